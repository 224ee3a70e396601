"""Attention as today's models have it: grouped heads, rotary embeddings, windows, softcap, sinks,
QK-norm, packed batches and a KV cache, in one module with the Llama family's names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Linear, Parameter, RMSNorm

from flashattn_lite import _argument_types
from flashattn_lite._ops import ArgumentError, renamed
from flashattn_lite.attention import attention, window_sides
from flashattn_lite.kv_cache import append_kv_cache

__all__ = ["Attention", "KVCache"]

_NAME = "nn.Attention"

# What forward calls the arguments that errors are about.
_WORDS = {
    **{"cu_seqlens_q": "cu_seqlens", "cu_seqlens_k": "cu_seqlens"},
    **{"max_seqlen_q": "max_seqlen", "max_seqlen_k": "max_seqlen"},
    **{"seqused_q": "seqlens", "seqused_k": "seqlens"},
    **{"k_cache": "cache.k", "v_cache": "cache.v", "cache_seqlens": "cache.seqlens"},
    "block_table": "cache.block_table",
}


@dataclass
class KVCache:
    """Keys and values seen so far, one sequence per batch entry; forward appends to it in place.

    >>> cache = KVCache.empty(batch=2, capacity=16, heads_kv=1, head_dim=8)
    >>> cache.k.shape, cache.seqlens.tolist()
    (torch.Size([2, 16, 1, 8]), [0, 0])
    """

    k: Tensor
    """(batch, capacity, heads_kv, head_dim), or (num_pages, page_size, heads_kv, head_dim)."""
    v: Tensor
    """Like k."""
    seqlens: Tensor
    """int32 (batch): rows in use; forward adds to it."""
    block_table: Tensor | None = None
    """int32 (batch, max_pages): the physical page of each logical one, when k and v are pages."""

    @classmethod
    def empty(
        cls,
        *,
        batch: int,
        capacity: int,
        heads_kv: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """A contiguous cache with room for ``capacity`` tokens of each sequence."""
        sizes = {"batch": batch, "capacity": capacity, "heads_kv": heads_kv, "head_dim": head_dim}
        for name, size in sizes.items():
            sizes[name] = _argument_types.index("KVCache.empty", name, size)
            if not 0 <= sizes[name] < 2**31:
                raise ArgumentError(f"KVCache.empty: {name} is {size}; it must be 0 to 2^31 - 1")
        batch, capacity, heads_kv, head_dim = sizes.values()
        k = torch.zeros(batch, capacity, heads_kv, head_dim, dtype=dtype, device=device)
        return cls(k, torch.zeros_like(k), torch.zeros(batch, dtype=torch.int32, device=device))


class Attention(torch.nn.Module):
    """Self- or cross-attention with projections.

    Layouts, in einops' terms: x is "b n d" (or "t d" with cu_seqlens); q_proj gives "b n (h e)",
    k_proj and v_proj "b n (g e)", where query head h reads head h // (heads / heads_kv) of the g;
    o_proj takes "b n (h e)". The parameters are named as in transformers' Llama, Qwen3 and GPT-OSS
    attention, whose state dicts load.

    Order: projection, QK-norm, rotary, attention, projection.

    Args:
        dim: features of x.
        heads: query heads.
        heads_kv: heads of keys and values; default: heads.
        head_dim: default: dim / heads.
        dim_context: features of the context, for cross-attention; default: dim.
        bias: biases in q_proj, k_proj and v_proj.
        out_bias: a bias in o_proj; default: as bias.
        causal: token i sees those up to i.
        window: (left, right), inclusive, in tokens; None is unbounded.
        softmax_scale: default: 1 / sqrt(head_dim).
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        sinks: a learned logit per head that joins the softmax's denominator.
        qk_norm: RMSNorm over head_dim of q and k.
        norm_eps: the norm's epsilon.
        rotary_dim: features of each head that are rotated by position; 0 is none.
        rotary_base: the longest wavelength is 2 pi * rotary_base.
        rotary_interleaved: pairs are (2p, 2p + 1) (GPT-J) instead of (p, p + rotary_dim / 2).
        dropout: probability of dropping a weight in training.

    >>> attention = Attention(64, 8, heads_kv=2, causal=True, rotary_dim=8)
    >>> attention(torch.ones(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        heads_kv: int | None = None,
        head_dim: int | None = None,
        dim_context: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] = (None, None),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        sinks: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rotary_dim: int = 0,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "heads": heads, "heads_kv": heads_kv, "head_dim": head_dim}
        for name, size in (sizes | {"dim_context": dim_context}).items():
            if size is not None and _argument_types.index(_NAME, name, size) < 1:
                raise ArgumentError(f"{_NAME}: {name} is {size}; it must be at least 1")
        _argument_types.index(_NAME, "rotary_dim", rotary_dim)
        flags = {"bias": bias, "causal": causal, "sinks": sinks, "qk_norm": qk_norm}
        for name, value in (flags | {"rotary_interleaved": rotary_interleaved}).items():
            _argument_types.flag(_NAME, name, value)
        numbers = {"norm_eps": norm_eps, "rotary_base": rotary_base, "softcap": softcap}
        for name, number in (numbers | {"softmax_scale": softmax_scale}).items():
            if number is not None and not math.isfinite(
                _argument_types.number(_NAME, name, number)
            ):
                raise ArgumentError(f"{_NAME}: {name} is {number}; it must be finite")
        for name, number in numbers.items():
            if number < 0 or (number == 0 and name == "rotary_base"):
                least = "> 0" if name == "rotary_base" else ">= 0"
                raise ArgumentError(f"{_NAME}: {name} is {number}; it must be {least}")
        window_sides(window, causal, _NAME)
        if out_bias is not None:
            out_bias = _argument_types.flag(_NAME, "out_bias", out_bias)
        if not 0.0 <= _argument_types.number(_NAME, "dropout", dropout) < 1.0:
            raise ArgumentError(f"{_NAME}: dropout is {dropout}; it must be in [0, 1)")
        heads_kv = heads if heads_kv is None else heads_kv
        if heads % heads_kv:
            raise ArgumentError(
                f"{_NAME}: heads is {heads}, not a multiple of heads_kv {heads_kv}; it must be one"
            )
        if head_dim is None:
            if dim % heads:
                raise ArgumentError(
                    f"{_NAME}: dim is {dim}, not a multiple of heads {heads}; give head_dim"
                )
            head_dim = dim // heads
        if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
            raise ArgumentError(
                f"{_NAME}: rotary_dim is {rotary_dim}; it must be even and at most {head_dim}"
            )
        self.heads, self.heads_kv, self.head_dim = heads, heads_kv, head_dim
        self.causal, self.window, self.dropout = causal, window, dropout
        self.softmax_scale, self.softcap = softmax_scale, softcap
        self.rotary_interleaved = rotary_interleaved
        dim_context = dim if dim_context is None else dim_context
        out_bias = bias if out_bias is None else out_bias
        to: dict[str, torch.device | str | torch.dtype | None] = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, heads * head_dim, bias, **to)
        self.k_proj = Linear(dim_context, heads_kv * head_dim, bias, **to)
        self.v_proj = Linear(dim_context, heads_kv * head_dim, bias, **to)
        self.o_proj = Linear(heads * head_dim, dim, out_bias, **to)
        self.q_norm = RMSNorm(head_dim, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.sinks = Parameter(torch.zeros(heads, device=device, dtype=dtype)) if sinks else None
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
        inv_freq = rotary_base ** -(exponents / max(1, rotary_dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        seqlens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        bias: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: (batch, seqlen, dim), or (total, dim) with cu_seqlens.
            context: (batch, seqlen_k, dim_context): attend to this instead of x.
            position_ids: (batch, seqlen) or (total), for the rotary embedding; default: counted
                from the start of each sequence (from cache.seqlens with a cache).
            seqlens: int32 (batch): real tokens of each sequence, padding at the end; of the context
                if it is given. Padded rows of x then give o_proj's bias.
            cu_seqlens: int32 (batch + 1), from 0: the sequences are packed one after the other.
            max_seqlen: the longest of those; worth giving on CUDA.
            bias: broadcasts to (batch, heads, seqlen, seqlen_k), added to the scores.
            cache: keys and values before x; x's are appended to it, in place and without gradient.

        Returns: like x.
        """
        self._check(x, context, position_ids, seqlens, cu_seqlens, cache)
        source = x if context is None else context
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(source).unflatten(-1, (self.heads_kv, self.head_dim))
        v = self.v_proj(source).unflatten(-1, (self.heads_kv, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.inv_freq.numel():
            if position_ids is None:
                position_ids = _positions(x, cu_seqlens, cache)
            cos, sin = self._rotation(position_ids, q.dtype)
            q = self._rotate(q, cos, sin)
            k = self._rotate(k, cos, sin) if context is None else k
        seqused_q, seqused_k, block_table = (
            (None if context is not None else seqlens),
            seqlens,
            None,
        )
        try:
            if cache is not None:
                append_kv_cache(
                    *(k, v, cache.k, cache.v, cache.seqlens),
                    block_table=cache.block_table,
                    name=_NAME,
                )
                cache.seqlens += x.shape[1]
                k, v, seqused_k, block_table = cache.k, cache.v, cache.seqlens, cache.block_table
            out = attention(
                *(q, k, v),
                causal=self.causal,
                window=self.window,
                softmax_scale=self.softmax_scale,
                softcap=self.softcap,
                sinks=self.sinks,
                bias=bias,
                dropout_p=self.dropout if self.training else 0.0,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=max_seqlen,
                max_seqlen_k=max_seqlen,
                seqused_q=seqused_q,
                seqused_k=seqused_k,
                block_table=block_table,
                name=_NAME,
            )
        except (ArgumentError, TypeError) as error:
            raise renamed(error, _WORDS) from None
        assert isinstance(out, Tensor)
        projected: Tensor = self.o_proj(out.flatten(-2))
        return projected

    def _check(
        self,
        x: Tensor,
        context: Tensor | None,
        position_ids: Tensor | None,
        seqlens: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: KVCache | None,
    ) -> None:
        _argument_types.dense(
            _NAME,
            x=x,
            **_argument_types.given(
                context=context, seqlens=seqlens, cu_seqlens=cu_seqlens, position_ids=position_ids
            ),
        )
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"{_NAME}: cache is {cache!r}; it must be a KVCache")
        if x.dim() != (3 if cu_seqlens is None else 2):
            form = "(batch, seqlen, dim)" if cu_seqlens is None else "(total, dim) with cu_seqlens"
            raise ArgumentError(f"{_NAME}: x has shape {tuple(x.shape)}; it must be {form}")
        sources = {"x": (x, self.q_proj), "context": (context, self.k_proj)}
        for name, (t, projection) in sources.items():
            if t is not None and t.shape[-1] != projection.in_features:
                raise ArgumentError(
                    f"{_NAME}: {name} has {t.shape[-1]} features; it must have "
                    f"{projection.in_features}"
                )
            if t is not None and (not t.is_floating_point() or t.dtype.itemsize == 1):
                raise ArgumentError(f"{_NAME}: {name} is {t.dtype}; it must be floating-point")
        if position_ids is not None and (
            position_ids.dtype is torch.bool
            or position_ids.is_complex()
            or (position_ids.is_floating_point() and position_ids.dtype.itemsize < 4)
        ):
            raise ArgumentError(f"{_NAME}: position_ids is {position_ids.dtype}; it must be int64")
        if position_ids is not None and position_ids.shape not in (x.shape[:-1], (1, x.shape[-2])):
            raise ArgumentError(
                f"{_NAME}: position_ids has shape {tuple(position_ids.shape)}; it must be "
                f"{tuple(x.shape[:-1])}"
            )
        given = {"context": context, "seqlens": seqlens, "cu_seqlens": cu_seqlens, "cache": cache}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1 and names != ["context", "seqlens"]:
            raise ArgumentError(f"{_NAME}: {' and '.join(names)} do not go together")
        if context is not None and self.inv_freq.numel():
            raise ArgumentError(f"{_NAME}: a context has no positions; make rotary_dim 0")
        if (
            cache is not None
            and torch.is_grad_enabled()
            and any(t.requires_grad for t in (x, *self.parameters()))
        ):
            raise ArgumentError(f"{_NAME}: a cache has no gradient; call under torch.no_grad()")

    def _rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (..., seqlen, 1, rotary_dim / 2)."""
        angle = position_ids[..., None, None].to(torch.float32) * self.inv_freq
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (..., seqlen, heads, head_dim), its first rotary_dim features rotated."""
        half = self.inv_freq.numel()
        rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
        if self.rotary_interleaved:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
            return torch.cat((pairs, rest), -1)
        a, b = rotated[..., :half], rotated[..., half:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), -1)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, heads_kv={self.heads_kv}, head_dim={self.head_dim}, "
            f"causal={self.causal}, window={self.window}, softcap={self.softcap}"
        )


def _positions(x: Tensor, cu_seqlens: Tensor | None, cache: KVCache | None) -> Tensor:
    """Of each token in its sequence."""
    if cu_seqlens is None:
        positions = torch.arange(x.shape[1], device=x.device)
        return positions if cache is None else positions + cache.seqlens[:, None]
    token = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    return token - cu_seqlens[sequence.clamp_max(cu_seqlens.shape[0] - 2)]
