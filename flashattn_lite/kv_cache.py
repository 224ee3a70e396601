"""Attention over a KV cache: flash_attn's ``flash_attn_with_kvcache``, contiguous or paged.

A cache addressed by ``cache_batch_idx`` is a paged one whose pages hold a whole sequence each, so
there is one way to find a key: the block table.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from flashattn_lite import _argument_types, _ops
from flashattn_lite._ops import ArgumentError
from flashattn_lite.attention import UNBOUNDED, attention, flash_window
from flashattn_lite.block_mask import BlockMask
from flashattn_lite.tree import check_lengths, check_tree, tree_attention

__all__ = ["append_kv_cache", "flash_attn_with_kvcache"]

_NAME = "flash_attn_with_kvcache"


def append_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    name: str = "append_kv_cache",
) -> None:
    """Writes new keys and values into a cache, in place: exactly rows cache_seqlens[b] + i.

    Args:
        k: (batch, seqlen, heads_k, head_dim), or (total, heads_k, head_dim) with cu_seqlens.
        v: like k; its head_dim may differ.
        k_cache: (batch, capacity, heads_k, head_dim), or (num_pages, page_size, heads_k, head_dim)
            with block_table. Of k's dtype, int8 or float8_e4m3fn.
        v_cache: like k_cache.
        cache_seqlens: int32 (batch), rows already in the cache, left padding included.
        block_table: int32 (batch, max_pages).
        cu_seqlens: int32 (batch + 1), offsets of the sequences in k.
        max_seqlen: the longest sequence in k, with cu_seqlens; default: all rows of k.
        k_scale: float32 k_cache.shape[:3], with a quantised cache: receives each new row's factor,
            max |k| / 127 (int8) or / 448 (float8_e4m3fn).
        v_scale: the same for v.
        rotary_cos: (positions, rotary_dim / 2); k's row i is rotated for position
            cache_seqlens[b] + i.
        rotary_sin: like rotary_cos.
        rotary_interleaved: pairs are (2p, 2p + 1) (GPT-J), or (p, p + rotary_dim / 2) (GPT-NeoX).
        name: what error messages begin with.

    Raises:
        ArgumentError: when rows would not fit, or an argument cannot be used. Nothing is written.

    >>> cache = torch.zeros(1, 4, 1, 2)
    >>> new = torch.ones(1, 1, 1, 2)
    >>> append_kv_cache(new, new, cache, cache.clone(), torch.tensor([2], dtype=torch.int32))
    >>> cache[0, :, 0, 0].tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    _argument_types.tensors(name, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens)
    for argument, rows in (("k", k), ("v", v)):
        if not isinstance(rows, Tensor) or rows.is_nested or rows.layout is not torch.strided:
            _argument_types.dense(name, **{argument: rows})
    if type(rotary_interleaved) is not bool:
        rotary_interleaved = _argument_types.flag(name, "rotary_interleaved", rotary_interleaved)
    k, v = _unit_last(k), _unit_last(v)
    if not torch.compiler.is_compiling():
        if k_cache.is_neg() or v_cache.is_neg():
            raise ArgumentError(
                f"{name}: {'k_cache' if k_cache.is_neg() else 'v_cache'} is a view that torch "
                "negates when it is read; call .resolve_neg() on it"
            )
        k, v = k.resolve_neg(), v.resolve_neg()
    longest = max_seqlen
    if longest is None:
        longest = k.shape[0] if k.dim() else 0
    if type(longest) is not int:
        longest = _argument_types.index(name, "max_seqlen", longest)
    try:
        _ops.append_kv(
            *(k, v, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens, longest),
            *(k_scale, v_scale, rotary_cos, rotary_sin, rotary_interleaved),
        )
    except RuntimeError as error:
        given = _argument_types.given(
            **{"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache},
            **{"cache_seqlens": cache_seqlens, "block_table": block_table},
            **{"cu_seqlens": cu_seqlens, "k_scale": k_scale, "v_scale": v_scale},
            **{"rotary_cos": rotary_cos, "rotary_sin": rotary_sin},
        )
        _argument_types.dense(name, **given)
        raise _ops.argument_error(error, name) from None


def rotate(
    x: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    offsets: Tensor | None,
    *,
    advance: bool = True,
    interleaved: bool,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    name: str,
) -> Tensor:
    """x (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens, rotated for
    positions offsets[b] + i, or offsets[b] for every row when advance is false."""
    if max_seqlen is None:
        max_seqlen = x.shape[1] if cu_seqlens is None else x.shape[0]
    try:
        rotated: Tensor = _ops.rotate(
            *(_unit_last(x), rotary_cos, rotary_sin, cu_seqlens, offsets, max_seqlen),
            *(interleaved, advance),
        )
    except RuntimeError as error:
        words = {"x": "q", "offsets": "cache_seqlens"}
        raise _ops.renamed(_ops.argument_error(error, name), words) from None
    return rotated


def _unit_last(t: Tensor) -> Tensor:
    return t if t.dim() == 0 or t.stride(-1) == 1 else t.contiguous()


def _lengths(cache_seqlens: Any, q: Tensor) -> Tensor | None:
    if isinstance(cache_seqlens, Tensor) and cache_seqlens.dtype is not torch.int32:
        dtype = str(cache_seqlens.dtype).removeprefix("torch.")
        raise ArgumentError(f"{_NAME}: cache_seqlens is {dtype}; it must be int32")
    if cache_seqlens is None or isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    length: int = cache_seqlens
    if type(length) is not int:  # asking more of one would fix its value in a graph
        length = _argument_types.index(_NAME, "cache_seqlens", cache_seqlens)
    if not 0 <= length < 2**31:
        raise ArgumentError(
            f"{_NAME}: cache_seqlens is {length}; it must be 0 to the cache's length"
        )
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)


