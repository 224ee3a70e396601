"""CUDA engines on the emulator, called with CPU tensors and the reference's own options."""

import functools
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from native import emulated
from torch import Tensor

from flashattn_lite import reference

DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
ALL_DTYPES = {torch.float32: 0, **DTYPES}


@functools.cache
def engines() -> ModuleType:
    """The engine table with every kernel behind it, compiled for the emulator."""
    kernels = [
        path
        for path in sorted(emulated.CUDA.glob("*.cu"))
        if path.stem != "device_info" and not path.stem.endswith("_sm90")
    ]
    return emulated.load(
        "cuda_engines", [emulated.NATIVE / "cuda_engines.cpp"], kernels, flags=["-I."]
    )


def _view(t: Tensor) -> tuple[int, int, int, int]:
    batch, row, head = (0, *t.stride()[:2]) if t.dim() == 3 else t.stride()[:3]
    return t.data_ptr(), batch, row, head


def _row_stats(t: Tensor | None) -> tuple[int, int, int, int]:
    if t is None:
        return 0, 0, 0, 0
    batch, head, row = (0, *t.stride()) if t.dim() == 2 else t.stride()
    return t.data_ptr(), batch, head, row


@dataclass
class Result:
    """What a call wrote, and what the emulator saw."""

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dsinks: Tensor | None = None
    reports: list[tuple[str, str, str]] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)


def _address(module: ModuleType, t: Tensor | None, name: str, writable: bool = False) -> int:
    """Registers the tensor's memory with the emulator; a view registers just what it spans."""
    if t is None or t.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    module.register_buffer(t.data_ptr(), (last + 1) * t.element_size(), name, writable)
    return t.data_ptr()


def _bias(module: ModuleType, bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return (0,) * 6
    bias = bias[(None,) * (4 - bias.dim())]
    strides = (0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))
    return (_address(module, bias, "bias"), *strides, ALL_DTYPES[bias.dtype])


