"""Block masks combined: intersection, union, tables beside each other; packed for the kernels.

A mask here is (grid, listed blocks, rules), the parts of a ``BlockMask``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashattn_lite import block_elements
from flashattn_lite.block_elements import (
    BAND,
    BITMAP,
    BITMAP_SHIFT,
    DOCUMENTS,
    FULL,
    Grid,
    Listed,
    Rules,
)


class Parts(NamedTuple):
    """A mask. ``rules.bitmaps`` are those that the rules of ``listed`` number."""

    grid: Grid
    listed: Listed
    rules: Rules


def expanded(mask: Parts, batch: int, heads: int) -> Parts:
    """The same mask with a table for every (batch entry, head) that is asked for."""
    grid, listed, rules = mask
    if (grid.batch, grid.heads) == (batch, heads):
        return mask
    table = torch.arange(grid.tables).reshape(grid.batch, grid.heads)
    source = table.expand(batch, heads).reshape(-1)
    per_table = grid.blocks_q * grid.blocks_k
    starts = torch.searchsorted(listed.blocks, torch.arange(grid.tables + 1) * per_table)
    counts = (starts[1:] - starts[:-1])[source]
    target = torch.arange(batch * heads).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    index = starts[source][target] + torch.arange(len(target)) - first[target]
    blocks = listed.blocks[index] + (target - source[target]) * per_table
    documents = rules.documents and (rules.documents[0][source], rules.documents[1][source])
    return Parts(
        grid._replace(batch=batch, heads=heads),
        Listed(blocks, listed.rule[index], listed.bitmaps),
        Rules(rules.bands[source], documents, listed.bitmaps),
    )


def as_bitmaps(mask: Parts, flag: int) -> Parts:
    """The same mask without rules of that flag: bitmaps take their place."""
    grid, listed, rules = mask
    some = ((listed.rule & flag) != 0).nonzero().squeeze(1)
    if len(some) == 0:
        return mask
    blocks, rule = listed.blocks[some], listed.rule[some]
    table, r, c = grid.split(blocks)
    if bool((rule == BAND).all()):
        # What a band shows depends on the distance from the diagonal: few blocks differ.
        cut = (r == grid.blocks_q - 1) * 2 + (c == grid.blocks_k - 1)
        alike = torch.stack([table, r * grid.block_q - c * grid.block_k, cut])
        _, which = torch.unique(alike, dim=1, return_inverse=True)
    else:
        which = torch.arange(len(blocks))
    example = torch.zeros(int(which.max()) + 1, dtype=torch.int64)
    example[which] = torch.arange(len(blocks))
    shown = [
        block_elements.elements(grid, rules, blocks[example[s]], rule[example[s]])
        for s in grid.chunks(len(example))
    ]
    others = torch.ones(len(listed.blocks), dtype=torch.bool)
    others[some] = False
    kept = Listed(listed.blocks[others], listed.rule[others], listed.bitmaps)
    turned = block_elements.listed_from_bits(grid, blocks, which, torch.cat(shown))
    listed = block_elements.joined(grid, [kept, turned])
    return Parts(grid, listed, rules._replace(bitmaps=listed.bitmaps))


def aligned(a: Parts, b: Parts) -> tuple[Parts, Parts]:
    """Both with the same tables and rules that refer to the same bands, documents and bitmaps."""
    batch, heads = max(a.grid.batch, b.grid.batch), max(a.grid.heads, b.grid.heads)
    a, b = expanded(a, batch, heads), expanded(b, batch, heads)

    def uses(mask: Parts, flag: int) -> bool:
        return bool((mask.listed.rule & flag).any())

    bands, documents = a.rules.bands, a.rules.documents
    if not uses(a, BAND):
        bands = b.rules.bands
    elif uses(b, BAND) and not torch.equal(bands, b.rules.bands):
        b = as_bitmaps(b, BAND)
    if not uses(a, DOCUMENTS):
        documents = b.rules.documents
    elif uses(b, DOCUMENTS) and documents is not None and b.rules.documents is not None:
        same = (torch.equal(x, y) for x, y in zip(documents, b.rules.documents, strict=True))
        if not all(same):
            b = as_bitmaps(b, DOCUMENTS)
    moved = b.listed.rule + (len(a.listed.bitmaps) << BITMAP_SHIFT)
    rule = torch.where((b.listed.rule & BITMAP) != 0, moved, b.listed.rule)
    bitmaps = torch.cat([a.listed.bitmaps, b.listed.bitmaps])
    rules = Rules(bands, documents, bitmaps)
    return (
        Parts(a.grid, Listed(a.listed.blocks, a.listed.rule, bitmaps), rules),
        Parts(a.grid, Listed(b.listed.blocks, rule, bitmaps), rules),
    )


def _find(blocks: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of ``blocks`` is in ``among``, and whether it is there; both ascend."""
    if len(among) == 0:
        return torch.zeros_like(blocks), torch.zeros_like(blocks).bool()
    place = torch.searchsorted(among, blocks).clamp(max=len(among) - 1)
    return place, among[place] == blocks


