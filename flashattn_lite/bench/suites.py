"""The suites: which cases each holds at each size."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashattn_lite.bench.cases import DTYPES, Case

SUITES = (
    *("forward", "training", "masks", "overhead", "memory", "scaling", "decode", "paged", "papers"),
    *("io", "sparse"),
)
SIZES = ("quick", "default", "full")

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
HEAD_DIMS = (64, 80, 96, 128, 256)
TOKENS = 8192  # batch x heads x length of the "large" CPU shapes: the work grows with the length


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line."""

    size: str = "default"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    threads: tuple[int, ...] = (1, 2)
    device: str = "cpu"

    def case(self, suite: str, **shape: Any) -> Case:
        return Case(suite=suite, device=self.device, **shape)


def cases_of(suite: str, plan: Plan) -> list[Case]:
    """The suite's cases; those of one number of threads are neighbours."""
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}; it must be one of {', '.join(SUITES)}")
    cases = (_CUDA if plan.device == "cuda" else _CPU)[suite](plan)
    unique = list(dict.fromkeys(case for case in cases if case.dtype in plan.dtypes))
    return sorted(unique, key=lambda case: case.threads)


# ---- CPU ----------------------------------------------------------------------------------------


def _large(seqlen: int) -> dict[str, int]:
    heads = min(16, max(1, TOKENS // seqlen))
    return {"seqlen": seqlen, "heads": heads, "batch": max(1, TOKENS // seqlen // heads)}


def _small(seqlen: int) -> dict[str, int]:
    return {"seqlen": seqlen, "heads": 1, "batch": 1}


def _shapes(plan: Plan, lengths: Sequence[int]) -> list[dict[str, int]]:
    """Shape and threads; the default size visits every length, head dim and number of threads, and
    both kinds of batch x heads, without multiplying them all out."""
    threads = plan.threads
    if plan.size == "quick":
        return [
            {**_large(128), "head_dim": 64, "threads": threads[0]},
            {**_large(512), "head_dim": 64, "threads": threads[-1]},
            {**_large(1024), "head_dim": 128, "threads": threads[0]},
        ]
    if plan.size == "full":
        return [
            {**kind(n), "head_dim": d, "threads": t}
            for t in threads
            for d in HEAD_DIMS
            for n in lengths
            for kind in (_large, _small)
        ]
    chosen = []
    for i, n in enumerate(lengths):
        chosen.append({**_large(n), "head_dim": 64, "threads": threads[i % len(threads)]})
        chosen.append({**_large(n), "head_dim": 128, "threads": threads[(i + 1) % len(threads)]})
        if n in (128, 512, 2048):
            chosen.append({**_small(n), "head_dim": 64, "threads": threads[-1]})
            chosen.append({**_small(n), "head_dim": 128, "threads": threads[0]})
    for i, d in enumerate((80, 96, 256)):
        chosen.append({**_large(256), "head_dim": d, "threads": threads[i % len(threads)]})
        chosen.append({**_large(1024), "head_dim": d, "threads": threads[(i + 1) % len(threads)]})
    return chosen


def _forward(plan: Plan) -> list[Case]:
    return [
        plan.case("forward", dtype=dtype, causal=causal, **shape)
        for dtype in plan.dtypes
        for causal in (False, True)
        for shape in _shapes(plan, LENGTHS)
    ]


def _training(plan: Plan) -> list[Case]:
    cases = []
    for dtype in plan.dtypes:
        # PyTorch's 16-bit backward takes many times as long as its float32 one.
        longest = {"quick": 1024, "default": 1024, "full": 4096}[plan.size]
        longest = 4 * longest if dtype == "fp32" else longest
        if plan.size == "default":
            shapes: list[dict[str, int]] = []
            for i, n in enumerate(n for n in LENGTHS if n <= longest):
                t = plan.threads[i % len(plan.threads)]
                shapes.append({**_large(n), "head_dim": 64 if i % 2 else 128, "threads": t})
            shapes.append({**_small(512), "head_dim": 64, "threads": plan.threads[-1]})
            shapes.append({**_large(512), "head_dim": 96, "threads": plan.threads[0]})
        else:
            shapes = _shapes(plan, [n for n in LENGTHS if n <= longest])
        if plan.size == "quick":
            shapes = shapes[:2]
        for causal in (False, True):
            for shape in shapes:
                if dtype != "fp32":  # half the batch x heads
                    shape = {**shape, "heads": max(1, shape["heads"] // 2)}
                cases.append(
                    plan.case("training", dtype=dtype, causal=causal, backward=True, **shape)
                )
    return cases


def ragged_lengths(count: int = 20, longest: int = 1024) -> tuple[int, ...]:
    """Sequence lengths as a batch of requests has them: many short, few long; the same ones always.

    >>> len(ragged_lengths()), max(ragged_lengths())
    (20, 1024)
    """
    generator = random.Random(20)
    lengths = [max(1, int(longest * generator.random() ** 2)) for _ in range(count - 1)]
    return (longest, *lengths)


def _masks(plan: Plan) -> list[Case]:
    dtypes = plan.dtypes[:1] if plan.size == "quick" else plan.dtypes
    threads = plan.threads if plan.size == "full" else plan.threads[:1]
    cases = []
    for t in threads:
        for dtype in dtypes:
            common: dict[str, Any] = {"dtype": dtype, "threads": t}
            window: dict[str, Any] = {"seqlen": 4096, "causal": True, "window": 128, **common}
            lengths = ragged_lengths()
            ragged: dict[str, Any] = {
                **{"lengths": lengths, "batch": len(lengths), "seqlen": max(lengths)},
                **{"heads": 8, "head_dim": 64, **common},
            }
            cases += [
                plan.case("masks", heads=2, head_dim=64, **window),
                plan.case("masks", **ragged),
                plan.case("masks", causal=True, **ragged),
            ]
            if plan.size != "quick":
                one = {"seqlen": 1024, "heads": 8, "head_dim": 64, **common}
                cases += [
                    plan.case("masks", heads=2, head_dim=128, **window),
                    plan.case("masks", **{**ragged, "head_dim": 128}),
                    plan.case("masks", causal=True, heads_k=2, **one),
                    plan.case("masks", score="bias", **one),
                    plan.case("masks", causal=True, score="alibi", **one),
                ]
    return cases


def _overhead(plan: Plan) -> list[Case]:
    dtypes = plan.dtypes[:1] if plan.size == "quick" else plan.dtypes
    return [
        # One key's softmax has no gradient, so the smallest backward has two.
        plan.case("overhead", dtype=d, seqlen=n + (b and n == 1), backward=b, drop_in=drop_in, **s)
        for d in dtypes
        for n, h, causal in ((1, 1, False), (8, 2, True), (16, 4, False))
        for s in ({"heads": h, "head_dim": 32, "causal": causal},)
        for drop_in in (False, True)
        for b in (False, True)
    ]


def _memory(plan: Plan) -> list[Case]:
    longest = 4096 if plan.size == "quick" else 16384
    dtypes = plan.dtypes if plan.size == "full" else plan.dtypes[:1]
    lengths = [n for n in (1024, 2048, 4096, 8192, 16384) if n <= longest]
    return [
        plan.case(
            "memory",
            **{"dtype": dtype, "seqlen": n, "heads": 2, "head_dim": 64, "causal": True},
            **{"backward": True, "threads": plan.threads[-1]},
        )
        for dtype in dtypes
        for n in (lengths[::2] if plan.size == "quick" else lengths)
    ]


def _scaling(plan: Plan) -> list[Case]:
    if max(plan.threads) == 1:
        return []
    dtypes = plan.dtypes[:1] if plan.size == "quick" else plan.dtypes
    cases = [
        plan.case(
            "scaling",
            **{"dtype": dtype, "causal": causal, "backward": backward, "threads": t},
            **{"seqlen": 1024, "heads": 8, "head_dim": 64},
        )
        for t in plan.threads
        if t > 1
        for dtype in dtypes
        for causal in (False, True)
        for backward in (False, True)
    ]
    if plan.size == "full":
        cases += [replace(c, seqlen=2048, heads=4, head_dim=128) for c in cases]
    return cases


CACHE_LENGTHS = (1024, 4096, 16384, 32768)
GROUPED: dict[str, Any] = {"heads": 32, "heads_k": 8, "head_dim": 128, "tokens": 1}
PLAIN: dict[str, Any] = {"heads": 8, "head_dim": 128, "tokens": 1}


def _decode(plan: Plan) -> list[Case]:
    """One query over a cache; and what quantising and a batch of unlike lengths change."""
    lengths = {"quick": (4096,), "default": CACHE_LENGTHS}.get(plan.size, (*CACHE_LENGTHS, 2048))
    cases = []
    for i, n in enumerate(lengths):
        threads = plan.threads if plan.size == "full" else (plan.threads[i % len(plan.threads)],)
        for t in threads:
            common: dict[str, Any] = {"seqlen": n, "threads": t}
            for dtype in plan.dtypes:
                cases += [plan.case("decode", dtype=dtype, **s, **common) for s in (GROUPED, PLAIN)]
            if n == 16384 or plan.size == "quick":
                cases += [
                    plan.case("decode", dtype="bf16", storage=storage, **PLAIN, **common)
                    for storage in ("int8", "fp8")
                ]
    ragged = ragged_lengths(8, 4096)
    cases += [
        plan.case(
            "decode", dtype=d, lengths=ragged, batch=8, seqlen=max(ragged), **GROUPED, threads=t
        )
        for d in plan.dtypes
        for t in plan.threads
        if plan.size != "quick"
    ]
    return cases


def _paged(plan: Plan) -> list[Case]:
    """Over pages in a random order, against the same rows in one piece."""
    lengths = {"quick": (4096,), "default": (1024, 4096, 16384)}.get(plan.size, CACHE_LENGTHS)
    sizes = {"quick": (16,), "default": (16,)}.get(plan.size, (1, 16, 64, 256))
    return [
        plan.case("paged", dtype=d, seqlen=n, page_size=size, **shape, threads=t)
        for d in plan.dtypes
        for i, n in enumerate(lengths)
        for size in sizes
        for shape in (GROUPED, PLAIN)
        for t in (plan.threads if plan.size == "full" else (plan.threads[i % len(plan.threads)],))
    ]


def _papers(plan: Plan) -> list[Case]:
    """The FlashAttention papers' figures: time of forward + backward over the length, with and
    without a causal mask, against standard attention."""
    longest = {"quick": 1024, "default": 4096, "full": 8192}[plan.size]
    return [
        plan.case(
            "papers",
            **{"dtype": plan.dtypes[0], "causal": causal, "backward": True},
            **{"seqlen": n, "heads": 4, "head_dim": 64, "threads": plan.threads[-1]},
        )
        for causal in (False, True)
        for n in LENGTHS
        if n <= longest
    ]


def _io(plan: Plan) -> list[Case]:
    """Bytes through memory, by the papers' loops, beside the time that attention takes."""
    lengths = {"quick": (512, 2048), "default": (256, 512, 1024, 2048, 4096)}
    dtypes = plan.dtypes if plan.size == "full" else plan.dtypes[:1]
    return [
        plan.case(
            "io",
            **{"dtype": dtype, "causal": causal, "head_dim": 64},
            **{**_large(n), "threads": plan.threads[0]},
        )
        for dtype in dtypes
        for causal in ((False,) if plan.size == "quick" else (False, True))
        for n in lengths.get(plan.size, LENGTHS)
    ]


def _sparse(plan: Plan) -> list[Case]:
    """Block masks: time over the share of blocks that are listed."""
    densities = (0.125, 0.25, 1.0) if plan.size == "quick" else (0.0625, 0.125, 0.25, 0.5, 1.0)
    dtypes = plan.dtypes[:1] if plan.size == "quick" else plan.dtypes[:2]
    return [
        plan.case(
            "sparse",
            **{"dtype": dtype, "block_density": density, "backward": backward},
            **{"seqlen": 4096, "heads": 1, "head_dim": 128, "threads": plan.threads[0]},
        )
        for dtype in dtypes
        for backward in (False, True)
        for density in densities
        # PyTorch's 16-bit backward takes many times as long as its float32 one.
        if dtype == "fp32" or not backward
    ]


# ---- CUDA ---------------------------------------------------------------------------------------

CUDA_TOKENS, CUDA_WIDTH = 16384, 2048  # the papers' setting: batch x length, heads x head dim


def _cuda_shapes(plan: Plan) -> list[dict[str, int]]:
    lengths = {"quick": (2048, 16384), "default": (512, 1024, 2048, 4096, 8192, 16384)}
    head_dims = {"quick": (128,), "default": (64, 128)}.get(plan.size, (64, 96, 128, 256))
    return [
        {"batch": CUDA_TOKENS // n, "seqlen": n, "heads": CUDA_WIDTH // d, "head_dim": d}
        for d in head_dims
        for n in lengths.get(plan.size, lengths["default"])
    ]


def _cuda_dense(suite: str, plan: Plan, *, backward: bool) -> list[Case]:
    return [
        plan.case(suite, dtype=d, causal=causal, backward=backward, **shape)
        for d in plan.dtypes
        if d != "fp32"
        for causal in (False, True)
        for shape in _cuda_shapes(plan)
    ]


def _cuda_masks(plan: Plan) -> list[Case]:
    lengths = ragged_lengths(20, 4096)
    return [
        case
        for d in plan.dtypes
        if d != "fp32"
        for case in (
            plan.case(
                "masks",
                **{"dtype": d, "seqlen": 8192, "heads": 16, "head_dim": 128},
                **{"causal": True, "window": 128},
            ),
            plan.case(
                "masks",
                **{"dtype": d, "lengths": lengths, "batch": len(lengths), "seqlen": 4096},
                **{"heads": 16, "head_dim": 128, "causal": True},
            ),
        )
    ]


def _cuda_overhead(plan: Plan) -> list[Case]:
    return [
        plan.case("overhead", dtype=d, seqlen=16, heads=2, head_dim=64, backward=b)
        for d in plan.dtypes
        if d != "fp32"
        for b in (False, True)
    ]


def _cuda_memory(plan: Plan) -> list[Case]:
    longest = 8192 if plan.size == "quick" else 32768
    return [
        plan.case(
            "memory",
            **{"dtype": d, "seqlen": n, "heads": 16, "head_dim": 128},
            **{"causal": True, "backward": True},
        )
        for d in plan.dtypes[1:2]
        for n in (1024, 2048, 4096, 8192, 16384, 32768)
        if n <= longest
    ]


CUDA_CACHES = {"quick": (8192,), "default": (2048, 8192, 32768)}
CACHED = 64 * 8192  # tokens of a batch's caches: 2.1 GB of K and V, far beyond any L2


def _cuda_decode(plan: Plan) -> list[Case]:
    """One query a sequence: of one, of a batch, of a ragged one, and over quantised caches."""
    ragged = ragged_lengths(32, 8192)
    cases = []
    for d in plan.dtypes:
        if d == "fp32":
            continue
        for n in CUDA_CACHES.get(plan.size, CUDA_CACHES["default"]):
            cases += [plan.case("decode", dtype=d, seqlen=n, **s) for s in (GROUPED, PLAIN)]
            cases.append(plan.case("decode", dtype=d, seqlen=n, batch=CACHED // n, **GROUPED))
        shape = {"lengths": ragged, "batch": len(ragged), "seqlen": max(ragged), **GROUPED}
        cases.append(plan.case("decode", dtype=d, **shape))
    cases += [
        plan.case("decode", dtype="bf16", storage=storage, seqlen=8192, batch=64, **GROUPED)
        for storage in ("int8", "fp8")
        if "bf16" in plan.dtypes
    ]
    return cases


def _cuda_paged(plan: Plan) -> list[Case]:
    """Pages of 16 and 64 tokens, and of 256, the least that flash_attn takes; quantised, of 16."""
    sizes = (16, 64) if plan.size == "quick" else (16, 64, 256)
    storages = [(size, "") for size in sizes] + [(16, "int8"), (16, "fp8")]
    return [
        plan.case(
            "paged",
            **{"dtype": d, "seqlen": n, "batch": CACHED // n, **GROUPED},
            **{"page_size": size, "storage": storage},
        )
        for d in plan.dtypes
        if d != "fp32"
        for n in CUDA_CACHES.get(plan.size, CUDA_CACHES["default"])
        for size, storage in storages
        if not storage or (d, n) == ("bf16", 8192)
    ]


def _cuda_io(plan: Plan) -> list[Case]:
    """The papers' setting, of one head dim."""
    shape = {"heads": 16, "head_dim": 64}
    return [
        plan.case("io", dtype=d, causal=causal, batch=CUDA_TOKENS // n, seqlen=n, **shape)
        for d in plan.dtypes
        if d != "fp32"
        for causal in (False, True)
        for n in ((1024, 4096) if plan.size == "quick" else (512, 1024, 2048, 4096, 8192))
    ]


def _cuda_sparse(plan: Plan) -> list[Case]:
    return [
        plan.case(
            "sparse",
            **{"dtype": d, "block_density": density, "backward": backward},
            **{"seqlen": 8192, "heads": 16, "head_dim": 128},
        )
        for d in plan.dtypes
        if d != "fp32"
        for backward in (False, True)
        for density in (0.125, 0.25, 1.0)
    ]


_CPU: dict[str, Callable[[Plan], list[Case]]] = {
    "forward": _forward,
    "training": _training,
    "masks": _masks,
    "overhead": _overhead,
    "memory": _memory,
    "scaling": _scaling,
    "decode": _decode,
    "paged": _paged,
    "papers": _papers,
    "io": _io,
    "sparse": _sparse,
}
_CUDA: dict[str, Callable[[Plan], list[Case]]] = {
    "forward": lambda plan: _cuda_dense("forward", plan, backward=False),
    "training": lambda plan: _cuda_dense("training", plan, backward=True),
    "masks": _cuda_masks,
    "overhead": _cuda_overhead,
    "memory": _cuda_memory,
    "scaling": lambda plan: [],  # threads are the CPU's
    "decode": _cuda_decode,
    "paged": _cuda_paged,
    "papers": lambda plan: _cuda_dense("papers", plan, backward=True),
    "io": _cuda_io,
    "sparse": _cuda_sparse,
}
