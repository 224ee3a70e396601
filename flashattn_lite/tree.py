"""Attention of speculative trees over a KV cache: the last tokens are the nodes of a tree, and a
node sees its ancestors among them beside everything before.

Miao et al., "SpecInfer" (ASPLOS 2024), section 4. Computed as two attentions and a merge: all
queries over the cache up to the tree, which needs no mask, and over the few keys of the tree, whose
mask is small.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashattn_lite import _argument_types
from flashattn_lite._ops import ArgumentError, renamed
from flashattn_lite.attention import attention
from flashattn_lite.merge import merge_attention_states

__all__ = ["ancestor_mask", "tree_attention"]


def ancestor_mask(parents: Tensor) -> Tensor:
    """Which nodes a node of a tree of draft tokens sees: itself and its ancestors.

    Args:
        parents: integers (..., nodes), each node's parent, which comes before it; -1 at a root.

    Returns:
        bool (..., nodes, nodes); [i, j] says whether node i sees node j.

    Raises:
        ArgumentError: when a parent does not come before its node.

    >>> ancestor_mask(torch.tensor([-1, 0, 0, 1])).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """
    _argument_types.dense("ancestor_mask", parents=parents)
    if parents.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise ArgumentError(f"ancestor_mask: parents is {parents.dtype}; it must be of integers")
    parents = parents.long()
    nodes = parents.shape[-1] if parents.dim() else 0
    order = torch.arange(nodes, device=parents.device)
    if parents.dim() < 1 or bool(((parents < -1) | (parents >= order)).any()):
        raise ArgumentError(
            f"ancestor_mask: parents is {parents.tolist()}; node i's parent must be -1 to i - 1"
        )
    mask = torch.eye(nodes, dtype=torch.bool, device=parents.device)
    mask = mask.expand(*parents.shape, nodes).clone()
    for i in range(nodes):
        parent = parents[..., i]
        above = mask.gather(
            -2, parent.clamp(min=0)[..., None, None].expand(*parent.shape, 1, nodes)
        )
        mask[..., i, :] |= above.squeeze(-2) & (parent >= 0).unsqueeze(-1)
    return mask


def check_tree(tree_mask: Tensor, q: Tensor, name: str) -> None:
    """tree_mask's shape and dtype; the lengths are checked where they are used."""
    batch, tokens = (q.shape[0], q.shape[1]) if q.dim() == 4 else (0, 0)
    if q.dim() != 4:
        raise ArgumentError(
            f"{name}: q has shape {tuple(q.shape)}; with tree_mask it must be (batch, seqlen_q, "
            "heads_q, head_dim)"
        )
    if tree_mask.dtype is not torch.bool:
        raise ArgumentError(f"{name}: tree_mask is {tree_mask.dtype}; it must be bool")
    if tree_mask.device != q.device:
        raise ArgumentError(f"{name}: tree_mask is on {tree_mask.device} but q on {q.device}")
    shapes = ((tokens, tokens), (1, tokens, tokens), (batch, tokens, tokens))
    if tuple(tree_mask.shape) not in shapes:
        raise ArgumentError(
            f"{name}: tree_mask has shape {tuple(tree_mask.shape)}; it must be (seqlen_q, "
            f"seqlen_q) or (batch, seqlen_q, seqlen_q), here {shapes[2]}"
        )