def intersection(a: Parts, b: Parts) -> Parts:
    """What both show."""
    a, b = aligned(a, b)
    place, there = _find(a.listed.blocks, b.listed.blocks)
    blocks, rule_a, rule_b = (
        a.listed.blocks[there],
        a.listed.rule[there],
        b.listed.rule[place[there]],
    )
    bitmaps = a.listed.bitmaps
    rule = ((rule_a | rule_b) & (BITMAP - 1)).int()
    has_a, has_b = (rule_a & BITMAP) != 0, (rule_b & BITMAP) != 0
    number_a, number_b = rule_a >> BITMAP_SHIFT, rule_b >> BITMAP_SHIFT
    number = torch.where(has_a, number_a, number_b)
    both = has_a & has_b & (number_a != number_b)
    if bool(both.any()):
        pairs, which = torch.unique(
            torch.stack([number_a[both], number_b[both]]), dim=1, return_inverse=True
        )
        met = bitmaps[pairs[0].long()] & bitmaps[pairs[1].long()]
        number = number.clone()
        number[both] = (len(bitmaps) + which).int()
        bitmaps = torch.cat([bitmaps, met])
    rule = torch.where(has_a | has_b, rule | BITMAP | (number << BITMAP_SHIFT), rule).int()
    nothing = torch.cat([~bitmaps.flatten(1).any(1), torch.zeros(1, dtype=torch.bool)])
    shows = ~nothing[torch.where(has_a | has_b, number, len(bitmaps)).long()]
    listed = block_elements.compact(Listed(blocks[shows], rule[shows], bitmaps))
    return Parts(a.grid, listed, a.rules._replace(bitmaps=listed.bitmaps))


def union(a: Parts, b: Parts) -> Parts:
    """What either shows."""
    a, b = aligned(a, b)
    grid, rules = a.grid, a.rules
    place, there = _find(a.listed.blocks, b.listed.blocks)
    in_b = place[there]
    rule_a, rule_b = a.listed.rule[there], b.listed.rule[in_b]
    whole = (rule_a == FULL) | (rule_b == FULL)
    mixed = ~whole & (rule_a != rule_b)
    blocks, rule_a_mixed, rule_b_mixed = (
        a.listed.blocks[there][mixed],
        rule_a[mixed],
        rule_b[mixed],
    )
    which = torch.arange(len(blocks))
    if not bool(((rule_a_mixed | rule_b_mixed) & DOCUMENTS).any()):
        # The same pair of rules at the same distance from the diagonal shows the same.
        table, r, c = grid.split(blocks)
        cut = (r == grid.blocks_q - 1) * 2 + (c == grid.blocks_k - 1)
        alike = torch.stack(
            [table, r * grid.block_q - c * grid.block_k, cut, rule_a_mixed, rule_b_mixed]
        )
        _, which = torch.unique(alike, dim=1, return_inverse=True)
    example = torch.zeros(int(which.max()) + 1 if len(which) else 0, dtype=torch.int64)
    example[which] = torch.arange(len(blocks))
    shown = [torch.zeros((0, grid.block_q, grid.block_k), dtype=torch.bool)]
    for s in grid.chunks(len(example)):
        e = example[s]
        shown.append(
            block_elements.elements(grid, rules, blocks[e], rule_a_mixed[e])
            | block_elements.elements(grid, rules, blocks[e], rule_b_mixed[e])
        )
    settled = torch.where(whole, FULL, rule_a)[~mixed]
    only_a = ~there
    only_b = torch.ones(len(b.listed.blocks), dtype=torch.bool)
    only_b[in_b] = False
    kept = [
        Listed(a.listed.blocks[there][~mixed], settled, rules.bitmaps),
        Listed(a.listed.blocks[only_a], a.listed.rule[only_a], rules.bitmaps),
        Listed(b.listed.blocks[only_b], b.listed.rule[only_b], rules.bitmaps),
    ]
    same = Listed(
        torch.cat([part.blocks for part in kept]),
        torch.cat([part.rule for part in kept]).int(),
        rules.bitmaps,
    )
    united = block_elements.listed_from_bits(grid, blocks, which, torch.cat(shown))
    listed = block_elements.joined(grid, [same, united])
    return Parts(grid, listed, rules._replace(bitmaps=listed.bitmaps))


