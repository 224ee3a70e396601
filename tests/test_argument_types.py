"""A string, a list, a sparse tensor, another device where something else was meant: every public
function names the argument, its value and the remedy, and takes scalars of numpy's and torch's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from flashattn_lite import (
    ArgumentError,
    attention,
    attention_weights,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attention_states,
    scaled_dot_product_attention,
)
from flashattn_lite.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)
from flashattn_lite.layers.rotary import apply_rotary_emb, apply_rotary_emb_kv_

Q, CU = torch.zeros(2, 3, 2, 8), torch.tensor([0, 3, 6], dtype=torch.int32)
TABLE, ROW = torch.zeros(9, 4), torch.zeros(6, 2, 8)
HEADS_FIRST = Q.transpose(1, 2)
FP8 = Q[None, ..., 0].to(torch.float8_e4m3fn)
SPARSE, NESTED = Q.to_sparse(), torch.nested.nested_tensor([Q[0], Q[1]])


# Whatever stands where something else was meant is named, with its value and the remedy.
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash_attn_func(Q, Q, Q, "0.1"), "dropout_p is '0.1'; it must be a float"),
        (lambda: flash_attn_func(Q, Q, Q, 0.0, []), "softmax_scale is []; it must be a float"),
        (lambda: flash_attn_func(Q, Q, Q, 0.0, 10**400), "softmax_scale is a int; it must be a"),
        (lambda: flash_attn_func(Q, Q, Q, causal="no"), "causal is 'no'; it must be a bool"),
        (lambda: flash_attn_func(Q, Q, Q, causal=CU), "causal is a int32 tensor of shape (3,)"),
        (lambda: flash_attn_func(Q, Q, Q, window_size=(2.5, 0)), "window_size[0] is 2.5; it must"),
        (lambda: flash_attn_func(Q, Q, Q, softcap=1j), "softcap is 1j; it must be a float"),
        (lambda: flash_attn_func(Q, Q, Q, alibi_slopes=1.0), "alibi_slopes is 1.0; it must be a"),
        (lambda: flash_attn_func(Q, Q, Q, return_attn_probs=2), "return_attn_probs is 2; it must"),
        (lambda: flash_attn_func(Q, SPARSE, Q), "k is a sparse tensor; it must be a dense one"),
        (lambda: flash_attn_func(NESTED, Q, Q), "q is a nested tensor; it must be a dense one"),
        (lambda: flash_attn_with_kvcache(Q, Q, Q, causal=CU), "causal is a int32 tensor of shape"),
        (lambda: flash_attn_with_kvcache(Q, Q, Q, num_splits="x"), "num_splits is 'x'; it must be"),
        (lambda: flash_attn_with_kvcache(Q, Q, Q, cache_seqlens=1.5), "cache_seqlens is 1.5; it"),
        (lambda: flash_attn_with_kvcache(Q, Q, Q, cache_seqlens=2**31), "cache_seqlens is 2147483"),
        (lambda: flash_attn_with_kvcache(Q, Q, Q, block_table=CU), "block_table has shape (3,)"),
        (lambda: flash_attn_with_kvcache(Q, Q, Q, block_table=[0]), "block_table is [0]; it must"),
        (lambda: flash_attn_qkvpacked_func([1]), "qkv is [1]; it must be a torch.Tensor"),
        (lambda: flash_attn_varlen_func(ROW, ROW, ROW, CU, None, 3, 3), "cu_seqlens_k is None; it"),
        (lambda: flash_attn_varlen_func(ROW, ROW, ROW, CU, CU, 3.0, 3), "max_seqlen_q is 3.0; it"),
        (lambda: flash_attn_varlen_func(ROW, ROW, ROW, CU, CU.to("meta"), 3, 3), "k is on meta"),
        (lambda: attention(Q, Q, Q, sinks=[0.0]), "sinks is [0.0]; it must be a torch.Tensor"),
        (lambda: attention(Q, Q, Q, backend=None), "backend is None; it must be a str"),
        (lambda: attention_weights(Q, Q, causal="yes"), "causal is 'yes'; it must be a bool"),
        (lambda: scaled_dot_product_attention(Q, Q, "v"), "value is 'v'; it must be"),
        (lambda: scaled_dot_product_attention(Q, Q, Q, is_causal=7), "is_causal is 7; it must be"),
        (lambda: scaled_dot_product_attention(Q, Q, Q, 1.0), "attn_mask is 1.0; it must be a"),
        (lambda: scaled_dot_product_attention(Q, Q, Q, scale="x"), "scale is 'x'; it must be a f"),
        (lambda: merge_attention_states(Q, Q, 3, Q), "out_b is 3; it must be a torch.Tensor"),
        (lambda: flash_attn_combine(Q[None], Q[None, ..., 0].int()), "lse_partial is int32; it"),
        (lambda: flash_attn_combine(Q[None], FP8), "lse_partial is float8_e4m3fn; it must be"),
        (lambda: flash_attn_combine(Q[None], Q[None, ..., 0], out_dtype=3), "out_dtype is 3; it"),
        (lambda: unpad_input(Q, Q[..., 0, 0], 4), "unused_mask is 4; it must be a torch.Tensor"),
        (lambda: unpad_input(Q, Q[0, :, 0]), "attention_mask has shape (3, 8); it must be (2, 3)"),
        (lambda: pad_input(ROW, CU, 2, 3), "hidden_states has shape (6, 2, 8) but"),
        (lambda: pad_input(ROW[:3], CU, 1, 3), "indices are 0 to 6; they must be within the 3"),
        (lambda: pad_input(ROW[:3], CU.float(), 1, 3), "indices is torch.float32 of shape (3,)"),
        (lambda: index_first_axis(ROW, CU - 1), "indices are -1 to 5; they must be within the 6"),
        (lambda: index_put_first_axis(ROW[:3], CU, -1), "first_axis_dim is -1; it must be >= 0"),
        (lambda: apply_rotary_emb(Q, TABLE, 3), "sin is 3; it must be a torch.Tensor"),
        (lambda: apply_rotary_emb(Q, TABLE.int(), TABLE.int()), "cos is torch.int32; it must be"),
        (lambda: apply_rotary_emb(Q, TABLE, TABLE, seqlen_offsets=1.5), "seqlen_offsets is 1.5"),
        (lambda: apply_rotary_emb(Q, TABLE, TABLE, "yes"), "interleaved is 'yes'; it"),
        (lambda: apply_rotary_emb(ROW, TABLE, TABLE, cu_seqlens=CU[:0]), "int32 of shape (0,); it"),
        (lambda: apply_rotary_emb_kv_(Q, TABLE, TABLE), "apply_rotary_emb_kv_: kv has shape"),
    ],
)  # fmt: skip
def test_other_things_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ArgumentError), match=re.escape(message)):
        call()


@pytest.mark.parametrize("flag", [1, None, numpy.True_, torch.tensor(True), torch.tensor([1])])
@pytest.mark.parametrize("number", [1, numpy.float32(1), torch.tensor(1.0), torch.tensor([1])])
def test_scalars_of_other_kinds_are_taken(flag: Any, number: Any) -> None:
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 5, 2, 8)
    expected = flash_attn_func(q, k, k, softmax_scale=1.0, causal=bool(flag))
    assert torch.equal(flash_attn_func(q, k, k, softmax_scale=number, causal=flag), expected)
