"""Other packages as contenders, each called as its documentation says for the case: flash_attn 2.8,
xformers 0.0.35, FlashInfer 0.7. What one of them cannot do is refused here, with the reason.

None of them is needed; tests/test_bench_packages.py holds the calls to modules that compute the
same by the documented meaning of their arguments.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from flashattn_lite.bench import caches
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.inputs import Entry, Inputs, bind

__all__ = ["flash_attn", "flash_attn_refuses", "flashinfer", "flashinfer_refuses", "xformers",
           "xformers_refuses"]  # fmt: skip

WORKSPACE = 128 * 2**20  # bytes of FlashInfer's scratch memory, as its examples have it


def _first(*reasons: tuple[bool, str]) -> str | None:
    """The first reason that holds."""
    return next((reason for holds, reason in reasons if holds), None)


# ---- flash_attn ---------------------------------------------------------------------------------


def flash_attn_refuses(case: Case) -> str | None:
    return _first(
        (case.dtype == "fp32", "it has no float32"),
        (case.score == "bias", "it has no bias"),
        (case.block_density is not None, "it has no block mask"),
        (bool(case.storage), "it reads no quantised cache"),
        (case.page_size % 256 != 0, "its pages hold multiples of 256 tokens"),
    )


def flash_attn(case: Case, inputs: Inputs) -> Entry:
    module = importlib.import_module("flash_attn")
    if case.tokens:
        return caches.over_cache(
            inputs, caches.arguments(case, inputs), module.flash_attn_with_kvcache
        )
    window = (-1, -1) if case.window is None else (case.window, 0)
    options: dict[str, Any] = {"causal": case.causal, "window_size": window}
    if inputs.slopes is not None:
        options["alibi_slopes"] = inputs.slopes
    cu, n = inputs.cu_seqlens, case.seqlen

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.lengths:
            return module.flash_attn_varlen_func(q, k, v, cu, cu, n, n, **options)  # type: ignore[no-any-return]
        return module.flash_attn_func(q, k, v, **options)  # type: ignore[no-any-return]

    return bind(case, inputs, run, "native")


# ---- xformers -----------------------------------------------------------------------------------


def xformers_refuses(case: Case) -> str | None:
    return _first(
        (case.block_density is not None, "it has no block mask of this kind"),
        (case.score == "alibi", "its ALiBi is a bias, which another row measures"),
        (case.score == "bias" and case.causal, "its causal mask goes with no bias"),
        (bool(case.storage), "it reads no quantised cache of this layout"),
        (case.page_size != 0, "measured without pages"),
        (bool(case.lengths) and case.window is not None, "measured without both at once"),
    )


def xformers(case: Case, inputs: Inputs) -> Entry:
    """memory_efficient_attention: a ragged batch is one row of sequences; grouped heads are a
    dimension of their own, along which K and V are expanded."""
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    bias = _xformers_bias(case, inputs)
    group = case.heads // case.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        if case.lengths:
            q, k, v = (t.flatten(0, -3)[None] for t in (q, k, v))
        if group > 1:
            q = q.view(*q.shape[:2], case.kv_heads, group, q.shape[-1])
            k, v = (t.unsqueeze(3).expand(-1, -1, -1, group, -1) for t in (k, v))
        return attend(q, k, v, attn_bias=bias).reshape(shape)  # type: ignore[no-any-return]

    if case.tokens and case.lengths:  # over a cache as long as the longest for each
        q, k, v = inputs.q, inputs.padded(inputs.k), inputs.padded(inputs.v)
        return Entry(lambda: (run(q, k, v),), "native")
    return bind(case, inputs, run, "native")


def _xformers_bias(case: Case, inputs: Inputs) -> Any:
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    lengths = list(case.sequences())
    if case.tokens:
        if not case.lengths:
            return None
        make = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens
        return make([case.tokens] * len(lengths), case.seqlen, lengths, device=case.device)
    if case.lengths:
        ragged = masks.BlockDiagonalMask.from_seqlens(lengths, device=case.device)
        return ragged.make_causal() if case.causal else ragged
    if case.window is not None:
        return masks.LocalAttentionFromBottomRightMask(window_left=case.window, window_right=0)
    if inputs.bias is not None:
        n = case.seqlen
        return inputs.bias.expand(case.batch, case.heads, n, n)
    return masks.LowerTriangularMask() if case.causal else None


# ---- FlashInfer ---------------------------------------------------------------------------------


def flashinfer_refuses(case: Case) -> str | None:
    batch = len(case.sequences())
    return _first(
        (case.dtype == "fp32", "it has no float32"),
        (case.backward, "it has no backward"),
        (bool(case.score), "measured without a bias"),
        (case.block_density is not None, "measured without a block mask"),
        (bool(case.storage), "it reads no cache with a factor for each row"),
        (case.tokens > 1, "measured with one query"),
        (bool(case.tokens) and not case.page_size and batch > 1, "it decodes batches over pages"),
    )


def flashinfer(case: Case, inputs: Inputs) -> Entry:
    """Planned once for the shape, as its users do; only what is run for every layer is timed."""
    module = importlib.import_module("flashinfer")
    if not case.tokens:
        return _flashinfer_prompts(module, case, inputs)
    if case.page_size:
        return _flashinfer_pages(module, case, inputs)
    q, k, v = inputs.q[0, 0], inputs.k[0], inputs.v[0]

    def run() -> tuple[Tensor, ...]:
        return (module.single_decode_with_kv_cache(q, k, v, kv_layout="NHD")[None, None],)

    return Entry(run, "native")


def _workspace(case: Case) -> Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=case.device)


def _flashinfer_prompts(module: Any, case: Case, inputs: Inputs) -> Entry:
    wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(_workspace(case), "NHD")
    wrapper.plan(
        *(inputs.cu_seqlens, inputs.cu_seqlens, case.heads, case.kv_heads, case.head_dim),
        causal=case.causal,
        window_left=-1 if case.window is None else case.window,
        q_data_type=case.torch_dtype,
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = (t.flatten(0, -3) for t in (q, k, v))
        return wrapper.run(*packed).view(q.shape)  # type: ignore[no-any-return]

    return bind(case, inputs, run, "native")


def _flashinfer_pages(module: Any, case: Case, inputs: Inputs) -> Entry:
    arguments = caches.arguments(case, inputs)
    size, lengths = case.page_size, torch.tensor(case.sequences())
    counts = -(-lengths // size)
    table = arguments["block_table"]
    used = torch.arange(table.shape[1]) < counts[:, None]
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(case.device, torch.int32)
    last = (lengths - (counts - 1) * size).to(case.device, torch.int32)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(case), "NHD", use_tensor_cores=case.heads != case.kv_heads
    )
    wrapper.plan(
        *(indptr, table[used.to(case.device)], last),
        *(case.heads, case.kv_heads, case.head_dim, size),
        q_data_type=case.torch_dtype,
        kv_data_type=case.torch_dtype,
    )
    q, pages = inputs.q[:, 0].contiguous(), (arguments["k_cache"], arguments["v_cache"])

    def run() -> tuple[Tensor, ...]:
        return (wrapper.run(q, pages)[:, None],)

    return Entry(run, "native")