def stacked(masks: Sequence[Parts], *, heads: bool) -> Parts:
    """Masks of one shape as the heads (or the batch entries) of one mask."""
    batch = max(mask.grid.batch for mask in masks) if heads else len(masks)
    width = 1 if heads else max(mask.grid.heads for mask in masks)
    masks = [expanded(mask, batch if heads else 1, width) for mask in masks]
    grid = masks[0].grid._replace(batch=batch, heads=len(masks) if heads else width)
    per_table, parts = grid.blocks_q * grid.blocks_k, []
    bands = torch.full((grid.tables, 2), -1, dtype=torch.int32)
    documents = None
    if any(mask.rules.documents is not None for mask in masks):
        documents = tuple(
            torch.zeros((grid.tables, n), dtype=torch.int32) for n in (grid.seqlen_q, grid.seqlen_k)
        )
    for n, mask in enumerate(masks):
        old = torch.arange(mask.grid.tables)
        new = old * len(masks) + n if heads else n * width + old
        table = mask.listed.blocks // max(1, per_table)
        blocks = mask.listed.blocks + (new[table] - table) * per_table
        parts.append(Listed(blocks, mask.listed.rule, mask.listed.bitmaps))
        bands[new] = mask.rules.bands
        if documents is not None and mask.rules.documents is not None:
            for side in (0, 1):
                documents[side][new] = mask.rules.documents[side]
    listed = block_elements.joined(grid, parts)
    return Parts(grid, listed, Rules(bands, documents, listed.bitmaps))  # type: ignore[arg-type]


def packed(mask: Parts) -> tuple[Tensor, Tensor]:
    """The mask as the operators take it: ``csrc/torch/block_mask.h`` says how it is laid out."""
    grid, listed, rules = mask
    table, r, c = grid.split(listed.blocks)

    def starts(line: Tensor, lines: int) -> Tensor:
        """(tables, lines + 1) of entries that ascend by table and line."""
        edges = torch.arange(grid.tables).unsqueeze(1) * lines + torch.arange(lines + 1)
        return torch.searchsorted(table_line(line, lines), edges)

    def table_line(line: Tensor, lines: int) -> Tensor:
        return table[order] * lines + line

    order = torch.arange(len(listed.blocks))
    rows = [starts(r, grid.blocks_q), c, listed.rule]
    order = ((table * grid.blocks_k + c) * grid.blocks_q + r).argsort()
    columns = [starts(c[order], grid.blocks_k), r[order], listed.rule[order]]
    arrays = [*rows, *columns, rules.bands]
    arrays += [] if rules.documents is None else list(rules.documents)
    arrays.append(listed.bitmaps)
    layout = torch.tensor(
        [
            *(grid.seqlen_q, grid.seqlen_k, grid.block_q, grid.block_k, grid.batch, grid.heads),
            *(len(listed.blocks), int(rules.documents is not None), len(listed.bitmaps)),
        ]
    )
    return torch.cat([array.reshape(-1).to(torch.int32) for array in arrays]), layout
