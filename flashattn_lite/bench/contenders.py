"""Who computes a case: this library and the competitors found at run time.

Every contender gets the same numbers in the memory layout that it likes best: (batch, seqlen,
heads, head_dim) for us, flash_attn and xformers, (batch, heads, seqlen, head_dim) for PyTorch. A
backward contender runs forward and backward and returns the gradients too.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashattn_lite.bench import caches, packages
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.inputs import Entry, Inputs, bind

OURS = "flashattn_lite"


# ---- ours ---------------------------------------------------------------------------------------


def ours(case: Case, inputs: Inputs, backend: str = "auto") -> Entry:
    """The drop-in functions; ``attention`` where they have no such option."""
    if case.tokens:
        return caches.ours(case, inputs)
    if case.drop_in:
        return _drop_in(case, inputs)
    from flashattn_lite import attention, flash_attn_func, flash_attn_varlen_func

    window = (-1, -1) if case.window is None else (case.window, 0)
    if backend != "auto" or inputs.bias is not None or inputs.block_mask is not None:
        options: dict[str, Any] = {"causal": case.causal, "backend": backend}
        options["block_mask"] = inputs.block_mask
        if case.window is not None:
            options["window"] = window
        if case.lengths:
            options |= {"cu_seqlens_q": inputs.cu_seqlens, "cu_seqlens_k": inputs.cu_seqlens}
            options |= {"max_seqlen_q": case.seqlen, "max_seqlen_k": case.seqlen}
        options |= {"bias": inputs.bias, "alibi_slopes": inputs.slopes}

        def every_option(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attention(q, k, v, **options)
            assert isinstance(out, Tensor)
            return out

        return bind(case, inputs, every_option, "native")
    if case.lengths:
        cu, longest = inputs.cu_seqlens, case.seqlen

        def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_varlen_func(
                q, k, v, cu, cu, longest, longest, causal=case.causal, window_size=window
            )
            assert isinstance(out, Tensor)
            return out

        return bind(case, inputs, varlen, "native")
    causal, slopes = case.causal, inputs.slopes
    options = {"window_size": window} if case.window is not None else {}
    if slopes is not None:
        options["alibi_slopes"] = slopes

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, causal=causal, **options)  # type: ignore[return-value]

    return bind(case, inputs, dense, "native")


def _drop_in(case: Case, inputs: Inputs) -> Entry:
    """Ours in the place of PyTorch's."""
    from flashattn_lite.sdpa import scaled_dot_product_attention as drop_in

    causal, gqa = case.causal, case.kv_heads != case.heads

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return drop_in(q, k, v, attn_mask=None, is_causal=causal, enable_gqa=gqa)

    return bind(case, inputs, plain, "heads_first")


# ---- PyTorch ------------------------------------------------------------------------------------


def sdpa(case: Case, inputs: Inputs, backend: SDPBackend | None = None) -> Entry:
    """F.scaled_dot_product_attention, called as its documentation says for such a case."""
    mask = _sdpa_mask(case, inputs)
    causal = case.causal and mask is None
    gqa = case.kv_heads != case.heads

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa
        )

    layout = "padded_first" if case.lengths else "heads_first"
    if backend is None:
        return bind(case, inputs, plain, layout)

    def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return plain(q, k, v)

    return bind(case, inputs, forced, layout)


def _sdpa_mask(case: Case, inputs: Inputs) -> Tensor | None:
    """The attn_mask that a case needs; None where is_causal says it all. Causal padding at the end
    needs none: no real row sees it."""
    n, device = case.seqlen, case.device
    if inputs.dense_mask is not None:
        return inputs.dense_mask
    if case.lengths and not case.causal:
        lengths = torch.tensor(case.lengths, device=device)[:, None, None, None]
        return (torch.arange(n, device=device) < lengths).expand(-1, 1, n, n)
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    if case.window is not None:
        return ((distance >= 0) & (distance <= case.window))[None, None]
    if inputs.slopes is not None:
        bias = -inputs.slopes[:, None, None] * distance.abs()
        if case.causal:
            bias = bias.masked_fill(distance < 0, float("-inf"))
        return bias[None].to(case.torch_dtype)
    if inputs.bias is not None and case.causal:
        return inputs.bias.masked_fill(distance < 0, float("-inf"))
    return inputs.bias


def standard(case: Case, inputs: Inputs) -> Entry:
    """The papers' "standard attention": three operators with S and P in memory between them."""
    hidden = None
    if case.causal:
        shape = (case.seqlen, case.seqlen)
        hidden = torch.ones(shape, dtype=torch.bool, device=case.device).triu(1)
    scale = case.head_dim**-0.5

    def three_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * scale) @ k.transpose(-1, -2)
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.matmul(scores.softmax(-1), v)

    return bind(case, inputs, three_steps, "heads_first")


def sdpa_causal(case: Case, inputs: Inputs) -> Entry:
    """What somebody does who gives up the window for is_causal: another result."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    return bind(case, inputs, plain, "heads_first", same=False)


def sdpa_dense(case: Case, inputs: Inputs) -> Entry:
    """What somebody does who computes every block: another result."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    return bind(case, inputs, plain, "heads_first", same=False)


