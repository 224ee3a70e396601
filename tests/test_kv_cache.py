"""flash_attn_with_kvcache and flash_attn_varlen_func over caches: every layout and storage against
the reference, in-place updates byte for byte, and the error contract."""

import itertools
from typing import Any

import pytest
import torch
from native import kv_caches
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import reference, testing

AXES: dict[str, tuple[Any, ...]] = {
    "layout": ("contiguous", "page16", "page1", "page5", "page64", "page256", "batch_idx"),
    "storage": ("same", "int8", "fp8"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "append": ("none", "plain", "interleaved", "half"),
    "seqlen_q": (1, 2, 3, 5, 9, 40),
    "heads": ((4, 1), (3, 3), (6, 2), (8, 1), (7, 1)),
    "head_dims": ((64, 64), (128, 128), (37, 37), (24, 40), (256, 256), (80, 80), (8, 1)),
    "band": (
        (False, (-1, -1)),
        (True, (-1, -1)),
        (False, (33, 2)),
        (True, (70, -1)),
        (False, (10**6, 0)),
    ),
    "score": ("", "softcap", "alibi", "alibi_batch", "sinks", "all"),
    "lengths": ((5, 61, 0), (130, 64, 1), (1100, 513)),
    "leftpad": (False, True),
}
ROWS = list(testing._pairwise([len(values) for values in AXES.values()]))
CASES = [{axis: AXES[axis][i] for axis, i in zip(AXES, row, strict=True)} for row in ROWS]


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(case[axis]) for axis in ("layout", "storage", "append", "seqlen_q"))


