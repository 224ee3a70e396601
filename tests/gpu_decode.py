"""Decode on an NVIDIA GPU: bytes of K and V a second, against what the same GPU copies and reads.

    python tests/gpu_decode.py --json FILE

Every row is computed by the decode engine, checked against the float64 reference on two of its
sequences, and timed in turns with a copy, a read and PyTorch's own attention over the same keys.
Rows: batch 64, 8192 keys, 32 query heads on 8 K/V heads, head dim 128, one token.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashattn_lite import attention, reference, testing
from flashattn_lite.bench.timing import Contender, CudaClock, Rounds, interleave

BATCH, KEYS, HEADS_Q, HEADS_K, DIM = 64, 8192, 32, 8, 128
# (storage, page size; 0 = contiguous)
ROWS = (("bf16", 16), ("bf16", 64), ("bf16", 0), ("int8", 16), ("fp8", 16))
STORED = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def cache(storage: str, page_size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """K, V and the options that go with them; pages in random order."""
    shape = (BATCH, KEYS, HEADS_K, DIM)
    options = {"seqused_k": torch.full((BATCH,), KEYS, dtype=torch.int32, device="cuda")}
    if page_size:
        pages = BATCH * KEYS // page_size
        shape = (pages, page_size, HEADS_K, DIM)
        table = torch.randperm(pages, device="cuda").to(torch.int32)
        options["block_table"] = table.view(BATCH, -1)
    tensors = []
    for name in ("k_scale", "v_scale"):
        if storage == "bf16":
            tensors.append(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
            continue
        stored = torch.randint(-100, 101, shape, device="cuda", dtype=torch.int8)
        tensors.append(stored if storage == "int8" else stored.bfloat16().to(STORED[storage]))
        options[name] = torch.rand(shape[:3], device="cuda") / 50
    return tensors[0], tensors[1], options


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Tensor]) -> float:
    """The share of the error budget that the first and the last sequence use."""
    some = torch.tensor([0, BATCH - 1], device="cuda")
    local = {n: o[some] for n, o in options.items() if n in ("seqused_k", "block_table")}
    for name in ("k_scale", "v_scale"):
        if name in options:
            local[name] = options[name] if "block_table" in options else options[name][some]
    if "block_table" not in options:
        k, v = k[some], v[some]
    truth, _ = reference.attention(q[some], k, v, **local)
    low, _ = reference.attention(q[some], k, v, **local, precision=q.dtype)
    return testing.check_within_budget("out", out[some], truth, low)


def row(storage: str, page_size: int, source: Tensor, target: Tensor) -> dict[str, object]:
    q = torch.randn(BATCH, 1, HEADS_Q, DIM, device="cuda", dtype=torch.bfloat16)
    k, v, options = cache(storage, page_size)

    def decode() -> Tensor:
        out = attention(q, k, v, causal=True, backend="decode", **options)
        assert isinstance(out, Tensor)
        return out

    share = check(decode(), q, k, v, options)
    moved = {"decode": float(k.nbytes + v.nbytes), "copy": 2.0 * source.nbytes}
    moved["read"] = float(source.nbytes)
    words = source.view(torch.float32)
    runs: dict[str, Callable[[], object]] = {
        "decode": decode,
        "copy": lambda: target.copy_(source),
        "read": words.sum,
    }
    if storage == "bf16" and not page_size:
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        moved["PyTorch"] = moved["decode"]
        runs["PyTorch"] = lambda: scaled_dot_product_attention(*heads_first, enable_gqa=True)
    rounds = Rounds(budget_s=1.0, at_least=5, at_most=30)
    clock = CudaClock(torch.device("cuda"))
    samples = interleave({n: Contender(r) for n, r in runs.items()}, clock, rounds)
    rates = {n: moved[n] / statistics.median(s.wall) for n, s in samples.items()}
    best = max(rates["copy"], rates["read"])
    return {
        "storage": storage,
        "page_size": page_size,
        "share_of_error_budget": share,
        "bytes_per_s": rates,
        "share_of_bandwidth": rates["decode"] / best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True)
    path = parser.parse_args().json
    source = torch.zeros(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    device = torch.cuda.get_device_properties(0)
    rows = []
    for storage, page_size in ROWS:
        rows.append(row(storage, page_size, source, target))
        rates = ", ".join(f"{n} {r / 1e12:.2f}" for n, r in rows[-1]["bytes_per_s"].items())  # type: ignore[attr-defined]
        layout = f"pages of {page_size}" if page_size else "contiguous"
        print(f"{storage}, {layout}: TB/s: {rates}", flush=True)
        path.write_text(json.dumps({"device": device.name, "rows": rows}, indent=1) + "\n")
    shares = [float(r["share_of_bandwidth"]) for r in rows if r["storage"] == "bf16"]  # type: ignore[arg-type]
    mean = math.exp(statistics.fmean(math.log(s) for s in shares))
    print(f"bf16 decode reaches {mean:.0%} of the measured bandwidth (geometric mean)")


if __name__ == "__main__":
    main()
