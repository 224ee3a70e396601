"""A vision transformer built from torch.nn.TransformerEncoder, its attention swapped in place.

python examples/vit.py [--image 128] [--layers 4]
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import Tensor, nn

import flashattn_lite.nn as fal_nn


class VisionTransformer(nn.Module):
    """Patches of 8 x 8 pixels, a class token, learned positions."""

    def __init__(self, image: int, dim: int, heads: int, layers: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, kernel_size=8, stride=8)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (image // 8) ** 2 + 1, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            *(dim, heads, 4 * dim),
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # (batch, patches, dim)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


def step(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Logits, and the milliseconds of the best of three training steps without the optimizer."""
    best = float("inf")
    for _ in range(3):
        model.zero_grad()
        start = time.perf_counter()
        logits = model(images)
        nn.functional.cross_entropy(logits, labels).backward()
        best = min(best, time.perf_counter() - start)
    return logits.detach(), best * 1e3


def main(arguments: list[str] | None = None) -> float:
    """Returns the largest difference of a logit or gradient, relative to the largest one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    theirs = VisionTransformer(options.image, dim=192, heads=3, layers=options.layers, classes=10)
    ours = copy.deepcopy(theirs)
    print(fal_nn.replace_attention(ours))
    images, labels = torch.randn(4, 3, options.image, options.image), torch.arange(4)
    expected, before = step(theirs, images, labels)
    got, after = step(ours, images, labels)
    pairs = [(got, expected)]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        pairs.append((a.grad, b.grad))
    largest = max(b.abs().max().item() for _, b in pairs)
    difference = max((a - b).abs().max().item() for a, b in pairs) / largest
    print(f"training step: torch {before:.0f} ms, flashattn_lite {after:.0f} ms")
    print(f"largest relative difference of logits and gradients: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
