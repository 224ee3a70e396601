"""A string, a list, a sparse tensor, another device where something else was meant: every public
function names the argument, its value and the remedy, and takes scalars of numpy's and torch's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from flashattn_lite import (
    ArgumentError,
    append_kv_cache,
    attention,
    attention_weights,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    merge_attention_states,
    scaled_dot_product_attention,
    use_as_sdpa,
)
from flashattn_lite.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)
from flashattn_lite.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_torch,
)
from flashattn_lite.tree import ancestor_mask, tree_attention

Q, CU = torch.zeros(2, 3, 2, 8), torch.tensor([0, 3, 6], dtype=torch.int32)
TABLE, ROW = torch.zeros(9, 4), torch.zeros(6, 2, 8)
HEADS_FIRST = Q.transpose(1, 2)
FP8 = Q[None, ..., 0].to(torch.float8_e4m3fn)
SPARSE, NESTED = Q.to_sparse(), torch.nested.nested_tensor([Q[0], Q[1]])
SPARSE_CSR = TABLE.to_sparse_csr()
F8, QKV = torch.float8_e4m3fn, torch.zeros(2, 3, 3, 2, 8)
RAGGED = {"k": ROW, "v": ROW, "cu_seqlens": CU, "block_table": CU.new_tensor([[0], [1]])}


def append(**changes: Any) -> None:
    cache = torch.zeros(2, 9, 2, 8)
    good = {"k": Q, "v": Q, "k_cache": cache, "v_cache": cache.clone(), "cache_seqlens": CU[:2]}
    append_kv_cache(**good | changes)


def kvcache(**changes: Any) -> Any:
    cache, angles = torch.zeros(2, 9, 2, 8), torch.zeros(16, 4)
    good = {"k": Q, "v": Q, "rotary_cos": angles, "rotary_sin": angles}
    return flash_attn_with_kvcache(Q, cache, cache.clone(), **good | changes)


def paged(cu_seqlens_k: torch.Tensor, max_seqlen_k: int) -> Any:
    pages, table = torch.zeros(4, 5, 2, 8), CU.new_tensor([[0], [1]])
    arguments = (ROW, pages, pages, CU, cu_seqlens_k, 3, max_seqlen_k)
    return flash_attn_varlen_func(*arguments, window_size=(2, 0), block_table=table)


def used_sdpa(*arguments: Any) -> Any:
    with use_as_sdpa():
        return torch.nn.functional.scaled_dot_product_attention(*arguments)


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
        (lambda: apply_rotary_emb_torch(Q, TABLE, TABLE), "cos is for (9,) tokens but x has (3,)"),
        (lambda: apply_rotary_emb_torch(Q, TABLE[:3], TABLE[:3], "no"), "interleaved is 'no'; it"),
        (lambda: apply_rotary_emb(Q.to(F8), TABLE, TABLE), "x is torch.float8_e4m3fn; it must be"),
        (lambda: RotaryEmbedding(8, base=0), "base is 0; it must be > 0"),
        (lambda: RotaryEmbedding(8)("qkv"), "qkv is 'qkv'; it must be a torch.Tensor"),
        (lambda: attention(Q, Q, Q, window=(2**63, 0)), "window[0] is 9223372036854775808; it mus"),
        (lambda: attention(Q, Q, Q, num_splits=2**70), "but instead found one of more than 64 bit"),
        (lambda: attention(Q.to(torch.complex64), Q, Q), "q is complex64; it must be float32,"),
        (lambda: attention(Q, Q.to(torch.uint8), Q), "k is uint8; it must be float32 as q is, int"),
        (lambda: attention_weights(Q, Q, scale=2.0), "scale is no option; see"),
        (lambda: attention_weights(Q, Q, window=3), "window is 3; it must be a pair"),
        (lambda: attention_weights(Q, Q, softmax_scale="x"), "softmax_scale is 'x'; it must be"),
        (lambda: attention_weights(Q, Q, block_mask=Q), "block_mask is Tensor; it must be a Block"),
        (lambda: flash_attn_combine(Q[None], Q[None, ..., 0], Q.int()), "out is int32; it must be"),
        (lambda: flash_attn_combine(Q[None], Q[None, ..., 0], None, torch.int8), "out_dtype is to"),
        (lambda: flash_attn_qkvpacked_func(QKV.int()), "qkv is int32; it must be float32,"),
        (lambda: flash_attn_kvpacked_func(Q, QKV[:1, :, :2]), "kv has batch 1 but q has batch 2"),
        (lambda: flash_attn_varlen_qkvpacked_func(QKV[0], CU, 6), "cu_seqlens ends at 6 but qkv h"),
        (lambda: flash_attn_varlen_qkvpacked_func(QKV[0], CU, 3.0), "max_seqlen is 3.0; it must b"),
        (lambda: paged(CU + 1, 3), "cu_seqlens_k starts at 1; it must start at 0"),
        (lambda: paged(CU.flip(0) * 0 + CU * -1, 3), "cu_seqlens_k falls from 0 to -3 at entry 1"),
        (lambda: paged(CU, -1), "max_seqlen_k is -1 but cu_seqlens_k has a sequence of 3 rows"),
        (lambda: paged(CU.float(), 3), "cu_seqlens_k is torch.float32 of shape (3,); it must be"),
        (lambda: paged(CU[0], 3), "cu_seqlens_k is torch.int32 of shape (); it must be int32"),
        (lambda: scaled_dot_product_attention(*[HEADS_FIRST.numpy()] * 3), "query is a ndarray; i"),
        (lambda: scaled_dot_product_attention(Q, Q, Q, scale=math.nan), "scale is nan; it must be"),
        (lambda: used_sdpa(Q, Q, 3), "value is 3; it must be a torch.Tensor"),
        (lambda: append(k=Q[0, 0, 0, 0]), "k has shape (); it must be (batch, seqlen, heads"),
        (lambda: attention(Q, Q, Q, bias=SPARSE_CSR), "bias is a sparse tensor; it must be a"),
        (lambda: append(k=[1]), "k is [1]; it must be a torch.Tensor"),
        (lambda: append(v=Q.to("meta")), "v is on meta but k is on cpu"),
        (lambda: append(k=Q.to_sparse()), "k is a sparse tensor; it must be a dense one"),
        (lambda: append(k=Q.int()), "k is int32; it must be float32, float16 or bfloat16"),
        (lambda: append(cache_seqlens=None), "cache_seqlens is None; it must be a torch.Tensor"),
        (lambda: append(rotary_interleaved="x"), "rotary_interleaved is 'x'; it must be a bool"),
        (lambda: append(**RAGGED, max_seqlen=2**32), "max_seqlen is 4294967296; it must be 0"),
        (lambda: append(**RAGGED, max_seqlen=2.0), "max_seqlen is 2.0; it must be an int"),
        (lambda: kvcache(cache_seqlens=CU[:2] - 1), "cache_seqlens[0] is -1; it must be >= 0"),
        (lambda: kvcache(cache_seqlens=CU.bool()), "cache_seqlens is bool; it must be int32"),
        (lambda: ancestor_mask([-1, 0]), "parents is [-1, 0]; it must be a torch.Tensor"),
        (lambda: ancestor_mask(TABLE), "parents is torch.float32; it must be of integers"),
        (lambda: tree_attention(3, Q, Q, Q, seqused_k=CU), "q is 3; it must be a torch.Tensor"),
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
