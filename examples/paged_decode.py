"""Decoding from a paged KV cache: sequences of unequal lengths share one pool of pages.

python examples/paged_decode.py [--steps 64] [--page-size 16]
"""

from __future__ import annotations

import argparse
import time

import torch

from flashattn_lite import flash_attn_with_kvcache


def main(arguments: list[str] | None = None) -> float:
    """Returns the largest difference between paged and contiguous decoding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--page-size", type=int, default=16)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    heads, heads_kv, head_dim, page_size = 8, 2, 64, options.page_size
    lengths = torch.tensor([700, 5, 320, 33], dtype=torch.int32)  # tokens of each sequence so far
    batch, capacity = len(lengths), int(lengths.max()) + options.steps
    cache = torch.randn(2, batch, capacity, heads_kv, head_dim)  # keys and values, contiguous

    # The same tokens in pages: each sequence takes as many as it needs, from anywhere in the pool.
    needed = -(-(lengths + options.steps) // page_size)
    pool = torch.full((2, int(needed.sum()), page_size, heads_kv, head_dim), torch.nan)
    free = torch.randperm(pool.shape[1]).to(torch.int32)
    block_table = torch.zeros(batch, int(needed.max()), dtype=torch.int32)
    for b, count in enumerate(needed.tolist()):
        block_table[b, :count], free = free[:count], free[count:]
        for token in range(int(lengths[b])):
            page = block_table[b, token // page_size]
            pool[:, page, token % page_size] = cache[:, b, token]

    difference, seconds = 0.0, 0.0
    for step in range(options.steps):
        q = torch.randn(batch, 1, heads, head_dim)
        k, v = torch.randn(2, batch, 1, heads_kv, head_dim)
        used = lengths + step
        start = time.perf_counter()
        out = flash_attn_with_kvcache(
            q, *pool, k, v, cache_seqlens=used, block_table=block_table, causal=True
        )
        seconds += time.perf_counter() - start
        expected = flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=used, causal=True)
        difference = max(difference, (out - expected).abs().max().item())
    padded = batch * capacity
    print(f"{pool.shape[1] * page_size} tokens of cache in pages instead of {padded} padded ones")
    print(f"{seconds / options.steps * 1e6:.0f} us a step for {batch} sequences")
    print(f"largest difference from a contiguous cache: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