def _check_together(
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | int | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Arguments that are given together or not at all."""
    if (k is None) != (v is None):
        raise ArgumentError(f"{_NAME}: k and v go together; only one of them is given")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ArgumentError(f"{_NAME}: rotary_cos and rotary_sin go together")
    if k is not None and cache_seqlens is None:
        raise ArgumentError(f"{_NAME}: k is given, which needs cache_seqlens to say where it goes")
    if rotary_cos is not None and k is None:
        raise ArgumentError(f"{_NAME}: rotary_cos is given, which needs k and v to append")
    if cache_batch_idx is not None and block_table is not None:
        raise ArgumentError(f"{_NAME}: cache_batch_idx does not go with block_table")


def _check_rows(q: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    for argument, rows, side in (("q", q, "q"), ("k", k, "new"), ("v", v, "new")):
        if rows is not None and rows.dim() != 4:
            heads = "heads_q" if side == "q" else "heads_k"
            raise ArgumentError(
                f"{_NAME}: {argument} has shape {tuple(rows.shape)}; it must be (batch, "
                f"seqlen_{side}, {heads}, head_dim)"
            )


def _capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    """Rows that a sequence can have."""
    if block_table is None:
        return k_cache.shape[1]
    if block_table.dim() != 2:
        raise ArgumentError(
            f"{_NAME}: block_table has shape {tuple(block_table.shape)}; it must be (batch, "
            "pages of the longest sequence)"
        )
    return k_cache.shape[1] * block_table.shape[1]


def _check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    for argument, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4:
            raise ArgumentError(
                f"{_NAME}: {argument} has shape {tuple(cache.shape)}; it must be 4-D"
            )
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            raise ArgumentError(f"{_NAME}: {argument} must have unit stride in its last dimension")


def _check_batch_idx(cache_batch_idx: Tensor, lengths: Tensor | None, new_rows: int) -> None:
    if cache_batch_idx.dtype is not torch.int32 or cache_batch_idx.dim() != 1:
        raise ArgumentError(
            f"{_NAME}: cache_batch_idx is {cache_batch_idx.dtype} of shape "
            f"{tuple(cache_batch_idx.shape)}; it must be int32 (batch,)"
        )
    if new_rows == 0 or lengths is None or not cache_batch_idx.is_cpu or not lengths.is_cpu:
        return
    # Entries may share a sequence, but not the rows they write.
    entries = cache_batch_idx.tolist()
    if len(set(entries)) == len(entries) or lengths.shape != cache_batch_idx.shape:
        return
    ends: dict[int, int] = {}
    for begin, entry in sorted(zip(lengths.tolist(), entries, strict=True)):
        if begin < ends.get(entry, begin):
            raise ArgumentError(
                f"{_NAME}: cache_batch_idx names entry {entry} of k_cache twice, and both write "
                f"row {begin}; each row can be written once"
            )
        ends[entry] = begin + new_rows


def _in_callers_words(error: ArgumentError, appends: bool, batch_idx: bool) -> ArgumentError:
    """The same error with this function's names for what ``attention`` calls otherwise."""
    text = re.sub(r"\b([kv])\b", r"\1_cache", str(error))
    if appends:
        text = re.sub(r"seqused_k(\[\d+\])", r"cache_seqlens\1 + new rows", text)
    text = re.sub(r"seqused_[kq]", "cache_seqlens", text)
    text = text.replace("leftpad_k", "cache_leftpad")
    if batch_idx:
        text = re.sub(r"block_table\[(\d+), 0\]", r"cache_batch_idx[\1]", text)
        text = text.replace(" pages", " batch entries").replace("block_table", "cache_batch_idx")
    return ArgumentError(text)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_mask: BlockMask | None = None,
    tree_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over a KV cache, after appending k and v to it, if given. No gradient.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        k_cache: (batch_cache, capacity, heads_k, head_dim), or
            (num_pages, page_size, heads_k, head_dim) with block_table; any page size.
        v_cache: like k_cache; its head_dim may differ.
        k: (batch, seqlen_new, heads_k, head_dim), appended in place at rows cache_seqlens[b] + i.
        v: like k.
        rotary_cos: (positions, rotary_dim / 2), applied to k at position cache_seqlens[b] + i, and
            to q at the same positions when causal or windowed, else at cache_seqlens[b].
        rotary_sin: like rotary_cos.
        cache_seqlens: int32 (batch) or an int: rows in the cache before appending, left padding
            included. Default: the whole cache.
        cache_batch_idx: int32 (batch), the cache's batch entry of each q; not with block_table.
        cache_leftpad: int32 (batch), rows to skip at the start of each sequence.
        block_table: int32 (batch, max_pages), the physical page of each logical page.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: bottom-right: row i sees keys up to i + length - seqlen_q, where length =
            cache_seqlens + seqlen_new - cache_leftpad.
        window_size: (left, right), inclusive; negative is unbounded, and so is a side >= capacity.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        rotary_interleaved: pairs are (2p, 2p + 1) (GPT-J), or (p, p + rotary_dim / 2) (GPT-NeoX).
        alibi_slopes: float32 (heads_q) or (batch, heads_q).
        num_splits: thread blocks that share a sequence's keys on CUDA, at most one for every 256
            keys; 0 chooses. No bit of the result depends on it, nor does anything on the CPU.
        return_softmax_lse: also return the log-sum-exp.
        sinks: float32 (heads_q), a logit per head that joins the softmax's denominator.
        k_scale: float32 k_cache.shape[:3], factors of an int8 or float8_e4m3fn cache.
        v_scale: the same for v_cache.
        block_mask: the blocks of keys that each row may see; its rows and keys count positions, so
            that one square mask of the longest context serves every step.
        tree_mask: bool (batch, seqlen_q, seqlen_q), or without batch: the queries are a tree of
            draft tokens whose keys are the last seqlen_q rows, and query i sees row j of those iff
            tree_mask[i, j], beside all rows before. Not with causal, window_size, block_mask,
            alibi_slopes or rotary_cos, which go by the rows' order. See
            ``flashattn_lite.tree.ancestor_mask``.
        backend: as in ``attention``.

    Returns:
        out: (batch, seqlen_q, heads_q, head_dim_v); 0 in rows that see nothing.
        softmax_lse: float32 (batch, heads_q, seqlen_q), natural log; +inf in rows that see nothing.

    Raises:
        ArgumentError: (a ValueError and a RuntimeError) for an argument that cannot be used; then
            nothing has been written to the cache.

    >>> cache = torch.zeros(2, 16, 1, 8)
    >>> q, k = torch.ones(2, 1, 4, 8), torch.ones(2, 1, 1, 8)
    >>> flash_attn_with_kvcache(q, cache, cache.clone(), k, k, cache_seqlens=3).shape
    torch.Size([2, 1, 4, 8])

    Source: the flash_attn package, version 2.8.
    """
    _argument_types.dense(
        _NAME,
        **{"q": q, "k_cache": k_cache, "v_cache": v_cache},
        **_argument_types.given(
            **{"k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin},
            **{"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad},
            **{"block_table": block_table, "alibi_slopes": alibi_slopes, "sinks": sinks},
            **{"k_scale": k_scale, "v_scale": v_scale, "tree_mask": tree_mask},
            cache_seqlens=cache_seqlens if isinstance(cache_seqlens, Tensor) else None,
        ),
    )
    _check_together(k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, block_table)
    causal = _argument_types.flag(_NAME, "causal", causal)
    rotary_interleaved = _argument_types.flag(_NAME, "rotary_interleaved", rotary_interleaved)
    return_softmax_lse = _argument_types.flag(_NAME, "return_softmax_lse", return_softmax_lse)
    _check_rows(q, k, v)
    _check_caches(k_cache, v_cache)

    capacity = _capacity(k_cache, block_table)
    window = flash_window(window_size, capacity, _NAME)
    lengths = _lengths(cache_seqlens, q)
    if tree_mask is not None:
        by_order = {
            **{"causal": causal, "window_size": window != UNBOUNDED},
            **{"alibi_slopes": alibi_slopes is not None, "rotary_cos": rotary_cos is not None},
            "block_mask": block_mask is not None,
        }
        given = [argument for argument, is_given in by_order.items() if is_given]
        if given or cache_seqlens is None:
            clash = f"does not go with {given[0]}" if given else "needs cache_seqlens"
            raise ArgumentError(f"{_NAME}: tree_mask {clash}")
        check_tree(tree_mask, q, _NAME)

    if cache_batch_idx is not None:
        _check_batch_idx(cache_batch_idx, lengths, 0 if k is None else k.shape[1])
        block_table = cache_batch_idx[:, None]

    def attend(q: Tensor, seqused_k: Tensor | None, seqused_q: Tensor | None) -> Any:
        try:
            if tree_mask is not None and seqused_k is not None:
                check_lengths(seqused_k, cache_leftpad, q.shape[1], _NAME)
            if tree_mask is not None and seqused_q is None and seqused_k is not None:
                return tree_attention(
                    *(q, k_cache, v_cache, tree_mask),
                    seqused_k=seqused_k,
                    block_table=block_table,
                    leftpad_k=cache_leftpad,
                    k_scale=k_scale,
                    v_scale=v_scale,
                    softmax_scale=softmax_scale,
                    softcap=softcap,
                    sinks=sinks,
                    return_lse=return_softmax_lse,
                    num_splits=num_splits,
                    backend=backend,
                    name=_NAME,
                )
            return attention(
                q,
                k_cache,
                v_cache,
                causal=causal,
                window=window,
                softmax_scale=softmax_scale,
                softcap=softcap,
                alibi_slopes=alibi_slopes,
                sinks=sinks,
                seqused_q=seqused_q,
                seqused_k=seqused_k,
                leftpad_k=cache_leftpad,
                block_table=block_table,
                k_scale=k_scale,
                v_scale=v_scale,
                block_mask=block_mask,
                return_lse=return_softmax_lse,
                num_splits=num_splits,
                backend=backend,
                name=_NAME,
            )
        except ArgumentError as error:
            raise _in_callers_words(error, k is not None, cache_batch_idx is not None) from None

    if k is not None and v is not None and lengths is not None:
        if rotary_cos is not None and rotary_sin is not None:
            q = rotate(
                *(q, rotary_cos, rotary_sin, lengths),
                advance=causal or window != UNBOUNDED,
                interleaved=rotary_interleaved,
                name=_NAME,
            )
        # No query row: every argument is checked, and nothing is computed. What would be
        # refused below must be refused before the cache is written. On CUDA, where no content is
        # looked at and the engines' limits are the same, q may be empty: that launches nothing.
        total = lengths + k.shape[1]
        if q.is_cuda and q.dim() == 4 and tree_mask is None:
            attend(q[:, :0], total, None)
        else:
            attend(q, total, torch.zeros_like(lengths))
        append_kv_cache(
            *(k, v, k_cache, v_cache, lengths),
            block_table=block_table,
            k_scale=k_scale,
            v_scale=v_scale,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            name=_NAME,
        )
        lengths = total
    if lengths is None and block_table is not None:
        lengths = torch.full((q.shape[0],), capacity, dtype=torch.int32, device=q.device)
    result = attend(q, lengths, None)
    if isinstance(result, Tensor):
        return result
    out, lse = result
    return out, torch.where(lse == -math.inf, math.inf, lse)
