"""flash_attn_with_kvcache over the shapes that flash_attn promises (1 to 128 queries against up to
20000 keys, head dims 59 to 256, pages of 256 and 512), every pair of options in some case, against
the reference on each sequence's plain rows; and arguments of every kind, good and bad."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import kv_caches
from torch import Tensor
from torch.nn import functional

import flashattn_lite as fal
from flashattn_lite import BlockMask, block_patterns, reference, testing

AXES: dict[str, tuple[Any, ...]] = {
    "seqlens": (  # queries, capacity of the cache
        *((1, 128), (1, 339), (3, 1024), (64, 800)),
        *((64, 256), (3, 799), (64, 2048), (128, 128)),
    ),
    "head_dim": (128, 59, 64, 80, 96, 111, 160, 192, 256),
    "new": ("none", "as many as queries", "fewer"),
    "rotary": ((0.0, True), (0.5, True), (0.5, False), (1.0, True), (1.0, False)),
    "band": ("", "causal", "local", "causal and local"),
    "heads": ((6, 6), (6, 2), (6, 1)),
    "layout": ("contiguous", "batch_idx", "page256", "page512"),
    "leftpad": (False, True),
    "alibi": (False, True),
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "num_splits": (0, 1, 7, 1000),
}
ROWS = list(testing._pairwise([len(values) for values in AXES.values()]))
CASES = [{axis: AXES[axis][i] for axis, i in zip(AXES, row, strict=True)} for row in ROWS]
LONG = {"seqlens": (16, 20000), "rotary": (1.0, False), "leftpad": False, "num_splits": 0}
CASES += [
    LONG | {"head_dim": 59, "new": "fewer", "band": "causal", "heads": (6, 1), "alibi": True}
    | {"layout": "page256", "dtype": torch.float16},
    LONG | {"head_dim": 128, "new": "none", "band": "", "heads": (6, 2), "alibi": False}
    | {"layout": "batch_idx", "dtype": torch.bfloat16},
]  # fmt: skip


def name_of(case: dict[str, Any]) -> str:
    queries, keys = case["seqlens"]
    return f"{queries}x{keys}-{case['head_dim']}-{case['layout']}"


def pick(low: int, high: int) -> int:
    """One of [low, high], of torch's generator."""
    return int(torch.randint(low, high + 1, ()))


