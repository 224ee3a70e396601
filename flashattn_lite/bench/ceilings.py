"""How fast this machine can go at all, measured in the same run as the rows.

The CPU's ceiling is a register-only loop of fused multiply-adds in the active instruction set, on
as many threads as the row has; it runs as one more contender in every round, so a change of clock
frequency moves it as it moves the rows. Matrix products and a large read are shown beside it: on a
processor with matrix units (AMX) 16-bit products go beyond the FMA peak, and so may PyTorch.
Decoding is held against reading instead: on the CPU a sum over as many bytes as the row's K and V
have; on a GPU the faster of a sum and a copy, over at least a GiB, which no cache holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashattn_lite import _ops
from flashattn_lite.bench.cases import DTYPES, Case
from flashattn_lite.bench.timing import Clock, Contender, Rounds, interleave

FMA, READ, COPY = "fma", "read", "copy"  # the ceilings' names among a row's samples
FMA_FLOPS = 200_000_000  # per thread and sample: some milliseconds
READ_BYTES = 2**28  # 256 MiB: beyond most caches
CUDA_BYTES = 2**30  # 1 GiB: twenty times an H100's L2

Ceiling = tuple[Callable[[], object], float]  # what is run, and the FLOPs or bytes of one call


def fma_peak() -> Ceiling:
    """The loop on torch's current number of threads."""
    done = float(_ops.fma_peak(FMA_FLOPS))
    return lambda: _ops.fma_peak(FMA_FLOPS), done


def read(size: int, device: str = "cpu") -> Ceiling:
    """A sum over as many bytes, by torch's current number of threads or on the device."""
    buffer = torch.ones(max(1, size // 4), device=device)
    return buffer.sum, 4.0 * buffer.numel()


def copy(size: int, device: str) -> Ceiling:
    """As many bytes read, and as many written, which count too."""
    source = torch.ones(max(1, size // 4), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8.0 * source.numel()


def memory(case: Case) -> dict[str, Ceiling]:
    """What a row of decoding is held against, by name; the fastest of them is the ceiling."""
    if case.device == "cpu":
        return {READ: read(case.cache_bytes())}
    size = max(case.cache_bytes(), CUDA_BYTES)
    return {READ: read(size, case.device), COPY: copy(size, case.device)}


def measure(device: str, threads: tuple[int, ...], clock: Clock) -> dict[str, float]:
    """FLOP/s and bytes/s by name, e.g. {"FMA, 1 thread": 9e10, "read, 1 thread": 1e10}."""
    found = {}
    rounds = Rounds(budget_s=0.15, at_least=3, at_most=15)
    if device == "cuda":
        return _cuda(clock, rounds)
    for count in threads:
        torch.set_num_threads(count)
        on = f"{count} thread{'s' if count > 1 else ''}"
        run, flops = fma_peak()
        found[f"FMA fp32, {on}"] = flops / _best(run, clock, rounds)
        for name, dtype in DTYPES.items():
            n = 1024
            a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            seconds = _best(lambda a=a, b=b: torch.mm(a, b), clock, rounds)  # type: ignore[misc]
            found[f"matmul {name}, {on}"] = 2.0 * n**3 / seconds
        run, size = read(READ_BYTES)
        found[f"read, {on}"] = size / _best(run, clock, rounds)
    return found


def _cuda(clock: Clock, rounds: Rounds) -> dict[str, float]:
    found = {}
    for name in ("bf16", "fp16"):
        n = 8192
        a, b = (torch.randn(n, n, dtype=DTYPES[name], device="cuda") for _ in range(2))
        seconds = _best(lambda a=a, b=b: torch.mm(a, b), clock, rounds)  # type: ignore[misc]
        found[f"matmul {name}"] = 2.0 * n**3 / seconds
    for name, (run, size) in {
        READ: read(CUDA_BYTES, "cuda"),
        COPY: copy(CUDA_BYTES, "cuda"),
    }.items():
        found[name] = size / _best(run, clock, rounds)
    return found


def _best(run: Callable[[], object], clock: Clock, rounds: Rounds) -> float:
    """A ceiling is what the machine reaches, not what it does on average."""
    return min(interleave({"ceiling": Contender(run)}, clock, rounds)["ceiling"].wall)


def units(name: str, rate: float) -> str:
    """
    >>> units("read, 1 thread", 1.25e10), units("FMA fp32, 1 thread", 1e11)
    ('12.5 GB/s', '100.0 GFLOP/s')
    """
    unit = "B/s" if name.startswith(("read", "copy")) else "FLOP/s"
    scale, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
    return f"{rate / scale:.1f} {prefix}{unit}"
