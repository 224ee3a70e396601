"""``torch.nn.MultiheadAttention`` on this library's kernels: same constructor, parameters,
arguments and results. Attention reads the projections as strided views, so nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from flashattn_lite import _argument_types
from flashattn_lite._masks import (
    TOP_LEFT_CAUSAL,
    MaskOptions,
    band_of,
    band_options,
    bias_of,
    contents_may_be_read,
    kernel_window,
    mask_options,
)
from flashattn_lite._ops import ArgumentError
from flashattn_lite.attention import attention
from flashattn_lite.nn.nested import packed, padding_mask, unpacked

__all__ = ["MultiheadAttention"]

_NAME = "MultiheadAttention"


class _ArgumentError(ArgumentError, AssertionError):
    """torch.nn.MultiheadAttention raises an AssertionError for some arguments and a RuntimeError
    for others; the messages hold torch's own words, which code may look for."""


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, whose constructor and state dict these are, on our kernels.

    ``need_weights=False`` runs on the kernels; masks that are padding or a band become lengths and
    windows. ``need_weights=True`` (torch's default) has to materialise the weights and runs torch's
    own formula. Nested tensors of both layouts are attended to without padding, with gradients.

    In ``torch.nn.TransformerEncoderLayer`` and ``TransformerDecoderLayer`` it takes part in eval
    mode too: torch's fused encoder layer, which would go past it, is not entered.

    >>> mha = MultiheadAttention(64, 4, batch_first=True)
    >>> x = torch.ones(2, 5, 64)
    >>> out, weights = mha(x, x, x, need_weights=False)
    >>> out.shape, weights
    (torch.Size([2, 5, 64]), None)

    Source: torch.nn.MultiheadAttention; Vaswani et al., Attention Is All You Need (2017).
    """

    # torch's encoder layers read this name to decide whether their fused kernel may compute the
    # whole layer from the weights, past this module. The answer is no; whether they are packed
    # shows in in_proj_weight. In torch's constructor, which makes out_proj last, it is the truth.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return "out_proj" not in self._modules and bool(self.__dict__["_qkv_same_embed_dim"])

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value  # what torch.nn.MultiheadAttention stores

    def _reset_parameters(self) -> None:
        for weight in (
            *(self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight),
        ):
            if weight is not None:
                torch.nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            torch.nn.init.constant_(self.in_proj_bias, 0.0)
            torch.nn.init.constant_(self.out_proj.bias, 0.0)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                torch.nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with projections.

        Args:
            query: (seqlen_q, batch, embed_dim), (batch, seqlen_q, embed_dim) with batch_first, or
                (seqlen_q, embed_dim).
            key: the same with seqlen_k and kdim.
            value: the same with seqlen_k and vdim.
            key_padding_mask: (batch, seqlen_k) or (seqlen_k); bool (True: ignored) or float
                (added).
            need_weights: also return the weights, which materialises them.
            attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k); bool (True:
                hidden) or float (added, differentiable).
            average_attn_weights: average the weights over the heads.
            is_causal: a hint that attn_mask, which must be given, is torch's causal mask (row i
                sees keys 0 to i). The kernels then take the hint's word for it.

        Returns:
            out: like query.
            weights: None, or (batch, seqlen_q, seqlen_k); (batch, num_heads, seqlen_q, seqlen_k)
                unless averaged.
        """
        _argument_types.tensors(
            _NAME,
            **{"query": query, "key": key, "value": value},
            **_argument_types.given(key_padding_mask=key_padding_mask, attn_mask=attn_mask),
        )
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None or is_causal:
                raise _ArgumentError(f"{_NAME}: masks do not go with nested tensors; pad them")
            return self._nested(query, key, value, need_weights, average_attn_weights)
        need_weights = _argument_types.flag(_NAME, "need_weights", need_weights)
        is_causal = _argument_types.flag(_NAME, "is_causal", is_causal)
        average_attn_weights = _argument_types.flag(
            _NAME, "average_attn_weights", average_attn_weights
        )
        batched = self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        if need_weights:
            return self._with_weights(
                *(query, key, value, key_padding_mask, attn_mask, average_attn_weights, is_causal)
            )
        batch_dim = 0 if self.batch_first and batched else 1
        if not batched:
            query, key, value = _unsqueezed(query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._projections(query, key, value)  # each (batch, seqlen, heads, head_dim)
        if batch_dim == 1:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        seqlen_k = k.shape[1]
        k, v = self._with_extra_keys(k, v)
        keys, options = self._mask_options(
            q, k, key_padding_mask, attn_mask, is_causal, k.shape[1] - seqlen_k
        )
        out = self._attend(q, k[:, :keys], v[:, :keys], **options)
        if batch_dim == 1:
            out = out.transpose(0, 1)
        out = functional.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return out if batched else out.squeeze(1), None

    # ---- steps -----------------------------------------------------------------------------------

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        dropout_p = float(self.dropout) if self.training else 0.0
        if dropout_p == 1.0:
            v, dropout_p = v * 0.0, 0.0  # everything is dropped
        out = attention(q, k, v, dropout_p=dropout_p, name=_NAME, **options)
        assert isinstance(out, Tensor)
        return out

    def _nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Nested (batch, ragged, features) tensors: their sequences attend without padding."""
        for name, t in (("query", query), ("key", key), ("value", value)):
            if not t.is_nested or t.dim() != 3:
                raise _ArgumentError(
                    f"{_NAME}: query should be unbatched 2D or batched 3D tensor but received "
                    f"{query.dim()}-D query tensor; {name} is {t.dim()}-D and "
                    f"{'nested' if t.is_nested else 'not nested'}, and all three must be nested"
                )
        if not self.batch_first or self.bias_k is not None or self.add_zero_attn:
            raise _ArgumentError(
                f"{_NAME}: nested tensors need batch_first=True, add_bias_kv=False and "
                f"add_zero_attn=False; they are {self.batch_first}, {self.bias_k is not None} and "
                f"{self.add_zero_attn}"
            )
        q = packed(query)
        k = q if key is query else packed(key)
        v = k if value is key else packed(value)
        if len(q.lengths) != len(k.lengths) or k.lengths != v.lengths:
            raise _ArgumentError(
                f"{_NAME}: key has sequences of {k.lengths} tokens and value of {v.lengths}, for "
                f"{len(q.lengths)} of query; the former must agree, and be as many"
            )
        self._check_features(q.tokens, k.tokens, v.tokens)
        if need_weights:
            return self._nested_with_weights(query, key, value, average)
        longest_q, longest_k = max(q.lengths, default=0), max(k.lengths, default=0)
        out = self._attend(
            *self._projections(q.tokens, k.tokens, v.tokens),
            cu_seqlens_q=q.cu_seqlens,
            cu_seqlens_k=k.cu_seqlens,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
        )
        out = functional.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return unpacked(out, query, q.lengths), None

    def _nested_with_weights(
        self, query: Tensor, key: Tensor, value: Tensor, average: bool
    ) -> tuple[Tensor, Tensor]:
        """Through padded tensors; the weights are padded with zeros, as in torch's fused kernel."""
        q = packed(query)
        dense_q, dense_k, dense_v = (t.to_padded_tensor(0.0) for t in (query, key, value))
        padding = padding_mask(packed(key).lengths, key.device)
        dense, weights = self._with_weights(
            *(dense_q, dense_k, dense_v, padding, None, average, False)
        )
        assert weights is not None
        no_row = padding_mask(q.lengths, query.device)
        no_row = no_row[:, :, None] if average else no_row[:, None, :, None]
        out = torch.cat([row[:n] for row, n in zip(dense, q.lengths, strict=True)])
        return unpacked(out, query, q.lengths), weights.masked_fill(no_row, 0.0)

    def _projections(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (dim 0, dim 1, heads, head_dim): views of as few products as possible."""
        heads, e = (self.num_heads, self.head_dim), self.embed_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            q, k, v = _split(functional.linear(query, weight, bias), 3, *heads).unbind(-3)
            return q, k, v
        if weight is not None and key is value:
            bias_q, bias_kv = (None, None) if bias is None else (bias[:e], bias[e:])
            k, v = _split(functional.linear(key, weight[e:], bias_kv), 2, *heads).unbind(-3)
            return _split(functional.linear(query, weight[:e], bias_q), *heads), k, v
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if weight is None
            else weight.chunk(3)
        )
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            _split(functional.linear(x, w, b), *heads)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _with_extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """With bias_k and bias_v, and the zeros of add_zero_attn, after the keys."""
        shape = (k.shape[0], 1, self.num_heads, self.head_dim)
        extra_k, extra_v = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            extra_k.append(self.bias_k.view(1, *shape[1:]).expand(shape).to(k.dtype))
            extra_v.append(self.bias_v.view(1, *shape[1:]).expand(shape).to(v.dtype))
        if self.add_zero_attn:
            extra_k.append(k.new_zeros(shape))
            extra_v.append(v.new_zeros(shape))
        if len(extra_k) == 1:
            return k, v
        return torch.cat(extra_k, 1), torch.cat(extra_v, 1)

    def _mask_options(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        extra_keys: int,
    ) -> tuple[int, MaskOptions]:
        """How many of the keys to pass, and the options, of both masks; ``extra_keys`` at the end
        are visible to all."""
        batch, seqlen_q, keys = q.shape[0], q.shape[1], k.shape[1]
        if is_causal and key_padding_mask is None:
            return band_options(TOP_LEFT_CAUSAL, seqlen_q, keys)
        scores = attn_mask
        if scores is not None:
            scores = scores.view(-1, self.num_heads if scores.dim() == 3 else 1, *scores.shape[-2:])
            scores = _extended(scores, extra_keys)
        padding = key_padding_mask
        if padding is not None:
            padding = _extended(padding[:, None, None, :], extra_keys)
        if scores is None or padding is None:
            mask = padding if scores is None else scores
            return (
                (keys, {}) if mask is None else mask_options(mask, batch, seqlen_q, keys, q.dtype)
            )
        band = TOP_LEFT_CAUSAL if is_causal and not extra_keys else None
        if band is None and scores.shape[:2] == (1, 1) and contents_may_be_read(scores):
            band = band_of(scores[0, 0]) if scores.numel() else None
        if band is not None and kernel_window(band, seqlen_q, keys) is not None:
            keys, options = band_options(band, seqlen_q, keys)
            return keys, {**options, "bias": bias_of(padding, q.dtype)[..., :keys]}
        if scores.dtype == torch.bool and padding.dtype == torch.bool:
            return keys, {"bias": bias_of(scores & padding, q.dtype)}
        return keys, {"bias": bias_of(scores, q.dtype) + bias_of(padding, q.dtype)}

    def _with_weights(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """torch's formula, which materialises the weights."""
        swap = self.batch_first and query.dim() == 3
        if swap:
            same_k, same_v = query is key, key is value
            query = query.transpose(0, 1)
            key = query if same_k else key.transpose(0, 1)
            value = key if same_v else value.transpose(0, 1)
        out, weights = functional.multi_head_attention_forward(
            *(query, key, value, self.embed_dim, self.num_heads),
            *(self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v),
            *(self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias),
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=True,
            attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if swap else out), weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether the inputs are batched; raises for shapes that do not go together."""
        _argument_types.dense(
            _NAME,
            **{"query": query, "key": key, "value": value},
            **_argument_types.given(key_padding_mask=key_padding_mask, attn_mask=attn_mask),
        )
        for name, t in (("query", query), ("key", key), ("value", value)):
            if not t.is_floating_point() or t.dtype.itemsize == 1:
                raise _ArgumentError(f"{_NAME}: {name} is {t.dtype}; it must be floating-point")
        dim = query.dim()
        if dim not in (2, 3):
            raise _ArgumentError(
                f"{_NAME}: query should be unbatched 2D or batched 3D tensor but received {dim}-D "
                "query tensor"
            )
        batched = dim == 3
        form = f"for {'batched (3-D)' if batched else 'unbatched (2-D)'} `query`, expected"
        if not key.dim() == value.dim() == dim:
            raise _ArgumentError(
                f"{_NAME}: {form} `key` and `value` to be {dim}-D but found {key.dim()}-D and "
                f"{value.dim()}-D tensors respectively"
            )
        self._check_features(query, key, value)
        if key.shape[:-1] != value.shape[:-1]:
            raise _ArgumentError(
                f"{_NAME}: key shape {key.shape} does not match value shape {value.shape}; only "
                "their features may differ"
            )
        batch_dim = 0 if self.batch_first else 1
        batch = query.shape[batch_dim] if batched else 1
        if batched and key.shape[batch_dim] != batch:
            raise _ArgumentError(
                f"{_NAME}: key has batch {key.shape[batch_dim]} but query has {batch}"
            )
        seqlen_q, seqlen_k = (t.shape[1 - batch_dim if batched else 0] for t in (query, key))
        if key_padding_mask is not None:
            _check_dtype("key_padding_mask", key_padding_mask)
            if key_padding_mask.dim() != dim - 1:
                raise _ArgumentError(
                    f"{_NAME}: {form} `key_padding_mask` to be `None` or {dim - 1}-D but found "
                    f"{key_padding_mask.dim()}-D tensor instead"
                )
            padding = (batch, seqlen_k) if batched else (seqlen_k,)
            for d, size in enumerate(padding):
                if key_padding_mask.shape[d] != size:
                    raise _ArgumentError(
                        f"{_NAME}: Expected key_padded_mask.shape[{d}] to be {size}, but got "
                        f"{key_padding_mask.shape[d]}: key_padding_mask must be {padding}"
                    )
        if attn_mask is not None:
            _check_dtype("attn_mask", attn_mask)
            if attn_mask.dim() not in (2, 3):
                raise _ArgumentError(
                    f"{_NAME}: {form} `attn_mask` to be `None`, 2-D or 3-D but found "
                    f"{attn_mask.dim()}-D tensor instead"
                )
            wanted: tuple[int, ...] = (seqlen_q, seqlen_k)
            if attn_mask.dim() == 3:
                wanted = (batch * self.num_heads, *wanted)
            if attn_mask.shape != wanted:
                raise _ArgumentError(
                    f"{_NAME}: Expected `attn_mask` shape to be {wanted}. The shape of the "
                    f"{attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {wanted}."
                )
        elif is_causal:
            raise _ArgumentError(
                f"{_NAME}: Need attn_mask if specifying the is_causal hint, which is about it"
            )
        return batched

    def _check_features(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.shape[-1] != self.embed_dim:
            raise _ArgumentError(
                f"{_NAME}: was expecting embedding dimension of {self.embed_dim}, but got "
                f"{query.shape[-1]} features in query"
            )
        for name, t, features in (("key", key, self.kdim), ("value", value, self.vdim)):
            if t.shape[-1] != features:
                raise _ArgumentError(
                    f"{_NAME}: {name} has {t.shape[-1]} features; it must be {features}"
                )


def _check_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not (mask.is_floating_point() and mask.dtype.itemsize > 1):
        raise _ArgumentError(
            f"{_NAME}: only bool and floating types of {name} are supported; it is {mask.dtype}"
        )


def _split(x: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return x.view(*x.shape[:-1], *sizes)


def _unsqueezed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With a batch of 1 at dimension 1; what was one tensor stays one."""
    q = query.unsqueeze(1)
    k = q if key is query else key.unsqueeze(1)
    return q, k, k if value is key else value.unsqueeze(1)


def _extended(mask: Tensor, extra_keys: int) -> Tensor:
    """torch.nn.MultiheadAttention's mask (True: hidden) as ours (True: visible), and for the extra
    keys, which nobody hides."""
    if mask.dtype == torch.bool:
        return functional.pad(~mask, (0, extra_keys), value=True) if extra_keys else ~mask
    return functional.pad(mask, (0, extra_keys)) if extra_keys else mask
