"""An attention implementation for the transformers library.

from flashattn_lite.integrations.transformers import register
model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register())
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils.generic import is_flash_attention_requested

from flashattn_lite import attention_weights
from flashattn_lite._masks import Band, bias_of, kernel_window
from flashattn_lite._ops import ArgumentError
from flashattn_lite.attention import attention
from flashattn_lite.integrations.transformers_masks import CompactMask, create_mask

__all__ = ["enable_continuous_batching", "register"]

_registered: set[str] = set()


def register(name: str = "fal") -> str:
    """Makes this library an attention implementation of transformers, masks included.

    Safe to call again. A name that contains "flash" makes transformers treat it as one of its own
    flash implementations, which it may try to download: hence the default.

    Returns: the name, for ``from_pretrained(..., attn_implementation=register())`` or
    ``model.set_attn_implementation(register())``.

    >>> register()
    'fal'
    """
    if "flash" in name:
        warnings.warn(
            f"register: transformers handles names with 'flash' itself and may not reach {name!r}",
            stacklevel=2,
        )
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, create_mask)
    _registered.add(name)
    return name


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' AttentionInterface.

    Args:
        module: the attention module; ``is_causal`` and ``layer_idx`` are read from it.
        query: (batch, heads_q, seqlen_q, head_dim).
        key: (batch, heads_k, seqlen_k, head_dim).
        value: (batch, heads_k, seqlen_k, head_dim_v).
        attention_mask: what ``create_mask`` made; or a bool (True visible) or float mask that
            broadcasts to (batch, heads_q, seqlen_q, seqlen_k); or None, and then is_causal (counted
            from the first query and key, as in torch) and sliding_window say what is visible.
        dropout: probability.
        scaling: default 1 / sqrt(head_dim).
        sliding_window: how many tokens a query sees, itself included. Masks that ``create_mask``
            made know it already.
        softcap: scores become softcap * tanh(score / softcap).
        is_causal: default: the module's, or True.
        s_aux: (heads_q), sinks: logits that join the softmax's denominator; differentiable.
        sinks: (batch, heads_q, seqlen_q, 1), such a logit for each query; differentiable. Not with
            s_aux, packed sequences or output_attentions.
        position_bias: broadcasts to the scores, added to them; differentiable.
        cache: transformers' paged cache, with continuous batching.
        kwargs: cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, in a
            batch of 1. output_attentions: also return the weights, (batch, heads_q, seqlen_q,
            seqlen_k), computed apart in float64. deterministic: as in ``attention``.

    Returns: out (batch, seqlen_q, heads_q, head_dim_v), and the weights or None.
    """
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if cache is not None:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
        attention_mask = None
    batch = max(query.shape[0], key.shape[0])  # learned queries may come with a batch of 1
    q, k, v = (t.transpose(1, 2).expand(batch, -1, -1, -1) for t in (query, key, value))
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "bias": position_bias,
    }
    by_caller = kwargs.get("cu_seq_lens_q") is not None  # packed
    by_column = position_bias is not None or kwargs.get("output_attentions")
    if isinstance(attention_mask, CompactMask) and attention_mask.moves_keys and not by_caller:
        # The bias and the weights have a column for each key, padding and other sequences too.
        attention_mask = attention_mask.dense() if by_column else attention_mask
    if by_caller:
        band = _packed_band(attention_mask, is_causal, sliding_window)
        options |= _packed_options(q, band, kwargs)
    elif isinstance(attention_mask, CompactMask):
        lengths = q.shape[1], k.shape[1]
        # transformers makes no mask where nothing is hidden, and so some models that see the whole
        # cache (BERT's language models) ask for one of the new tokens alone.
        keys = k.shape[1] if attention_mask.hides_nothing else attention_mask.keys
        if lengths != tuple(attention_mask.shape[2:]) and not attention_mask.hides_nothing:
            raise ArgumentError(
                f"transformers: the mask is for {tuple(attention_mask.shape[2:])} queries and keys "
                f"but there are {lengths}"
            )
        options |= attention_mask.options
        k, v = k[:, :keys], v[:, :keys]
        if position_bias is not None:
            options["bias"] = position_bias[..., :keys]
    elif attention_mask is not None:
        mask = bias_of(attention_mask, query.dtype)
        options["bias"] = mask if position_bias is None else mask + position_bias
    else:
        keys, options["window"] = _window(q.shape[1], k.shape[1], is_causal, sliding_window)
        k, v = k[:, :keys], v[:, :keys]
        if position_bias is not None:
            options["bias"] = position_bias[..., :keys]
    packed = "cu_seqlens_q" in options
    if packed:
        if position_bias is not None:
            raise ArgumentError("transformers: position_bias does not go with packed sequences")
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    if sinks is not None and (packed or s_aux is not None or kwargs.get("output_attentions")):
        raise ArgumentError(
            "transformers: sinks, a logit for each query, go neither with packed sequences nor "
            "with s_aux or output_attentions"
        )
    out: Any = attention(
        *(q, k, v),
        dropout_p=dropout,
        deterministic=bool(kwargs.get("deterministic")),
        return_lse=sinks is not None,
        name="transformers",
        **options,
    )
    if sinks is not None:
        out, lse = out
        share = torch.sigmoid(lse[..., None] - sinks)  # of the softmax that the keys keep
        out = out * share.transpose(1, 2).to(out.dtype)
    if packed:
        out = out.view(batch, -1, *out.shape[1:])
    weights = None
    if kwargs.get("output_attentions"):
        for unused in ("max_seqlen_q", "max_seqlen_k"):
            options.pop(unused, None)
        weights = attention_weights(q, k, **options).to(query.dtype)
        if not packed:
            weights = pad(weights, (0, key.shape[2] - weights.shape[3]))  # keys nobody sees
    return out, weights


