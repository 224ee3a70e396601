"""What dense masks are taken for: bands, padding, or a bias."""

from __future__ import annotations

import pytest
import torch
from dense_masks import additive, band, padding
from torch import Tensor

from flashattn_lite._masks import Band, band_of, kernel_window, mask_options, padding_of


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("keys", [1, 2, 5, 9])
def test_every_band_is_recognised_or_left_dense(rows: int, keys: int) -> None:
    """Brute force over all sides: what is recognised has exactly the mask's visibility."""
    recognised = 0
    for left in (None, *range(-3, 10)):
        for right in (None, *range(-3, 10)):
            mask = band(rows, keys, left, right)
            found = band_of(mask)
            if found is None or kernel_window(found, rows, keys) is None:
                continue
            recognised += 1
            assert torch.equal(band(rows, keys, found.left, found.right), mask)
            aligned = kernel_window(found, rows, keys)
            assert aligned is not None
            used, (window_left, window_right) = aligned
            shift = used - rows  # the kernels' rule, bottom-right
            seen = band(
                rows,
                used,
                None if window_left is None else window_left - shift,
                None if window_right is None else window_right + shift,
            )
            assert torch.equal(seen, mask[:, :used])
            assert not mask[:, used:].any()
    assert recognised > 20


def test_random_masks_are_not_taken_for_bands_or_padding() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        mask = torch.rand(4, 5, generator=generator) < 0.6
        found = band_of(mask)
        if found is not None:
            assert torch.equal(band(4, 5, *found), mask)
        runs = padding_of(mask)
        if runs is not None:
            j = torch.arange(5)
            start = torch.zeros(4) if runs.leftpad is None else runs.leftpad
            end = torch.full((4,), 5) if runs.used is None else runs.used
            assert torch.equal((j >= start[:, None]) & (j < end[:, None]), mask)


def as_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return visible
    return torch.where(visible, 0.0, -torch.inf).to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_masks_are_read_to_the_last_element(dtype: torch.dtype) -> None:
    visible = band(21, 37, 5, 3)
    real = (torch.arange(37) >= torch.tensor([0, 9, 3])[:, None]) & (torch.arange(37) < 35)
    for view in (
        lambda m: m,
        lambda m: m.t().contiguous().t(),
        lambda m: m.repeat_interleave(2, 1)[:, ::2],
    ):
        mask = view(as_mask(visible, dtype))
        assert band_of(mask) == Band(5, 3)
        padding = padding_of(view(as_mask(real, dtype)))
        assert padding is not None and padding.leftpad is not None and padding.used is not None
        assert padding.leftpad.tolist() == [0, 9, 3] and padding.used.tolist() == [35] * 3
    for i, j in ((0, 36), (20, 0), (10, 5), (10, 13), (10, 14), (10, 36), (20, 23), (20, 24)):
        other = visible.clone()
        other[i, j] = ~other[i, j]
        assert band_of(as_mask(other, dtype)) is None
    for j in (1, 17, 36):
        other = real.clone()
        other[0, j] = ~other[0, j]
        assert padding_of(as_mask(other, dtype)) is None
    if dtype != torch.bool:
        negative_zeros = torch.where(visible, -0.0, -torch.inf).to(dtype)
        assert band_of(negative_zeros) == Band(5, 3)
        for value in (0.5, torch.inf, torch.nan):
            assert band_of(as_mask(visible, dtype).index_fill(1, torch.tensor(20), value)) is None
            assert padding_of(as_mask(real, dtype).index_fill(1, torch.tensor(20), value)) is None
    assert band_of(torch.zeros(0, 0, dtype=torch.bool)) is None
    empty = padding_of(torch.zeros(2, 0, dtype=torch.bool))
    assert empty is not None and empty == (None, None)


def test_band_of_names_the_sides() -> None:
    assert band_of(band(6, 6, None, 0)) == Band(None, 0)
    assert band_of(band(6, 6, 2, 1)) == Band(2, 1)
    assert band_of(torch.ones(6, 6, dtype=torch.bool)) == Band(None, None)


@pytest.mark.parametrize("additive_form", [False, True])
def test_masks_become_lengths_and_windows(additive_form: bool) -> None:
    form = additive if additive_form else (lambda make: make)
    keys, options = mask_options(form(padding((0, 31), (2, 47)))(), 2, 33, 47, torch.float32)
    assert keys == 47 and options["seqused_k"].tolist() == [31, 47]
    assert options["leftpad_k"].tolist() == [0, 2] and "bias" not in options
    keys, options = mask_options(
        form(lambda: band(33, 47, None, 0)[None, None])(), 2, 33, 47, torch.float32
    )
    assert keys == 33 and options == {"window": (None, 0)}


def test_a_mask_with_a_gradient_stays_a_bias() -> None:
    mask = additive(padding((0, 31), (0, 47)))().requires_grad_()
    _, options = mask_options(mask, 2, 33, 47, torch.float32)
    assert options["bias"] is mask
