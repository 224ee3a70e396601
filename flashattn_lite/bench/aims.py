"""What the rows are held to: groups of them, by their ratios or by their shares of a ceiling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.timing import geometric_mean


@dataclass(frozen=True)
class Group:
    """Rows that are summed up; the geometric mean of their figures is to be at least ``aim``."""

    suite: str
    title: str
    aim: float | None  # None: shown without one
    holds: Callable[[Case], bool]
    device: str = "cpu"

    def contains(self, case: Case) -> bool:
        return case.suite == self.suite and case.device == self.device and self.holds(case)


@dataclass(frozen=True)
class Share:
    """Rows whose share of a ceiling, FMA or reading, is held to ``aim``."""

    title: str
    holds: Callable[[Case], bool]
    of: Callable[[Sequence[float]], float]  # what the rows' shares come to
    aim: float = 0.8


def _is(dtype: str, causal: bool, longest: float = float("inf")) -> Callable[[Case], bool]:
    return lambda c: (c.dtype, c.causal) == (dtype, causal) and c.seqlen <= longest


def _in_pages(case: Case) -> bool:
    return case.page_size in (16, 64) and not case.storage


def _called(drop_in: bool, backward: bool) -> Callable[[Case], bool]:
    return lambda c: (c.drop_in, c.backward) == (drop_in, backward)


def _cache_groups() -> list[Group]:
    def plain(dtype: str, grouped: bool) -> Callable[[Case], bool]:
        return lambda c: (
            (c.dtype, bool(c.heads_k)) == (dtype, grouped) and not (c.lengths or c.storage)
        )

    return [
        *(
            Group("decode", f"{d}, 4 query heads to a K/V head", aim, plain(d, True))
            for d, aim in (("fp32", 2.5), ("bf16", 15.0), ("fp16", 20.0))
        ),
        Group("decode", "fp32, no grouped heads", 1.3, plain("fp32", False)),
        Group("decode", "int8, against bf16", 1.6, lambda c: c.storage == "int8"),
        Group("decode", "fp8, against bf16", None, lambda c: c.storage == "fp8"),
        Group("decode", "8 ragged sequences, against one by one", 1.0, lambda c: bool(c.lengths)),
        Group("paged", "pages of 16, against contiguous", 0.9, lambda c: c.page_size == 16),
    ]


def _groups() -> list[Group]:
    groups = []
    for suite, aims in {
        "forward": {"fp32": (1.05, 1.25), "bf16": (1.1, 1.35), "fp16": (1.5, 1.8)},
        "training": {"fp32": (1.1, 1.3), "bf16": (6.0, 6.0), "fp16": (6.0, 6.0)},
    }.items():
        for dtype, (dense, causal) in aims.items():
            groups.append(Group(suite, f"{dtype} dense", dense, _is(dtype, False)))
            groups.append(Group(suite, f"{dtype} causal", causal, _is(dtype, True)))
            if suite == "forward" and dtype == "fp32":
                title = "fp32 causal, lengths up to 1024"
                groups.append(Group(suite, title, 1.7, _is(dtype, True, longest=1024)))
    groups += [
        Group("masks", "window 128 at 4096, against a mask", 25.0, lambda c: c.window == 128),
        Group("masks", "20 ragged sequences, against padding", 1.5, lambda c: bool(c.lengths)),
        Group("masks", "bias, ALiBi, grouped heads", 1.0, lambda c: bool(c.score or c.heads_k)),
        Group(
            "sparse",
            "12.5 % of the blocks, against a boolean mask",
            10.0,
            lambda c: c.block_density == 0.125 and not c.backward,
        ),
        *(
            Group("overhead", f"{title}{both}", 0.8, _called(drop_in, backward))
            for title, drop_in in (("small calls", False), ("the same, SDPA's drop-in", True))
            for both, backward in ((", forward", False), (", forward + backward", True))
        ),
        *_cache_groups(),
        Group("scaling", "1 -> 2 threads", 1.85, lambda c: c.threads == 2),
        Group("memory", "peak memory, against PyTorch", 1.0, lambda c: True),
    ]
    for suite in ("forward", "training"):
        for d in ("bf16", "fp16"):
            for causal in (False, True):
                title = f"{d} {'causal' if causal else 'dense'}"
                groups.append(Group(suite, title, 1.0, _is(d, causal), device="cuda"))
    title = "pages of 16 and 64, against contiguous"
    return [*groups, Group("paged", title, None, _in_pages, device="cuda")]


GROUPS = _groups()

SHARES = (
    Share(
        "forward: least share of the FMA peak, head dim 128 from length 1024",
        lambda c: (c.device, c.suite, c.head_dim) == ("cpu", "forward", 128) and c.seqlen >= 1024,
        min,
    ),
    Share(
        "decode: share of the read rate, fp32 without grouped heads",
        lambda c: (
            (c.device, c.suite, c.dtype) == ("cpu", "decode", "fp32")
            and not (c.heads_k or c.lengths)
        ),
        geometric_mean,
    ),
    Share(
        "paged: least share of the read rate, bf16, batch 64, 8192 keys, pages of 16 and 64",
        lambda c: (
            (c.device, c.suite, c.dtype, c.batch) == ("cuda", "paged", "bf16", 64)
            and (c.seqlen, c.heads, c.heads_k, c.head_dim) == (8192, 32, 8, 128)
            and _in_pages(c)
        ),
        min,
    ),
)
