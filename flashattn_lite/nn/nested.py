"""Nested tensors, of both of torch's layouts, as sequences laid end to end, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Packed", "packed", "padding_mask", "unpacked"]


class Packed(NamedTuple):
    """What the kernels take for a nested tensor (batch, ragged, features)."""

    tokens: Tensor
    """(total, features), connected to the nested tensor's gradient."""
    cu_seqlens: Tensor
    """int32 (batch + 1)."""
    lengths: list[int]
    """Of each sequence."""


def packed(t: Tensor) -> Packed:
    """A nested (batch, ragged, features) tensor's sequences, one after the other."""
    nested: Any = t
    if t.layout is torch.jagged and nested.lengths() is None:
        offsets = nested.offsets()
        return Packed(nested.values(), offsets.to(torch.int32), offsets.diff().tolist())
    sequences = t.unbind()
    lengths = [sequence.shape[0] for sequence in sequences]
    cu_seqlens = torch.tensor([0, *lengths], device=t.device).cumsum(0).to(torch.int32)
    tokens = torch.cat(sequences) if sequences else torch.empty(0, 0, device=t.device)
    return Packed(tokens, cu_seqlens, lengths)


def unpacked(tokens: Tensor, like: Tensor, lengths: list[int]) -> Tensor:
    """The inverse: tokens (total, features) nested as ``like`` is, so that the two can be added."""
    nested: Any = like
    if like.layout is torch.jagged and nested.lengths() is None:
        result: Tensor = torch.nested.nested_tensor_from_jagged(tokens, nested.offsets())
        return result
    sequences = list(torch.split(tokens, lengths))
    return torch.nested.as_nested_tensor(sequences, layout=like.layout)


def padding_mask(lengths: list[int], device: torch.device) -> Tensor:
    """bool (batch, longest): True where a padded tensor has no token."""
    longest = max(lengths, default=0)
    return torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
