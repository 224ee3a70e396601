"""Latent attention as decode sees it: one K/V head of 576, whose first 512 dims are the values too,
under all query heads."""

import pytest
import torch
from native import kv_caches
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import reference, testing

DIM, DIM_V = 576, 512


def latent(lengths: tuple[int, ...], layout: str, dtype: torch.dtype) -> kv_caches.Cache:
    """A cache of latent rows; V is a view of K."""
    rows = [torch.randn(n, 1, DIM).to(dtype) for n in lengths]
    cache = kv_caches.make_cache(layout, "same", rows, [r[..., :DIM_V] for r in rows], max(lengths))
    kv_caches.forget_unused_pages(cache, list(lengths))
    cache.v = cache.k[..., :DIM_V]
    return cache


@pytest.mark.parametrize("layout", ("contiguous", "page1", "page64"))
@pytest.mark.parametrize("heads, tokens", ((16, 1), (128, 1), (16, 8), (5, 2)))
def test_against_the_reference(layout: str, heads: int, tokens: int, isa: str) -> None:
    dtype = {"contiguous": torch.float32, "page1": torch.float16, "page64": torch.bfloat16}[layout]
    lengths = (600, 9)
    cache = latent(lengths, layout, dtype)
    q = torch.randn(2, tokens, heads, DIM).to(dtype) * 0.2
    used = torch.tensor(lengths, dtype=torch.int32)
    out, lse = fal.flash_attn_with_kvcache(
        *(q, cache.k, cache.v),
        cache_seqlens=used,
        causal=True,
        softmax_scale=0.1,
        return_softmax_lse=True,
        **cache.options,
    )
    truth, low = (
        reference.attention(
            *(q, cache.k, cache.v),
            seqused_k=used,
            causal=True,
            softmax_scale=0.1,
            precision=precision,
            **cache.reference_options(),
        )
        for precision in (torch.float64, dtype)
    )
    testing.check_within_budget("out", out, truth[0], low[0])
    testing.check_within_budget("lse", lse, truth[1], low[1])


@pytest.mark.parametrize("storage", ("int8", "fp8"))
def test_quantised_rows_of_their_own(storage: str, isa: str) -> None:
    k, v = ([torch.randn(n, 1, dim) for n in (40, 700)] for dim in (DIM, DIM_V))
    cache = kv_caches.make_cache("page16", storage, k, v, 700)
    q = torch.randn(2, 1, 16, DIM) * 0.2
    used = torch.tensor([40, 700], dtype=torch.int32)
    out = fal.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=used, **cache.options)
    truth, low = (
        reference.attention(
            q, cache.k, cache.v, seqused_k=used, precision=p, **cache.reference_options()
        )
        for p in (torch.float64, torch.float32)
    )
    assert isinstance(out, Tensor)
    testing.check_within_budget("out", out, truth[0], low[0])


def test_threads_and_batch_change_no_bit() -> None:
    cache = latent((5000, 33), "page16", torch.bfloat16)
    q = torch.randn(2, 1, 128, DIM).to(torch.bfloat16)
    used = torch.tensor([5000, 33], dtype=torch.int32)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                fal.flash_attn_with_kvcache(
                    q, cache.k, cache.v, cache_seqlens=used, **cache.options
                )
            )
    finally:
        torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    table = cache.options["block_table"][1:]
    alone = fal.flash_attn_with_kvcache(
        q[1:], cache.k, cache.v, cache_seqlens=used[1:], block_table=table
    )
    assert torch.equal(alone[0], results[0][1])


def test_the_pool_appends_latent_rows() -> None:
    pool = fal.PagedKVCache(8, 4, 1, DIM, DIM_V)
    sequence = pool.create()
    rows = torch.randn(1, 6, 1, DIM)
    pool.append([sequence], rows, rows[..., :DIM_V])
    q = torch.randn(1, 1, 16, DIM)
    out = pool.attend([sequence], q)
    expected, _ = reference.attention(q, rows, rows[..., :DIM_V])
    testing.check_within_budget("out", out, expected, expected.float())


def test_what_is_not_decode_is_refused() -> None:
    q, k, v = torch.randn(1, 9, 4, DIM), torch.randn(1, 9, 1, DIM), torch.randn(1, 9, 1, DIM_V)
    with pytest.raises(fal.ArgumentError, match="q has head_dim 576; it must be 1 to 256"):
        fal.attention(q, k, v)
    few = q[:, :2].requires_grad_()
    with pytest.raises(fal.ArgumentError, match="it must be 1 to 256 where a gradient is wanted"):
        fal.attention(few, k, v)
    with pytest.raises(fal.ArgumentError, match="it must be 1 to 256 where a gradient is wanted"):
        fal.flash_attn_func(few, k, v)
    with pytest.raises(fal.ArgumentError, match="head dims above 256 without dropout"):
        fal.attention(q[:, :2], k, v, dropout_p=0.5)