def _window(
    seqlen_q: int, seqlen_k: int, is_causal: bool, sliding_window: int | None
) -> tuple[int, tuple[int | None, int | None]]:
    """How many of the keys to pass, and the kernels' window, without a mask. A single query is the
    last token; several are the first ones, as in torch's scaled_dot_product_attention."""
    left = None if sliding_window is None else sliding_window - 1
    right = 0 if is_causal else left
    if seqlen_q == 1:
        return seqlen_k, (left, 0 if is_causal else None)
    aligned = kernel_window(Band(left, right), seqlen_q, seqlen_k)
    assert aligned is not None  # left >= 0
    return aligned


def _packed_band(
    attention_mask: Tensor | None, is_causal: bool, sliding_window: int | None
) -> tuple[int | None, int | None]:
    """What is visible within each of the sequences that cu_seq_lens_q tells apart."""
    if attention_mask is None:
        left = None if sliding_window is None else sliding_window - 1
        return left, 0 if is_causal else left
    if not isinstance(attention_mask, CompactMask) or any(
        name in attention_mask.options for name in ("leftpad_k", "seqused_k")
    ):
        raise ArgumentError(
            "transformers: cu_seq_lens_q does not go with an attention_mask that hides tokens"
        )
    return attention_mask.band.left, attention_mask.band.right


def _packed_options(
    q: Tensor, band: tuple[int | None, int | None], kwargs: dict[str, Any]
) -> dict[str, Any]:
    if q.shape[0] != 1:
        raise ArgumentError(
            f"transformers: batch is {q.shape[0]}; with cu_seq_lens_q it must be 1, the sequences "
            "one after the other"
        )
    cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
    longest_q, longest_k = kwargs.get("max_length_q"), kwargs.get("max_length_k")
    return {
        "window": band,
        "cu_seqlens_q": cu_q.to(torch.int32),
        "cu_seqlens_k": (cu_q if cu_k is None else cu_k).to(torch.int32),
        "max_seqlen_q": longest_q,
        "max_seqlen_k": longest_q if longest_k is None else longest_k,
    }


# ---- continuous batching -------------------------------------------------------------------------

# What transformers decides by the name of the attention implementation, through a function that
# each of these modules imported.
_DECIDING_MODULES = ("cache", "continuous_api", "initialization")
_SUPPORTED = ("5.23.",)


def _is_flash_attention_requested(
    config: Any = None,
    requested_attention_implementation: str | None = None,
    version: int | list[int] | None = None,
) -> bool:
    """transformers' question "does it take cu_seqlens instead of a mask?", which is yes here too.
    With a version, the question is which of its own kernels to import: no."""
    name = requested_attention_implementation
    if config is not None:
        name = config._attn_implementation
    if name in _registered and version is None:
        return True
    return bool(is_flash_attention_requested(config, requested_attention_implementation, version))


def enable_continuous_batching() -> None:
    """Lets ``model.generate_batch`` and continuous batching use the registered implementations.

    transformers admits implementations to it by name, in private code; this replaces that test, in
    those versions of transformers where it was tried. Safe to call again. Keys and values then go
    through transformers' paged cache, which gathers them; attention takes cu_seqlens.

    Raises:
        RuntimeError: with another version of transformers.
    """
    if not transformers.__version__.startswith(_SUPPORTED):
        raise RuntimeError(
            f"enable_continuous_batching: transformers is {transformers.__version__}; this relies "
            f"on private parts of {' or '.join(f'{v}*' for v in _SUPPORTED)}"
        )
    import importlib

    for module in _DECIDING_MODULES:
        parent = importlib.import_module(f"transformers.generation.continuous_batching.{module}")
        parent.is_flash_attention_requested = _is_flash_attention_requested  # type: ignore[attr-defined]
    if not _registered:
        register()
