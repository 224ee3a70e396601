"""flash_attn_with_kvcache and flash_attn_varlen_func over caches: every layout and storage against
the reference, in-place updates byte for byte, and the error contract."""

import itertools
from typing import Any

import pytest
import torch
from kv_problem import AXES, Problem, cases_of, seeded
from native import kv_caches
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import reference, testing

CASES = cases_of(AXES)


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(case[axis]) for axis in ("layout", "storage", "append", "seqlen_q"))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_the_reference(case: dict[str, Any], isa: str) -> None:
    Problem(case).check()


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


# (heads, head_dim, keys): V key by key, except where noted.
WAYS = {
    "in a cache": (8, 128, 300),
    "other dims": (8, 72, 300),
    "items of 4, 2 and 1 heads": (7, 64, 300),  # the last two head by head
    "from memory": (16, 64, 2101),  # 16 bits head by head
    "wide, from memory": (16, 128, 2101),
}


@pytest.mark.parametrize("page_size", (None, 5, 16))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_order_in_which_a_cache_is_read_changes_no_bit(
    dtype: torch.dtype, way: str, page_size: int | None, isa: str
) -> None:
    """Key by key, as memory holds it, or, where its heads lie apart, head by head."""
    heads, dim, n = WAYS[way]
    q, k, v = (seeded(1, rows, heads, dim, dtype=dtype) for rows in (1, n, n))
    assert (2 * k.nbytes > 4 * 2**20) == ("memory" in way)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    together, options = [k, v], {}
    if page_size:
        cache = kv_caches.make_cache(f"page{page_size}", "same", [k[0]], [v[0]], n)
        together, options = [cache.k, cache.v], cache.options
    result = decode(q, *together, (n,), **options)
    assert torch.equal(result, decode(q, *apart, (n,)))


@pytest.mark.parametrize("layout", ("contiguous", "page16"))
@pytest.mark.parametrize("storage", ("same", "int8", "fp8"))
def test_a_plain_step_takes_the_short_operator_to_the_same_bits(
    layout: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, v = ([seeded(n, 2, 64, dtype=torch.bfloat16) for n in (70, 9)] for _ in range(2))
    q = seeded(2, 1, 8, 64, dtype=torch.bfloat16)
    cache = kv_caches.make_cache(layout, storage, k, v, 70)
    calls = {"k": cache.k, "v": cache.v, "lengths": (70, 9), "causal": True, **cache.options}
    long = decode(q, **calls, backend="cpu")
    monkeypatch.setattr(fal._ops, "forward", None)
    assert torch.equal(decode(q, **calls), long)


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
    "batch_idx that writes a row twice": (
        _contiguous(
            cache_batch_idx=int32(1, 1),
            cache_seqlens=int32(4, 5),
            k=torch.randn(2, 2, 2, 8),
            v=torch.randn(2, 2, 2, 8),
        ),
        "cache_batch_idx names entry 1 of k_cache twice, and both write row 5",
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
