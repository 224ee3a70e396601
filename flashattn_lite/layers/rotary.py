"""Rotary position embedding, under flash_attn's names: pairs of a head's first rotary_dim elements
are rotated by an angle proportional to the position. Su et al., RoFormer (2021).

A pair is elements (i, i + rotary_dim / 2) by default, (2 i, 2 i + 1) when interleaved. All of it is
differentiable plain torch; the rotation is done in float32 (float64 for float64 x).
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flashattn_lite import _argument_types
from flashattn_lite._ops import ArgumentError, renamed

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]

_INTEGERS = (torch.int32, torch.int64)

Offsets: TypeAlias = int | Tensor  # tokens before the first: one for all, or (batch) integers


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., heads, head_dim) with cos and sin (..., rotary_dim / 2), broadcast over heads."""
    half = cos.shape[-1]
    precision = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(precision).unsqueeze(-2) for t in (cos, sin))
    turned, rest = x[..., : 2 * half].to(precision), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Rotates x (batch, seqlen, heads, head_dim) by cos and sin (seqlen, rotary_dim / 2), or
    (batch, seqlen, rotary_dim / 2).

    >>> x = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> apply_rotary_emb_torch(x, torch.zeros(1, 1), torch.ones(1, 1)).flatten().tolist()
    [0.0, 1.0]
    """
    name = "apply_rotary_emb_torch"
    _check(name, x, cos, sin)
    interleaved = _argument_types.flag(name, "interleaved", interleaved)
    rows = x.shape[-1 - cos.dim() : -2]
    if rows != cos.shape[:-1]:
        raise ArgumentError(
            f"{name}: cos is for {tuple(cos.shape[:-1])} tokens but x has {tuple(rows)}; they must "
            "agree"
        )
    return _rotate(x, cos, sin, interleaved)


def _check(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    _argument_types.dense(name, x=x, cos=cos, sin=sin)
    for argument, t in (("x", x), ("cos", cos), ("sin", sin)):
        if not t.dtype.is_floating_point or t.dtype.itemsize == 1:
            raise ArgumentError(
                f"{name}: {argument} is {t.dtype}; it must be floating-point of 16 bits or more"
            )
    if cos.shape != sin.shape:
        raise ArgumentError(
            f"{name}: cos has shape {tuple(cos.shape)} but sin has {tuple(sin.shape)}"
        )
    if cos.dim() not in (2, 3) or x.dim() < 3:
        raise ArgumentError(
            f"{name}: x has shape {tuple(x.shape)} and cos {tuple(cos.shape)}; they must be (..., "
            "heads, head_dim) and (rows, rotary_dim / 2)"
        )
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ArgumentError(
            f"{name}: cos has {cos.shape[-1]} columns, for a rotary_dim of {2 * cos.shape[-1]}; it "
            f"must be at most head_dim, {x.shape[-1]}"
        )


def _positions(
    name: str, x: Tensor, offsets: Offsets, cu_seqlens: Tensor | None, limit: int
) -> Tensor:
    """The position of each token of x: (seqlen), (batch, seqlen), or (total) when varlen."""
    if cu_seqlens is None:
        token = torch.arange(x.shape[1], device=x.device)
        if not isinstance(offsets, Tensor):
            return _within(name, token + offsets, limit)
        if offsets.shape != x.shape[:1]:
            raise ArgumentError(
                f"{name}: seqlen_offsets has shape {tuple(offsets.shape)}; it must be "
                f"({x.shape[0]},)"
            )
        return _within(name, token + offsets.to(x.device).unsqueeze(1), limit)
    if cu_seqlens.dtype not in _INTEGERS or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ArgumentError(
            f"{name}: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it must "
            "be int32, (batch + 1,)"
        )
    if isinstance(offsets, Tensor) and offsets.shape[0] != cu_seqlens.shape[0] - 1:
        raise ArgumentError(
            f"{name}: seqlen_offsets has shape {tuple(offsets.shape)}; it must be "
            f"({cu_seqlens.shape[0] - 1},)"
        )
    if cu_seqlens.shape[0] == 1:  # no sequences: nothing of x belongs to any
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    token = torch.arange(x.shape[0], device=x.device)
    begin = cu_seqlens.to(torch.int64)
    sequence = torch.searchsorted(begin[1:].contiguous(), token, right=True)
    sequence = sequence.clamp_max(max(0, begin.numel() - 2))
    position = token - begin[sequence]
    if isinstance(offsets, Tensor):
        position = position + offsets.to(x.device)[sequence]
    else:
        position = position + offsets
    return _within(name, position, limit)


def _within(name: str, position: Tensor, limit: int) -> Tensor:
    """Raises if a position has no row in cos (on the CPU; elsewhere looking would synchronise)."""
    if position.device.type == "cpu" and position.numel() and not torch.compiler.is_compiling():
        low, high = position.aminmax()
        if low < 0 or high >= limit:
            raise ArgumentError(
                f"{name}: positions are {int(low)} to {int(high)} but cos has {limit} rows; "
                "seqlen_offsets must keep them within"
            )
    return position


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates x by its tokens' positions.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens.
        cos: (rows, rotary_dim / 2): row p belongs to position p. rotary_dim <= head_dim; elements
            beyond it stay as they are.
        sin: like cos.
        interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2).
        inplace: write the result into x.
        seqlen_offsets: int, or integer (batch): the position of each sequence's first token.
        cu_seqlens: int32 (batch + 1), offsets of the sequences in x.
        max_seqlen: not needed here; taken because flash_attn does.

    Returns: like x; x itself when inplace. (If that is a leaf that requires a gradient, it receives
        the values, and what is returned is another tensor, which has the gradient.)

    Raises:
        ArgumentError: (a ValueError) for an argument that cannot be used.

    >>> x = torch.ones(1, 2, 1, 2)
    >>> angle = torch.tensor([[0.0], [torch.pi / 2]])
    >>> apply_rotary_emb(x, angle.cos(), angle.sin()).round().flatten().tolist()
    [1.0, 1.0, -1.0, 1.0]
    """
    return _apply(
        *("apply_rotary_emb", x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens)
    )


