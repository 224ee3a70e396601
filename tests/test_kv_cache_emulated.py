"""flash_attn_with_kvcache over the CUDA kernels that rotate, append, decode and combine, on the
SIMT emulator: every pair of options, layouts and storages among them, and trees of drafts."""

from typing import Any

import pytest
import torch
from kv_problem import AXES, Problem, cases_of
from native import emulated_ops, kv_caches
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import reference, testing
from flashattn_lite.tree import ancestor_mask

CASES = cases_of(
    AXES
    | {
        "dtype": (torch.bfloat16, torch.float16),
        "seqlen_q": (1, 2, 5, 16, 33),  # more than 16 are FlashAttention-2's, unless quantised
        "heads": ((4, 1), (3, 3), (6, 2), (17, 1)),
        "head_dims": ((64, 64), (128, 128), (37, 37), (24, 40), (256, 256), (192, 128), (8, 1)),
        "lengths": ((5, 61, 0), (130, 64, 1), (600, 300)),
        "num_splits": (0, 1, 2, 64),
        "seed": (0, 1, 2, 3),  # the schedule of the emulated threads
    }
)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['layout']}-{case['storage']}-{case['append']}"
)
def test_against_the_reference(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_ops.install(monkeypatch, seed=case["seed"])
    Problem(case).check(num_splits=case["num_splits"])


@pytest.mark.parametrize("storage", ("same", "int8", "fp8"))
@pytest.mark.parametrize("layout", ("contiguous", "page1", "page5", "page16"))
@pytest.mark.parametrize("nodes", (7, 40))
def test_trees(storage: str, layout: str, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes' own keys come with a bias, which decode takes; 40 nodes are more than it takes
    without one: the keys before the tree are FlashAttention-2's then."""
    emulated_ops.install(monkeypatch)
    dtype, lengths, heads_q = torch.bfloat16, (nodes, nodes + 60, 400), 4
    k, v = ([torch.randn(n, 2, 40).to(dtype) for n in lengths] for _ in range(2))
    cache = kv_caches.make_cache(layout, storage, k, v, 403)
    kv_caches.forget_unused_pages(cache, list(lengths))
    q = torch.randn(3, nodes, heads_q, 40).to(dtype)
    parents = torch.tensor([-1, *(torch.rand(nodes - 1) * torch.arange(1, nodes)).int()])
    tree = torch.stack([ancestor_mask(parents), *(torch.rand(2, nodes, nodes) > 0.5)])
    used, sinks = torch.tensor(lengths, dtype=torch.int32), torch.randn(heads_q)
    out, lse = fal.flash_attn_with_kvcache(
        *(q, cache.k, cache.v),
        cache_seqlens=used,
        tree_mask=tree,
        softcap=5.0,
        sinks=sinks,
        num_splits=2,
        return_softmax_lse=True,
        **cache.options,
    )
    longest = cache.k.shape[1] * (1 if cache.table is None else cache.table.shape[1])
    bias = torch.zeros(3, 1, nodes, longest, dtype=torch.float64)
    for b, n in enumerate(lengths):
        bias[b, 0, :, n - nodes : n].masked_fill_(~tree[b], -torch.inf)
    more: dict[str, Any] = {"seqused_k": used, "softcap": 5.0, "sinks": sinks, "bias": bias}
    more |= cache.reference_options()
    truth, low = (
        reference.attention(q, cache.k, cache.v, precision=p, **more)
        for p in (torch.float64, dtype)
    )
    assert isinstance(out, Tensor)
    testing.check_within_budget("out", out, truth[0], low[0])
    testing.check_within_budget("lse", lse, truth[1], low[1])


@pytest.mark.parametrize("tokens", (1, 3))
def test_pages_before_a_window_may_be_gone(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of the block table whose keys nobody sees may hold anything, on either side."""
    emulated_ops.install(monkeypatch)
    k, v = ([torch.randn(300, 2, 64).bfloat16()] for _ in range(2))
    q = torch.randn(1, tokens, 4, 64).bfloat16()
    cache = kv_caches.make_cache("page16", "same", k, v, 400)
    kv_caches.forget_unused_pages(cache, [300])
    options: dict[str, Any] = {"cache_seqlens": 300, "causal": True, "window_size": (70, 0)}
    expected = fal.flash_attn_with_kvcache(q, cache.k, cache.v, **options, **cache.options)
    cache.options["block_table"][0, : (300 - tokens - 70) // 16] = -(2**31)
    out = fal.flash_attn_with_kvcache(q, cache.k, cache.v, **options, **cache.options)
    assert isinstance(out, Tensor) and isinstance(expected, Tensor)
    assert torch.equal(out, expected) and bool(out.isfinite().all())
