"""csrc/core's conversions bit for bit against torch's, over every small float; and the rotation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from native.build import load

core = load("core", [Path(__file__).parent / "native/core.cpp"], ["-O1"])

# name in core, torch's type, integers of its width (numpy's and torch's)
TYPES = [
    ("bfloat16", torch.bfloat16, np.uint16, torch.int16),
    ("float16", torch.float16, np.uint16, torch.int16),
    ("float8_e4m3", torch.float8_e4m3fn, np.uint8, torch.int8),
]
each_type = pytest.mark.parametrize(
    ("name", "dtype", "unsigned", "signed"), TYPES, ids=[t[0] for t in TYPES]
)


def every_value(dtype: torch.dtype, unsigned: type, signed: torch.dtype) -> tuple:
    """All bit patterns, and torch's float32 of each."""
    bits = np.arange(np.iinfo(unsigned).max + 1).astype(unsigned)
    tensor = torch.from_numpy(bits.view(f"int{8 * bits.itemsize}")).view(dtype)
    return bits, tensor.to(torch.float32).numpy()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits, any NaN being as good as another."""
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


@each_type
def test_every_small_float_widens_exactly(name, dtype, unsigned, signed) -> None:
    bits, expected = every_value(dtype, unsigned, signed)
    assert same(getattr(core, f"{name}_to_float")(bits), expected)


@each_type
def test_rounding_is_to_nearest_ties_to_even(name, dtype, unsigned, signed) -> None:
    """Every value, every midpoint of two neighbours, a float32 ulp to both sides, and anything."""
    _, values = every_value(dtype, unsigned, signed)
    finite = np.unique(values[np.isfinite(values)]).astype(np.float64)
    middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    grid = np.concatenate([values[np.isfinite(values)], middles])
    random = np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=np.uint32).view(np.float32)
    x = np.concatenate(
        [
            grid,
            np.nextafter(grid, np.float32(np.inf)),
            np.nextafter(grid, np.float32(-np.inf)),
            random,
            np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45], np.float32),
        ]
    )
    rounded = getattr(core, f"float_to_{name}")(x)
    if dtype is torch.float8_e4m3fn:  # saturates instead of making a NaN
        x = np.where(np.isnan(x), x, np.clip(x, -448, 448)).astype(np.float32)
    expected = torch.from_numpy(x).to(dtype)
    nan = np.isnan(x)
    assert np.array_equal(rounded[~nan], expected.view(signed).numpy().view(unsigned)[~nan])
    assert np.isnan(getattr(core, f"{name}_to_float")(rounded[nan])).all() and nan.any()


def test_int8_rounds_to_nearest_even() -> None:
    x = np.arange(-127 * 8, 127 * 8 + 1, dtype=np.float32) / 8
    stored = core.quantise_int8(x).view(np.int8)
    assert np.array_equal(stored, np.round(x).astype(np.int8))
    assert np.array_equal(core.dequantise_int8(stored.view(np.uint8)), np.round(x))
    assert core.quantise_int8(np.float32(np.nan)) == 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_rotation_is_multiplication_by_a_unit_complex_number(interleaved: bool, pairs: int) -> None:
    random = np.random.default_rng(pairs)
    head_dim = 2 * pairs + 3  # the rest is copied
    x = random.standard_normal(head_dim).astype(np.float32)
    angles = random.uniform(-3, 3, (50, pairs))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = np.array([0, 7, 49])
    out = core.rotate_row(x, cos, sin, interleaved, positions)

    first = np.arange(pairs) * 2 if interleaved else np.arange(pairs)
    second = first + (1 if interleaved else pairs)
    turned = (x[first] + 1j * x[second].astype(np.float64)) * (cos + 1j * sin)[positions]
    # Two products and a sum, each rounded once.
    bound = 3 * 2.0**-24 * np.abs(x[first] + 1j * x[second]) * 2**0.5
    assert (np.abs(out[:, first] - turned.real) <= bound).all()
    assert (np.abs(out[:, second] - turned.imag) <= bound).all()
    assert (out[:, 2 * pairs :] == x[2 * pairs :]).all()
