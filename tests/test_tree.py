"""Trees of draft tokens over every cache against the reference with the whole mask as a bias."""

import functools
from typing import Any

import pytest
import torch
from native import kv_caches
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import reference, testing
from flashattn_lite.tree import ancestor_mask, tree_attention

PARENTS = [-1, 0, 0, 1, 1, 2, 3]  # three branches under one root
LENGTHS = (7, 61, 700)  # the first one is nothing but its tree


def whole_mask(tree: Tensor, lengths: tuple[int, ...], longest: int) -> Tensor:
    """float64 (batch, 1, nodes, longest): 0 or -inf, the tree over each sequence's last keys."""
    nodes = tree.shape[-1]
    bias = torch.zeros(len(lengths), 1, nodes, longest, dtype=torch.float64)
    for b, n in enumerate(lengths):
        hidden = ~tree.expand(len(lengths), nodes, nodes)[b]
        bias[b, 0, :, n - nodes : n].masked_fill_(hidden, -torch.inf)
    return bias


def test_ancestors_are_those_on_the_way_to_the_root() -> None:
    mask = ancestor_mask(torch.tensor([PARENTS, [-1, 0, 1, 2, 3, -1, 5]]))
    for parents, seen in zip([PARENTS, [-1, 0, 1, 2, 3, -1, 5]], mask, strict=True):
        for i in range(7):
            way, node = set(), i
            while node >= 0:
                way.add(node)
                node = parents[node]
            assert {j for j in range(7) if seen[i, j]} == way
    with pytest.raises(fal.ArgumentError, match="node i's parent must be -1 to i - 1"):
        ancestor_mask(torch.tensor([-1, 1]))


@pytest.mark.parametrize("storage", ("same", "int8", "fp8"))
@pytest.mark.parametrize("layout", ("contiguous", "page1", "page5", "page16", "page64", "page256"))
@pytest.mark.parametrize("heads", ((4, 1), (3, 3)))
def test_tree_against_the_reference(storage: str, layout: str, heads: tuple[int, int]) -> None:
    dtype = torch.bfloat16 if layout == "page16" else torch.float32
    heads_q, heads_k = heads
    k, v = ([torch.randn(n, heads_k, 40).to(dtype) for n in LENGTHS] for _ in range(2))
    leftpad = [0, 20, 3] if layout != "page1" else None
    cache = kv_caches.make_cache(layout, storage, k, v, 703, leftpad=leftpad)
    kv_caches.forget_unused_pages(cache, list(LENGTHS))
    q = torch.randn(3, 7, heads_q, 40).to(dtype)
    tree = torch.stack([ancestor_mask(torch.tensor(PARENTS)), *(torch.rand(2, 7, 7) > 0.5)])
    pad = None if leftpad is None else torch.tensor(leftpad, dtype=torch.int32)
    used = torch.tensor(LENGTHS, dtype=torch.int32)
    sinks = torch.randn(heads_q)
    out, lse = fal.flash_attn_with_kvcache(
        *(q, cache.k, cache.v),
        cache_seqlens=used,
        cache_leftpad=pad,
        tree_mask=tree,
        softcap=5.0,
        sinks=sinks,
        return_softmax_lse=True,
        **cache.options,
    )
    lengths = tuple(n - (0 if leftpad is None else leftpad[b]) for b, n in enumerate(LENGTHS))
    options: dict[str, Any] = {
        "seqused_k": used,
        "leftpad_k": pad,
        "softcap": 5.0,
        "sinks": sinks,
        "bias": whole_mask(tree, lengths, cache.k.shape[1] * max(1, _columns(cache))),
        **cache.reference_options(),
    }
    truth, low = (
        reference.attention(q, cache.k, cache.v, precision=p, **options)
        for p in (torch.float64, dtype)
    )
    testing.check_within_budget("out", out, truth[0], low[0])
    testing.check_within_budget("lse", lse, truth[1], low[1])


def _columns(cache: kv_caches.Cache) -> int:
    return 1 if cache.table is None else cache.table.shape[1]


def test_a_chain_is_causal_and_appends() -> None:
    """Through the pool: a chain of drafts is what causal is, and a refused draft can be dropped."""
    pool = fal.PagedKVCache(16, 4, 2, 16)
    sequences = [pool.create(), pool.create()]
    for sequence, n in zip(sequences, (5, 18), strict=True):
        pool.append([sequence], torch.randn(1, n, 2, 16), torch.randn(1, n, 2, 16))
    q = torch.randn(2, 3, 4, 16)
    pool.append(sequences, torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16))
    chain = ancestor_mask(torch.tensor([-1, 0, 1]))
    out, lse = pool.attend_tree(sequences, q, chain, return_lse=True)
    causal, causal_lse = pool.attend(sequences, q, causal=True, return_lse=True)
    torch.testing.assert_close(out, causal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, causal_lse, rtol=1e-5, atol=1e-6)
    pool.truncate(sequences[0], 6)
    assert pool.length(sequences[0]) == 6


@pytest.mark.parametrize("leftpad,refused", ((3, False), (4, True)))
def test_a_sequence_holds_its_tree_after_any_left_padding(leftpad: int, refused: bool) -> None:
    cache, q = torch.randn(1, 16, 1, 8), torch.randn(1, 7, 2, 8)
    options = {"cache_leftpad": torch.tensor([leftpad], dtype=torch.int32)}
    call = functools.partial(
        *(fal.flash_attn_with_kvcache, q, cache, cache),
        **{"cache_seqlens": 10, "tree_mask": ancestor_mask(torch.tensor(PARENTS)), **options},
    )
    if not refused:
        assert call().isfinite().all()
        return
    with pytest.raises(
        fal.ArgumentError, match=r"must count the 7 rows of the tree, after any left"
    ):
        call()


def test_nothing_outside_the_sequence_is_looked_at() -> None:
    """The cache beyond the length is NaN; a NaN in a node's value shows where it is visible."""
    cache = torch.full((1, 20, 1, 8), torch.nan)
    cache[:, :12] = torch.randn(1, 12, 1, 8)
    tree = ancestor_mask(torch.tensor([-1, 0, 0]))
    used = torch.tensor([12], dtype=torch.int32)
    q = torch.randn(1, 3, 2, 8)
    out = tree_attention(q, cache, cache, tree, seqused_k=used)
    assert isinstance(out, Tensor) and bool(out.isfinite().all())
    values = cache.clone()
    values[0, 10] = torch.nan  # node 1 of 3
    out = tree_attention(q, cache, values, tree, seqused_k=used)
    assert isinstance(out, Tensor) and bool(out[0, 1].isnan().all())
