"""Merging attention over parts of the keys: each part's output is normalised by its own LSE, and
the merge weighs it by exp(lse - lse of the whole). Associative and commutative up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashattn_lite import _argument_types
from flashattn_lite._ops import ArgumentError

__all__ = ["flash_attn_combine", "merge_attention_states"]


def _combine(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Over dimension 0: out (parts, ..., head_dim), lse (parts, ...); at least float32.

    A part that saw nothing (LSE -inf, or +inf as flash_attn 2.8 marks it) weighs nothing; its
    output is not looked at, so it may hold anything. A NaN LSE gives NaN.
    """
    lse = torch.where(lse == math.inf, -math.inf, lse)
    if lse.shape[0] == 0:
        return out.new_zeros(out.shape[1:]), lse.new_full(lse.shape[1:], -math.inf)
    empty = lse == -math.inf
    nothing = empty.all(0)
    safe = torch.where(nothing, torch.zeros_like(lse), lse)
    merged = torch.where(nothing, -math.inf, torch.logsumexp(safe, 0))
    weight = torch.where(empty, torch.zeros_like(lse), torch.softmax(safe, 0)).unsqueeze(-1)
    return torch.where(empty.unsqueeze(-1), torch.zeros_like(out), out * weight).sum(0), merged


def _check_dtypes(name: str, **tensors: Tensor) -> None:
    for argument, t in tensors.items():
        if not t.dtype.is_floating_point or t.dtype.itemsize == 1:
            dtype = str(t.dtype).removeprefix("torch.")
            raise ArgumentError(
                f"{name}: {argument} is {dtype}; it must be floating-point of 16 bits or more"
            )


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    Args:
        out_a: (batch, seqlen_q, heads, head_dim) or (total_q, heads, head_dim).
        lse_a: (batch, heads, seqlen_q) or (heads, total_q), natural log; -inf (or +inf) marks a row
            that saw nothing.
        out_b: like out_a.
        lse_b: like lse_a.

    Returns:
        out: like out_a.
        lse: like lse_a, float32 (float64 if given so); -inf in rows that saw nothing in both.

    Differentiable in all four.

    Raises:
        ArgumentError: (a ValueError) for shapes that do not belong together.

    >>> from flashattn_lite import attention
    >>> q, k, v = (torch.ones(1, n, 2, 8) for n in (3, 4, 4))
    >>> parts = [attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(1), slice(1, 4))]
    >>> merge_attention_states(*parts[0], *parts[1])[0].allclose(attention(q, k, v))
    True
    """
    name = "merge_attention_states"
    _argument_types.dense(name, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    _check_dtypes(name, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape:
        raise ArgumentError(
            f"merge_attention_states: out_a has shape {tuple(out_a.shape)}, out_b "
            f"{tuple(out_b.shape)}, lse_a {tuple(lse_a.shape)}, lse_b {tuple(lse_b.shape)}; "
            "the two states must have the same shapes"
        )
    lse_shape = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3])
    if out_a.dim() not in (3, 4) or lse_a.shape != lse_shape:
        raise ArgumentError(
            f"merge_attention_states: out_a has shape {tuple(out_a.shape)} and lse_a "
            f"{tuple(lse_a.shape)}; they must be (batch, seqlen_q, heads, head_dim) and (batch, "
            "heads, seqlen_q), or (total_q, heads, head_dim) and (heads, total_q)"
        )
    precision = torch.promote_types(lse_a.dtype, torch.float32)
    out = torch.stack([out_a.to(precision), out_b.to(precision)])
    lse = torch.stack([lse_a.to(precision), lse_b.to(precision)]).transpose(-1, -2)
    merged, merged_lse = _combine(out, lse)
    return merged.to(out_a.dtype), merged_lse.transpose(-1, -2)


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of many disjoint sets of keys, as in FlashAttention-3.

    Args:
        out_partial: (num_splits, batch, seqlen_q, heads, head_dim) or (num_splits, total_q, heads,
            head_dim).
        lse_partial: (num_splits, batch, seqlen_q, heads) or (num_splits, total_q, heads): the heads
            come last.
        out: written in place when given.
        out_dtype: default: out's, else out_partial's.

    Returns:
        out: like out_partial without its first dimension.
        lse: float32, like lse_partial without its first dimension; -inf in rows that saw nothing.

    Raises:
        ArgumentError: (a ValueError) for shapes or dtypes that do not belong together.

    >>> out, lse = flash_attn_combine(torch.ones(2, 1, 3, 4, 8), torch.zeros(2, 1, 3, 4))
    >>> out.shape, lse.shape
    (torch.Size([1, 3, 4, 8]), torch.Size([1, 3, 4]))
    """
    name = "flash_attn_combine"
    _argument_types.dense(
        name, out_partial=out_partial, lse_partial=lse_partial, **_argument_types.given(out=out)
    )
    _check_dtypes(
        name, out_partial=out_partial, lse_partial=lse_partial, **_argument_types.given(out=out)
    )
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{name}: out_dtype is {out_dtype!r}; it must be a torch.dtype")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"{name}: out_dtype is {out_dtype}; it must be floating-point")
    if out_partial.dim() not in (4, 5) or lse_partial.shape != out_partial.shape[:-1]:
        raise ArgumentError(
            f"flash_attn_combine: out_partial has shape {tuple(out_partial.shape)} and lse_partial "
            f"{tuple(lse_partial.shape)}; they must be (num_splits, batch, seqlen_q, heads, "
            "head_dim) and (num_splits, batch, seqlen_q, heads), or without batch"
        )
    if out is not None and out.shape != out_partial.shape[1:]:
        raise ArgumentError(
            f"flash_attn_combine: out has shape {tuple(out.shape)}; it must be "
            f"{tuple(out_partial.shape[1:])}"
        )
    if out is not None and out_dtype is not None and out.dtype != out_dtype:
        raise ArgumentError(f"flash_attn_combine: out is {out.dtype} but out_dtype is {out_dtype}")
    precision = torch.promote_types(lse_partial.dtype, torch.float32)
    merged, lse = _combine(out_partial.to(precision), lse_partial.to(precision))
    if out is not None:
        return out.copy_(merged), lse
    return merged.to(out_partial.dtype if out_dtype is None else out_dtype), lse
