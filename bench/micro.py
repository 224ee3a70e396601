"""The figures of docs/kernels that no suite of `flashattn-lite bench` holds, made again.

    python bench/micro.py [part ...]

    instructions   cycles of what the inner loops of csrc/cpu are made of, AMX where there is any;
                   what the exponentials cost, and their errors
    reads          GB/s of one thread: over the size, and over a KV cache in two orders
    rows           decoding: nanoseconds for each key and head while all of K and V is in L2
    masks          decoding under block masks; what a mask costs that hides nothing
    calls          what an operator of few and of many arguments costs to call

One thread by CPU time, in turn where something is compared; all of it takes about a minute. The
first two are C++ (g++, or $CXX), compiled for the processor that they run on.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flashattn_lite import BlockMask, attention, block_patterns, flash_attn_func
from flashattn_lite.bench import machine
from flashattn_lite.bench.timing import Contender, CpuClock, Rounds, Run, Samples, interleave, ratio

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-O3 -march=native -mprefer-vector-width=512 -std=c++17 -Wno-psabi"


def native(program: str) -> None:
    """Compiles bench/micro/<program>.cpp and runs it."""
    if platform.machine() != "x86_64":
        print(f"absent: {program}, which is written for x86-64")
        return
    sources = [ROOT / "bench/micro" / f"{program}.cpp", ROOT / "csrc/cpu/amx_support.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / program
        compiler = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS.split(), f"-I{ROOT}"]
        subprocess.run([*compiler, *map(str, sources), "-o", str(path)], check=True)
        subprocess.run([path], check=True)


def in_turn(runs: dict[str, Run]) -> dict[str, Samples]:
    contenders = {name: Contender(run) for name, run in runs.items()}
    return interleave(contenders, CpuClock(), Rounds(budget_s=1.0))


def rows() -> None:
    """All sequences of a batch share their keys (a stride of 0): K and V stay in L2."""
    batch, keys, heads = 128, 64, 8
    dims = {f"{dim} dims": dim for dim in (64, 96, 128)}
    print(
        f"| ns for each of {keys} keys and {heads} heads | "
        + " | ".join(dims)
        + " |\n|---|--:|--:|--:|"
    )

    def decode(heads_q: int, dtype: torch.dtype, storage: torch.dtype, dim: int) -> Run:
        k, v = (
            torch.randn(1, keys, heads, dim).to(storage).expand(batch, keys, heads, dim)
            for _ in range(2)
        )
        q = torch.randn(batch, 1, heads_q, dim).to(dtype)
        factor = torch.full((1, keys, heads), 0.01).expand(batch, keys, heads)
        factors = {} if storage == dtype else {"k_scale": factor, "v_scale": factor}
        return lambda: attention(q, k, v, **factors)

    for heads_q in (8, 32):
        for name, dtype, storage in (
            ("fp32", torch.float32, torch.float32),
            ("bf16", torch.bfloat16, torch.bfloat16),
            ("fp16", torch.float16, torch.float16),
            ("int8", torch.bfloat16, torch.int8),
            ("fp8", torch.bfloat16, torch.float8_e4m3fn),
        ):
            runs = {label: decode(heads_q, dtype, storage, dim) for label, dim in dims.items()}
            found = in_turn(runs)
            cells = (1e9 * found[label].median("cpu") / (batch * keys * heads) for label in dims)
            print(
                f"| {heads_q} / {heads}, {name} | " + " | ".join(f"{x:.1f}" for x in cells) + " |"
            )


def masks() -> None:
    """One query of 32 / 8 heads of 128 over 16k keys; and what a mask costs that hides nothing."""

    def report(case: str, found: dict[str, Samples]) -> None:
        for what, samples in found.items():
            times = ratio(samples.cpu, found["no mask"].cpu).median
            print(f"{case}, {what}: {1e3 * samples.median('cpu'):.2f} ms, {times:.2f} of no mask")

    keys = 16384
    streaming = block_patterns.streaming(keys, 64, 1024)
    everything = block_patterns.causal(keys)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        q = torch.randn(1, 1, 32, 128).to(dtype)
        k, v = (torch.randn(1, keys, 8, 128).to(dtype) for _ in range(2))

        def over(mask: BlockMask | None, tensors: tuple[Tensor, ...] = (q, k, v)) -> Run:
            return lambda: attention(*tensors, block_mask=mask)

        found = in_turn(
            {
                "no mask": over(None),
                "streaming(16384, 64, 1024)": over(streaming),
                "a mask of each head's own: the prefill tiles": over(
                    BlockMask.stack_heads([streaming] * 32)
                ),
                "causal, of which one query sees all": over(everything),
            }
        )
        report(f"decoding, {name}", found)
    every_block = BlockMask.from_blocks(torch.ones(32, 32, dtype=torch.bool), 4096, 4096)
    q = torch.randn(1, 4096, 1, 128)
    report(
        "prefill of 4096, fp32",
        in_turn(
            {
                "no mask": lambda: attention(q, q, q),
                "every block listed": lambda: attention(q, q, q, block_mask=every_block),
            }
        ),
    )


def calls() -> None:
    """One token, so overhead alone. Naming the engine takes the operator of all arguments."""
    q = torch.randn(1, 1, 1, 32)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    few, all_ = (
        len(getattr(torch.ops.flashattn_lite, name).default._schema.arguments)
        for name in ("forward_plain", "forward")
    )
    found = in_turn(
        {
            "scaled_dot_product_attention": lambda: sdpa(q, q, q),
            "flash_attn_func": lambda: flash_attn_func(q, q, q),
            f"attention, an operator of {few} arguments": lambda: attention(q, q, q),
            f"the same by one of {all_}": lambda: attention(q, q, q, backend="cpu"),
        }
    )
    for what, samples in found.items():
        print(f"{what}: {1e6 * samples.median('cpu'):.2f} us")


PARTS: dict[str, Callable[[], None]] = {
    "instructions": lambda: native("instructions"),
    "reads": lambda: native("reads"),
    "rows": rows,
    "masks": masks,
    "calls": calls,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} (all)")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("\n".join(machine.headline(machine.describe())))
    for part in options.parts or PARTS:
        print(f"\n{part}\n", flush=True)
        PARTS[part]()


if __name__ == "__main__":
    main()
