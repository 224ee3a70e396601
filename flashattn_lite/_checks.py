"""Argument checks for calls that do not reach an operator: those that run through the reference.

The rules and the wording are those of csrc/torch/arguments.cpp, which checks every other call. The
contents of index tensors are read, so this waits for the device when they are on one.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, cast

from torch import Tensor, int32, int64

from flashattn_lite import _argument_types
from flashattn_lite._ops import ArgumentError
from flashattn_lite.block_mask import BlockMask
from flashattn_lite.reference import Options

_IndexVector = Literal["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k"]
_INDEX_VECTORS: tuple[_IndexVector, ...] = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "leftpad_k",
)

READ = (*_INDEX_VECTORS, "block_table")  # options whose contents decide what is computed

_TENSORS = (
    *(*_INDEX_VECTORS, "block_table", "k_scale", "v_scale"),
    *("alibi_slopes", "sinks", "bias", "mask"),
)


def check(name: str, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    """Raises ArgumentError, beginning with ``name``, for the first argument that cannot be used."""
    given = _argument_types.given(**{argument: options.get(argument) for argument in _TENSORS})
    _argument_types.dense(name, q=q, k=k, v=v, **given)
    _argument_types.flag(name, "causal", options.get("causal"))
    for argument in ("softcap", "dropout_p", "softmax_scale"):
        value = cast("float | None", options.get(argument))
        if value is not None:
            _argument_types.number(name, argument, value)
    mask = options.get("block_mask")
    if not isinstance(mask, BlockMask | None):
        raise TypeError(f"{name}: block_mask is {type(mask).__name__}; it must be a BlockMask")
    try:
        _check_tensors(q, k, v, options)
        batch = _check_shapes(q, k, v, options)
        _check_scores(q, batch, options)
        _check_contents(q, k, batch, options)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error}") from None


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    quantised = not k.dtype.is_floating_point or k.dtype.itemsize == 1
    if not q.dtype.is_floating_point or q.dtype.itemsize == 1:
        raise ArgumentError(f"q is {_dtype(q)}; it must be float32, float16, bfloat16 or float64")
    if v.dtype != k.dtype:
        raise ArgumentError(f"k is {_dtype(k)} but v is {_dtype(v)}; they must agree")
    if not quantised and k.dtype != q.dtype:
        raise ArgumentError(f"k and v are {_dtype(k)} but q is {_dtype(q)}; they must agree")
    if quantised and (options.get("k_scale") is None or options.get("v_scale") is None):
        raise ArgumentError(f"k and v are {_dtype(k)}, which needs k_scale and v_scale")
    for argument, t in (("sinks", options.get("sinks")), ("bias", options.get("bias"))):
        if t is not None and (not t.dtype.is_floating_point or t.dtype.itemsize == 1):
            raise ArgumentError(f"{argument} is {_dtype(t)}; it must be floating-point")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, options: Options) -> int:
    """The batch size."""
    cu_q, cu_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    table = options.get("block_table")
    paged = table is not None
    forms = {
        "q": (q, cu_q, "q", "(batch, seqlen_q, heads_q, head_dim)"),
        "k": (k, cu_k, "k", "(batch, seqlen_k, heads_k, head_dim)"),
        "v": (v, cu_k, "k", "(batch, seqlen_k, heads_k, head_dim)"),
    }
    for argument, (t, cu, side, form) in forms.items():
        if t.dim() != (4 if cu is None else 3):
            if cu is not None:
                form = f"(total_{side}, heads_{side}, head_dim) because cu_seqlens_{side} is given"
            raise ArgumentError(f"{argument} has shape {tuple(t.shape)}; it must be {form}")
    if paged and cu_k is not None:
        raise ArgumentError("cu_seqlens_k does not go with block_table; give seqused_k")
    if paged and options.get("seqused_k") is None:
        raise ArgumentError("block_table needs seqused_k, the keys used of each sequence")
    if k.shape[:-1] != v.shape[:-1]:
        raise ArgumentError(
            f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; only head_dim may differ"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ArgumentError(f"k has head_dim {k.shape[-1]} but q has {q.shape[-1]}")
    if q.shape[-1] < 1:
        raise ArgumentError("q has head_dim 0; it must be at least 1")
    heads_q, heads_k = q.shape[-2], k.shape[-2]
    if heads_q % heads_k if heads_k else heads_q:
        raise ArgumentError(
            f"q has {heads_q} heads but k has {heads_k}; heads_q must be a multiple of heads_k"
        )
    batch = q.shape[0] if cu_q is None else cu_q.numel() - 1
    if batch < 0:
        raise ArgumentError("cu_seqlens_q is empty; it must hold batch + 1 offsets, from 0")
    if not paged and cu_k is None and k.shape[0] != batch:
        raise ArgumentError(f"k has batch {k.shape[0]} but q has batch {batch}")
    if table is not None and table.dtype != int32:
        raise ArgumentError(f"block_table is {_dtype(table)}; it must be int32")
    if table is not None and (table.dim() != 2 or table.shape[0] != batch):
        raise ArgumentError(
            f"block_table has shape {tuple(table.shape)}; it must be ({batch}, max_pages)"
        )
    if paged and k.shape[1] < 1:
        raise ArgumentError("k has page_size 0; a page must hold at least one token")
    for argument in _INDEX_VECTORS:
        vector: Tensor | None = options.get(argument)
        if vector is None:
            continue
        size = batch + 1 if argument.startswith("cu_") else batch
        if vector.dtype != int32:
            raise ArgumentError(f"{argument} is {_dtype(vector)}; it must be int32")
        if tuple(vector.shape) != (size,):
            raise ArgumentError(f"{argument} has shape {tuple(vector.shape)}; it must be ({size},)")
    return batch


def _check_scores(q: Tensor, batch: int, options: Options) -> None:
    heads_q = q.shape[-2]
    softcap, dropout_p = options.get("softcap", 0.0), options.get("dropout_p", 0.0)
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ArgumentError(f"softcap is {softcap}; it must be >= 0 (0 = off)")
    if not 0 <= dropout_p < 1:
        raise ArgumentError(f"dropout_p is {dropout_p}; it must be in [0, 1)")
    scale, seed = options.get("softmax_scale"), options.get("dropout_seed")
    if scale is not None and not math.isfinite(scale):
        raise ArgumentError(f"softmax_scale is {scale}; it must be finite")
    if dropout_p > 0 and not (
        isinstance(seed, Tensor) and seed.dtype == int64 and seed.numel() == 1
    ):
        raise ArgumentError("dropout_seed must be one int64 on the CPU")
    slopes, sinks = options.get("alibi_slopes"), options.get("sinks")
    if slopes is not None and tuple(slopes.shape) not in ((heads_q,), (batch, heads_q)):
        raise ArgumentError(
            f"alibi_slopes has shape {tuple(slopes.shape)}; it must be ({heads_q},) or "
            f"({batch}, {heads_q})"
        )
    if sinks is not None and tuple(sinks.shape) != (heads_q,):
        raise ArgumentError(f"sinks has shape {tuple(sinks.shape)}; it must be ({heads_q},)")


def _check_contents(q: Tensor, k: Tensor, batch: int, options: Options) -> None:
    lengths: dict[str, list[int]] = {}
    for side, t in (("q", q), ("k", k)):
        cu = options.get("cu_seqlens_q") if side == "q" else options.get("cu_seqlens_k")
        lengths[side] = [t.shape[1]] * batch if cu is None else _differences(cu, side, t)
    table = options.get("block_table")
    if table is not None:
        lengths["k"] = [table.shape[1] * k.shape[1]] * batch
    bounded = {"seqused_q": "q", "seqused_k": "k", "leftpad_k": "k"}
    for argument in _INDEX_VECTORS[2:]:
        values, side = options.get(argument), bounded[argument]
        if values is None:
            continue
        for b, value in enumerate(values.tolist()):
            if not 0 <= value <= lengths[side][b]:
                at = ", all that block_table can address" if table is not None else ""
                raise ArgumentError(
                    f"{argument}[{b}] is {value}; it must be 0 to {lengths[side][b]}"
                    f"{at or ', the length of that sequence'}"
                )
    bias = options.get("bias")
    if bias is not None:
        full = (batch, q.shape[-2], max(lengths["q"], default=0), max(lengths["k"], default=0))
        fits = len(bias.shape) == 4 and all(
            have == 1 or (have == want if d < 2 else have >= want)
            for d, (have, want) in enumerate(zip(bias.shape, full, strict=True))
        )
        if not fits:
            raise ArgumentError(f"bias has shape {tuple(bias.shape)}; it must broadcast to {full}")
    mask = options.get("block_mask")
    if mask is not None:
        _check_block_mask(mask, q, batch, options, lengths)
    used = options.get("seqused_k")
    if table is not None and used is not None:
        for b, value in enumerate(used.tolist()):
            for p, page in enumerate(table[b, : -(-value // k.shape[1])].tolist()):
                if not 0 <= page < k.shape[0]:
                    raise ArgumentError(
                        f"block_table[{b}, {p}] is {page} but k has {k.shape[0]} pages"
                    )


def _check_block_mask(
    mask: BlockMask, q: Tensor, batch: int, options: Options, lengths: dict[str, list[int]]
) -> None:
    if mask.batch not in (1, batch):
        raise ArgumentError(f"block_mask has batch {mask.batch}; it must be 1 or {batch}")
    if mask.heads not in (1, q.shape[-2]):
        raise ArgumentError(
            f"block_mask has {mask.heads} heads; it must be 1 or {q.shape[-2]}, the heads of q"
        )
    used, leftpad = options.get("seqused_k"), options.get("leftpad_k")
    keys = list(lengths["k"]) if used is None else used.tolist()
    if leftpad is not None:
        keys = [n - skipped for n, skipped in zip(keys, leftpad.tolist(), strict=True)]
    for b, n in enumerate(keys):
        if n > mask.seqlen_k:
            raise ArgumentError(
                f"block_mask has seqlen_k {mask.seqlen_k} but sequence {b} has {n} keys; a mask "
                "must cover every key"
            )
    ragged = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k")
    if batch and all(options.get(name) is None for name in ragged):
        seqlen_q, seqlen_k = lengths["q"][0], lengths["k"][0]
        before = (mask.seqlen_k - mask.seqlen_q) - (seqlen_k - seqlen_q)
        if before > 0 and seqlen_q > 0:
            raise ArgumentError(
                f"block_mask covers {mask.seqlen_q} x {mask.seqlen_k} but q and k have seqlens "
                f"{seqlen_q} and {seqlen_k}: the first query row lies {before} rows before the "
                "mask's first"
            )


def check_offsets(name: str, side: Literal["q", "k"], cu_seqlens: Tensor, longest: Any) -> None:
    """cu_seqlens of tokens in pages, which tell no number of rows, and the longest sequence."""
    longest = _argument_types.index(name, f"max_seqlen_{side}", longest)
    try:
        lengths = _differences(cu_seqlens, side, None)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error}") from None
    if max(lengths, default=0) > longest:
        raise ArgumentError(
            f"{name}: max_seqlen_{side} is {longest} but cu_seqlens_{side} has a sequence of "
            f"{max(lengths)} rows; it must be at least that"
        )


def _differences(cu: Tensor, side: str, t: Tensor | None) -> list[int]:
    """The sequences' lengths; t holds their rows."""
    offsets = cu.tolist()
    if offsets[0] != 0:
        raise ArgumentError(f"cu_seqlens_{side} starts at {offsets[0]}; it must start at 0")
    for i, (a, b) in enumerate(pairwise(offsets)):
        if b < a:
            raise ArgumentError(
                f"cu_seqlens_{side} falls from {a} to {b} at entry {i + 1}; it must not fall"
            )
    if t is not None and offsets[-1] > t.shape[0]:
        raise ArgumentError(
            f"cu_seqlens_{side} ends at {offsets[-1]} but {side} has {t.shape[0]} rows"
        )
    return [b - a for a, b in pairwise(offsets)]


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