class Problem:
    """Two sequences in a cache of more; lengths count rows before appending, padding included."""

    def __init__(self, case: dict[str, Any]) -> None:
        dtype, dim = case["dtype"], case["head_dim"]
        heads_q, heads_k = case["heads"]
        queries, capacity = case["seqlens"]
        self.new = {"none": 0, "fewer": pick(1, queries)}.get(case["new"], queries)
        fraction, self.interleaved = case["rotary"]
        # Queries that advance need angles at positions that need not be in the cache.
        room = queries if self.new and fraction and case["band"] else self.new
        self.lengths = [pick(0 if self.new else 1, capacity - room) for _ in range(2)]
        self.leftpad = [pick(0, n) if case["leftpad"] else 0 for n in self.lengths]
        rows = [[torch.randn(n, heads_k, dim) for n in self.lengths] for _ in range(2)]
        k, v = ([x.to(dtype) for x in of] for of in rows)
        self.cache = kv_caches.make_cache(
            case["layout"], "same", k, v, capacity, leftpad=self.leftpad
        )
        kv_caches.forget_unused_pages(self.cache, [n + self.new for n in self.lengths])
        self.q = torch.randn(2, queries, heads_q, dim).to(dtype)
        self.k, self.v = (torch.randn(2, self.new, heads_k, dim).to(dtype) for _ in range(2))
        self.causal = case["band"].startswith("causal")
        self.window = (-1, -1)
        if case["band"].endswith("local"):
            self.window = (pick(0, capacity // 2), pick(0, capacity // 2))
        self.options: dict[str, Any] = {"num_splits": case["num_splits"], **self.cache.options}
        if case["leftpad"]:
            self.options["cache_leftpad"] = torch.tensor(self.leftpad, dtype=torch.int32)
        self.slopes = torch.rand(2, heads_q) * 0.3 if case["alibi"] else None
        pairs = int(fraction * dim) // 2 if self.new else 0
        angles = torch.rand(capacity, pairs) * 6
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        if pairs:
            self.options |= {"rotary_cos": self.cos, "rotary_sin": self.sin}
            self.options["rotary_interleaved"] = self.interleaved
        if self.new:
            self.options |= {"k": self.k, "v": self.v}

    def run(self) -> tuple[Tensor, Tensor]:
        return fal.flash_attn_with_kvcache(  # type: ignore[return-value]
            self.q,
            self.cache.k,
            self.cache.v,
            cache_seqlens=torch.tensor(self.lengths, dtype=torch.int32),
            causal=self.causal,
            window_size=self.window,
            alibi_slopes=self.slopes,
            return_softmax_lse=True,
            **self.options,
        )

    def rotated(self, x: Tensor, b: int, advance: bool) -> Tensor:
        steps = torch.arange(len(x)) * advance
        return kv_caches.rotate(x, self.cos, self.sin, self.lengths[b] + steps, self.interleaved)

    def check_cache(self, before: list[Tensor]) -> None:
        """New rows hold what was appended, after at most one rounding; every other byte is kept."""
        eps = torch.finfo(self.q.dtype).eps + 2 * torch.finfo(torch.float32).eps
        for which, new in enumerate((self.k, self.v)):
            after = self.cache.tensors()[which]
            for b, n in enumerate(self.lengths):
                places = self.cache.places(b, n, n + self.new)
                row = new[b].double() if which else self.rotated(new[b], b, True)
                error = (after[places].double() - row).abs()
                assert bool((error <= eps * row.abs().amax(-1, keepdim=True)).all())
                before[which][places] = after[places]
            assert torch.equal(kv_caches.bits(before[which]), kv_caches.bits(after))

    def truth(self, b: int, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of one sequence, from its rows in a row."""
        n, capacity = self.lengths[b], 10**6
        advance = self.causal or self.window != (-1, -1)
        q = self.rotated(self.q[b], b, advance).to(self.q.dtype)
        places = self.cache.places(b, self.leftpad[b], n + self.new)
        left, right = (None if side < 0 else min(side, capacity) for side in self.window)
        return reference.attention(
            q[None],
            *(t[places][None] for t in self.cache.tensors()),
            causal=self.causal,
            window=(left, right),
            alibi_slopes=None if self.slopes is None else self.slopes[b],
            precision=precision,
        )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_pair_of_options(case: dict[str, Any]) -> None:
    problem = Problem(case)
    before = [t.clone() for t in problem.cache.tensors()]
    out, lse = problem.run()
    problem.check_cache(before)
    for b in range(2):
        truth, low = problem.truth(b, torch.float64), problem.truth(b, case["dtype"])
        finite = truth[1][truth[1].isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 1.0
        testing.check_within_budget("out", out[b : b + 1], truth[0], low[0], largest_score=largest)
        seen = torch.where(lse == torch.inf, -torch.inf, lse)[b : b + 1]
        testing.check_within_budget("lse", seen, truth[1], low[1], largest_score=largest)


# ---- the case table over caches -----------------------------------------------------------------


def few_queries(case: testing.Case) -> testing.Case:
    """At most five tokens a sequence: what decode is for."""
    return replace(case, seqlens=tuple((min(5, q), k) for q, k in case.seqlens))


TABLE = [case for case in testing.all_cases() if case.batch]
IN_CACHES = [
    *((few_queries(case), storage) for case in TABLE for storage in kv_caches.STORED_AS),
    *((case, kv_caches.STORED_AS[i % 3]) for i, case in enumerate(TABLE)),
]


@pytest.mark.parametrize(("case", "storage"), IN_CACHES, ids=str)
def test_the_case_table_over_every_layout(case: testing.Case, storage: str) -> None:
    """Exact, and the same bits in all of them."""
    results: list[tuple[Tensor, Tensor]] = []
    for layout in reversed(kv_caches.LAYOUTS):
        inputs = kv_caches.over_cache(case, layout, storage)
        table = inputs.options.get("block_table")
        keys = inputs.k.shape[1] * (1 if table is None else table.shape[1])
        if "bias" in inputs.options:  # nobody reads it beyond the sequences
            bias = inputs.options["bias"]
            bias = functional.pad(bias, (0, keys - bias.shape[-1]), value=torch.nan)
            inputs.options["bias"] = bias
        results.append(
            fal.attention(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True)  # type: ignore[arg-type]
        )
        assert torch.equal(results[-1][0], results[0][0]), layout
        assert torch.equal(results[-1][1], results[0][1]), layout
    assert layout == "contiguous"
    options = inputs.reference_options()
    truth, low = (
        reference.attention(inputs.q, inputs.k, inputs.v, **options, precision=precision)
        for precision in (torch.float64, case.dtype)
    )
    finite = truth[1][truth[1].isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    for name, actual, t, x in zip(("out", "lse"), results[-1], truth, low, strict=True):
        testing.check_within_budget(name, actual, t, x, largest_score=largest)


# ---- block masks --------------------------------------------------------------------------------

CONTEXT = 1600


def random_blocks(batch: int) -> BlockMask:
    """A quarter of the blocks, with holes in them."""
    blocks = torch.rand(batch, 1, CONTEXT // 32, CONTEXT // 32) < 0.25
    dense = blocks.repeat_interleave(32, -1).repeat_interleave(32, -2)
    return BlockMask.from_dense(dense & (torch.rand(dense.shape) < 0.7), block_size=32)


MASKS: dict[str, Callable[[], BlockMask]] = {
    "streaming": lambda: block_patterns.streaming(CONTEXT, 4, 100, block_size=16),
    "slash": lambda: block_patterns.vertical_slash(
        CONTEXT, torch.tensor([3, 900]), torch.tensor([0, 700]), block_size=128
    ),
    "random": lambda: random_blocks(1),
    "random of each sequence": lambda: random_blocks(2),
}
MASKED_AXES: dict[str, tuple[Any, ...]] = {
    "mask": tuple(MASKS),
    "tokens": (1, 3, 8),
    "heads": ((4, 1), (3, 3), (6, 2)),
    "layout": ("page16", "contiguous", "page5"),
    "storage": ("same", "int8", "fp8"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "window": (None, 800),
    "softcap": (0.0, 5.0),
}
MASKED = [
    {axis: MASKED_AXES[axis][i] for axis, i in zip(MASKED_AXES, row, strict=True)}
    for row in testing._pairwise([len(values) for values in MASKED_AXES.values()])
]


@pytest.mark.parametrize("case", MASKED, ids=lambda c: f"{c['mask']}-{c['tokens']}-{c['layout']}")
def test_decoding_under_a_block_mask(case: dict[str, Any], isa: str) -> None:
    """Keys that nobody sees hold NaN. Parts of 512 keys: some see everything, some nothing."""
    dtype, tokens = case["dtype"], case["tokens"]
    heads_q, heads_k = case["heads"]
    mask, lengths = MASKS[case["mask"]](), [CONTEXT, 1111]
    options: dict[str, Any] = {"causal": True, "softcap": case["softcap"], "block_mask": mask}
    q = torch.randn(2, tokens, heads_q, 48).to(dtype)
    k, v = ([torch.randn(n, heads_k, 48).to(dtype) for n in lengths] for _ in range(2))
    for b, n in enumerate(lengths):
        hidden = ~mask.to_dense()[b % mask.batch, 0, n - tokens : n, :n].any(0)
        assert hidden.any()
        k[b][hidden] = v[b][hidden] = torch.nan
    cache = kv_caches.make_cache(case["layout"], case["storage"], k, v, CONTEXT)
    window = (-1 if case["window"] is None else case["window"], -1)
    used = torch.tensor(lengths, dtype=torch.int32)
    out, lse = fal.flash_attn_with_kvcache(
        *(q, cache.k, cache.v),
        cache_seqlens=used,
        window_size=window,
        return_softmax_lse=True,
        **cache.options,
        **options,
    )
    truth, low = (
        reference.attention(
            *(q, cache.k, cache.v),
            window=(case["window"], None),
            seqused_k=used,
            precision=precision,
            **cache.reference_options(),
            **options,
        )
        for precision in (torch.float64, dtype)
    )
    testing.check_within_budget("out", out, truth[0], low[0])
    lse = torch.where(lse == torch.inf, -torch.inf, lse)
    testing.check_within_budget("lse", lse, truth[1], low[1])


# ---- arguments ----------------------------------------------------------------------------------


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def small(paged: bool, **more: Any) -> dict[str, Any]:
    """Two sequences of 6 and 3 rows, one of each new, in room for 8."""
    cache = [torch.randn((5, 4, 2, 8) if paged else (3, 8, 2, 8)) for _ in range(2)]
    return {
        **{"q": torch.randn(2, 1, 4, 8), "k_cache": cache[0], "v_cache": cache[1]},
        **{"k": torch.randn(2, 1, 2, 8), "v": torch.randn(2, 1, 2, 8)},
        "cache_seqlens": int32(6, 3),
        **({"block_table": torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)} if paged else {}),
        **({} if paged else {"cache_batch_idx": int32(2, 0)}),
        **more,
    }


NUMBERS = st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 5, 7, 8, 9, 2**20, 2**31 - 1])
DTYPES = st.sampled_from(
    [torch.int32, torch.int64, torch.float32, torch.float16, torch.bool, torch.int8]
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Small ones of any shape and type, sometimes with strides of their own."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=5))
    dtype = draw(DTYPES)
    if dtype in (torch.int32, torch.int64):
        filled = torch.full(shape, draw(NUMBERS), dtype=dtype)
    else:
        filled = torch.ones(shape).to(dtype)
    return filled.transpose(0, -1) if shape and draw(st.booleans()) else filled


ANYTHING: dict[str, st.SearchStrategy[Any]] = {
    **{n: tensors() for n in ("q", "k_cache", "v_cache")},
    **{n: st.none() | tensors() for n in ("k", "v", "rotary_cos", "rotary_sin")},
    **{n: st.none() | tensors() for n in ("cache_batch_idx", "cache_leftpad", "block_table")},
    **{n: st.none() | tensors() for n in ("alibi_slopes", "sinks", "k_scale", "tree_mask")},
    "cache_seqlens": st.none() | NUMBERS | tensors() | st.builds(int32, NUMBERS, NUMBERS),
    "softmax_scale": st.none() | st.floats(-2, 2),
    "causal": st.booleans(),
    "window_size": st.tuples(NUMBERS, NUMBERS),
    "softcap": st.floats(-1, 50),
    "num_splits": NUMBERS,
}


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(st.booleans(), st.data())
def test_any_argument_gives_a_result_or_a_named_error(paged: bool, data: Any) -> None:
    """One or two arguments of a good call replaced by anything: never a crash, nothing written when
    it is refused, and no NaN (the cache holds none) when it is not."""
    arguments = small(paged)
    for name in data.draw(st.sets(st.sampled_from(sorted(ANYTHING)), min_size=1, max_size=2)):
        arguments[name] = data.draw(ANYTHING[name])
    caches = [t for n, t in arguments.items() if n.endswith("_cache")]
    before = [t.clone() for t in caches]
    try:
        out = fal.flash_attn_with_kvcache(**arguments)
    except (fal.ArgumentError, TypeError) as error:
        assert str(error).startswith("flash_attn_with_kvcache: "), error
        for old, new in zip(before, caches, strict=True):
            assert torch.equal(old, new)
        return
    q = arguments["q"]
    assert isinstance(out, Tensor) and out.shape[:3] == q.shape[:3] and out.dtype == q.dtype
    assert not bool(out.isnan().any())
