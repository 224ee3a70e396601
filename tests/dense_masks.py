"""Dense masks whose shape is known: bands along the diagonal and padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def padding(*runs: tuple[int, int], keys: int = 47) -> Callable[[], Tensor]:
    """(batch, 1, 1, keys): True for start <= j < end."""
    j = torch.arange(keys)
    return lambda: torch.stack([(j >= a) & (j < b) for a, b in runs])[:, None, None]


def band(rows: int, keys: int, left: int | None, right: int | None) -> Tensor:
    distance = torch.arange(keys) - torch.arange(rows)[:, None]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen = seen if left is None else seen & (distance >= -left)
    return seen if right is None else seen & (distance <= right)


def additive(mask: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.zeros(mask().shape).masked_fill(~mask(), -torch.inf)
