"""Bytes that attention moves through device memory, counted by the SIMT emulator (csrc/simt).

    make io-complexity        (PYTHONPATH=.:tests python tests/io_complexity.py)

runs standard attention, FlashAttention and FlashAttention-2 forward over sequence length and tile
size, FlashAttention-2 also backward and over the density of a block mask, and writes the tables of
docs/io_complexity.md and docs/images/io_complexity.svg. The plot needs matplotlib.
tests/test_io_complexity.py holds the counts to flashattn_lite.bench.io_model,
test_block_mask_emulated.py to the density.
"""

import functools
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from native import cuda_problem, emulated

from flashattn_lite import BlockMask
from flashattn_lite.bench import io_model
from flashattn_lite.bench.io_model import Bytes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "io_complexity.md"
PLOT = ROOT / "docs" / "images" / "io_complexity.svg"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"

HEAD_DIM, ELEMENT = 64, 2  # bfloat16
TILES = (64, 128, 256)  # keys (FlashAttention) or query rows (FlashAttention-2)
LIBRARY_TILE = 128  # what the library uses at head dim 64, of both
SEQLENS = (256, 512, 1024, 2048)
DENSITIES = (0.125, 0.25, 0.5, 1.0)  # shares of the blocks of a block mask
SPARSE_SEQLEN, SPARSE_BLOCK, SPARSE_HEAD_DIM = 1024, 128, 128
NAMES = {"standard": "standard", "flash1": "FlashAttention", "flash2": "FlashAttention-2"}


@dataclass(frozen=True)
class Run:
    which: str  # "standard", "flash1" or "flash2"
    seqlen: int
    causal: bool
    tile: int = LIBRARY_TILE


@functools.cache
def kernels() -> ModuleType:
    return emulated.load(
        "io_kernels",
        [emulated.NATIVE / "io_binding.cpp"],
        [emulated.NATIVE / "io_kernels.cu"],
    )


def inputs(seqlen: int) -> list[torch.Tensor]:
    """q, k and v (1, seqlen, 1, 64) of unit normals."""
    generator = torch.Generator().manual_seed(seqlen)
    shape = (1, seqlen, 1, HEAD_DIM)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(3)]


def attention(run: Run, *, check: bool = False) -> tuple[torch.Tensor, torch.Tensor, Bytes]:
    """out, lse and what was counted. check: report races and the like, which takes longer."""
    module = kernels()
    module.reset()
    module.configure(check=check, account=False)
    q, k, v = inputs(run.seqlen)
    out, lse = torch.full_like(q, torch.nan), torch.full((1, 1, run.seqlen), torch.nan)
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    for name, t in tensors.items():
        module.register_buffer(
            t.data_ptr(), t.numel() * t.element_size(), name, name in ("out", "lse")
        )
    addresses = tuple(t.data_ptr() for t in tensors.values())
    error = module.attention(
        run.which, run.tile, addresses, batch=1, heads=1, seqlen=run.seqlen, causal=run.causal
    )
    reports, traffic = module.reports(), module.traffic()
    module.reset()
    assert error == 0 and not reports, reports
    return out, lse, Bytes(*(sum(part) for part in zip(*traffic.values(), strict=True)))


def predict(run: Run) -> Bytes:
    """What the papers' loops move."""
    shape = (run.seqlen, HEAD_DIM, ELEMENT)
    if run.which == "standard":
        return io_model.standard(*shape)
    if run.which == "flash1":
        return io_model.flash1(*shape, causal=run.causal, rows=io_model.FLASH1_ROWS, keys=run.tile)
    return io_model.flash2(*shape, causal=run.causal, rows=run.tile)


# ---- block masks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseCount:
    """What grows with the tiles that are visited, of one head."""

    moved: int  # bytes of device memory, the mask's own tables included
    tables: int  # of those, the tables
    flops: int


@functools.cache
def _sparse(density: float | None, backward: bool) -> cuda_problem.Result:
    generator = torch.Generator().manual_seed(0)
    shape = (1, SPARSE_SEQLEN, 1, SPARSE_HEAD_DIM)
    q, k, v, dout = (torch.randn(shape, generator=generator).bfloat16() for _ in range(4))
    options: dict[str, Any] = {}
    if density is not None:
        blocks = SPARSE_SEQLEN // SPARSE_BLOCK
        order = torch.arange(blocks)
        listed = (3 * order + order[:, None]) % blocks < density * blocks  # as many in every line
        options["block_mask"] = BlockMask.from_blocks(
            listed, SPARSE_SEQLEN, SPARSE_SEQLEN, block_size=SPARSE_BLOCK
        )
    result = cuda_problem.forward("flash2", q, k, v, **options)
    if backward:
        result = cuda_problem.backward("flash2", q, k, v, result.out, result.lse, dout, **options)
    assert not result.reports, result.reports
    return result


