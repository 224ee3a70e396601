"""A long context through block masks: a pattern for each head, prefill, decoding, gradients.

python examples/block_sparse.py [--seqlen 16384] [--head-dim 64]

Heads see attention sinks and a window, chosen columns and diagonals, or a butterfly of blocks; what
no head of them lists is neither read nor computed. Checked against exact attention of a few rows in
float64, and one step of decoding against the prefill.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from flashattn_lite import BlockMask, attention, block_patterns, flash_attn_with_kvcache


def masks(seqlen: int) -> BlockMask:
    """Four heads, one mask."""
    generator = torch.Generator().manual_seed(0)
    verticals = torch.randint(0, seqlen, (20,), generator=generator)
    slashes = torch.tensor([0, 1, 2, seqlen // 2])
    local = block_patterns.sliding_window(seqlen, seqlen // 16)
    return BlockMask.stack_heads(
        [
            block_patterns.streaming(seqlen, sinks=4, window=seqlen // 16),
            block_patterns.vertical_slash(seqlen, verticals, slashes) | local,
            block_patterns.butterfly(seqlen, is_causal=True),
            block_patterns.strided(seqlen, seqlen // 16, by_block=True),
        ]
    )


def exact_rows(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, rows: Tensor) -> Tensor:
    """Softmax attention of chosen rows in float64: (batch, rows, heads, dim)."""
    scores = torch.einsum("brhd,bkhd->bhrk", q[:, rows].double(), k.double()) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhrk,bkhd->brhd", weights, v.double())


def main(arguments: list[str] | None = None) -> float:
    """Returns the largest error against float64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seqlen", type=int, default=16384)
    parser.add_argument("--head-dim", type=int, default=64)
    options = parser.parse_args(arguments)
    seqlen = options.seqlen
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, seqlen, 4, options.head_dim) for _ in range(3))

    start = time.perf_counter()
    mask = masks(seqlen)
    print(f"made in {time.perf_counter() - start:.2f} s: {mask}")
    print(mask.text(width=24))

    start = time.perf_counter()
    out = attention(q, k, v, block_mask=mask)
    sparse = time.perf_counter() - start
    start = time.perf_counter()
    attention(q, k, v, causal=True)
    dense = time.perf_counter() - start
    print(f"causal attention {dense:.2f} s, by blocks {sparse:.2f} s: {dense / sparse:.1f} times")

    rows = torch.tensor([0, seqlen // 3, seqlen - 1])
    single = [mask.to_dense(1, int(row) + 1) for row in rows]  # (1, heads, 1, row + 1)
    seen = torch.cat([torch.nn.functional.pad(t, (0, seqlen - t.shape[-1])) for t in single], dim=2)
    error = float((out[:, rows] - exact_rows(q, k, v, seen, rows)).abs().max())
    print(f"largest error of {len(rows)} rows against float64: {error:.1e}")

    # The same mask decodes: the last token alone, over a cache that holds the others.
    lengths = torch.tensor([seqlen], dtype=torch.int32)
    last = flash_attn_with_kvcache(q[:, -1:], k, v, cache_seqlens=lengths, block_mask=mask)
    assert isinstance(last, Tensor)
    error = max(error, float((last - out[:, -1:]).abs().max()))

    # And it has gradients: a key that no row lists gets none.
    leaves = [t[:, : seqlen // 4].clone().requires_grad_() for t in (q, k, v)]
    part = masks(seqlen // 4)
    loss = attention(*leaves, block_mask=part).square().sum()
    gradients = torch.autograd.grad(loss, leaves)
    unseen = ~part.to_dense()[0].any(1)  # (heads, keys)
    assert all((g[0].transpose(0, 1)[unseen] == 0).all() for g in gradients[1:])
    assert all(torch.isfinite(g).all() for g in gradients)
    return error


if __name__ == "__main__":
    main()
