"""Where the blocks of a mask come from: rows of elements, or what can be told of whole blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from flashattn_lite import _argument_types, block_elements
from flashattn_lite._ops import ArgumentError
from flashattn_lite.block_algebra import Parts
from flashattn_lite.block_elements import BAND, BITMAP, FULL, Grid, Listed, Rules

BlockSize = int | tuple[int, int]

P = ParamSpec("P")
R = TypeVar("R")


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: tensors that the function makes are on the CPU, where masks are made, whatever
    torch's default device is."""

    @functools.wraps(function)
    def with_cpu(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return with_cpu


def makes_mask(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: ``by_annotation`` and ``on_cpu``."""
    return _argument_types.by_annotation(on_cpu(function))


def make_grid(
    seqlen_q: int, seqlen_k: int, block_size: BlockSize, batch: int = 1, heads: int = 1
) -> Grid:
    """The grid of a mask, or an error that says what is wrong with its sizes."""
    sides = (block_size, block_size) if isinstance(block_size, int) else block_size
    if not isinstance(sides, Sequence) or len(sides) != 2:
        raise TypeError(
            f"BlockMask: block_size is {block_size!r}; it must be an int or a pair (rows, keys)"
        )
    block_q, block_k = (_argument_types.index("BlockMask", "block_size", n) for n in sides)
    for side, size in (("rows", block_q), ("keys", block_k)):
        if size < 16 or size > 256 or size % 16:
            raise ArgumentError(
                f"BlockMask: block_size is {size} {side}; it must be a multiple of 16 from 16 to "
                "256"
            )
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "batch": batch, "heads": heads}
    for name, size in sizes.items():
        if not 0 <= size <= 2**30:
            raise ArgumentError(f"BlockMask: {name} is {size}; it must be 0 to 2^30")
    return Grid(batch, heads, seqlen_q, seqlen_k, block_q, block_k)


def of(grid: Grid, listed: Listed, rules: Rules | None = None) -> Parts:
    """A mask of blocks whose bitmaps are numbered already."""
    rules = Rules.none(grid) if rules is None else rules
    return Parts(grid, listed, rules._replace(bitmaps=listed.bitmaps))


def from_rows(grid: Grid, rows: Callable[[int, int, int], Tensor]) -> Parts:
    """From rows(table, begin, end) -> bool (end - begin, seqlen_k)."""
    parts = []
    lines = max(1, (1 << 24) // (grid.block_q * max(1, grid.seqlen_k)))
    for table in range(grid.tables):
        for first in range(0, grid.blocks_q, lines):
            r = torch.arange(first, min(first + lines, grid.blocks_q))
            begin, end = first * grid.block_q, min((first + len(r)) * grid.block_q, grid.seqlen_q)
            pad = (
                *(0, grid.blocks_k * grid.block_k - grid.seqlen_k),
                *(0, len(r) * grid.block_q - (end - begin)),
            )
            seen = torch.nn.functional.pad(rows(table, begin, end), pad)
            bits = seen.reshape(len(r), grid.block_q, grid.blocks_k, grid.block_k)
            bits = bits.transpose(1, 2).flatten(0, 1)
            some = bits.flatten(1).any(1).nonzero().squeeze(1)
            blocks = (table * grid.blocks_q + first) * grid.blocks_k + some
            parts.append(
                block_elements.listed_from_bits(grid, blocks, torch.arange(len(some)), bits[some])
            )
    return of(grid, block_elements.joined(grid, parts))


def from_kinds(
    grid: Grid,
    kinds: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    flag: int = BITMAP,
    rules: Rules | None = None,
    likeness: Callable[[Tensor, Tensor], Tensor] | None = None,
    bits: Callable[[Tensor, Tensor], Tensor] | None = None,
    columns: Callable[[int, int], tuple[int, int]] | None = None,
) -> Parts:
    """Of one table, from what can be told of blocks without their elements.

    Args:
        kinds: (block rows (n, 1), block columns (m)) -> which show something, which show all.
        flag: the rule of those that show something; BITMAP asks the next two.
        rules: what the flag refers to.
        likeness: (r, c) -> int64, equal for blocks inside the mask that show the same.
        bits: (r, c) of n blocks -> bool (n, block_q, block_k), what one of each likeness shows.
        columns: block rows [begin, end) -> the block columns [begin, end) that may show any.
    """
    numbers, ruled = [], []
    lines = max(1, block_elements._CHUNK // max(1, grid.blocks_k))
    for first in range(0, grid.blocks_q, lines):
        end = min(first + lines, grid.blocks_q)
        low, high = (0, grid.blocks_k) if columns is None else columns(first, end)
        r, c = torch.arange(first, end).unsqueeze(1), torch.arange(low, max(low, high))
        some, whole = kinds(r, c)
        line, column = some.expand(end - first, len(c)).nonzero().unbind(1)
        whole = whole.expand(end - first, len(c))[line, column]
        numbers.append((line + first) * grid.blocks_k + column + low)
        ruled.append(torch.where(whole, FULL, flag))
    blocks = torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.int64)
    rule = torch.cat(ruled).int() if ruled else blocks.int()
    rules = Rules.none(grid) if rules is None else rules
    if flag != BITMAP or likeness is None or bits is None:
        return of(grid, Listed(blocks, rule, rules.bitmaps), rules)
    partial = blocks[rule != FULL]
    _, r, c = grid.split(partial)
    # Blocks at the mask's end are cut off: they are like each other only.
    alike = likeness(r, c) * 4 + (r == grid.blocks_q - 1) * 2 + (c == grid.blocks_k - 1)
    _, which = torch.unique(alike, return_inverse=True)
    example = torch.zeros(int(which.max()) + 1 if len(which) else 0, dtype=torch.int64)
    example[which] = torch.arange(len(partial))
    r, c = r[example], c[example]
    shown = [bits(r[s], c[s]) & grid.inside(r[s], c[s]) for s in grid.chunks(len(example))]
    empty = torch.zeros((0, grid.block_q, grid.block_k), dtype=torch.bool)
    part = block_elements.listed_from_bits(
        grid, partial, which, torch.cat(shown) if shown else empty
    )
    full = blocks[rule == FULL]
    whole_blocks = Listed(full, torch.zeros_like(full).int(), rules.bitmaps)
    return of(grid, block_elements.joined(grid, [whole_blocks, part]), rules)


def band(grid: Grid, left: int, right: int) -> Parts:
    """Keys from ``left`` before the diagonal to ``right`` after it; -1 is unbounded."""
    bq, bk = grid.block_q, grid.block_k

    def ends(r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The diagonal of the first and last row, the first and last key."""
        last_row = ((r + 1) * bq).clamp(max=grid.seqlen_q) - 1
        last_key = ((c + 1) * bk).clamp(max=grid.seqlen_k) - 1
        return r * bq + grid.shift, last_row + grid.shift, c * bk, last_key

    def kinds(r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        low, high, first, last = ends(r, c)
        some = torch.ones((len(r), len(c)), dtype=torch.bool)
        whole = some.clone()
        if left >= 0:
            some &= last >= low - left
            whole &= first >= high - left
        if right >= 0:
            some &= first <= high + right
            whole &= last <= low + right
        return some, whole

    def columns(first: int, end: int) -> tuple[int, int]:
        low, high = first * bq + grid.shift - left, end * bq + grid.shift + right
        return (
            max(0, low // bk) if left >= 0 else 0,
            min(grid.blocks_k, high // bk + 1) if right >= 0 else grid.blocks_k,
        )

    rules = Rules.none(grid)
    rules.bands[:] = torch.tensor([left, right]).clamp(max=2**30)
    return from_kinds(grid, kinds, flag=BAND, rules=rules, columns=columns)
