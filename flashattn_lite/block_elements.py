"""The blocks of a block mask as arrays: where they are, which of their elements show, and bitmaps.

What a rule means is stated in ``csrc/core/block_mask.h`` for C++, and in ``elements`` here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# The element rule of a listed block: 0 shows all; otherwise every test named must pass. The number
# of the bitmap is above the flags.
FULL, BAND, DOCUMENTS, BITMAP, BITMAP_SHIFT = 0, 1, 2, 4, 3

_CHUNK = 1 << 22  # elements looked at together: bounds the memory of every step


class Grid(NamedTuple):
    """The shape of a mask. Blocks are numbered table by table, then row by row."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    block_q: int
    block_k: int

    @property
    def tables(self) -> int:
        return self.batch * self.heads

    @property
    def blocks_q(self) -> int:
        return -(-self.seqlen_q // self.block_q)

    @property
    def blocks_k(self) -> int:
        return -(-self.seqlen_k // self.block_k)

    @property
    def shift(self) -> int:
        return self.seqlen_k - self.seqlen_q

    def number(self, table: Tensor | int, r: Tensor, c: Tensor) -> Tensor:
        return (table * self.blocks_q + r) * self.blocks_k + c

    def split(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(table, block row, block column) of each block number."""
        line = blocks // max(1, self.blocks_k)
        return (
            line // max(1, self.blocks_q),
            line % max(1, self.blocks_q),
            blocks % max(1, self.blocks_k),
        )

    def rows_of(self, r: Tensor) -> Tensor:
        """(n, block_q): the rows of block rows; beyond seqlen_q in the last one."""
        return r.unsqueeze(1) * self.block_q + torch.arange(self.block_q)

    def keys_of(self, c: Tensor) -> Tensor:
        return c.unsqueeze(1) * self.block_k + torch.arange(self.block_k)

    def chunks(self, count: int) -> Iterator[slice]:
        """Slices of ``count`` blocks whose elements fit in memory together."""
        step = max(1, _CHUNK // (self.block_q * self.block_k))
        return (slice(at, min(at + step, count)) for at in range(0, count, step))

    def inside(self, r: Tensor, c: Tensor) -> Tensor:
        """bool (n, block_q, block_k): the elements that exist."""
        rows, keys = self.rows_of(r) < self.seqlen_q, self.keys_of(c) < self.seqlen_k
        return rows.unsqueeze(2) & keys.unsqueeze(1)


class Rules(NamedTuple):
    """What the rules of a mask's blocks refer to."""

    bands: Tensor  # int32 (tables, 2): left, right; -1 unbounded
    documents: tuple[Tensor, Tensor] | None  # int32 (tables, seqlen_q) and (tables, seqlen_k)
    bitmaps: Tensor  # int32 (bitmaps, block_q, ceil(block_k / 32)), bit t % 32 of word t / 32

    @staticmethod
    def none(grid: Grid) -> Rules:
        words = -(-grid.block_k // 32)
        return Rules(
            torch.full((grid.tables, 2), -1, dtype=torch.int32),
            None,
            torch.zeros((0, grid.block_q, words), dtype=torch.int32),
        )


def pack_bits(bits: Tensor) -> Tensor:
    """bool (n, block_q, block_k) -> int32 (n, block_q, ceil(block_k / 32))."""
    n, block_q, block_k = bits.shape
    words = -(-block_k // 32)
    padded = torch.nn.functional.pad(bits, (0, words * 32 - block_k))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    packed = (padded.reshape(n, block_q, words * 4, 8) * weights).sum(-1, dtype=torch.uint8)
    return packed.view(torch.int32)


def unpack_bits(bitmaps: Tensor, block_k: int) -> Tensor:
    """The inverse of ``pack_bits``."""
    bits = (bitmaps.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.reshape(*bitmaps.shape[:-1], -1)[..., :block_k].bool()


def elements(grid: Grid, rules: Rules, blocks: Tensor, rule: Tensor) -> Tensor:
    """bool (n, block_q, block_k): what listed blocks show; False for elements that do not exist.

    Args:
        blocks: int64 (n), block numbers.
        rule: int32 (n), the rule of each.
    """
    table, r, c = grid.split(blocks)
    seen = grid.inside(r, c)
    rows, keys = grid.rows_of(r), grid.keys_of(c)

    def unless(flag: int) -> Tensor:
        return ((rule & flag) == 0).reshape(-1, 1, 1)

    if bool((rule & BAND).any()):
        # At a distance of more than the mask is long, a side hides nothing.
        distance = (keys.unsqueeze(1) - rows.unsqueeze(2) - grid.shift).to(torch.int32)
        left, right = rules.bands[table].reshape(-1, 2, 1, 1).unbind(1)
        seen &= ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right)) | unless(
            BAND
        )
    if rules.documents is not None and bool((rule & DOCUMENTS).any()):
        of_q, of_k = rules.documents
        document_q = of_q[table.unsqueeze(1), rows.clamp(max=grid.seqlen_q - 1)]
        document_k = of_k[table.unsqueeze(1), keys.clamp(max=grid.seqlen_k - 1)]
        seen &= (document_q.unsqueeze(2) == document_k.unsqueeze(1)) | unless(DOCUMENTS)
    if bool((rule & BITMAP).any()):
        number = torch.where((rule & BITMAP) != 0, rule >> BITMAP_SHIFT, 0)
        seen &= unpack_bits(rules.bitmaps[number.long()], grid.block_k) | unless(BITMAP)
    return seen


class Listed(NamedTuple):
    """Blocks, ascending, and their rules; bitmaps are numbered within ``bitmaps``."""

    blocks: Tensor  # int64 (n)
    rule: Tensor  # int32 (n)
    bitmaps: Tensor


def listed_from_bits(grid: Grid, blocks: Tensor, which: Tensor, bits: Tensor) -> Listed:
    """Blocks whose elements are given: those that show nothing are left out, those that show all
    become full, the others get a bitmap.

    Args:
        blocks: int64 (n), ascending.
        which: int64 (n), the row of ``bits`` that each block shows.
        bits: bool (m, block_q, block_k). Blocks that share one must be cut off alike by the mask's
            end, or the bits beyond it must be False.
    """
    _, r, c = grid.split(blocks)
    rule = torch.empty(len(blocks), dtype=torch.int32)
    packed = pack_bits(bits) if len(bits) else Rules.none(grid).bitmaps
    bitmaps, number = (
        torch.unique(packed, dim=0, return_inverse=True) if len(bits) else (packed, which)
    )
    number = number[which]
    counts = bits.flatten(1).sum(1)[which]
    height = (grid.seqlen_q - r * grid.block_q).clamp(max=grid.block_q)
    width = (grid.seqlen_k - c * grid.block_k).clamp(max=grid.block_k)
    rule = torch.where(
        counts >= height * width, FULL, BITMAP | (number << BITMAP_SHIFT).to(torch.int32)
    ).to(torch.int32)
    some = counts > 0
    return Listed(blocks[some], rule[some], bitmaps)


def joined(grid: Grid, parts: list[Listed]) -> Listed:
    """Parts that list different blocks as one, its bitmaps each once."""
    if not parts:
        none = torch.zeros(0, dtype=torch.int64)
        return Listed(none, none.int(), Rules.none(grid).bitmaps)
    offset, rules = 0, []
    for part in parts:
        moved = part.rule + (offset << BITMAP_SHIFT)
        rules.append(torch.where((part.rule & BITMAP) != 0, moved, part.rule))
        offset += len(part.bitmaps)
    blocks, order = torch.cat([part.blocks for part in parts]).sort()
    return compact(
        Listed(blocks, torch.cat(rules)[order], torch.cat([part.bitmaps for part in parts]))
    )


def compact(listed: Listed) -> Listed:
    """The same with every bitmap that a rule names, once, and no other."""
    blocks, rule, bitmaps = listed
    has = (rule & BITMAP) != 0
    if not bool(has.any()):
        return Listed(blocks, rule, bitmaps[:0])
    number, index = torch.unique(rule[has] >> BITMAP_SHIFT, return_inverse=True)
    bitmaps, same = torch.unique(bitmaps[number.long()], dim=0, return_inverse=True)
    rule = rule.clone()
    rule[has] = ((rule[has] & (BITMAP - 1)) | BITMAP) | (same[index] << BITMAP_SHIFT).to(
        torch.int32
    )
    return Listed(blocks, rule, bitmaps)
