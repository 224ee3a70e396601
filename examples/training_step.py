"""A small decoder on nn.Attention learns to repeat the first half of its input.

python examples/training_step.py [--steps 150] [--seqlen 64] [--bf16]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import flashattn_lite.nn as fal_nn

VOCAB = 32


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = fal_nn.Attention(
            *(dim, heads), heads_kv=heads // 2, causal=True, rotary_dim=dim // heads, qk_norm=True
        )
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.SiLU(), nn.Linear(3 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


def batch_of(size: int, seqlen: int, generator: torch.Generator) -> Tensor:
    """(size, seqlen) tokens whose second half repeats the first."""
    half = torch.randint(VOCAB, (size, seqlen // 2), generator=generator)
    return torch.cat([half, half], dim=1)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns the loss on the repeated half, before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Embedding(VOCAB, 64), Block(64, 4), Block(64, 4), nn.RMSNorm(64), nn.Linear(64, VOCAB)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = loss_value = 0.0
    start = time.perf_counter()
    for step in range(options.steps):
        tokens = batch_of(16, options.seqlen, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            logits = model(tokens[:, :-1])
        repeated = slice(options.seqlen // 2, None)  # targets that can be known
        loss = nn.functional.cross_entropy(
            logits[:, repeated].flatten(0, 1).float(), tokens[:, 1:][:, repeated].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_value = loss.item()
        first = first or loss_value
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {loss_value:.3f}")
    print(f"{(time.perf_counter() - start) / options.steps * 1e3:.1f} ms a step")
    return first, loss_value


if __name__ == "__main__":
    main()