# For code written for flash_attn 2.0.
apply_rotary_emb_func = apply_rotary_emb


def _apply(
    name: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    inplace: bool,
    seqlen_offsets: Offsets,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    _check(name, x, cos, sin)
    interleaved = _argument_types.flag(name, "interleaved", interleaved)
    inplace = _argument_types.flag(name, "inplace", inplace)
    if cu_seqlens is not None:
        _argument_types.dense(name, x=x, cu_seqlens=cu_seqlens)
    if isinstance(seqlen_offsets, Tensor) and seqlen_offsets.dim() == 1:
        _argument_types.dense(name, x=x, seqlen_offsets=seqlen_offsets)
        if seqlen_offsets.dtype not in _INTEGERS:
            raise ArgumentError(f"{name}: seqlen_offsets is {seqlen_offsets.dtype}; use int32")
    else:
        seqlen_offsets = _argument_types.index(name, "seqlen_offsets", seqlen_offsets)
    expected = 4 if cu_seqlens is None else 3
    if x.dim() != expected:
        form = "(batch, seqlen, heads, head_dim)" if expected == 4 else "(total, heads, head_dim)"
        raise ArgumentError(f"{name}: x has shape {tuple(x.shape)}; it must be {form}")
    if cos.dim() != 2:
        raise ArgumentError(
            f"{name}: cos has shape {tuple(cos.shape)}; it must be (rows, rotary_dim / 2)"
        )
    if isinstance(seqlen_offsets, int) and seqlen_offsets == 0 and cu_seqlens is None:
        if x.shape[1] > cos.shape[0]:
            raise ArgumentError(f"{name}: x has {x.shape[1]} rows but cos has {cos.shape[0]}")
        rotated = _rotate(x, cos[: x.shape[1]], sin[: x.shape[1]], interleaved)
    else:
        position = _positions(name, x, seqlen_offsets, cu_seqlens, cos.shape[0])
        rotated = _rotate(x, cos[position], sin[position], interleaved)
    if not inplace:
        return rotated
    return _written_to_leaf(rotated, x) if _is_trained_leaf(x) else x.copy_(rotated)


def _is_trained_leaf(x: Tensor) -> bool:
    """torch's in-place operations refuse such a tensor; flash_attn writes to it all the same."""
    return x.requires_grad and x.is_leaf and torch.is_grad_enabled()


def _written_to_leaf(rotated: Tensor, leaf: Tensor) -> Tensor:
    with torch.no_grad():
        leaf.copy_(rotated)
    return rotated


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates q and k of a packed tensor in place.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads_q + 2 * heads_k,
            head_dim) with num_heads_q.
        cos: (rows, rotary_dim / 2).
        sin: like cos.
        cos_k: for k, when it differs.
        sin_k: like cos_k.
        interleaved: as in ``apply_rotary_emb``.
        seqlen_offsets: as in ``apply_rotary_emb``.
        num_heads_q: heads of q in a 4-D qkv.

    Returns: qkv.

    >>> qkv = torch.ones(1, 1, 3, 1, 2)
    >>> apply_rotary_emb_qkv_(qkv, torch.zeros(1, 1), torch.ones(1, 1)).flatten().tolist()
    [-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]
    """
    name = "apply_rotary_emb_qkv_"
    _argument_types.dense(
        name,
        **{"qkv": qkv, "cos": cos, "sin": sin},
        **_argument_types.given(cos_k=cos_k, sin_k=sin_k),
    )
    if _is_trained_leaf(qkv):
        options = (cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q)
        return _written_to_leaf(apply_rotary_emb_qkv_(qkv.clone(), *options), qkv)
    if num_heads_q is not None:
        num_heads_q = _argument_types.index(name, "num_heads_q", num_heads_q)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ArgumentError(
                f"{name}: qkv has shape {tuple(qkv.shape)}; it must be (batch, seqlen, 3, heads, "
                "head_dim)"
            )
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        if (
            qkv.dim() != 4
            or num_heads_q is None
            or not 0 <= num_heads_q <= qkv.shape[2]
            or (qkv.shape[2] - num_heads_q) % 2
        ):
            raise ArgumentError(
                f"{name}: qkv has shape {tuple(qkv.shape)} with num_heads_q {num_heads_q}; it must "
                "be (batch, seqlen, num_heads_q + 2 * heads_k, head_dim), or 5-D"
            )
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + heads_k]
    words = {"x": "qkv"}
    try:
        _apply(name, q, cos, sin, interleaved, True, seqlen_offsets)
        if cos_k is not cos or sin_k is not sin:
            words |= {"cos": "cos_k", "sin": "sin_k"}
        _apply(name, k, cos_k, sin_k, interleaved, True, seqlen_offsets)
    except (ArgumentError, TypeError) as error:
        raise renamed(error, words) from None
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
) -> Tensor:
    """Rotates k of kv (batch, seqlen, 2, heads_k, head_dim) in place; returns kv.

    >>> kv = torch.ones(1, 1, 2, 1, 2)
    >>> apply_rotary_emb_kv_(kv, torch.zeros(1, 1), torch.ones(1, 1)).flatten().tolist()
    [-1.0, 1.0, 1.0, 1.0]
    """
    _argument_types.dense("apply_rotary_emb_kv_", kv=kv, cos=cos, sin=sin)
    if _is_trained_leaf(kv):
        return _written_to_leaf(
            apply_rotary_emb_kv_(kv.clone(), cos, sin, interleaved, seqlen_offsets), kv
        )
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ArgumentError(
            f"apply_rotary_emb_kv_: kv has shape {tuple(kv.shape)}; it must be (batch, seqlen, 2, "
            "heads_k, head_dim)"
        )
    try:
        _apply("apply_rotary_emb_kv_", kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    except (ArgumentError, TypeError) as error:
        raise renamed(error, {"x": "kv"}) from None
    return kv


class RotaryEmbedding(nn.Module):
    """Computes, caches and applies cos and sin for a model; with ``scale_base`` also XPos's decay
    (Sun et al., A Length-Extrapolatable Transformer, 2022).

    Args:
        dim: rotary_dim, even.
        base: the wavelength's base.
        interleaved: pairs are (2 i, 2 i + 1).
        scale_base: XPos's; None is plain rotary.
        device: of the cached tables.

    >>> rotary = RotaryEmbedding(8)
    >>> rotary(torch.ones(2, 5, 3, 4, 16)).shape
    torch.Size([2, 5, 3, 4, 16])
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = "RotaryEmbedding"
        dim = _argument_types.index(name, "dim", dim)
        interleaved = _argument_types.flag(name, "interleaved", interleaved)
        if dim < 2 or dim % 2:
            raise ArgumentError(f"{name}: dim is {dim}; it must be even and positive")
        for argument, value in (("base", base), ("scale_base", scale_base)):
            if value is None and argument == "scale_base":
                continue
            if not 0 < _argument_types.number(name, argument, value) < math.inf:
                raise ArgumentError(f"{name}: {argument} is {value}; it must be > 0 and finite")
        base = float(base)
        self.dim, self.base, self.interleaved, self.scale_base = dim, base, interleaved, scale_base
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", base ** (-even / dim), persistent=False)
        decay = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", decay, persistent=False)
        self._seqlen_cached = 0
        self._tables: tuple[Tensor, ...] = ()

    def tables(self, seqlen: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """cos, sin, cos_k, sin_k for positions 0 .. seqlen, each (rows, dim / 2)."""
        cached = self._tables
        if (
            not cached
            or seqlen > self._seqlen_cached
            or cached[0].device != device
            or cached[0].dtype != dtype
            or (self.training and cached[0].is_inference())
        ):
            position = torch.arange(seqlen, device=device, dtype=torch.float32)
            # Angles in float32 whatever the model's dtype: half precision cannot count positions.
            frequency = self.inv_freq.to(device)
            if frequency.dtype != torch.float32:
                even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
                frequency = self.base ** (-even / self.dim)
            angle = torch.outer(position, frequency)
            cos, sin, cos_k, sin_k = angle.cos(), angle.sin(), angle.cos(), angle.sin()
            if self.scale is not None and self.scale_base is not None:
                power = (position - seqlen // 2) / self.scale_base
                growth = self.scale.to(device, torch.float32) ** power.unsqueeze(1)
                cos, sin, cos_k, sin_k = cos * growth, sin * growth, cos_k / growth, sin_k / growth
            self._tables = tuple(t.to(dtype) for t in (cos, sin, cos_k, sin_k))
            self._seqlen_cached = seqlen
        return self._tables

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Any:
        """Rotates q and k in place.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads_q + 2 * heads_k,
                head_dim) with num_heads_q; with kv it is q, (batch, seqlen, heads_q, head_dim).
            kv: (batch, seqlen_k, 2, heads_k, head_dim).
            seqlen_offset: as in ``apply_rotary_emb``.
            max_seqlen: rows of the tables; needed when seqlen_offset is a tensor on a device (else
                its largest element is read).
            num_heads_q: heads of q in a 4-D qkv.

        Returns: qkv, or (q, kv).
        """
        name = "RotaryEmbedding"
        for argument, t in {"qkv": qkv, **_argument_types.given(kv=kv)}.items():
            _argument_types.dense(name, **{argument: t})
            if t.dim() < 4:
                raise ArgumentError(
                    f"{name}: {argument} has shape {tuple(t.shape)}; it must be 4-D or 5-D"
                )
        if isinstance(seqlen_offset, Tensor):
            _argument_types.dense(name, seqlen_offset=seqlen_offset)
        else:
            seqlen_offset = _argument_types.index(name, "seqlen_offset", seqlen_offset)
        seqlen = max(qkv.shape[1], 0 if kv is None else kv.shape[1])
        if max_seqlen is not None:
            rows = max(_argument_types.index(name, "max_seqlen", max_seqlen), seqlen)
        elif isinstance(seqlen_offset, Tensor):
            rows = seqlen + (int(seqlen_offset.max()) if seqlen_offset.numel() else 0)
        else:
            rows = seqlen + seqlen_offset
        cos, sin, cos_k, sin_k = self.tables(rows, qkv.device, qkv.dtype)
        if kv is None:
            return apply_rotary_emb_qkv_(
                *(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
