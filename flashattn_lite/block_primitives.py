"""What patterns are made of: bands, chosen keys, chosen rows, chosen distances, documents.

Each is a ``BlockMask`` made from what can be told of whole blocks, never from seqlen x seqlen
elements; ``&`` and ``|`` combine them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashattn_lite import block_build
from flashattn_lite._ops import ArgumentError
from flashattn_lite.block_build import BlockSize, make_grid, makes_mask
from flashattn_lite.block_elements import DOCUMENTS, Rules
from flashattn_lite.block_mask import BlockMask

__all__ = ["band", "causal", "documents", "full", "key_columns", "offsets", "query_rows"]


@makes_mask
def band(
    seqlen_q: int,
    seqlen_k: int,
    left: int | None,
    right: int | None,
    *,
    block_size: BlockSize = 128,
) -> BlockMask:
    """Keys from ``left`` before a row's position to ``right`` after it, as ``window`` has it.

    Args:
        seqlen_q: rows.
        seqlen_k: keys; the last row and the last key are at the same position.
        left: keys seen before the position; None is unbounded.
        right: keys seen after it; None is unbounded.
        block_size: rows and keys of a block, or (rows, keys).

    >>> band(64, 64, 3, 0, block_size=16).to_dense().sum().item()
    250
    """
    sides = [-1 if side is None else side for side in (left, right)]
    if min(sides) < -1:
        raise ArgumentError(f"band: the sides are {(left, right)}; they must be >= 0 or None")
    return BlockMask(*block_build.band(make_grid(seqlen_q, seqlen_k, block_size), *sides))


@makes_mask
def full(seqlen_q: int, seqlen_k: int | None = None, *, block_size: BlockSize = 128) -> BlockMask:
    """Every key; a start for ``&``.

    >>> full(100, block_size=64).density()
    1.0
    """
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    return band(seqlen_q, seqlen_k, None, None, block_size=block_size)


@makes_mask
def causal(seqlen: int, *, block_size: BlockSize = 128) -> BlockMask:
    """Keys up to the row's own.

    >>> causal(64, block_size=16).to_dense().sum().item()
    2080
    """
    return band(seqlen, seqlen, None, 0, block_size=block_size)


@makes_mask
def key_columns(seqlen_q: int, visible: Tensor, *, block_size: BlockSize = 128) -> BlockMask:
    """Chosen keys, for every row.

    Args:
        seqlen_q: rows.
        visible: bool (seqlen_k).
        block_size: rows and keys of a block, or (rows, keys).

    >>> key_columns(32, torch.arange(32) < 3, block_size=16).to_dense().sum().item()
    96
    """
    _check_flags("key_columns", "visible", visible)
    grid = make_grid(seqlen_q, len(visible), block_size)
    padding = grid.blocks_k * grid.block_k - grid.seqlen_k
    shown = torch.nn.functional.pad(visible.cpu(), (0, padding))
    shown = shown.reshape(grid.blocks_k, grid.block_k)
    some = shown.any(1)
    whole = (shown | (grid.keys_of(torch.arange(grid.blocks_k)) >= grid.seqlen_k)).all(1)
    return BlockMask(
        *block_build.from_kinds(
            grid,
            lambda r, c: (some[c], whole[c]),
            likeness=lambda r, c: c,
            bits=lambda r, c: shown[c].unsqueeze(1).expand(-1, grid.block_q, -1),
        )
    )


@makes_mask
def query_rows(seqlen_k: int, seeing: Tensor, *, block_size: BlockSize = 128) -> BlockMask:
    """Every key, for chosen rows.

    Args:
        seqlen_k: keys.
        seeing: bool (seqlen_q).
        block_size: rows and keys of a block, or (rows, keys).

    >>> query_rows(32, torch.arange(32) < 3, block_size=16).to_dense().sum().item()
    96
    """
    _check_flags("query_rows", "seeing", seeing)
    grid = make_grid(len(seeing), seqlen_k, block_size)
    padding = grid.blocks_q * grid.block_q - grid.seqlen_q
    shown = torch.nn.functional.pad(seeing.cpu(), (0, padding)).reshape(-1, grid.block_q)
    some = shown.any(1)
    whole = (shown | (grid.rows_of(torch.arange(grid.blocks_q)) >= grid.seqlen_q)).all(1)
    return BlockMask(
        *block_build.from_kinds(
            grid,
            lambda r, c: (some[r].expand(-1, len(c)), whole[r]),
            likeness=lambda r, c: r,
            bits=lambda r, c: shown[r].unsqueeze(2).expand(-1, -1, grid.block_k),
        )
    )


@makes_mask
def offsets(seqlen: int, visible: Tensor, *, block_size: BlockSize = 128) -> BlockMask:
    """Keys at chosen distances before the row: row i sees key j iff ``visible[i - j]``, j <= i.

    Args:
        seqlen: tokens.
        visible: bool (seqlen) or shorter; what is beyond its end is hidden.
        block_size: rows and keys of a block, or (rows, keys).

    >>> offsets(64, torch.tensor([True, False, True]), block_size=16).to_dense().sum().item()
    126
    """
    _check_flags("offsets", "visible", visible)
    grid = make_grid(seqlen, seqlen, block_size)
    bq, bk = grid.block_q, grid.block_k
    # Distances from -(bk + seqlen) on, so that every block's lookup lies inside.
    before = grid.blocks_k * bk
    table = torch.zeros(before + grid.blocks_q * bq + 1, dtype=torch.bool)
    n = min(len(visible), seqlen)
    table[before : before + n] = visible[:n].cpu()
    below = torch.cat([torch.zeros(1, dtype=torch.int64), table.cumsum(0)])

    def kinds(r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        distance = r * bq - c * bk + before  # of the first row and key
        shown = below[distance + bq] - below[distance - bk + 1]
        return shown > 0, shown == bq + bk - 1

    def bits(r: Tensor, c: Tensor) -> Tensor:
        distance = grid.rows_of(r).unsqueeze(2) - grid.keys_of(c).unsqueeze(1) + before
        return table[distance]

    return BlockMask(
        *block_build.from_kinds(grid, kinds, likeness=lambda r, c: r * bq - c * bk, bits=bits)
    )


@makes_mask
def documents(ids: Tensor, *, is_causal: bool = True, block_size: BlockSize = 128) -> BlockMask:
    """Tokens of several documents packed into one sequence see their own document.

    Args:
        ids: int (seqlen) or (batch, seqlen), the document of each token.
        is_causal: and no key after the row's own.
        block_size: rows and keys of a block, or (rows, keys).

    Source: Krell et al., Efficient Sequence Packing without Cross-contamination (2021).

    >>> documents(torch.tensor([0] * 20 + [1] * 12), block_size=16).to_dense().sum().item()
    288
    """
    if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.is_complex():
        dtype = str(ids.dtype).removeprefix("torch.")
        raise ArgumentError(
            f"documents: ids is {dtype} of shape {tuple(ids.shape)}; it must be int (seqlen) or "
            "(batch, seqlen)"
        )
    ids = ids.cpu().to(torch.int32)
    if ids.dim() == 2:
        return BlockMask.stack_batch(
            [documents(row, is_causal=is_causal, block_size=block_size) for row in ids]
        )
    grid = make_grid(len(ids), len(ids), block_size)
    if len(ids) == 0:
        return full(0, block_size=block_size)

    def extremes(size: int, blocks: int) -> tuple[Tensor, Tensor]:
        padded = torch.cat([ids, ids[-1:].expand(blocks * size - len(ids))]).reshape(-1, size)
        return padded.min(1).values, padded.max(1).values

    (low_q, high_q), (low_k, high_k) = (
        extremes(grid.block_q, grid.blocks_q),
        extremes(grid.block_k, grid.blocks_k),
    )

    def kinds(r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        one = (low_q == high_q)[r] & (low_k == high_k)[c]
        return (low_q[r] <= high_k[c]) & (low_k[c] <= high_q[r]), one & (low_q[r] == low_k[c])

    rules = Rules.none(grid)._replace(documents=(ids.unsqueeze(0), ids.unsqueeze(0)))
    mask = BlockMask(*block_build.from_kinds(grid, kinds, flag=DOCUMENTS, rules=rules))
    return mask & causal(len(ids), block_size=block_size) if is_causal else mask


def _check_flags(name: str, argument: str, t: Tensor) -> None:
    if t.dtype != torch.bool or t.dim() != 1:
        dtype = str(t.dtype).removeprefix("torch.")
        raise ArgumentError(
            f"{name}: {argument} is {dtype} of shape {tuple(t.shape)}; it must be bool of one "
            "dimension"
        )