def check_lengths(seqused_k: Tensor, leftpad_k: Tensor | None, tokens: int, name: str) -> None:
    """On the CPU: each sequence holds its tree."""
    if not seqused_k.is_cpu or seqused_k.numel() == 0 or torch.compiler.is_compiling():
        return
    before = seqused_k - tokens - (0 if leftpad_k is None else leftpad_k)
    if int(before.min()) < 0:
        b = int(before.argmin())
        raise ArgumentError(
            f"{name}: seqused_k[{b}] is {int(seqused_k[b])}; with tree_mask it must count the "
            f"{tokens} rows of the tree, after any left padding"
        )


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tree_mask: Tensor,
    *,
    seqused_k: Tensor,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int = 0,
    backend: str = "auto",
    name: str = "tree_attention",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a tree of new tokens, whose keys are the cache's last ones. No gradient.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), the nodes.
        k_cache: (batch, capacity, heads_k, head_dim), or (num_pages, page_size, heads_k, head_dim)
            with block_table. The nodes' own keys are rows seqused_k - seqlen_q and on.
        v_cache: like k_cache; its head_dim may differ.
        tree_mask: bool (batch, seqlen_q, seqlen_q), or without batch: whether node i sees node j.
            Every node sees all keys before the tree. See ``ancestor_mask``.
        seqused_k: int32 (batch), rows of each sequence in the cache, the tree's and left padding
            included.
        block_table: int32 (batch, max_pages).
        leftpad_k: int32 (batch), rows to skip at the start.
        k_scale: float32 k_cache.shape[:3], factors of an int8 or float8_e4m3fn cache.
        v_scale: the same for v_cache.
        softmax_scale: default 1 / sqrt(head_dim).
        softcap: as in ``attention``.
        sinks: as in ``attention``.
        return_lse: also return the log-sum-exp.
        num_splits: as in ``attention``.
        backend: as in ``attention``.
        name: what error messages begin with.

    Returns:
        out: (batch, seqlen_q, heads_q, head_dim_v).
        lse: float32 (batch, heads_q, seqlen_q), -inf in rows that see nothing.

    Raises:
        ArgumentError: for an argument that cannot be used.

    >>> cache = torch.randn(1, 16, 1, 8)
    >>> mask = ancestor_mask(torch.tensor([-1, 0, 0]))  # two continuations of one token
    >>> used = torch.tensor([10], dtype=torch.int32)
    >>> tree_attention(torch.randn(1, 3, 2, 8), cache, cache, mask, seqused_k=used).shape
    torch.Size([1, 3, 2, 8])
    """
    _argument_types.dense(name, q=q, tree_mask=tree_mask, seqused_k=seqused_k)
    check_tree(tree_mask, q, name)
    return_lse = _argument_types.flag(name, "return_lse", return_lse)
    batch, tokens = q.shape[:2]
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    common: dict[str, Any] = {
        **{"softmax_scale": softmax_scale, "softcap": softcap, "num_splits": num_splits},
        **{"backend": backend, "name": name, "return_lse": True},
    }
    cache: dict[str, Any] = {"block_table": block_table, "leftpad_k": leftpad_k, **scales}
    # Every argument is checked over the whole length before keys are taken by hand below.
    try:
        attention(
            *(q, k_cache, v_cache),
            seqused_k=seqused_k,
            seqused_q=torch.zeros_like(seqused_k),
            sinks=sinks,
            **cache | common,
        )
    except (ArgumentError, TypeError) as error:
        words = {"k": "k_cache", "v": "v_cache", "seqused_q": "seqused_k"}
        raise renamed(error, words) from None
    check_lengths(seqused_k, leftpad_k, tokens, name)
    prefix = seqused_k - tokens
    before = attention(*(q, k_cache, v_cache), seqused_k=prefix, sinks=sinks, **cache | common)

    row = prefix[:, None].long() + torch.arange(tokens, device=q.device)
    block = torch.arange(batch, device=q.device)[:, None]
    if block_table is not None:
        block = block_table.long().gather(1, row // k_cache.shape[1])
        row = row % k_cache.shape[1]

    def taken(t: Tensor) -> Tensor:
        if t.dtype is torch.float8_e4m3fn:
            return t.view(torch.uint8)[block, row].view(t.dtype)
        return t[block, row]

    hidden = ~tree_mask.reshape(-1, 1, tokens, tokens)
    bias = torch.zeros(hidden.shape, dtype=torch.float32, device=q.device)
    bias = bias.masked_fill_(hidden, -math.inf)
    common |= {n: None if scale is None else taken(scale) for n, scale in scales.items()}
    nodes = attention(*(q, taken(k_cache), taken(v_cache)), bias=bias, **common)
    out, lse = merge_attention_states(*before, *nodes)
    return (out, lse) if return_lse else out
