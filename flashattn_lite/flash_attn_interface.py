"""The functions of flash_attn 2.8, name for name: thin layers over ``attention``.

What differs from ``attention``: positional options, ``window_size`` with any negative number for
unbounded and one as long as the keys counting as unbounded, an LSE of +inf for rows that see
nothing, and S_dmask.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashattn_lite import _argument_types, _checks, inspection
from flashattn_lite._ops import ArgumentError, renamed
from flashattn_lite.attention import (
    UNBOUNDED,
    attention,
    draw_dropout_seed,
    flash_window,
    plain_attention,
)
from flashattn_lite.block_mask import BlockMask
from flashattn_lite.kv_cache import flash_attn_with_kvcache
from flashattn_lite.merge import flash_attn_combine

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# out, or (out, softmax_lse, S_dmask) with return_attn_probs.
Result: TypeAlias = Tensor | tuple[Tensor, Tensor, Tensor]


_NO_WINDOW = (-1, -1)


def _get_block_size_n(_device: Any, _head_dim: int, _is_dropout: bool, _is_causal: bool) -> int:
    """Keys over which S_dmask is scaled by one maximum: here the whole row. (flash_attn's tests
    ask, to turn S_dmask into probabilities.)"""
    return 1 << 30


def _unpacked(name: str, argument: str, t: Tensor, dim: int, parts: int) -> tuple[Tensor, ...]:
    """q, k, v or k, v from a packed (..., parts, heads, head_dim) tensor, as views."""
    _argument_types.dense(name, **{argument: t})
    if t.dim() != dim or t.shape[-3] != parts:
        lead = "(batch, seqlen" if dim == 5 else "(total"
        raise ArgumentError(
            f"{name}: {argument} has shape {tuple(t.shape)}; it must be {lead}, {parts}, heads, "
            "head_dim)"
        )
    return t.unbind(-3)


def _attend(
    name: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    scoring: tuple[bool, Any, float | None, float, Tensor | None, BlockMask | None],
    rest: tuple[float, bool, bool],
    **lengths: Any,
) -> Result:
    """The common part of the functions below.

    Args:
        scoring: causal, window_size, softmax_scale, softcap, alibi_slopes, block_mask.
        rest: dropout_p, deterministic, return_attn_probs.
        lengths: those of ``attention``'s options that say where sequences are.
    """
    q, k, v = qkv
    causal, window_size, softmax_scale, softcap, alibi_slopes, block_mask = scoring
    dropout_p, deterministic, return_attn_probs = rest
    for argument, value in lengths.items():
        if not argument.startswith("max_"):
            if not isinstance(value, Tensor):
                _argument_types.tensors(name, **{argument: value})
        elif type(value) is not int:
            lengths[argument] = _argument_types.index(name, argument, value)
    if window_size is _NO_WINDOW:
        window = UNBOUNDED
    else:
        if not isinstance(k, Tensor) or k.is_nested:
            _argument_types.dense(name, k=k)
        seqlen_k = lengths.get("max_seqlen_k", k.shape[1] if k.dim() > 1 else 0)
        window = flash_window(window_size, seqlen_k, name)
    if not (type(dropout_p) is type(softcap) is float and type(return_attn_probs) is bool):
        dropout_p = _argument_types.number(name, "dropout_p", dropout_p)
        softcap = _argument_types.number(name, "softcap", softcap)
        return_attn_probs = _argument_types.flag(name, "return_attn_probs", return_attn_probs)
    if not (softmax_scale is None or type(softmax_scale) is float):
        softmax_scale = _argument_types.number(name, "softmax_scale", softmax_scale)
    if (
        window is UNBOUNDED
        and alibi_slopes is None
        and block_mask is None
        and not (dropout_p or softcap or return_attn_probs or lengths)
    ):
        return plain_attention(name, q, k, v, softmax_scale, causal, deterministic)
    seed = draw_dropout_seed() if dropout_p > 0 else None
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "block_mask": block_mask,
        "dropout_p": dropout_p,
        "dropout_seed": seed,
        **lengths,
    }
    result = attention(
        q, k, v, deterministic=deterministic, return_lse=return_attn_probs, name=name, **options
    )
    if isinstance(result, Tensor):
        return result
    out, lse = result
    lse = torch.where(lse == -math.inf, math.inf, lse)
    if seed is None:
        return out, lse, q.new_empty(0)
    max_seqlen_q, max_seqlen_k = options.pop("max_seqlen_q", 0), options.pop("max_seqlen_k", 0)
    probabilities = inspection.signed_probabilities(q, k, v, **options)
    more_q, more_k = max_seqlen_q - probabilities.shape[2], max_seqlen_k - probabilities.shape[3]
    return out, lse, pad(probabilities, (0, max(0, more_k), 0, max(0, more_q)))


# What the packed functions call the arguments that errors are about.
_KV = {"k and v": "kv", "k": "kv", "v": "kv"}
_ONE_LENGTH = {
    **{"cu_seqlens_q": "cu_seqlens", "cu_seqlens_k": "cu_seqlens"},
    **{"max_seqlen_q": "max_seqlen", "max_seqlen_k": "max_seqlen"},
}
_QKV = {"k and v": "qkv", "q": "qkv", "k": "qkv", "v": "qkv"} | _ONE_LENGTH


def _attend_packed(words: dict[str, str], *arguments: Any, **lengths: Any) -> Result:
    """``_attend``, whose errors say what the caller said."""
    try:
        return _attend(*arguments, **lengths)
    except (ArgumentError, TypeError) as error:
        raise renamed(error, words) from None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = _NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    block_mask: BlockMask | None = None,
) -> Result:
    """Attention of dense tensors.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        k: (batch, seqlen_k, heads_k, head_dim); heads_q is a multiple of heads_k.
        v: (batch, seqlen_k, heads_k, head_dim_v).
        dropout_p: in [0, 1); governed by ``torch.manual_seed``.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: bottom-right: row i sees keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), inclusive, ints or a tensor of two; negative is unbounded, and
            so is a side >= seqlen_k. causal makes the right side 0.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        alibi_slopes: float32 (heads_q) or (batch, heads_q).
        deterministic: gradients bitwise repeatable on CUDA too.
        return_attn_probs: also return what follows.
        block_mask: beyond flash_attn: the blocks of keys that each row may see (``BlockMask``).

    Returns:
        out: (batch, seqlen_q, heads_q, head_dim_v); 0 in rows that see nothing.
        softmax_lse: float32 (batch, heads_q, seqlen_q), natural log; +inf in rows that see nothing.
        S_dmask: (batch, heads_q, seqlen_q, seqlen_k) under dropout: proportional in each row to the
            softmax, negative where dropped; without dropout an empty tensor, as in flash_attn 2.8.

    Raises:
        ArgumentError: (a ValueError and a RuntimeError) for an argument that cannot be used.

    >>> q = k = v = torch.ones(1, 4, 2, 8)
    >>> flash_attn_func(q, k, v, causal=True).shape
    torch.Size([1, 4, 2, 8])

    Source: the flash_attn package, version 2.8.
    """
    if (
        window_size is _NO_WINDOW
        and alibi_slopes is None
        and block_mask is None
        and return_attn_probs is False
        and type(dropout_p) is type(softcap) is float
        and not (dropout_p or softcap)
    ):
        return plain_attention("flash_attn_func", q, k, v, softmax_scale, causal, deterministic)
    return _attend(
        "flash_attn_func",
        (q, k, v),
        (causal, window_size, softmax_scale, softcap, alibi_slopes, block_mask),
        (dropout_p, deterministic, return_attn_probs),
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = _NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    block_mask: BlockMask | None = None,
) -> Result:
    """``flash_attn_func`` with q, k, v in one tensor: qkv (batch, seqlen, 3, heads, head_dim).

    >>> flash_attn_qkvpacked_func(torch.ones(1, 4, 3, 2, 8)).shape
    torch.Size([1, 4, 2, 8])
    """
    q, k, v = _unpacked("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    return _attend_packed(
        _QKV,
        "flash_attn_qkvpacked_func",
        (q, k, v),
        (causal, window_size, softmax_scale, softcap, alibi_slopes, block_mask),
        (dropout_p, deterministic, return_attn_probs),
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = _NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    block_mask: BlockMask | None = None,
) -> Result:
    """``flash_attn_func`` with k, v in one tensor: kv (batch, seqlen_k, 2, heads_k, head_dim).

    >>> flash_attn_kvpacked_func(torch.ones(1, 4, 2, 8), torch.ones(1, 5, 2, 1, 8)).shape
    torch.Size([1, 4, 2, 8])
    """
    k, v = _unpacked("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    return _attend_packed(
        _KV,
        "flash_attn_kvpacked_func",
        (q, k, v),
        (causal, window_size, softmax_scale, softcap, alibi_slopes, block_mask),
        (dropout_p, deterministic, return_attn_probs),
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = _NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    block_mask: BlockMask | None = None,
) -> Result:
    """Attention of sequences of unequal lengths, laid end to end without padding.

    The other options are as in ``flash_attn_func``; a window side >= max_seqlen_k is unbounded.

    Args:
        q: (total_q, heads_q, head_dim).
        k: (total_k, heads_k, head_dim), or (num_pages, page_size, heads_k, head_dim) with
            block_table.
        v: like k.
        cu_seqlens_q: int32 (batch + 1): sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        cu_seqlens_k: int32 (batch + 1), the same for k and v.
        max_seqlen_q: the longest sequence in q.
        max_seqlen_k: the longest sequence in k.
        block_table: int32 (batch, max_pages), the physical page of each logical page; lengths of
            the sequences come from cu_seqlens_k.

    Returns:
        out: (total_q, heads_q, head_dim_v); 0 in rows that see nothing.
        softmax_lse: float32 (heads_q, total_q), natural log; +inf in rows that see nothing.
        S_dmask: (batch, heads_q, max_seqlen_q, max_seqlen_k) under dropout, else an empty tensor.

    Raises:
        ArgumentError: (a ValueError and a RuntimeError) for an argument that cannot be used.

    >>> q = k = v = torch.ones(7, 2, 8)
    >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
    torch.Size([7, 2, 8])

    Source: the flash_attn package, version 2.8.
    """
    lengths: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
    if block_table is None:
        lengths |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
    else:
        lengths |= {"block_table": block_table, "max_seqlen_k": max_seqlen_k}
        lengths |= {"seqused_k": _lengths_of_paged(cu_seqlens_k, max_seqlen_k)}
    return _attend(
        "flash_attn_varlen_func",
        (q, k, v),
        (causal, window_size, softmax_scale, softcap, alibi_slopes, block_mask),
        (dropout_p, deterministic, return_attn_probs),
        **lengths,
    )


def _lengths_of_paged(cu_seqlens_k: Tensor, max_seqlen_k: Any) -> Tensor:
    """seqused_k; what attention checks in cu_seqlens_k, it does not see here."""
    name = "flash_attn_varlen_func"
    _argument_types.dense(name, cu_seqlens_k=cu_seqlens_k)
    if cu_seqlens_k.dtype is not torch.int32 or cu_seqlens_k.dim() != 1 or not len(cu_seqlens_k):
        raise ArgumentError(
            f"{name}: cu_seqlens_k is {cu_seqlens_k.dtype} of shape {tuple(cu_seqlens_k.shape)}; "
            "it must be int32, (batch + 1,)"
        )
    lengths = cu_seqlens_k.diff()
    if cu_seqlens_k.is_cpu and type(cu_seqlens_k) is Tensor and not torch.compiler.is_compiling():
        _checks.check_offsets(name, "k", cu_seqlens_k, max_seqlen_k)
    return lengths


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = _NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    block_mask: BlockMask | None = None,
) -> Result:
    """``flash_attn_varlen_func`` with q, k, v in one tensor: qkv (total, 3, heads, head_dim).

    >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> flash_attn_varlen_qkvpacked_func(torch.ones(7, 3, 2, 8), cu_seqlens, 4).shape
    torch.Size([7, 2, 8])
    """
    q, k, v = _unpacked("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    return _attend_packed(
        _QKV,
        "flash_attn_varlen_qkvpacked_func",
        (q, k, v),
        (causal, window_size, softmax_scale, softcap, alibi_slopes, block_mask),
        (dropout_p, deterministic, return_attn_probs),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = _NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    block_mask: BlockMask | None = None,
) -> Result:
    """``flash_attn_varlen_func`` with k, v in one tensor: kv (total_k, 2, heads_k, head_dim).

    >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> q, kv = torch.ones(7, 2, 8), torch.ones(7, 2, 1, 8)
    >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 4, 4).shape
    torch.Size([7, 2, 8])
    """
    k, v = _unpacked("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    return _attend_packed(
        _KV,
        "flash_attn_varlen_kvpacked_func",
        (q, k, v),
        (causal, window_size, softmax_scale, softcap, alibi_slopes, block_mask),
        (dropout_p, deterministic, return_attn_probs),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