def sparse(density: float | None, backward: bool) -> SparseCount:
    """FlashAttention-2 with a block mask in blocks of 128; None: without one.

    Left out is what is moved once whatever the mask: in forward Q, O and LSE; in backward K, V and
    their gradients, and what prepares and converts.
    """
    result, nothing = _sparse(density, backward), _sparse(0.0, backward)
    once = ("k", "v") if backward else ("q",)
    bytes_of = {name: sum(t) for name, t in result.traffic.items() if name not in once}
    tables = bytes_of.pop("block_mask", 0)
    always = sum(sum(nothing.traffic.get(name, (0, 0))) for name in bytes_of)
    return SparseCount(
        sum(bytes_of.values()) - always + tables, tables, result.counters["mma_flops"]
    )


# ---- tables and plot ----------------------------------------------------------------------------


def runs_over_seqlen() -> list[Run]:
    return [Run(w, n, causal) for causal in (False, True) for n in SEQLENS for w in NAMES]


def runs_over_tile() -> list[Run]:
    return [
        Run(w, 1024, causal, t)
        for causal in (False, True)
        for w in NAMES
        for t in TILES
        if w != "standard"
    ]


def _mib(count: int) -> str:
    return f"{count / 2**20:.3f}"


def _table(title: list[str], rows: list[list[str]]) -> str:
    lines = [title, ["---", *["---:"] * (len(title) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def tables(counts: dict[Run, Bytes]) -> str:
    """The measured part of the page, as Markdown."""
    text = "### Over the sequence length (tiles of 128)\n\n"
    rows = []
    for causal in (False, True):
        for n in SEQLENS:
            line = [f"{n}{', causal' if causal else ''}"]
            for which in NAMES:
                run = Run(which, n, causal)
                line += [_mib(counts[run].total), f"{counts[run].total / predict(run).total:.4f}"]
            line.append(f"{counts[Run('standard', n, causal)].total / counts[run].total:.1f}")
            rows.append(line)
    title = ["N"]
    for name in NAMES.values():
        title += [f"{name}, MiB", "of prediction"]
    text += _table([*title, "standard / FlashAttention-2"], rows)
    text += "\n### Over the tile size (N = 1024)\n\n"
    rows = []
    for run in runs_over_tile():
        count, units = counts[run], run.seqlen**2 * HEAD_DIM * ELEMENT / run.tile
        mask = ", causal" if run.causal else ""
        rows.append(
            [
                f"{NAMES[run.which]}{mask}",
                str(run.tile),
                _mib(count.read),
                _mib(count.written),
                f"{count.total / predict(run).total:.4f}",
                f"{count.total / units:.2f}",
            ]
        )
    title = ["", "tile", "read, MiB", "written, MiB", "of prediction", "in N^2 d / tile elements"]
    text += _table(title, rows)
    text += f"\n### Over the density of a block mask (N = {SPARSE_SEQLEN})\n\n"
    rows = []
    for backward in (False, True):
        whole = sparse(None, backward)
        for density in (*DENSITIES, None):
            count = sparse(density, backward)
            rows.append(
                [
                    f"{'backward' if backward else 'forward'}, "
                    + ("no mask" if density is None else f"{density:.1%} of the blocks"),
                    _mib(count.moved),
                    f"{count.moved / whole.moved:.4f}",
                    f"{count.tables / count.moved:.2%}",
                    f"{count.flops / whole.flops:.4f}",
                ]
            )
    title = ["", "read and written, MiB", "of no mask", "of it tables", "FLOPs, of no mask"]
    return text + _table(title, rows)


def plot(counts: dict[Run, Bytes], path: Path) -> None:
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "io_complexity", "font.size": 9}
    pyplot: Any = importlib.import_module("matplotlib.pyplot")

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, causal in zip(axes, (False, True), strict=False):
        for which, name in NAMES.items():
            runs = [Run(which, n, causal) for n in SEQLENS]
            (line,) = axis.loglog(SEQLENS, [predict(r).total / 2**20 for r in runs], base=2)
            axis.plot(
                SEQLENS,
                [counts[r].total / 2**20 for r in runs],
                "o",
                label=name,
                color=line.get_color(),
            )
        axis.set_title("causal" if causal else "dense")
        axis.set_xlabel("sequence length")
        axis.set_ylabel("MiB through device memory, per head")
        axis.legend()
    for color, which in (("C1", "flash1"), ("C2", "flash2")):
        runs = [Run(which, 1024, False, t) for t in TILES]
        axes[2].loglog(TILES, [predict(r).total / 2**20 for r in runs], base=2, color=color)
        axes[2].plot(
            TILES, [counts[r].total / 2**20 for r in runs], "o", color=color, label=NAMES[which]
        )
    axes[2].set_title("dense, N = 1024")
    axes[2].set_xlabel("keys or rows of a tile")
    axes[2].set_xticks(TILES, [str(t) for t in TILES])
    axes[2].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    counts = {run: attention(run)[2] for run in {*runs_over_seqlen(), *runs_over_tile()}}
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(before + BEGIN + tables(counts) + END + after)
    plot(counts, PLOT)
    print(f"{PAGE.relative_to(ROOT)}, {PLOT.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
