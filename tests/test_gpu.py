"""The CUDA engines on a real GPU: the case table of every other engine, and what only a device
shows (streams, graphs, several devices, no waiting). `make gpu-check` runs it."""

import os
from dataclasses import replace
from typing import Any

import pytest
import test_block_mask as block_masks
import torch
from native import kv_caches
from torch import Tensor

from flashattn_lite import (
    ArgumentError,
    attention,
    block_patterns,
    flash_attn_func,
    flash_attn_with_kvcache,
    reference,
)
from flashattn_lite.testing import (
    Case,
    all_cases,
    check_case,
    check_within_budget,
    gradients_of,
    make_inputs,
)
from flashattn_lite.tree import ancestor_mask

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA"
)
ALGORITHMS = ("flash2", "flash1")


def runner(algorithm: str) -> Any:
    def run(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention(
            *tensors, **options, return_lse=True, backend=algorithm, deterministic=True
        )
        return out, lse

    return run


def out_of_reach(case: Case) -> str:
    """What is said to a case that CUDA does not run forward and backward; empty when it must."""
    if case.bias:
        return "which CUDA does not have through a bias"
    return "q is not float16 or bfloat16" if case.dtype == torch.float32 else ""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_case_table(case: Case, algorithm: str) -> None:
    reason = out_of_reach(case)
    if reason:
        with pytest.raises(ArgumentError, match=reason):
            check_case(runner(algorithm), case, device="cuda")
    else:
        check_case(runner(algorithm), case, device="cuda")


@pytest.mark.parametrize("backend", ["auto", "flash2", "decode"])
def test_every_engines_reason_is_listed(backend: str) -> None:
    """Latent attention: 576 dims over one head, on a GPU."""
    q, k = (torch.zeros(1, n, h, 576, dtype=torch.half, device="cuda") for n, h in ((1, 8), (9, 1)))
    with pytest.raises(ArgumentError, match="run this call") as raised:
        attention(q, k, k[..., :512], backend=backend)
    lines = str(raised.value).splitlines()[1:]
    reason = "the head dim is above 256: latent attention decodes on the CPU engine alone"
    expected = [f"  {name}: {reason}" for name in ("decode", "flash2", "flash1")]
    assert lines == ["  cpu: q is a CUDA tensor", *expected]


def few_queries(case: Case) -> Case:
    return replace(case, seqlens=tuple((min(5, q), k) for q, k in case.seqlens))


@pytest.mark.parametrize("case", [few_queries(c) for c in all_cases()], ids=str)
def test_case_table_of_decode(case: Case) -> None:
    """With at most five query tokens a sequence; decode has no backward, and takes a bias."""
    reason = out_of_reach(replace(case, bias=""))
    reason = reason or ("decoding has no dropout" if case.dropout_p else "")
    if reason:
        with pytest.raises(ArgumentError, match=reason):
            check_case(runner("decode"), case, device="cuda", backward=False)
    else:
        check_case(runner("decode"), case, device="cuda", backward=False)


@pytest.mark.parametrize("layout", ["contiguous", "page1", "page5", "page16", "page64", "page256"])
@pytest.mark.parametrize("storage", ["same", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("float16", "bfloat16"))
def test_decode_over_pages(layout: str, storage: str, dtype: torch.dtype) -> None:
    """Poisoned caches; the same bits alone and in a batch, in a graph, and with no waiting."""
    lengths = [5000, 1, 300, 700]
    k, v = ([torch.randn(n, 2, 128).to(dtype) for n in lengths] for _ in range(2))
    q = torch.randn(4, 3, 8, 128, dtype=dtype, device="cuda")
    cache = kv_caches.make_cache(layout, storage, k, v, 5003)
    kv_caches.forget_unused_pages(cache, lengths)
    options = {n: t.cuda() for n, t in cache.options.items()}
    options["seqused_k"] = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    stored = [cache.k.cuda(), cache.v.cuda()]

    def decode(batch: slice = slice(None), num_splits: int = 0) -> tuple[Tensor, Tensor]:
        own = {n: o[batch] for n, o in options.items() if n in ("seqused_k", "block_table")}
        of = [t if "block_table" in options else t[batch] for t in stored]
        scales = {
            n: o if "block_table" in options else o[batch]
            for n, o in options.items()
            if n.endswith("_scale")
        }
        out, lse = attention(
            *(q[batch], *of),
            causal=True,
            return_lse=True,
            num_splits=num_splits,
            backend="decode",
            **own,
            **scales,
        )
        return out, lse

    out, lse = decode()
    truth = reference.attention(q, *stored, causal=True, **options)
    low = reference.attention(q, *stored, causal=True, **options, precision=dtype)
    check_within_budget("out", out, truth[0], low[0])
    check_within_budget("lse", lse, truth[1], low[1])
    for b in range(4):
        alone = decode(slice(b, b + 1))
        assert torch.equal(alone[0][0], out[b]) and torch.equal(alone[1][0], lse[b])
    for num_splits in (1, 3):
        assert torch.equal(decode(num_splits=num_splits)[0], out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return  # gpu-check's sanitizer: without torch's allocator nothing can be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = decode()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, out)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_many_tiles(algorithm: str, head_dim: int, causal: bool) -> None:
    case = Case(
        "many_tiles",
        ((1000, 1500),) * 2,
        head_dim=head_dim,
        causal=causal,
        dtype=torch.bfloat16,
    )
    check_case(runner(algorithm), case, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("float16", "bfloat16"))
@pytest.mark.parametrize("name", block_masks.PATTERNS)
def test_block_masks(name: str, dtype: torch.dtype) -> None:
    """Every pattern, in blocks smaller and larger than tiles; tests/test_block_mask_emulated.py has
    the options."""
    case = Case(name, ((block_masks.S,) * 2,) * 2, heads_q=4, heads_k=2, dtype=dtype)
    inputs = make_inputs(case, device="cuda")
    for size in (16, 128):
        mask = block_masks.PATTERNS[name](size)
        block_masks.check(runner("flash2"), inputs, mask, dtype, f"{name} {size}")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=("plain", "softcap"))
def test_long_block_masks(head_dim: int, softcap: float) -> None:
    """More tiles than one list of them holds, dQ by atomics; and a decoding step over pages."""
    seqlen = 5000
    mask = block_patterns.streaming(seqlen, 100, 4200, block_size=64)
    case = Case("long", ((300, seqlen),), head_dim=head_dim, softcap=softcap, dtype=torch.bfloat16)
    inputs = make_inputs(case, device="cuda")

    def atomic(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention(*tensors, **options, return_lse=True, backend="flash2")
        return out, lse

    block_masks.check(atomic, inputs, mask, torch.bfloat16, "long")
    k, v = (t.view(-1, 8, *t.shape[2:]) for t in (inputs.k, inputs.v))
    lengths = torch.tensor([seqlen], dtype=torch.int32, device="cuda")
    table = torch.arange(seqlen // 8, dtype=torch.int32, device="cuda")[None]
    options = {"softcap": softcap, "block_mask": mask}
    step = flash_attn_with_kvcache(
        inputs.q[:, -1:], k, v, cache_seqlens=lengths, block_table=table, **options
    )
    truth, _ = reference.attention(inputs.q[:, -1:], inputs.k, inputs.v, **options)
    low, _ = reference.attention(
        inputs.q[:, -1:], inputs.k, inputs.v, **options, precision=torch.bfloat16
    )
    assert isinstance(step, Tensor)
    check_within_budget("step", step, truth, low)
    torch.cuda.set_sync_debug_mode("error")
    try:
        atomic(inputs.q, inputs.k, inputs.v, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_deterministic_gradients_are_bitwise_repeatable(algorithm: str) -> None:
    case = Case("repeat", ((700, 900),) * 4, heads_q=8, dtype=torch.float16, dropout_p=0.1)
    inputs = make_inputs(case, device="cuda")
    first = gradients_of(runner(algorithm), inputs, inputs.options)
    for _ in range(5):
        again = gradients_of(runner(algorithm), inputs, inputs.options)
        assert torch.equal(again.out, first.out)
        for name, gradient in first.grads.items():
            assert torch.equal(again.grads[name], gradient), name


def test_dropout_is_the_cpus() -> None:
    """The same seed drops the same elements on both devices."""
    q, k = (torch.zeros(2, 130, 3, 64, dtype=torch.float16) for _ in range(2))
    v = torch.eye(130, 64, dtype=torch.float16)[None, :, None].expand(2, -1, 3, -1)
    seed = torch.tensor([1234567])
    on_cpu = attention(q, k, v, dropout_p=0.3, dropout_seed=seed)
    on_gpu = attention(*(t.cuda() for t in (q, k, v)), dropout_p=0.3, dropout_seed=seed)
    assert isinstance(on_cpu, Tensor) and isinstance(on_gpu, Tensor)
    assert torch.equal(on_cpu == 0, on_gpu.cpu() == 0)


def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    q, k, v = (torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    expected = flash_attn_func(q, k, v, causal=True)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        flash_attn_func(q, k, v, causal=True)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, causal=True)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_training_step_runs_in_a_graph(algorithm: str, deterministic: bool) -> None:
    """Forward and backward, captured once, follow what their inputs hold at each replay."""
    q, k, v = (
        torch.randn(2, 300, heads, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        for heads in (4, 2, 2)
    )
    dout = torch.randn_like(q)

    def step() -> tuple[Tensor, ...]:
        out = attention(q, k, v, causal=True, backend=algorithm, deterministic=deterministic)
        assert isinstance(out, Tensor)
        return (out, *torch.autograd.grad(out, (q, k, v), dout))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in (q, k, v, dout):
            t.copy_(torch.randn_like(t))
    graph.replay()
    torch.cuda.synchronize()
    # Atomic sums of dQ differ in their order, not by more than a few roundings.
    for got, expected in zip(captured, step(), strict=True):
        bound = 0.0 if deterministic else 4 * 2.0**-10 * float(expected.abs().max())
        assert float((got - expected).detach().abs().max()) <= bound


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_hidden_nan_never_shows(algorithm: str, name: str) -> None:
    """It reaches the rows that see it and no other; tests/test_cuda_nonfinite.py has the rest."""
    tensors = {n: torch.randn(1, 200, 2, 64, device="cuda").bfloat16() for n in "qkv"}
    tensors[name][0, 100] = torch.nan
    out = attention(*tensors.values(), causal=True, backend=algorithm)
    assert isinstance(out, Tensor)
    assert torch.isfinite(out[:, :100]).all() and out[:, 100:].isnan().all()


def test_never_waits_for_the_device() -> None:
    q, k, v = (
        torch.randn(2, 64, 4, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        for _ in range(3)
    )
    lengths = torch.tensor([3, 64], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention(q, k, v, seqused_k=lengths, causal=True)
        assert isinstance(out, Tensor)
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device() -> None:
    q = torch.randn(1, 100, 2, 64, device="cuda:1", dtype=torch.float16)
    with torch.cuda.device(0):
        out = flash_attn_func(q, q, q)
    assert isinstance(out, Tensor) and out.device == q.device
    assert torch.equal(out, flash_attn_func(q, q, q))


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize("interleaved", [False, True])
def test_kv_cache_equals_the_cpus(page_size: int, interleaved: bool) -> None:
    """Append with rotary and attend over shuffled pages, on both devices."""
    batch, pages, heads, dim = 3, 3 * (512 // page_size), 2, 64
    q = torch.randn(batch, 2, 4, dim, dtype=torch.float16)
    new = [torch.randn(batch, 2, heads, dim, dtype=torch.float16) for _ in range(2)]
    caches = [torch.randn(pages, page_size, heads, dim, dtype=torch.float16) for _ in range(2)]
    angles = torch.rand(600, dim // 2)
    table = torch.randperm(pages, dtype=torch.int32).view(batch, -1)
    lengths = torch.tensor([0, 100, 509], dtype=torch.int32)
    results = []
    for device in ("cpu", "cuda"):
        k_cache, v_cache = (t.to(device, copy=True) for t in caches)
        out = flash_attn_with_kvcache(
            *(q.to(device), k_cache, v_cache, *(t.to(device) for t in new)),
            rotary_cos=angles.cos().half().to(device),
            rotary_sin=angles.sin().half().to(device),
            cache_seqlens=lengths.to(device),
            block_table=table.to(device),
            causal=True,
            rotary_interleaved=interleaved,
        )
        assert isinstance(out, Tensor)
        results.append((out.cpu(), k_cache.cpu(), v_cache.cpu()))
    (out, k_cache, v_cache), (gpu_out, gpu_k, gpu_v) = results
    assert torch.equal(v_cache, gpu_v)
    one_rounding = float(k_cache.abs().max()) * torch.finfo(torch.float16).eps
    assert float((k_cache - gpu_k).abs().max()) <= one_rounding
    assert float((out - gpu_out).abs().max()) <= 4 * float(out.abs().max()) * 2**-10


@pytest.mark.parametrize("nodes", [7, 40])
def test_trees_equal_the_cpus(nodes: int) -> None:
    """Drafts that branch, over pages: their own keys go through decode's bias."""
    lengths, generator = [nodes, nodes + 700], torch.Generator().manual_seed(3)
    k, v = ([torch.randn(n, 2, 64).half() for n in lengths] for _ in range(2))
    cache = kv_caches.make_cache("page16", "same", k, v, max(lengths))
    q = torch.randn(2, nodes, 4, 64).half()
    drawn = torch.rand(nodes - 1, generator=generator) * torch.arange(1, nodes)
    tree = ancestor_mask(torch.tensor([-1, *drawn.int()]))
    results = []
    for device in ("cpu", "cuda"):
        out = flash_attn_with_kvcache(
            *(t.to(device) for t in (q, cache.k, cache.v)),
            cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_table=cache.options["block_table"].to(device),
            tree_mask=tree.to(device),
        )
        assert isinstance(out, Tensor)
        results.append(out.cpu())
    largest = float(results[0].abs().max())
    assert float((results[0] - results[1]).abs().max()) <= 4 * largest * 2**-10
