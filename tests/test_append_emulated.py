"""The CUDA kernels that rotate and append, unmodified, on the SIMT emulator: what the CPU operators
write, and no report."""

import functools
from types import ModuleType

import pytest
import torch
from native import emulated, kv_caches
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import kv_cache

DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}


@functools.cache
def kernels() -> ModuleType:
    return emulated.load(
        "append_kernels",
        [emulated.NATIVE / "append_kernels.cpp"],
        [emulated.CUDA / "append.cu"],
        flags=["-I."],
    )


def address(t: Tensor | None, name: str, writable: bool = False) -> int:
    if t is None or t.numel() == 0:
        return 0
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    kernels().register_buffer(t.data_ptr(), span * t.element_size(), name, writable)
    return t.data_ptr()


def view(t: Tensor | None, name: str, writable: bool = False) -> list[int]:
    """Address, batch, row and head strides."""
    return [0] * 4 if t is None else [address(t, name, writable), *t.stride()[:3]]


def rotary(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> list[int]:
    if cos is None:
        return [0] * 7
    strides = [cos.stride(0), cos.shape[1], cos.shape[0]]
    return [address(cos, "cos"), address(sin, "sin"), *strides, interleaved, DTYPES[cos.dtype]]


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
    module = kernels()
    module.reset()
    x = torch.randn(2, 5, 3, 40).to(dtype)
    cos, sin = angles(30, 8, dtype)
    offsets = torch.tensor([0, 25], dtype=torch.int32)
    out = torch.full_like(x, torch.nan)
    where = [*view(x, "x"), *view(out, "out", True), address(offsets, "offsets"), advance]
    assert module.rotate([2, 5, 3, 40, DTYPES[dtype], *where, *rotary(cos, sin, interleaved)]) == 0
    assert not module.reports(), module.reports()
    expected = kv_cache.rotate(
        x, cos, sin, offsets, advance=advance, interleaved=interleaved, name="rotate"
    )
    close(out, expected, "rotated")


@pytest.mark.parametrize("layout", ("contiguous", "page1", "page5", "page16", "page64", "page256"))
@pytest.mark.parametrize("storage", ("same", "int8", "fp8"))
@pytest.mark.parametrize("rotated", (False, True))
def test_append(layout: str, storage: str, rotated: bool) -> None:
    """Every byte of the cache, poison included, is what the CPU leaves."""
    module = kernels()
    module.reset()
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
    theirs = caches[1]
    table = theirs.options.get("block_table")
    arguments = [3, new, heads, dim, dim_v, DTYPES[dtype], *view(k, "k"), *view(v, "v")]
    arguments += [address(used, "cache_seqlens")]
    arguments += [*view(theirs.k, "k_cache", True), *view(theirs.v, "v_cache", True)]
    arguments += [DTYPES[theirs.k.dtype], address(table, "block_table")]
    arguments += [0 if table is None else table.stride(0), theirs.k.shape[1]]
    arguments += view(theirs.options.get("k_scale"), "k_scale", True)
    arguments += view(theirs.options.get("v_scale"), "v_scale", True)
    assert module.append([*arguments, *rotary(cos, sin, True)]) == 0
    assert not module.reports(), module.reports()
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
