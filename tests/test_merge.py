"""Merging partial results: equals the whole, associative, right for empty parts, differentiable."""

import math

import pytest
import torch

from flashattn_lite import ArgumentError, attention, flash_attn_combine, merge_attention_states


def parts(
    splits: list[slice], *, grad: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    q, k, v = (torch.randn(2, n, 2, 8, requires_grad=grad) for n in (5, 24, 24))
    whole, lse = attention(q, k, v, return_lse=True)
    some = [attention(q, k[:, s], v[:, s], return_lse=True) for s in splits]
    return [q, k, v], whole, lse, [(out, part_lse) for out, part_lse in some]


def test_two_parts_equal_the_whole_with_gradients() -> None:
    leaves, whole, lse, (a, b) = parts([slice(0, 7), slice(7, 24)], grad=True)
    out, merged_lse = merge_attention_states(*a, *b)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-6, atol=1e-6)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((whole, lse), leaves, (dout, dlse))
    actual = torch.autograd.grad((out, merged_lse), leaves, (dout, dlse))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_merge_is_associative_and_commutative_to_rounding() -> None:
    _, _, _, (a, b, c) = parts([slice(0, 3), slice(3, 20), slice(20, 24)])
    left = merge_attention_states(*merge_attention_states(*a, *b), *c)
    right = merge_attention_states(*a, *merge_attention_states(*b, *c))
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        merge_attention_states(*a, *b), merge_attention_states(*b, *a), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("mark", [-math.inf, math.inf])
def test_an_empty_part_changes_nothing_whatever_it_holds(mark: float) -> None:
    _, _, _, (a,) = parts([slice(0, 24)])
    empty = torch.full_like(a[0], math.nan), torch.full_like(a[1], mark)
    out, lse = merge_attention_states(*a, *empty)
    assert torch.equal(out, a[0]) and torch.equal(lse, a[1])
    out, lse = merge_attention_states(*empty, *empty)
    assert out.eq(0).all() and lse.eq(-math.inf).all()


def test_a_nan_lse_shows() -> None:
    _, _, _, (a, b) = parts([slice(0, 7), slice(7, 24)])
    a[1][0, 0, 0] = math.nan
    out, lse = merge_attention_states(*a, *b)
    assert lse[0, 0, 0].isnan() and out[0, 0, 0].isnan().all()
    assert torch.isfinite(out[0, 1:]).all()


def test_varlen_and_low_precision() -> None:
    out = torch.randn(9, 2, 8).bfloat16()
    lse = torch.randn(2, 9)
    merged, merged_lse = merge_attention_states(out, lse, out, lse)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, out)
    torch.testing.assert_close(merged_lse, lse + math.log(2))


@pytest.mark.parametrize("varlen", [False, True])
def test_combine_equals_the_whole(varlen: bool) -> None:
    _, whole, lse, some = parts([slice(0, 1), slice(1, 12), slice(12, 12), slice(12, 24)])
    outs = torch.stack([out for out, _ in some])
    lses = torch.stack([part for _, part in some]).transpose(-1, -2)  # heads last
    if varlen:
        outs, lses, whole = outs.flatten(1, 2), lses.flatten(1, 2), whole.flatten(0, 1)
        lse = lse.transpose(1, 2).flatten(0, 1).transpose(0, 1)
    out, combined_lse = flash_attn_combine(outs, lses)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(combined_lse.transpose(-1, -2), lse, rtol=1e-6, atol=1e-6)
    half, _ = flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, out.bfloat16())
    given = torch.empty_like(whole, dtype=torch.float16)
    returned, _ = flash_attn_combine(outs, lses, out=given)
    assert returned is given and torch.equal(given, out.half())


def test_no_parts_at_all() -> None:
    out, lse = flash_attn_combine(torch.empty(0, 2, 3, 4, 8), torch.empty(0, 2, 3, 4))
    assert out.shape == (2, 3, 4, 8) and out.eq(0).all() and lse.eq(-math.inf).all()


def test_shapes_are_checked() -> None:
    out, lse = torch.randn(2, 5, 2, 8), torch.randn(2, 2, 5)
    with pytest.raises(ArgumentError, match=r"merge_attention_states: .* the same shapes"):
        merge_attention_states(out, lse, out[:1], lse)
    with pytest.raises(ArgumentError, match="merge_attention_states: out_a has shape"):
        merge_attention_states(out, lse.transpose(1, 2), out, lse.transpose(1, 2))
    with pytest.raises(ArgumentError, match="flash_attn_combine: out_partial has shape"):
        flash_attn_combine(out[None], lse[None])
    with pytest.raises(ArgumentError, match="flash_attn_combine: out has shape"):
        flash_attn_combine(out[None], lse[None].transpose(-1, -2), out=out[:1])
