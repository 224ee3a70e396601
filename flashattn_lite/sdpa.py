"""torch's ``scaled_dot_product_attention`` on this library's kernels: the function, and putting it
in place of torch's for a while.

torch counts rows and keys from the first ones (top-left), the kernels from the last ones; torch has
heads before rows, the kernels after them. Both are a matter of views: nothing is copied or masked.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from flashattn_lite import _argument_types
from flashattn_lite._masks import (
    TOP_LEFT_CAUSAL,
    Band,
    MaskOptions,
    band_options,
    is_causal_bias,
    mask_options,
)
from flashattn_lite._ops import ArgumentError, renamed
from flashattn_lite.attention import attention, autocasts, plain_attention

__all__ = ["SdpaCalls", "scaled_dot_product_attention", "use_as_sdpa"]

_NAME = "scaled_dot_product_attention"

# What torch calls the arguments that errors are about.
_TORCH_WORDS = {
    **{"q": "query", "k": "key", "v": "value", "bias": "attn_mask"},
    "softmax_scale": "scale",
}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * Q K^T + mask) V with torch's signature and semantics.

    Masks that are padding (a row per batch entry, shared by heads and queries) or a band (causal,
    windowed; one for all batch entries and heads) are recognised on the CPU and become lengths and
    windows; all others, and masks that need a gradient, are added to the scores. float64 runs
    through ``flashattn_lite.reference``. Any leading dimensions; they broadcast.

    Args:
        query: (..., heads_q, seqlen_q, head_dim); also (seqlen_q, head_dim) and (n, seqlen_q,
            head_dim). float32, float16, bfloat16 or float64; head_dim 1 to 256.
        key: (..., heads_k, seqlen_k, head_dim).
        value: (..., heads_k, seqlen_k, head_dim_v).
        attn_mask: broadcasts to (..., heads_q, seqlen_q, seqlen_k). bool: True takes part. Float
            (of query's dtype, or float32): added to the scores, differentiable. A CausalBias
            (``torch.nn.attention.bias``) becomes a window.
        dropout_p: in [0, 1]; applied whenever it is not 0, as in torch. The random numbers follow
            ``torch.manual_seed``, but are not torch's.
        is_causal: row i sees keys 0 to i (top-left, whatever the lengths). Excludes attn_mask.
        scale: default 1 / sqrt(head_dim).
        enable_gqa: heads_q may be a multiple of heads_k. (Without it, 1 still broadcasts.)

    Returns:
        (..., heads_q, seqlen_q, head_dim_v), in memory in query's order, as torch has it; 0 in rows
        that see nothing.

    Raises:
        ArgumentError: (a RuntimeError and a ValueError) where torch raises a RuntimeError.

    >>> q = torch.ones(2, 4, 3, 8); k = v = torch.ones(2, 2, 5, 8)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).shape
    torch.Size([2, 4, 3, 8])

    Source: torch.nn.functional.scaled_dot_product_attention.
    """
    if attn_mask is None and type(dropout_p) is float and not dropout_p:
        try:  # the common call by the fewest steps: a tiny one costs a third
            q_shape, k_shape = query.shape, key.shape
            if (
                len(q_shape) == 4
                and (q_shape[1] == k_shape[1] or enable_gqa)
                and (not is_causal or q_shape[2] == k_shape[2])
            ):
                return plain_attention(_NAME, query, key, value, scale, is_causal, False, True)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            pass  # what follows says what is wrong
    if type(dropout_p) is not float:
        dropout_p = _argument_types.number(_NAME, "dropout_p", dropout_p)
    if type(is_causal) is not bool:
        is_causal = _argument_types.flag(_NAME, "is_causal", is_causal)
    if type(enable_gqa) is not bool:
        enable_gqa = _argument_types.flag(_NAME, "enable_gqa", enable_gqa)
    _check(query, key, value, attn_mask, dropout_p, is_causal)
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0]:
        lead = query.shape[:1]
        q, k, v = query, key, value
    else:
        q, k, v, lead = _four_dimensional(query, key, value)
    heads = q.shape[1]
    if k.shape[1] != heads or v.shape[1] != heads:
        q, k, v = _match_heads(q, k, v, enable_gqa)
    seqlen_q, keys = q.shape[2], k.shape[2]
    options: MaskOptions = {}
    if is_causal:
        keys, options = band_options(TOP_LEFT_CAUSAL, seqlen_q, keys)
    elif attn_mask is not None and is_causal_bias(attn_mask):
        keys, options = band_options(_causal_band(attn_mask, seqlen_q, keys), seqlen_q, keys)
    elif attn_mask is not None:
        mask = _mask_like_scores(attn_mask, query.dim(), lead, (q.shape[1], seqlen_q, keys))
        keys, options = mask_options(mask, q.shape[0], seqlen_q, keys, q.dtype)
    if keys < k.shape[2]:
        k, v = k[:, :, :keys], v[:, :, :keys]
    if dropout_p == 1.0:
        v, dropout_p = v * 0.0, 0.0  # everything is dropped
    try:
        out = attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            softmax_scale=scale,
            dropout_p=dropout_p,
            name=_NAME,
            **options,
        )
    except (ArgumentError, TypeError) as error:
        raise renamed(error, _TORCH_WORDS) from None
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    if query.dim() == 4 and lead == out.shape[:1]:
        return out
    return out.reshape(*lead, *out.shape[1:]) if query.dim() > 2 else out[0, 0]