def seeded(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


class Problem:
    """The tensors of a case. Lengths count rows in the cache before appending, padding included."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, dtype = case, case["dtype"]
        heads_q, heads_k = case["heads"]
        dim, dim_v = case["head_dims"]
        seqlen_q = case["seqlen_q"]
        self.appends = case["append"] != "none"
        self.new = seqlen_q if self.appends else 0
        self.lengths = list(case["lengths"])
        batch, longest = len(self.lengths), max(self.lengths) + self.new
        self.leftpad = [n // 3 for n in self.lengths] if case["leftpad"] else None
        self.capacity = longest + 7
        k = [seeded(n, heads_k, dim, dtype=dtype) for n in self.lengths]
        v = [seeded(n, heads_k, dim_v, dtype=dtype) for n in self.lengths]
        self.cache = kv_caches.make_cache(
            case["layout"], case["storage"], k, v, self.capacity, leftpad=self.leftpad
        )
        self.total = [n + self.new for n in self.lengths]
        kv_caches.forget_unused_pages(self.cache, self.total)
        self.q = seeded(batch, seqlen_q, heads_q, dim, dtype=dtype)
        self.k = seeded(batch, self.new, heads_k, dim, dtype=dtype)
        self.v = seeded(batch, self.new, heads_k, dim_v, dtype=dtype)
        self.causal, self.window = case["band"]
        self.score: dict[str, Any] = {}
        if case["score"] in ("softcap", "all"):
            self.score["softcap"] = 3.0
        if case["score"] in ("alibi", "all"):
            self.score["alibi_slopes"] = torch.rand(heads_q) * 0.2
        if case["score"] == "alibi_batch":
            self.score["alibi_slopes"] = torch.rand(batch, heads_q) * 0.2
        if case["score"] in ("sinks", "all"):
            self.score["sinks"] = torch.randn(heads_q)
        self.rotary: dict[str, Any] = {}
        if case["append"] in ("interleaved", "half"):
            pairs = max(1, dim // 4)  # partial: dims beyond 2 * pairs are not rotated
            angles = torch.rand(longest + 3, pairs) * 6
            self.rotary = {
                "rotary_cos": angles.cos().to(dtype),
                "rotary_sin": angles.sin().to(dtype),
                "rotary_interleaved": case["append"] == "interleaved",
            }

    def run(self, **more: Any) -> tuple[Tensor, Tensor]:
        appended = {"k": self.k, "v": self.v} if self.appends else {}
        pad = None if self.leftpad is None else torch.tensor(self.leftpad, dtype=torch.int32)
        return fal.flash_attn_with_kvcache(  # type: ignore[return-value]
            self.q,
            self.cache.k,
            self.cache.v,
            cache_seqlens=torch.tensor(self.lengths, dtype=torch.int32),
            cache_leftpad=pad,
            causal=self.causal,
            window_size=self.window,
            return_softmax_lse=True,
            **self.cache.options,
            **self.score,
            **self.rotary,
            **appended,
            **more,
        )

    def _rotated(self, x: Tensor, advance: bool) -> Tensor:
        """Of x (batch, rows, heads, dim), in float64."""
        if not self.rotary:
            return x.double()
        rows = torch.arange(x.shape[1]) if advance else torch.zeros(x.shape[1], dtype=torch.long)
        cos, sin = self.rotary["rotary_cos"], self.rotary["rotary_sin"]
        interleaved = self.rotary["rotary_interleaved"]
        return torch.stack(
            [
                kv_caches.rotate(x[b], cos, sin, rows + n, interleaved)
                for b, n in enumerate(self.lengths)
            ]
        )

    def truth(self, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """The reference on what the cache holds now."""
        left, right = self.window
        window = (None if left < 0 or left >= 10**6 else left, None if right < 0 else right)
        advance = self.causal or window != (None, None)
        q = self._rotated(self.q, advance).to(self.q.dtype)
        pad = None if self.leftpad is None else torch.tensor(self.leftpad)
        return reference.attention(
            q,
            self.cache.k,
            self.cache.v,
            causal=self.causal,
            window=window,
            seqused_k=torch.tensor(self.total),
            leftpad_k=pad,
            precision=precision,
            **self.cache.reference_options(),
            **self.score,
        )

    def expected_rows(self) -> tuple[Tensor, Tensor]:
        """What is appended to K and V, before it is rounded or quantised: float64."""
        return self._rotated(self.k, True), self.v.double()

    def check_cache(self, before: list[Tensor]) -> None:
        """New slots hold the new rows; every other byte is what it was."""
        after = self.cache.tensors()
        for b, n in enumerate(self.lengths):
            for i in range(self.new):
                where = self.cache.where(b, n + i)
                for which, rows in enumerate(self.expected_rows()):
                    self.check_row(after, which, where, rows[b, i])
                for old, new in zip(before, after, strict=True):
                    old[where] = new[where]
        for old, new in zip(before, after, strict=True):
            assert torch.equal(kv_caches.bits(old), kv_caches.bits(new))

    def check_row(
        self, after: list[Tensor], which: int, where: tuple[int, int], row: Tensor
    ) -> None:
        stored = after[which][where].double()
        if not self.cache.scales():
            # One rounding of the exact value; the sum of two products has one of its own.
            eps = torch.finfo(self.q.dtype).eps + 2 * torch.finfo(torch.float32).eps
            assert bool(((stored - row).abs() <= eps * row.abs().amax()).all())
            return
        scale = after[2 + which][where].double().unsqueeze(-1)
        limit = kv_caches.LIMITS[after[which].dtype]
        torch.testing.assert_close(
            scale.squeeze(-1), row.abs().amax(-1) / limit, rtol=1e-6, atol=0.0
        )
        # int8: half a step; e4m3: half a unit of a 4-bit significand, or of a subnormal (2^-9).
        step = 0.5 * scale
        if after[which].dtype is torch.float8_e4m3fn:
            step = torch.maximum(row.abs() * 2.0**-4, scale * 2.0**-10)
        assert bool(((stored * scale - row).abs() <= step * (1 + 1e-5) + 1e-30).all())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_the_reference(case: dict[str, Any], isa: str) -> None:
    problem = Problem(case)
    before = [t.clone() for t in problem.cache.tensors()]
    out, lse = problem.run()
    problem.check_cache(before)
    truth, low = problem.truth(torch.float64), problem.truth(case["dtype"])
    finite = truth[1][truth[1].isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    testing.check_within_budget("out", out, truth[0], low[0], largest_score=largest)
    lse = torch.where(lse == torch.inf, -torch.inf, lse)
    testing.check_within_budget("lse", lse, truth[1], low[1], largest_score=largest)


# ---- decode: repeatable, whatever runs beside it ------------------------------------------------


def decode_inputs(
    lengths: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    batch, longest = len(lengths), max(lengths)
    q = seeded(batch, 1, 8, 64, dtype=dtype)
    return q, *(seeded(batch, longest, 2, 64, dtype=dtype) for _ in range(2))


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], **more: Any) -> Tensor:
    used = torch.tensor(lengths, dtype=torch.int32)
    return fal.flash_attn_with_kvcache(q, k, v, cache_seqlens=used, **more)  # type: ignore[return-value]


def test_a_sequence_is_the_same_bits_in_any_batch(isa: str) -> None:
    lengths = (3000, 1, 700, 0, 513)
    q, k, v = decode_inputs(lengths)
    together = decode(q, k, v, lengths)
    for b, length in enumerate(lengths):
        alone = decode(q[b : b + 1], k[b : b + 1, :3000], v[b : b + 1], (length,))
        assert torch.equal(alone[0], together[b])


def test_threads_change_no_bit(isa: str) -> None:
    lengths = (5000, 2000)
    q, k, v = decode_inputs(lengths, torch.bfloat16)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(decode(q, k, v, lengths))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("page_size", (1, 5, 16, 64, 256))
def test_pages_change_no_bit(page_size: int, isa: str) -> None:
    k, v = ([seeded(n, 2, 64, dtype=torch.float16) for n in (700, 90)] for _ in range(2))
    q = seeded(2, 1, 8, 64, dtype=torch.float16)
    results = []
    for layout in ("contiguous", f"page{page_size}"):
        cache = kv_caches.make_cache(layout, "same", k, v, 701)
        results.append(decode(q, cache.k, cache.v, (700, 90), **cache.options))
    assert torch.equal(results[0], results[1])


def test_num_splits_changes_nothing() -> None:
    q, k, v = decode_inputs((1500,))
    assert torch.equal(decode(q, k, v, (1500,), num_splits=7), decode(q, k, v, (1500,)))


@pytest.mark.parametrize("storage", ("same", "int8", "fp8"))
@pytest.mark.parametrize("seqlen_q", (1, 3, 40))
@pytest.mark.parametrize("which", ("k", "v"))
def test_a_visible_nan_shows_and_no_other(
    storage: str, seqlen_q: int, which: str, isa: str
) -> None:
    """Key 60 of 64 holds a NaN: only query rows that see it are NaN."""
    k, v = (seeded(64, 1, 16, dtype=torch.float32) for _ in range(2))
    (k if which == "k" else v)[60] = torch.nan
    cache = kv_caches.make_cache("page5", storage, [k], [v], 64)
    if storage == "int8":
        scale = cache.options[f"{which}_scale"]
        assert bool(scale[cache.where(0, 60)].isnan().all())
    q = seeded(1, seqlen_q, 2, 16, dtype=torch.float32)
    out = decode(q, cache.k, cache.v, (64,), causal=True, **cache.options)
    assert isinstance(out, Tensor)
    sees = torch.arange(seqlen_q) + 64 - seqlen_q >= 60
    assert torch.equal(out.isnan().all(-1).all(-1)[0], sees)
    assert torch.equal(out.isnan().any(-1).any(-1)[0], sees)


@pytest.mark.parametrize("dtype", (torch.int8, torch.float8_e4m3fn))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_an_appended_nan_is_not_lost(dtype: torch.dtype, bad: float) -> None:
    cache = [torch.zeros(1, 4, 1, 8).to(dtype) for _ in range(2)]
    scales = [torch.ones(1, 4, 1) for _ in range(2)]
    new = torch.randn(1, 1, 1, 8)
    new[..., 3] = bad
    lengths = torch.tensor([2], dtype=torch.int32)
    fal.append_kv_cache(new, new, *cache, lengths, k_scale=scales[0], v_scale=scales[1])
    row = cache[0][0, 2, 0].float() * scales[0][0, 2, 0]
    assert not bool(row.isfinite().all())
    assert scales[0][0, [0, 1, 3], 0].eq(1).all()


# ---- varlen queries over pages ------------------------------------------------------------------


@pytest.mark.parametrize("page_size", (1, 5, 16, 64, 256))
@pytest.mark.parametrize("window", ((-1, -1), (20, 3), (10**6, -1), (40, 0)))
@pytest.mark.parametrize("causal", (False, True))
def test_varlen_over_pages(page_size: int, window: tuple[int, int], causal: bool, isa: str) -> None:
    """Prefill chunks, decode steps and nothing at all in one call."""
    lengths_q, lengths_k = (1, 33, 0, 4), (90, 61, 7, 4)
    k, v = ([seeded(n, 2, 32, dtype=torch.bfloat16) for n in lengths_k] for _ in range(2))
    cache = kv_caches.make_cache(f"page{page_size}", "same", k, v, max(lengths_k))
    kv_caches.forget_unused_pages(cache, list(lengths_k))
    q = seeded(sum(lengths_q), 4, 32, dtype=torch.bfloat16)
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    )
    out, lse, _ = fal.flash_attn_varlen_func(
        *(q, cache.k, cache.v, cu_q, cu_k, max(lengths_q), max(lengths_k)),
        causal=causal,
        window_size=window,
        return_attn_probs=True,
        **cache.options,
    )
    left, right = window
    options: dict[str, Any] = {
        "window": (left if 0 <= left < max(lengths_k) else None, right if right >= 0 else None),
        "causal": causal,
        "cu_seqlens_q": cu_q,
        "seqused_k": torch.tensor(lengths_k),
        **cache.reference_options(),
    }
    truth, low = (
        reference.attention(q, cache.k, cache.v, precision=precision, **options)
        for precision in (torch.float64, torch.bfloat16)
    )
    testing.check_within_budget("out", out, truth[0], low[0])
    lse = torch.where(lse == torch.inf, -torch.inf, lse)
    testing.check_within_budget("lse", lse, truth[1], low[1])


# ---- errors -------------------------------------------------------------------------------------


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _paged(**more: Any) -> dict[str, Any]:
    """Two sequences of 10 rows in pages of 4; one row is new."""
    return {
        "q": torch.randn(2, 1, 4, 8),
        "k_cache": torch.randn(6, 4, 2, 8),
        "v_cache": torch.randn(6, 4, 2, 8),
        "k": torch.randn(2, 1, 2, 8),
        "v": torch.randn(2, 1, 2, 8),
        "cache_seqlens": int32(10, 10),
        "block_table": torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32),
    } | more


def _contiguous(**more: Any) -> dict[str, Any]:
    return _paged(block_table=None, k_cache=torch.randn(2, 12, 2, 8)) | {
        "v_cache": torch.randn(2, 12, 2, 8),
        **more,
    }


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "k without v": (_paged(v=None), "k and v go together"),
    "cos without sin": (_paged(rotary_cos=torch.ones(20, 2)), "rotary_cos and rotary_sin go"),
    "k without lengths": (_paged(cache_seqlens=None), "needs cache_seqlens"),
    "batch_idx with pages": (_paged(cache_batch_idx=int32(0, 1)), "does not go with block_table"),
    "splits": (_paged(num_splits=-1), "num_splits is -1"),
    "cache of 3 dims": (_paged(k_cache=torch.randn(6, 4, 8)), "k_cache has shape (6, 4, 8)"),
    "lengths of int64": (_paged(cache_seqlens=torch.tensor([10, 10])), "cache_seqlens is int64"),
    "table of int64": (_paged(block_table=torch.zeros(2, 3).long()), "block_table is int64"),
    "entry out of range": (
        _paged(block_table=torch.tensor([[0, 1, 2], [3, 6, 5]], dtype=torch.int32)),
        "block_table[1, 1] is 6 but the cache has 6 pages",
    ),
    "negative entry": (
        _paged(block_table=torch.tensor([[0, -1, 2], [3, 4, 5]], dtype=torch.int32)),
        "block_table[0, 1] is -1",
    ),
    "longer than the table": (
        _paged(cache_seqlens=int32(10, 12)),
        "cache_seqlens[1] + new rows is 13, more than block_table",
    ),
    "longer than the cache": (
        _contiguous(cache_seqlens=int32(12, 3)),
        "cache_seqlens[0] + new rows is 13; it must be 0 to 12",
    ),
    "reads beyond the table": (
        _paged(k=None, v=None, cache_seqlens=int32(10, 13)),
        "more than block_table can address",
    ),
    "negative length": (_paged(cache_seqlens=int32(10, -1)), "cache_seqlens[1] is -1"),
    "page size 0": (
        _paged(k_cache=torch.randn(6, 0, 2, 8), v_cache=torch.randn(6, 0, 2, 8)),
        "page_size is 0",
    ),
    "heads": (_paged(k=torch.randn(2, 1, 1, 8), v=torch.randn(2, 1, 1, 8)), "heads of 8"),
    "head dims": (_paged(q=torch.randn(2, 1, 4, 16)), "head_dim"),
    "heads of q": (_paged(q=torch.randn(2, 1, 3, 8)), "heads_q must be a multiple of heads_k"),
    "v_cache's pages": (_paged(v_cache=torch.randn(5, 4, 2, 8)), "v_cache has"),
    "dtype of the cache": (_paged(k_cache=torch.randn(6, 4, 2, 8).half()), "float"),
    "dtype of q": (_paged(q=torch.randn(2, 1, 4, 8).half()), "q is float16"),
    "int8 without scales": (
        _paged(
            k_cache=torch.zeros(6, 4, 2, 8, dtype=torch.int8),
            v_cache=torch.zeros(6, 4, 2, 8, dtype=torch.int8),
        ),
        "k_scale and v_scale",
    ),
    "scales without int8": (
        _paged(k_scale=torch.ones(6, 4, 2), v_scale=torch.ones(6, 4, 2)),
        "k_scale and v_scale",
    ),
    "leftpad beyond": (_contiguous(cache_leftpad=int32(0, 13)), "cache_leftpad[1] is 13"),
    "rotary too short": (
        _paged(rotary_cos=torch.ones(10, 2), rotary_sin=torch.ones(10, 2)),
        "rotary_cos has 10 positions but sequence 0 needs 11",
    ),
    "rotary too wide": (
        _paged(rotary_cos=torch.ones(20, 5), rotary_sin=torch.ones(20, 5)),
        "rotary_dim <= head_dim 8",
    ),
    "batch_idx beyond": (
        _contiguous(cache_batch_idx=int32(0, 2)),
        "cache_batch_idx[1] is 2 but the cache has 2",
    ),
    "batch": (_contiguous(k_cache=torch.randn(3, 12, 2, 8)), "k_cache has shape (3, 12, 2, 8)"),
    "softcap": (_paged(softcap=-1.0), "softcap is -1"),
    "slopes": (_paged(alibi_slopes=torch.ones(3)), "alibi_slopes has shape"),
    "sinks": (_paged(sinks=torch.ones(3)), "sinks has shape"),
    "window": (_paged(window_size=(1, 2, 3)), "window_size"),
    "backend": (_paged(backend="nothing"), "nothing"),
    "head dim beyond MLA's": (
        _contiguous(
            q=torch.randn(2, 1, 4, 577),
            k=torch.randn(2, 1, 1, 577),
            v=torch.randn(2, 1, 1, 512),
            k_cache=torch.randn(2, 12, 1, 577),
            v_cache=torch.randn(2, 12, 1, 512),
        ),
        "head_dim 577; it must be 1 to 576",
    ),
    "tree of int": (_paged(tree_mask=torch.ones(1, 1)), "tree_mask is torch.float32"),
    "tree of another size": (
        _paged(tree_mask=torch.ones(2, 2, dtype=torch.bool)),
        "tree_mask has shape (2, 2); it must be (seqlen_q, seqlen_q)",
    ),
    "tree with causal": (
        _paged(tree_mask=torch.ones(1, 1, dtype=torch.bool), causal=True),
        "tree_mask does not go with causal",
    ),
    "tree beyond the sequence": (
        _paged(
            q=torch.randn(2, 3, 4, 8),
            tree_mask=torch.ones(3, 3, dtype=torch.bool),
            cache_seqlens=int32(10, 1),
        ),
        "cache_seqlens[1] + new rows is 2; with tree_mask it must count the 3 rows",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_write_nothing(case: str) -> None:
    arguments, message = ERRORS[case]
    caches = [arguments["k_cache"], arguments["v_cache"]]
    before = [t.clone() for t in caches]
    with pytest.raises((fal.ArgumentError, TypeError)) as caught:
        fal.flash_attn_with_kvcache(**arguments)
    assert str(caught.value).startswith("flash_attn_with_kvcache: "), caught.value
    assert message in str(caught.value)
    for old, new in zip(before, caches, strict=True):
        assert torch.equal(kv_caches.bits(old), kv_caches.bits(new))
