"""``torch.nn.MultiheadAttention`` on this library's kernels: same constructor, parameters,
arguments and results. Attention reads the projections as strided views, so nothing is copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from flashattn_lite._masks import (
    TOP_LEFT_CAUSAL,
    MaskOptions,
    band_of,
    band_options,
    bias_of,
    contents_may_be_read,
    kernel_window,
    mask_options,
    visible_of,
)
from flashattn_lite._ops import ArgumentError
from flashattn_lite.attention import attention

__all__ = ["MultiheadAttention"]

_NAME = "MultiheadAttention"


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, whose constructor and state dict these are, on our kernels.

    ``need_weights=False`` runs on the kernels; masks that are padding or a band become lengths and
    windows. ``need_weights=True`` (torch's default) has to materialise the weights and runs torch's
    own formula. Nested tensors are refused.

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
        out = attention(
            *(q, k[:, :keys], v[:, :keys]),
            dropout_p=self.dropout if self.training else 0.0,
            name=_NAME,
            **options,
        )
        assert isinstance(out, Tensor)
        if batch_dim == 1:
            out = out.transpose(0, 1)
        out = functional.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return out if batched else out.squeeze(1), None

    # ---- steps -----------------------------------------------------------------------------------

    def _projections(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (dim 0, dim 1, heads, head_dim): views of as few products as possible."""
        heads, e = (self.num_heads, self.head_dim), self.embed_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            q, k, v = _split(functional.linear(query, weight, bias), 3, *heads).unbind(2)
            return q, k, v
        if weight is not None and key is value:
            bias_q, bias_kv = (None, None) if bias is None else (bias[:e], bias[e:])
            k, v = _split(functional.linear(key, weight[e:], bias_kv), 2, *heads).unbind(2)
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
            visible = visible_of(scores) if scores.numel() else None
            band = None if visible is None else band_of(visible[0, 0])
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
        if query.is_nested or key.is_nested or value.is_nested:
            raise ArgumentError(f"{_NAME}: nested tensors are not taken; pad them")
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ArgumentError(
                f"{_NAME}: query, key, value have {query.dim()}, {key.dim()}, {value.dim()} "
                "dimensions; they must be all 2 (unbatched) or all 3"
            )
        batched = query.dim() == 3
        for name, t, dim in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if t.shape[-1] != dim:
                raise ArgumentError(f"{_NAME}: {name} has {t.shape[-1]} features; it must be {dim}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ArgumentError(
                f"{_NAME}: key has shape {tuple(key.shape)} but value has {tuple(value.shape)}"
            )
        batch_dim = 0 if self.batch_first else 1
        batch = query.shape[batch_dim] if batched else 1
        if batched and key.shape[batch_dim] != batch:
            raise ArgumentError(
                f"{_NAME}: key has batch {key.shape[batch_dim]} but query has {batch}"
            )
        seqlen_q, seqlen_k = (t.shape[1 - batch_dim if batched else 0] for t in (query, key))
        padding = (batch, seqlen_k) if batched else (seqlen_k,)
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, padding)
        if attn_mask is not None:
            shapes = (seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k)
            _check_mask("attn_mask", attn_mask, *shapes)
        elif is_causal:
            raise ArgumentError(f"{_NAME}: is_causal is a hint about attn_mask, which is not given")
        return batched


def _check_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ArgumentError(f"{_NAME}: {name} is {mask.dtype}; it must be bool or float")
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ArgumentError(f"{_NAME}: {name} has shape {tuple(mask.shape)}; it must be {wanted}")


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
