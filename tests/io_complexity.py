"""Bytes that attention moves through device memory, counted by the SIMT emulator (csrc/simt).

    make io-complexity        (PYTHONPATH=.:tests python tests/io_complexity.py)

runs standard attention, FlashAttention and FlashAttention-2 forward over sequence length and tile
size, and writes the tables of docs/io_complexity.md and docs/images/io_complexity.svg. The plot
needs matplotlib. tests/test_io_complexity.py holds the counts to flashattn_lite.bench.io_model.
"""

import functools
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from native import emulated

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
