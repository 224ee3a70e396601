"""Between padded batches and varlen tensors, under flash_attn's names."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashattn_lite import _argument_types
from flashattn_lite._ops import ArgumentError

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x: (rows, ...)[indices] -> (len(indices), ...). Differentiable.

    >>> index_first_axis(torch.arange(4.0), torch.tensor([3, 0])).tolist()
    [3.0, 0.0]
    """
    _argument_types.dense("index_first_axis", x=x, indices=indices)
    _check_indices("index_first_axis", indices, x.shape[0] if x.dim() else 0, "rows of x")
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse: values (n, ...) at distinct ``indices`` (n) of (first_axis_dim, ...), else 0.

    >>> index_put_first_axis(torch.tensor([1.0, 2.0]), torch.tensor([3, 0]), 4).tolist()
    [2.0, 0.0, 0.0, 1.0]
    """
    first_axis_dim = _argument_types.index("index_put_first_axis", "first_axis_dim", first_axis_dim)
    if first_axis_dim < 0:
        raise ArgumentError(
            f"index_put_first_axis: first_axis_dim is {first_axis_dim}; it must be >= 0"
        )
    return _put("index_put_first_axis", "values", values, indices, first_axis_dim)


def _put(name: str, argument: str, values: Tensor, indices: Tensor, rows: int) -> Tensor:
    _argument_types.dense(name, **{argument: values, "indices": indices})
    if values.shape[:1] != indices.shape:
        raise ArgumentError(
            f"{name}: {argument} has shape {tuple(values.shape)} but indices has "
            f"{tuple(indices.shape)}; there must be one index for each row"
        )
    _check_indices(name, indices, rows, "rows of the result")
    return values.new_zeros((rows, *values.shape[1:])).index_copy(0, indices.long(), values)


def _check_indices(name: str, indices: Tensor, rows: int, of_what: str) -> None:
    """Raises unless indices are (n) integers within the rows (looked at on the CPU only)."""
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise ArgumentError(
            f"{name}: indices is {indices.dtype} of shape {tuple(indices.shape)}; it must be int64 "
            "or int32 of one dimension"
        )
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in indices.aminmax())
        if low < 0 or high >= rows:
            raise ArgumentError(
                f"{name}: indices are {low} to {high}; they must be within the {rows} {of_what}"
            )


def _check_mask(name: str, argument: str, mask: Tensor, hidden_states: Tensor) -> None:
    if hidden_states.dim() < 2 or mask.shape != hidden_states.shape[:2]:
        raise ArgumentError(
            f"{name}: {argument} has shape {tuple(mask.shape)}; it must be "
            f"{tuple(hidden_states.shape[:2])}, hidden_states' first two dimensions"
        )


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, laid end to end.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int; nonzero marks a token.
        unused_mask: (batch, seqlen), bool or int; nonzero marks a place that is kept but not used.

    Returns:
        hidden_states: (total, ...), total = places marked in either mask.
        indices: int64 (total), where they were in the flattened (batch * seqlen).
        cu_seqlens: int32 (batch + 1), offsets of the sequences.
        max_seqlen: int, the longest of them (this reads from the device).
        seqused: int32 (batch), tokens marked in attention_mask.

    >>> x = torch.arange(6.0).reshape(2, 3)
    >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    >>> tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    >>> tokens.tolist(), indices.tolist(), cu_seqlens.tolist(), max_seqlen
    ([0.0, 1.0, 3.0], [0, 1, 3], [0, 2, 3], 2)
    """
    _argument_types.dense(
        "unpad_input",
        **{"hidden_states": hidden_states, "attention_mask": attention_mask},
        **_argument_types.given(unused_mask=unused_mask),
    )
    _check_mask("unpad_input", "attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        _check_mask("unpad_input", "unused_mask", unused_mask, hidden_states)
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    seqlens = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    max_seqlen = int(seqlens.max()) if seqlens.numel() else 0
    cu_seqlens = pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, max_seqlen, used.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of ``unpad_input``: (total, ...) to (batch, seqlen, ...), zeros where padded.

    >>> pad_input(torch.tensor([5.0, 6.0]), torch.tensor([0, 3]), 2, 2).tolist()
    [[5.0, 0.0], [0.0, 6.0]]
    """
    batch = _argument_types.index("pad_input", "batch", batch)
    seqlen = _argument_types.index("pad_input", "seqlen", seqlen)
    if batch < 0 or seqlen < 0:
        raise ArgumentError(f"pad_input: batch is {batch} and seqlen {seqlen}; they must be >= 0")
    padded = _put("pad_input", "hidden_states", hidden_states, indices, batch * seqlen)
    return padded.reshape(batch, seqlen, *hidden_states.shape[1:])
