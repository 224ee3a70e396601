"""Ragged batches: cu_seqlens, seqused and left padding say the same thing in different ways."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashattn_lite import attention

LENGTHS = [(5, 9), (0, 4), (17, 0), (1, 30), (33, 33)]
OPTIONS: list[dict[str, Any]] = [{}, {"causal": True}, {"window": (6, 2), "softcap": 4.0}]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def ragged(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """q, k, v of each sequence, (rows, heads, dim)."""
    return [
        [torch.randn(n, h, 16).to(dtype) for n, h in ((a, 4), (b, 2), (b, 2))] for a, b in LENGTHS
    ]


def alone(sequences: list[list[Tensor]], **options: Any) -> list[tuple[Tensor, Tensor]]:
    results = [attention(*(t[None] for t in one), **options, return_lse=True) for one in sequences]
    return [(out[0], lse[0]) for out, lse in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen_equals_each_sequence_alone(options: dict[str, Any], dtype: torch.dtype) -> None:
    sequences = ragged(dtype)
    q, k, v = (torch.cat(parts) for parts in zip(*sequences, strict=True))
    cu_q, cu_k = (offsets([pair[i] for pair in LENGTHS]) for i in (0, 1))
    out, lse = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options, return_lse=True)
    for b, (expected, expected_lse) in enumerate(alone(sequences, **options)):
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        assert torch.equal(out[rows], expected), f"sequence {b}"
        assert torch.equal(lse[:, rows], expected_lse), f"sequence {b}"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("side", ["seqused", "leftpad"])
def test_padding_equals_each_sequence_alone(options: dict[str, Any], side: str) -> None:
    """Rows before a left padding, or beyond a used length, hold NaN and must not show."""
    sequences = ragged()
    longest_q, longest_k = (max(pair[i] for pair in LENGTHS) for i in (0, 1))
    q = torch.full((len(LENGTHS), longest_q, 4, 16), math.nan)
    k, v = (torch.full((len(LENGTHS), longest_k, 2, 16), math.nan) for _ in range(2))
    for b, ((seqlen_q, seqlen_k), (one_q, one_k, one_v)) in enumerate(
        zip(LENGTHS, sequences, strict=True)
    ):
        begin = longest_k - seqlen_k if side == "leftpad" else 0
        q[b, :seqlen_q] = one_q
        k[b, begin : begin + seqlen_k], v[b, begin : begin + seqlen_k] = one_k, one_v
    lengths: dict[str, Any] = {"seqused_q": torch.tensor([a for a, _ in LENGTHS]).int()}
    if side == "seqused":
        lengths["seqused_k"] = torch.tensor([b for _, b in LENGTHS]).int()
    else:
        lengths["leftpad_k"] = torch.tensor([longest_k - b for _, b in LENGTHS]).int()
    for t in (q, k, v):
        t.requires_grad_()
    out, lse = attention(q, k, v, **lengths, **options, return_lse=True)
    for b, (expected, expected_lse) in enumerate(alone(sequences, **options)):
        n = LENGTHS[b][0]
        assert torch.equal(out[b, :n], expected) and torch.equal(lse[b, :, :n], expected_lse)
        assert out[b, n:].eq(0).all() and lse[b, :, n:].eq(-math.inf).all()
    for t, g in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.isfinite(g).all() and g[t.isnan()].eq(0).all()


def test_queries_varlen_with_dense_keys() -> None:
    """The two sides are independent: ragged queries over a rectangular cache."""
    cu_q = offsets([3, 0, 5])
    q, k, v = torch.randn(8, 2, 8), torch.randn(3, 20, 2, 8), torch.randn(3, 20, 2, 8)
    used = torch.tensor([20, 7, 12], dtype=torch.int32)
    out = attention(q, k, v, causal=True, cu_seqlens_q=cu_q, seqused_k=used)
    for b, (begin, end) in enumerate([(0, 3), (3, 3), (3, 8)]):
        n = int(used[b])
        one = attention(q[None, begin:end], k[b : b + 1, :n], v[b : b + 1, :n], causal=True)
        assert torch.equal(out[begin:end], one[0])


def test_seqused_within_varlen() -> None:
    """seqused counts from the start of each cu_seqlens range; the rest of the range is NaN."""
    cu = offsets([10, 6, 4])
    used = torch.tensor([3, 6, 0], dtype=torch.int32)
    q, k, v = (torch.randn(20, 2, 8) for _ in range(3))
    for b in range(3):
        for t in (q, k, v):
            t[int(cu[b]) + int(used[b]) : int(cu[b + 1])] = math.nan
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "seqused_q": used, "seqused_k": used}
    out, lse = attention(q, k, v, causal=True, **lengths, return_lse=True)
    for b in range(3):
        begin, n = int(cu[b]), int(used[b])
        one = attention(*(t[None, begin : begin + n] for t in (q, k, v)), causal=True)
        assert torch.equal(out[begin : begin + n], one[0])
        assert out[begin + n : int(cu[b + 1])].eq(0).all()
        assert lse[:, begin + n : int(cu[b + 1])].eq(-math.inf).all()


def test_max_seqlen_is_only_a_bound() -> None:
    cu = offsets([4, 9])
    q = torch.randn(13, 2, 8)
    results = [
        attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=n, max_seqlen_k=n)
        for n in (9, 13, 1000, None)
    ]
    for other in results[1:]:
        assert torch.equal(other, results[0])
