"""Looking at attention: the probabilities, which the kernels never materialise."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from flashattn_lite import _argument_types, _checks, reference
from flashattn_lite.attention import UNBOUNDED, window_sides

__all__ = ["attention_weights", "signed_probabilities"]


def attention_weights(
    q: Tensor, k: Tensor, v: Tensor | None = None, **options: Unpack[reference.Options]
) -> Tensor:
    """The probabilities P = softmax(scores), exact and normalised, for inspection.

    They are computed in float64 by the reference (``precision=`` chooses otherwise) and take
    seqlen_q x seqlen_k memory. Differentiable.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim) with cu_seqlens_q.
        k: (batch, seqlen_k, heads_k, head_dim), or as ``attention`` takes it.
        v: not looked at; it may be given so that a call reads like ``attention``'s.
        options: those of ``attention`` that change a score: see ``reference.Options``.

    Returns:
        (batch, heads_q, seqlen_q, seqlen_k) float32 (float64 for float64 inputs), padded with zeros
        to the longest sequence. Rows sum to 1; to less with a sink, to 0 when they see nothing.

    Raises:
        ArgumentError: (a ValueError) for an argument that cannot be used.

    >>> q = torch.zeros(1, 2, 1, 4); k = torch.zeros(1, 2, 1, 4)
    >>> attention_weights(q, k, causal=True)[0, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    values = k if v is None else v
    if options.get("v_scale") is None and options.get("k_scale") is not None:
        options["v_scale"] = options["k_scale"]
    bias = options.get("bias")
    if isinstance(bias, Tensor):
        options["bias"] = bias[(None,) * (4 - bias.dim())]
    _normalise("attention_weights", options)
    _checks.check("attention_weights", q, k, values, options)
    weights = reference.attention_weights(q, k, values, **options)
    return weights.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _normalise(name: str, options: reference.Options) -> None:
    """The reference takes numbers as they are, and looks at no option that it does not know."""
    unknown = set(options) - set(reference.Options.__annotations__)
    if unknown:
        raise TypeError(
            f"{name}: {min(unknown)} is no option; see flashattn_lite.reference.Options"
        )
    causal = _argument_types.flag(name, "causal", options.get("causal"))
    options["window"] = window_sides(options.get("window", UNBOUNDED), causal, name)
    for argument in ("softcap", "dropout_p", "softmax_scale"):
        if options.get(argument) is not None:
            options[argument] = _argument_types.number(name, argument, options[argument])


def signed_probabilities(
    q: Tensor, k: Tensor, v: Tensor, **options: Unpack[reference.Options]
) -> Tensor:
    """flash_attn's S_dmask: exp(score - row maximum), negative where dropout drops the element.

    Returns: (batch, heads_q, seqlen_q, seqlen_k) in q's dtype, 0 where nothing is seen. Dropped
    elements are never 0, so that the sign always tells.
    """
    dropout_p, seed = options.pop("dropout_p"), options.pop("dropout_seed")
    assert seed is not None
    with torch.no_grad():
        options["precision"] = torch.float32
        p = reference.attention_weights(q, k, v, **options)
        batch, heads, seqlen_q, seqlen_k = p.shape
        p = p / p.amax(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny) if seqlen_k else p
        p = p.to(q.dtype)
        batch_heads = torch.arange(batch * heads, device=q.device).reshape(batch, heads)
        keep = reference.dropout_keep(seed, batch_heads, seqlen_q, seqlen_k, dropout_p)
        options["alibi_slopes"] = None
        seen = reference.attention_weights(torch.zeros_like(q), torch.zeros_like(k), v, **options)
        dropped = -p.clamp_min(torch.finfo(q.dtype).tiny)
        return torch.where(keep | (seen == 0), p, dropped)