# ---- arguments -----------------------------------------------------------------------------------


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> None:
    """Raises for what torch refuses, before shapes are looked at."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor) or t.is_nested or t.layout is not torch.strided:
            _argument_types.dense(_NAME, **{name: t})
        if t.dim() < 2:
            raise ArgumentError(
                f"{_NAME}: {name} has shape {tuple(t.shape)}; it must be at least 2-dimensional, "
                "(..., heads, seqlen, head_dim)"
            )
    autocast = autocasts(query)
    if not autocast and not (query.dtype == key.dtype == value.dtype):
        raise ArgumentError(
            f"{_NAME}: query is {query.dtype}, key {key.dtype} and value {value.dtype}; "
            "they must agree"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ArgumentError(
            f"{_NAME}: key has head_dim {key.shape[-1]} but query has {query.shape[-1]}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ArgumentError(
            f"{_NAME}: key has seqlen {key.shape[-2]} but value has {value.shape[-2]}"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(f"{_NAME}: dropout_p is {dropout_p}; it must be in [0, 1]")
    if attn_mask is None:
        return
    causal_bias = is_causal_bias(attn_mask)  # whose device and dtype mean nothing
    if not causal_bias:
        _argument_types.dense(_NAME, query=query, attn_mask=attn_mask)
    if is_causal:
        raise ArgumentError(f"{_NAME}: Explicit attn_mask should not be set when is_causal=True")
    if causal_bias:
        return
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) and not (
        autocast and attn_mask.is_floating_point()
    ):
        raise ArgumentError(
            f"{_NAME}: attn_mask is {attn_mask.dtype}; it must be bool, float32 or {query.dtype}"
        )


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """q, k, v as (batch, heads, seqlen, dim), and what the batch consists of in the result."""
    rank = max(query.dim(), key.dim(), value.dim(), 3)
    tensors = [t[(None,) * (rank - t.dim())] for t in (query, key, value)]
    try:
        lead = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            *(t.shape[:-3] for t in tensors)
        )
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ArgumentError(
            f"{_NAME}: query, key and value have shapes {shapes}, which do not broadcast to one "
            "batch; all but their last three sizes must"
        ) from None
    q, k, v = (t.expand(*lead, *t.shape[-3:]).reshape(lead.numel(), *t.shape[-3:]) for t in tensors)
    return q, k, v, lead


def _match_heads(
    q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that differ: grouped, or broadcast. The kernels read a group's keys once: no copies."""
    heads_q, heads_k, heads_v = q.shape[1], k.shape[1], v.shape[1]
    if enable_gqa:
        for name, heads in (("key", heads_k), ("value", heads_v)):
            if heads == 0 or heads_q % heads:
                raise ArgumentError(
                    f"{_NAME}: {name} has {heads} heads, which do not divide query's {heads_q}; "
                    "they must"
                )
        if heads_k != heads_v:  # torch repeats each on its own
            k = k.repeat_interleave(heads_q // heads_k, 1)
            v = v.repeat_interleave(heads_q // heads_v, 1)
        return q, k, v
    if any(h not in (1, max(heads_q, heads_k, heads_v)) for h in (heads_q, heads_k, heads_v)):
        raise ArgumentError(
            f"{_NAME}: query, key and value have {heads_q}, {heads_k} and {heads_v} heads; "
            "enable_gqa=True groups them"
        )
    heads = max(heads_q, heads_k, heads_v)
    q = q.expand(-1, heads, -1, -1)
    if heads_k != heads_v:
        k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    return q, k, v


def _causal_band(bias: Any, seqlen_q: int, seqlen_k: int) -> Band:
    """The band of torch's CausalBias. As there, the size of one that is square or counts from the
    first key is not looked at."""
    lengths = bias.seq_len_q, bias.seq_len_kv
    if bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv:
        return TOP_LEFT_CAUSAL
    if lengths != (seqlen_q, seqlen_k):
        raise ArgumentError(
            f"{_NAME}: attn_mask is a CausalBias for {lengths} queries and keys but there are "
            f"{(seqlen_q, seqlen_k)}"
        )
    return Band(None, seqlen_k - seqlen_q)


def _mask_like_scores(
    mask: Tensor, query_dim: int, lead: torch.Size, scores: tuple[int, int, int]
) -> Tensor:
    """The mask as 4-D, each dimension that of the scores or 1."""
    full = (*lead, *scores)
    shape = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    fits = len(shape) == len(full) and all(m in (1, s) for m, s in zip(shape, full, strict=True))
    if not fits:
        wanted = full if query_dim > 2 else full[-2:]
        raise ArgumentError(
            f"{_NAME}: attn_mask has shape {tuple(mask.shape)}; it must broadcast to {wanted}"
        )
    mask = mask[(None,) * (len(full) - mask.dim())]
    if len(lead) != 1:
        if any(size != 1 for size in shape[:-3]):
            mask = mask.expand(*lead, *shape[-3:])
            mask = mask.reshape(lead.numel(), *shape[-3:])
        else:
            mask = mask.reshape(1, *shape[-3:])
    # A dimension that only repeats itself says no more than its first entry.
    repeats = [m > 1 and stride == 0 for m, stride in zip(mask.shape, mask.stride(), strict=True)]
    if any(repeats):
        mask = mask[tuple(slice(0, 1) if r else slice(None) for r in repeats)]
    return mask


# ---- in place of torch's -------------------------------------------------------------------------


@dataclass
class SdpaCalls:
    """What happened to the calls while ``use_as_sdpa`` was in force."""

    ours: int = 0
    """Calls that ran on this library."""
    torch: Counter[str] = field(default_factory=Counter)
    """Calls that were handed to torch, by reason."""


@dataclass(eq=False)
class _Use:
    unsupported: Literal["raise", "torch"]
    calls: SdpaCalls


_lock = threading.Lock()
_here: ContextVar[_Use | None] = ContextVar("flashattn_lite.use_as_sdpa", default=None)
_everywhere: list[_Use] = []  # all_threads=True, innermost last
_installed = 0
_torch_sdpa: Any = torch.nn.functional.scaled_dot_product_attention


def _why_not(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why a call cannot run here, for reasons that lie in torch rather than in the arguments."""
    mask = query if attn_mask is None or is_causal_bias(attn_mask) else attn_mask
    if not all(isinstance(t, Tensor) for t in (query, key, value, mask)):
        return None  # a TypeError either way
    if query.is_nested or key.is_nested or value.is_nested or mask.is_nested:
        return "nested tensors"
    tensors = query, key, value, mask
    if torch.overrides.has_torch_function(tensors):
        kinds = sorted({type(t).__name__ for t in tensors} - {"Tensor", "Parameter"})
        if kinds:  # else it is a mode, such as torch.device's as a context
            return f"tensor subclass {', '.join(kinds)}"
    if not (query.is_cpu or query.is_cuda):
        return f"device {query.device.type}"
    if torch._C._functorch.maybe_current_level():
        return "torch.func transform"
    return None


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any, **options: Any
) -> Tensor:
    """torch's function. A CausalBias steps in only where it finds that in torch.nn.functional, and
    holds no elements otherwise: it goes as the mask that it stands for."""
    if attn_mask is not None and is_causal_bias(attn_mask):
        seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
        diagonal = _causal_band(attn_mask, seqlen_q, seqlen_k).right
        attn_mask = query.new_ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(diagonal or 0)
    return _torch_sdpa(query, key, value, attn_mask, *rest, **options)  # type: ignore[no-any-return]


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in torch.nn.functional while any ``use_as_sdpa`` is in force anywhere."""
    use = _here.get() or (_everywhere[-1] if _everywhere else None)
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if use is None:
        return _by_torch(*arguments, scale=scale, enable_gqa=enable_gqa)
    reason = _why_not(query, key, value, attn_mask)
    if reason is None:
        try:
            out = scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa)
            with _lock:
                use.calls.ours += 1
            return out
        except ArgumentError as error:
            if use.unsupported == "raise":
                raise
            reason = str(error).removeprefix(f"{_NAME}: ")
    if use.unsupported == "raise":
        raise ArgumentError(
            f"{_NAME}: {reason} cannot run on flashattn_lite; "
            'use_as_sdpa(unsupported="torch") hands such calls to torch and counts them'
        )
    with _lock:
        use.calls.torch[reason] += 1
    return _by_torch(*arguments, scale=scale, enable_gqa=enable_gqa)


@contextmanager
def use_as_sdpa(
    *, unsupported: Literal["raise", "torch"] = "raise", all_threads: bool = False
) -> Iterator[SdpaCalls]:
    """Puts this library in the place of torch.nn.functional.scaled_dot_product_attention.

    It holds for the thread (and asyncio task) that entered, others keep torch's; contexts nest, the
    innermost counts. Code that looked the function up before, with ``from torch.nn.functional
    import scaled_dot_product_attention``, is not reached, nor are torch's fused encoder layers.

    Args:
        unsupported: what to do with a call that this library cannot run: "raise", or "torch", which
            hands it to torch and says so in the result.
        all_threads: hold for every thread. Needed with ``torch.nn.DataParallel``, and with gradient
            checkpointing on CUDA, whose second forward runs in a thread of autograd's.

    Returns: (as the context) SdpaCalls, which counts.

    >>> with use_as_sdpa() as calls:
    ...     q = torch.ones(1, 2, 4, 8)
    ...     _ = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> calls.ours
    1
    """
    global _installed, _torch_sdpa
    if unsupported not in ("raise", "torch"):
        raise ArgumentError(f"use_as_sdpa: unsupported is {unsupported!r}; use 'raise' or 'torch'")
    use = _Use(unsupported, SdpaCalls())
    functional: Any = torch.nn.functional
    with _lock:
        if not _installed and functional.scaled_dot_product_attention is not _dispatch:
            _torch_sdpa = functional.scaled_dot_product_attention
            functional.scaled_dot_product_attention = _dispatch
        _installed += 1
        if all_threads:
            _everywhere.append(use)
    token = None if all_threads else _here.set(use)
    try:
        yield use.calls
    finally:
        if token is not None:
            _here.reset(token)
        with _lock:
            if all_threads:
                _everywhere.remove(use)
            _installed -= 1
            if not _installed and functional.scaled_dot_product_attention is _dispatch:
                functional.scaled_dot_product_attention = _torch_sdpa
