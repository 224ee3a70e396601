"""pad_input, unpad_input and their helpers: round trips, five values, gradients."""

import pytest
import torch

from flashattn_lite import ArgumentError
from flashattn_lite.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)

LENGTHS = [3, 0, 5, 1]


def mask_of(lengths: list[int], seqlen: int) -> torch.Tensor:
    return torch.arange(seqlen) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("trailing", [(), (7,), (2, 4)])
def test_round_trip(dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    mask = mask_of(LENGTHS, 6)
    x = torch.randn(4, 6, *trailing)
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask.to(dtype))
    assert tokens.shape == (9, *trailing) and torch.equal(tokens, x[mask])
    assert indices.dtype == torch.int64 and torch.equal(indices, mask.flatten().nonzero().flatten())
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 3, 8, 9]
    assert type(max_seqlen) is int and max_seqlen == 5
    assert seqused.dtype == torch.int32 and seqused.tolist() == LENGTHS
    padded = pad_input(tokens, indices, 4, 6)
    assert torch.equal(padded[mask], x[mask]) and padded[~mask].eq(0).all()


def test_unused_places_are_kept_but_not_used() -> None:
    mask, unused = mask_of([2, 1], 4), torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]])
    x = torch.arange(8.0).reshape(2, 4)
    tokens, _, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask, unused)
    assert tokens.tolist() == [0, 1, 2, 4, 5, 6]
    assert cu_seqlens.tolist() == [0, 3, 6] and max_seqlen == 3 and seqused.tolist() == [2, 1]


def test_masks_with_holes_keep_the_order() -> None:
    mask = torch.tensor([[0, 1, 0, 1]])
    tokens, indices, *_ = unpad_input(torch.arange(4.0).reshape(1, 4), mask)
    assert tokens.tolist() == [1, 3] and indices.tolist() == [1, 3]


def test_gradients_go_where_the_rows_came_from() -> None:
    mask = mask_of(LENGTHS, 6)
    x = torch.randn(4, 6, 3, requires_grad=True)
    tokens, indices, *_ = unpad_input(x, mask)
    weight = torch.randn_like(tokens)
    (dx,) = torch.autograd.grad((tokens * weight).sum(), x)
    assert torch.equal(dx[mask], weight) and dx[~mask].eq(0).all()
    values = torch.randn(9, 3, requires_grad=True)
    outer = torch.randn(4, 6, 3)
    (dvalues,) = torch.autograd.grad((pad_input(values, indices, 4, 6) * outer).sum(), values)
    assert torch.equal(dvalues, outer[mask])


def test_an_empty_batch_and_a_batch_without_tokens() -> None:
    for mask in (torch.zeros(0, 6), torch.zeros(2, 6)):
        tokens, indices, cu_seqlens, max_seqlen, _ = unpad_input(torch.randn(*mask.shape, 3), mask)
        assert tokens.shape == (0, 3) and max_seqlen == 0
        assert cu_seqlens.tolist() == [0] * (mask.shape[0] + 1)
        assert pad_input(tokens, indices, mask.shape[0], 6).shape == (mask.shape[0], 6, 3)


def test_the_indexing_helpers_are_inverse() -> None:
    x, indices = torch.randn(5, 2), torch.tensor([4, 0, 2])
    rows = index_first_axis(x, indices)
    assert torch.equal(rows, x[indices])
    back = index_put_first_axis(rows, indices, 5)
    assert torch.equal(back[indices], rows) and back[[1, 3]].eq(0).all()


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"unpad_input: attention_mask has shape \(2, 5\)"):
        unpad_input(torch.randn(2, 6, 3), torch.ones(2, 5))
