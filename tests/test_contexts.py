"""What surrounds a call changes no result: torch's defaults, modes and caches, and lazy views."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import BlockMask, attention, flash_attn_func, flash_attn_with_kvcache
from flashattn_lite import block_patterns as patterns
from flashattn_lite.tree import ancestor_mask, tree_attention

Q, CACHE = torch.randn(1, 3, 2, 8), torch.randn(1, 16, 1, 8)
USED = torch.tensor([9], dtype=torch.int32)
TREE = ancestor_mask(torch.tensor([-1, 0, 0]))


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_is_nobodys_business(default_dtype: torch.dtype) -> None:
    out = tree_attention(Q, CACHE, CACHE, TREE, seqused_k=USED)
    cache = fal.PagedKVCache(4, 4, 1, 8, dtype=torch.int8)
    sequence = cache.create()
    cache.append([sequence], CACHE[:, :9], CACHE[:, :9])
    quantised = cache.attend_tree([sequence], Q, TREE)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(out, tree_attention(Q, CACHE, CACHE, TREE, seqused_k=USED))
    assert torch.equal(quantised, cache.attend_tree([sequence], Q, TREE))
    assert cache.k_scale is not None and cache.k_scale.dtype == torch.float32


MASKS: dict[str, Callable[[], BlockMask]] = {
    "pattern": lambda: patterns.bigbird(96, block_size=16) & patterns.causal(96, block_size=16),
    "factorised": lambda: (
        patterns.butterfly(96, block_size=16) | patterns.sliding_window(96, 9, block_size=16)
    ),
    "heads": lambda: BlockMask.stack_heads([patterns.chunked(96, 10, block_size=16)] * 2),
    "flex": lambda: BlockMask.from_flex(patterns.streaming(96, 2, 9, block_size=32).to_flex()),
    "predicate": lambda: BlockMask.from_predicate(lambda b, h, i, j: i >= j, 96, block_size=16),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_made_on_the_cpu_whatever_the_default_device(name: str) -> None:
    expected = MASKS[name]()
    with torch.device("meta"):
        mask = MASKS[name]()
        dense, density = mask.to_dense(), mask.density()
        packed, layout = mask.packed(torch.device("cpu"))
    assert torch.equal(dense, expected.to_dense()) and density == expected.density()
    assert torch.equal(packed, expected.packed(torch.device("cpu"))[0]) and layout.is_cpu


def test_a_mask_made_and_used_for_inference_serves_training_later() -> None:
    q = torch.randn(1, 32, 2, 8)
    with torch.inference_mode():
        mask = patterns.sliding_window(32, 9, block_size=16)
        expected = attention(q, q, q, block_mask=mask)
    q.requires_grad_()
    out = attention(q, q, q, block_mask=mask)
    assert isinstance(out, Tensor) and torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all()


def test_a_float8_cache_keeps_its_scales_under_autocast() -> None:
    cache, scale = CACHE.to(torch.float8_e4m3fn), torch.rand(1, 16, 1)
    options = {"cache_seqlens": 9, "k_scale": scale, "v_scale": scale}
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn_with_kvcache(Q, cache, cache, **options)  # type: ignore[arg-type]
    expected = flash_attn_with_kvcache(Q.bfloat16(), cache, cache, **options)  # type: ignore[arg-type]
    assert torch.equal(out, expected)  # type: ignore[arg-type]


def test_sdpa_is_replaced_under_a_mode_too() -> None:
    q = torch.randn(1, 2, 5, 8)
    with torch.device("cpu"), fal.use_as_sdpa() as calls:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert calls.ours == 1


def test_what_has_no_gradient_is_taken_where_none_is_wanted() -> None:
    slopes = torch.rand(2, requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    with torch.no_grad():
        out = flash_attn_func(Q, Q, Q, softmax_scale=scale, alibi_slopes=slopes)  # type: ignore[arg-type]
    expected = flash_attn_func(Q, Q, Q, softmax_scale=0.5, alibi_slopes=slopes.detach())
    assert torch.equal(out, expected)  # type: ignore[arg-type]
    with pytest.raises(fal.ArgumentError, match="softmax_scale requires a gradient and has none"):
        flash_attn_func(Q, Q, Q, softmax_scale=scale)  # type: ignore[arg-type]


def test_dropout_is_drawn_on_the_inputs_device() -> None:
    torch.manual_seed(3)
    expected = flash_attn_func(Q, Q, Q, 0.3, return_attn_probs=True)
    torch.manual_seed(3)
    with torch.device("meta"):
        results = flash_attn_func(Q, Q, Q, 0.3, return_attn_probs=True)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_views_that_are_negated_when_read() -> None:
    negated = torch._neg_view(Q)
    assert torch.equal(attention(negated, Q, Q), attention(-Q, Q, Q))  # type: ignore[arg-type]
    cache = torch.zeros(1, 16, 2, 8)
    with pytest.raises(fal.ArgumentError, match=r"k_cache is a view that torch negates .*; call"):
        fal.append_kv_cache(Q, Q, torch._neg_view(cache), cache, USED)
    assert not cache.any()
    fal.append_kv_cache(negated, Q, cache, cache.clone(), USED)
    assert torch.equal(cache[:, 9:12], -Q)
