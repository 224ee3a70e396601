"""The CUDA kernels that rotate and append, unmodified, on the SIMT emulator: what the CPU operators
write, and no report."""

import pytest
import torch
from native import emulated_ops, kv_caches
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import kv_cache


def angles(positions: int, pairs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.rand(positions, pairs) * 6
    return x.cos().to(dtype), x.sin().to(dtype)


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Within one rounding: a fused multiply-add may round otherwise than two operations."""
    eps = torch.finfo(actual.dtype).eps if actual.dtype.is_floating_point else 0.0
    a, e = actual.double(), expected.double()
    same = (a == e) | (a.isnan() & e.isnan())
    bound = eps * e.abs() + 4 * torch.finfo(torch.float32).eps
    assert bool((same | ((a - e).abs() <= bound)).all()), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("advance", (False, True))
def test_rotate(dtype: torch.dtype, interleaved: bool, advance: bool) -> None:
    x = torch.randn(2, 5, 3, 40).to(dtype)
    cos, sin = angles(30, 8, dtype)
    offsets = torch.tensor([0, 25], dtype=torch.int32)
    out = emulated_ops.rotate(x, cos, sin, None, offsets, 5, interleaved, advance)
    expected = kv_cache.rotate(
        x, cos, sin, offsets, advance=advance, interleaved=interleaved, name="rotate"
    )
    close(out, expected, "rotated")


@pytest.mark.parametrize("layout", ("contiguous", "page1", "page5", "page16", "page64", "page256"))
@pytest.mark.parametrize("storage", ("same", "int8", "fp8"))
@pytest.mark.parametrize("rotated", (False, True))
def test_append(layout: str, storage: str, rotated: bool) -> None:
    """Every byte of the cache, poison included, is what the CPU leaves."""
    dtype, lengths, new, heads, dim, dim_v = torch.bfloat16, (0, 61, 130), 3, 2, 40, 24
    old = [[torch.randn(n, heads, d).to(dtype) for n in lengths] for d in (dim, dim_v)]
    caches = [kv_caches.make_cache(layout, storage, *old, 140) for _ in range(2)]
    for cache in caches:
        kv_caches.forget_unused_pages(cache, [n + new for n in lengths])
    k, v = (torch.randn(3, new, heads, d).to(dtype) for d in (dim, dim_v))
    k[1, 0, 0, 3] = v[2, 1, 1, 0] = torch.nan
    used = torch.tensor(lengths, dtype=torch.int32)
    cos, sin = angles(140, 8, dtype) if rotated else (None, None)

    fal.append_kv_cache(
        *(k, v, caches[0].k, caches[0].v, used),
        rotary_cos=cos,
        rotary_sin=sin,
        **caches[0].options,
    )
    theirs, scales = caches[1], ("k_scale", "v_scale")
    emulated_ops.append_kv(
        *(k, v, theirs.k, theirs.v, used, theirs.options.get("block_table"), None, new),
        *(theirs.options.get(scale) for scale in scales),
        *(cos, sin, True),
    )
    for name, ours, other in zip(
        ("k", "v", "k_scale", "v_scale"), caches[0].tensors(), theirs.tensors(), strict=False
    ):
        if rotated and name in ("k", "k_scale"):
            # A fused multiply-add may round otherwise, and a stored byte then by one step.
            if ours.dtype is torch.int8:
                assert int((ours.int() - other.int()).abs().max()) <= 1, name
            elif ours.dtype is torch.float8_e4m3fn:
                steps = ours.view(torch.uint8).int() - other.view(torch.uint8).int()
                assert int(steps.abs().max()) <= 1, name
            else:
                close(other, ours, name)
        else:
            assert torch.equal(kv_caches.bits(ours), kv_caches.bits(other)), name