def _block_mask(module: ModuleType, packed: Tensor, layout: Tensor) -> dict[str, int]:
    """Where each array of a packed mask is: csrc/torch/block_mask.h has their order."""
    names = ("seqlen_q", "seqlen_k", "block_q", "block_k", "batch", "heads")
    fields = dict(zip(names, layout.tolist(), strict=False))
    entries, documents, bitmaps = layout.tolist()[6:]
    tables = fields["batch"] * fields["heads"]
    blocks_q, blocks_k = (-(-fields[f"seqlen_{s}"] // fields[f"block_{s}"]) for s in "qk")
    sizes = {
        "row_start": tables * (blocks_q + 1),
        "row_index": entries,
        "row_rule": entries,
        "column_start": tables * (blocks_k + 1),
        "column_index": entries,
        "column_rule": entries,
        "bands": 2 * tables,
        "documents_q": documents * tables * fields["seqlen_q"],
        "documents_k": documents * tables * fields["seqlen_k"],
        "bitmaps": bitmaps * fields["block_q"] * -(-fields["block_k"] // 32),
    }
    assert sum(sizes.values()) == packed.numel()
    address = _address(module, packed, "block_mask")
    for name, size in sizes.items():
        required = not name.startswith(("documents", "bitmaps"))
        fields[name] = address if size or required else 0
        address += size * packed.element_size()
    return fields


def _problem(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> dict:
    """The fields of ForwardProblem but out and lse."""
    varlen_q, table = q.dim() == 3, o.get("block_table")
    lengths = reference.sequences(q, k, o)
    heads_k, head_dim = k.shape[-2:]
    left, right = o.get("window", (None, None))
    right = 0 if o.get("causal", False) else right
    slopes = o.get("alibi_slopes")
    scale = o.get("softmax_scale")
    index = {
        name: None if o.get(name) is None else o[name].to(torch.int32)
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k")
    }
    dropout_p = o.get("dropout_p", 0.0)
    seqlen_k = max((s.seqlen_k for s in lengths), default=0)
    if table is not None:
        seqlen_k = table.shape[1] * k.shape[1]
    elif k.dim() == 4:
        seqlen_k = k.shape[1]
    elif index["cu_seqlens_k"] is not None:
        seqlen_k = int(index["cu_seqlens_k"].diff().max()) if len(index["cu_seqlens_k"]) > 1 else 0
    seqlen_q = q.shape[1]
    if varlen_q:
        seqlen_q = int(index["cu_seqlens_q"].diff().max()) if len(index["cu_seqlens_q"]) > 1 else 0
    problem = {
        "batch": len(lengths),
        "heads_q": q.shape[-2],
        "heads_k": heads_k,
        "head_dim": head_dim,
        "head_dim_v": v.shape[-1],
        "dtype": DTYPES[q.dtype],
        "kv_dtype": DTYPES[k.dtype],
        "rows_q": q.shape[0] if varlen_q else q.shape[0] * q.shape[1],
        "rows_k": k.shape[0] if k.dim() == 3 else k.shape[0] * k.shape[1],
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "window_left": -1 if left is None else min(left, 2**30),
        "window_right": -1 if right is None else min(right, 2**30),
        "scale": head_dim**-0.5 if scale is None else scale,
        "softcap": o.get("softcap", 0.0),
        "alibi_batch_stride": slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        "dropout_seed": int(o.get("dropout_seed") or 0),
        "dropout_threshold": reference.dropout_threshold(dropout_p),
        "table_stride": 0 if table is None else table.stride(0),
        "page_size": 0 if table is None else k.shape[1],
        "num_splits": o.get("num_splits", 0),
        "bias": _bias(module, o.get("bias")),
        "alibi_slopes": _address(module, slopes, "alibi_slopes"),
        "sinks": _address(module, o.get("sinks"), "sinks"),
        "block_table": _address(module, table, "block_table"),
        "keep_alive": index,
    }
    for name, t in index.items():
        problem[name] = _address(module, t, name)
    for name, t in (("q", q), ("k", k), ("v", v)):
        _address(module, t, name)
        problem[name] = _view(t)
    if o.get("block_mask") is not None:
        mask = o["block_mask"]  # or as the operators get it, packed
        packed = (
            (mask, o["block_mask_layout"]) if isinstance(mask, Tensor) else mask.packed(q.device)
        )
        problem["keep_alive"] = (index, packed)
        problem["block_mask"] = _block_mask(module, *packed)
    for name in ("k_scale", "v_scale"):  # (batch, row, head), or (row, head) of varlen keys
        t = o.get(name)
        _address(module, t, name)
        problem[name] = _row_stats(None if t is None else t.transpose(-1, -2))
    return problem


def _finish(module: ModuleType, result: Result) -> Result:
    result.reports, result.sites = module.reports(), module.sites()
    result.traffic, result.counters = module.traffic(), module.counters()
    module.reset()
    return result


def _lse_like(q: Tensor) -> Tensor:
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return torch.full(shape, float("nan"))


def reason_against(
    algorithm: str, q: Tensor, k: Tensor, v: Tensor, capability: int = 80, **options: Any
) -> str | None:
    """Why an engine does not take a call, in its own words; None when it does."""
    module = engines()
    module.reset()
    problem = _problem(module, q, k, v, options) | {"out": (0,) * 4, "lse": (0,) * 4}
    which = getattr(module.Algorithm, algorithm)
    reason: str | None = module.supports_forward(which, problem, capability)
    module.reset()
    return reason


def first_that_takes(
    algorithms: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> str:
    """The first engine that takes a call; all reasons when none does."""
    reasons = {a: reason_against(a, q, k, v, **options) for a in algorithms}
    takes = [algorithm for algorithm, reason in reasons.items() if reason is None]
    assert takes, reasons
    return takes[0]


def forward(
    algorithm: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seed: int = 0,
    multiprocessors: int = 108,
    out: Tensor | None = None,
    **options: Any,
) -> Result:
    """Runs the forward under schedule `seed` with full checks. Outputs start as NaN."""
    module = engines()
    module.reset()
    module.configure(  # as sm_80
        seed=seed, max_smem_bytes=163 * 1024, multiprocessors=multiprocessors
    )
    problem = _problem(module, q, k, v, options)
    if out is None:
        out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=q.dtype)
    lse = _lse_like(q)
    _address(module, out, "out", writable=True)
    _address(module, lse, "lse", writable=True)
    problem |= {"out": _view(out), "lse": _row_stats(lse)}
    which = getattr(module.Algorithm, algorithm)
    assert module.supports_forward(which, problem, 80) is None
    workspace_bytes = module.forward_workspace_bytes(which, problem)
    workspace = module.allocate(workspace_bytes, "workspace") if workspace_bytes else 0
    assert module.forward(which, problem, workspace) == 0, module.reports()
    return _finish(module, Result(out, lse))


def backward(
    algorithm: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    dlse: Tensor | None = None,
    deterministic: bool = False,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Runs the backward on a forward's results. Gradients start as NaN."""
    module = engines()
    module.reset()
    module.configure(seed=seed, max_smem_bytes=163 * 1024)  # of sm_80
    problem = _problem(module, q, k, v, options)
    for name, t in (("out", out), ("lse", lse), ("dout", dout), ("dlse", dlse)):
        _address(module, t, name)
    problem |= {"out": _view(out), "lse": _row_stats(lse)}
    problem |= {"dout": _view(dout), "dlse": _row_stats(dlse), "deterministic": deterministic}
    result = Result(out, lse)
    for name, t in (("dq", q), ("dk", k), ("dv", v)):
        gradient = torch.full(t.shape, float("nan"), dtype=t.dtype)
        _address(module, gradient, name, writable=True)
        problem[name] = _view(gradient)
        setattr(result, name, gradient)
    if options.get("sinks") is not None:
        result.dsinks = torch.full_like(options["sinks"], float("nan"))
    problem["dsinks"] = _address(module, result.dsinks, "dsinks", writable=True)
    which = getattr(module.Algorithm, algorithm)
    assert module.supports_backward(which, problem, 80) is None
    workspace_bytes = module.backward_workspace_bytes(which, problem)
    workspace = module.allocate(workspace_bytes, "workspace") if workspace_bytes else 0
    assert module.backward(which, problem, workspace) == 0, module.reports()
    return _finish(module, result)