def sdpa_loop(case: Case, inputs: Inputs) -> Entry:
    """One call per sequence: the other way to do a ragged batch with PyTorch."""
    sizes = list(case.lengths)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(torch.split(t.transpose(0, 1), sizes, dim=1) for t in (q, k, v)), strict=True)
        outs = [
            scaled_dot_product_attention(a[None], b[None], c[None], is_causal=case.causal)[0]
            for a, b, c in parts
        ]
        return torch.cat(outs, dim=1).transpose(0, 1)

    return bind(case, inputs, loop, "native")


def flex(case: Case, inputs: Inputs) -> Entry:
    """torch.compile(flex_attention) with the case's block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # it falls back to eager after eight recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if inputs.block_mask is not None:
        block_mask = inputs.block_mask.to_flex(case.device)
    elif case.causal:
        window = case.seqlen if case.window is None else case.window

        def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j <= window)

        n = case.seqlen
        block_mask = create_block_mask(keep, None, None, n, n, device=case.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, block_mask=block_mask, enable_gqa=case.kv_heads != case.heads)
        assert isinstance(out, Tensor)
        return out

    return bind(case, inputs, run, "heads_first")


# ---- the registry -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Competitor:
    """``missing``: None, or why this machine does not have it. ``refuses``: None, or why it does
    not run a case. ``explicit``: it takes part only when it is asked for by name."""

    build: Callable[[Case, Inputs], Entry]
    missing: Callable[[str], str | None]
    refuses: Callable[[Case], str | None]
    explicit: Callable[[str], bool] = lambda device: False


def _here(device: str) -> str | None:
    return None


def _sdpa_refuses(case: Case) -> str | None:
    plain = not (case.tokens and (case.lengths or case.storage or case.page_size))
    return None if plain else "it decodes over contiguous caches of one length"


def _cuda_only(device: str) -> str | None:
    return None if device == "cuda" else "it runs on CUDA only"


@cache
def _importable(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return "it is not installed"
    try:
        importlib.import_module(package)
    except Exception as error:  # a package built for another torch or GPU: say so and go on
        return f"it does not import: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _package(package: str) -> Callable[[str], str | None]:
    return lambda device: _cuda_only(device) or _importable(package)


def _only_dense(case: Case) -> str | None:
    masked = case.window is not None or case.block_density is not None
    plain = not (case.lengths or case.score or masked or case.heads_k or case.tokens)
    return None if plain else "measured on dense and causal shapes only"


def _flex_refuses(case: Case) -> str | None:
    if case.lengths or case.score or case.tokens:
        return "measured on dense, causal and window shapes only"
    return "it has no backward on the CPU" if case.backward and case.device == "cpu" else None


def _forced(backend: SDPBackend) -> Competitor:
    return Competitor(lambda c, i: sdpa(c, i, backend), _cuda_only, _only_dense)


COMPETITORS: dict[str, Competitor] = {
    "standard": Competitor(  # the first that runs a case is its baseline: here the papers'
        standard,
        _here,
        lambda c: (
            None if c.suite in ("papers", "io") else "measured in the suites papers and io only"
        ),
    ),
    "one_by_one": Competitor(  # and of a batch of caches, of a quantised and of a paged one
        caches.one_by_one,
        _here,
        lambda c: None if c.tokens and c.lengths else "measured beside ragged caches only",
    ),
    "unquantised": Competitor(
        caches.unquantised,
        _here,
        lambda c: None if c.storage else "measured beside quantised caches only",
    ),
    "contiguous": Competitor(
        caches.contiguous,
        _here,
        lambda c: None if c.page_size else "measured beside paged caches only",
    ),
    "sdpa": Competitor(sdpa, _here, _sdpa_refuses),
    "sdpa_causal": Competitor(
        sdpa_causal,
        _here,
        lambda c: None if c.window is not None else "measured beside windows only",
    ),
    "sdpa_dense": Competitor(
        sdpa_dense,
        _here,
        lambda c: None if c.block_density is not None else "measured beside block masks only",
    ),
    "sdpa_loop": Competitor(
        sdpa_loop,
        _here,
        lambda c: None if c.lengths and not c.tokens else "measured on ragged batches only",
    ),
    "sdpa_math": Competitor(
        lambda c, i: sdpa(c, i, SDPBackend.MATH), _here, _only_dense, lambda device: device == "cpu"
    ),
    "sdpa_flash": _forced(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": _forced(SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": _forced(SDPBackend.EFFICIENT_ATTENTION),
    "flex": Competitor(flex, _here, _flex_refuses, lambda device: device == "cpu"),
    "flash_attn": Competitor(
        packages.flash_attn, _package("flash_attn"), packages.flash_attn_refuses
    ),
    "xformers": Competitor(packages.xformers, _package("xformers"), packages.xformers_refuses),
    "flashinfer": Competitor(
        packages.flashinfer, _package("flashinfer"), packages.flashinfer_refuses
    ),
}
