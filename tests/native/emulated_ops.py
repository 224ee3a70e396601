"""The library's operators with CUDA kernels behind them, on the emulator, for CPU tensors: put in
the place of ``_ops.forward``, ``_ops.forward_plain``, ``_ops.rotate`` and ``_ops.append_kv``, they
run the public functions as they run on a GPU, but for the checks that the C++ operators make
first."""

import functools
from types import ModuleType
from typing import Any

import pytest
import torch
from native import cuda_problem, emulated
from torch import Tensor

from flashattn_lite import _ops

ALGORITHMS = ("decode", "flash2", "flash1")  # in the order of preference (csrc/torch/engines.cpp)


def install(monkeypatch: pytest.MonkeyPatch, **fixed: Any) -> None:
    """For one test. `fixed`: keywords of every ``cuda_problem.forward``, such as its seed."""
    monkeypatch.setattr(_ops, "forward", functools.partial(forward, fixed))
    monkeypatch.setattr(_ops, "forward_plain", functools.partial(forward_plain, fixed))
    monkeypatch.setattr(_ops, "forward_plain_untraced", None)  # never the CPU's by mistake
    monkeypatch.setattr(_ops, "rotate", rotate)
    monkeypatch.setattr(_ops, "append_kv", append_kv)


def forward(fixed: dict[str, Any], *arguments: Any) -> tuple[Tensor, Tensor]:
    given = dict(zip(_ops.FORWARD_ARGUMENTS, arguments, strict=True))
    q, k, v = (given.pop(name) for name in "qkv")
    backend = given.pop("backend")
    left, right = given.pop("window_left"), given.pop("window_right")
    options = {n: o for n, o in given.items() if o is not None and not n.startswith("max_seqlen")}
    options["window"] = (None if left < 0 else left, None if right < 0 else right)
    algorithms = ALGORITHMS if backend in ("auto", "cuda") else (backend,)
    algorithm = cuda_problem.first_that_takes(algorithms, q, k, v, **options)
    result = cuda_problem.forward(algorithm, q, k, v, **fixed, **options)
    assert not result.reports, "\n".join(" ".join(report) for report in result.reports)
    return result.out, result.lse


def forward_plain(
    fixed: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads_first: bool = False,
    window_right: int = -1,
    softmax_scale: float | None = None,
    window_left: int = -1,
    *caches: Tensor | None,
) -> Tensor:
    assert not heads_first, "the emulated kernels take (batch, seqlen, heads, head_dim)"
    names = ("seqused_k", "block_table", "k_scale", "v_scale")
    given: dict[str, Any] = dict.fromkeys(_ops.FORWARD_ARGUMENTS)
    given |= {"q": q, "k": k, "v": v, "softmax_scale": softmax_scale, "backend": "auto"}
    given |= {"window_left": window_left, "window_right": window_right}
    given |= dict(zip(names, caches, strict=False))
    return forward(fixed, *given.values())[0]


@functools.cache
def append_kernels() -> ModuleType:
    return emulated.load(
        "append_kernels",
        [emulated.NATIVE / "append_kernels.cpp"],
        [emulated.CUDA / "append.cu"],
        flags=["-I."],
    )


def _address(t: Tensor | None, name: str, writable: bool = False) -> int:
    if t is None or t.numel() == 0:
        return 0
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    append_kernels().register_buffer(t.data_ptr(), span * t.element_size(), name, writable)
    return t.data_ptr()


def _view(t: Tensor | None, name: str, writable: bool = False) -> list[int]:
    """Address, batch, row and head strides."""
    return [0] * 4 if t is None else [_address(t, name, writable), *t.stride()[:3]]


def _rotary(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> list[int]:
    if cos is None:
        return [0] * 7
    strides = [cos.stride(0), cos.shape[1], cos.shape[0]]
    dtype = cuda_problem.ALL_DTYPES[cos.dtype]
    return [_address(cos, "cos"), _address(sin, "sin"), *strides, interleaved, dtype]


def _clean(error: int) -> None:
    reports = append_kernels().reports()
    append_kernels().reset()
    assert error == 0 and not reports, (error, reports)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor | None,
    offsets: Tensor | None,
    _max_seqlen: int,
    interleaved: bool,
    advance: bool,
) -> Tensor:
    assert cu_seqlens is None, "the binding of the emulated kernels takes dense rows"
    module = append_kernels()
    module.reset()
    out = torch.full_like(x, torch.nan)
    where = [*_view(x, "x"), *_view(out, "out", True), _address(offsets, "offsets"), advance]
    shape = [*x.shape, cuda_problem.ALL_DTYPES[x.dtype]]
    _clean(module.rotate([*shape, *where, *_rotary(cos, sin, interleaved)]))
    return out


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    _max_seqlen: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    assert cu_seqlens is None, "the binding of the emulated kernels takes dense rows"
    module = append_kernels()
    module.reset()
    arguments = [*k.shape, v.shape[-1], cuda_problem.ALL_DTYPES[k.dtype], *_view(k, "k")]
    arguments += [*_view(v, "v"), _address(cache_seqlens, "cache_seqlens")]
    arguments += [*_view(k_cache, "k_cache", True), *_view(v_cache, "v_cache", True)]
    arguments += [cuda_problem.ALL_DTYPES[k_cache.dtype], _address(block_table, "block_table")]
    arguments += [0 if block_table is None else block_table.stride(0), k_cache.shape[1]]
    arguments += [*_view(k_scale, "k_scale", True), *_view(v_scale, "v_scale", True)]
    _clean(module.append([*arguments, *_rotary(cos, sin, interleaved)]))
