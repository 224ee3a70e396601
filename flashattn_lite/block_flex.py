"""To and from ``torch.nn.attention.flex_attention.BlockMask``.

Flex lists blocks of two kinds, full ones and those that its ``mask_mod`` is asked about; ours
are the same two kinds, with rules where flex has a function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashattn_lite import block_algebra, block_build, block_elements
from flashattn_lite.block_algebra import Parts
from flashattn_lite.block_elements import BAND, BITMAP_SHIFT, DOCUMENTS, Listed

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


def _numbers(counts: Tensor | None, indices: Tensor | None, blocks_k: int) -> Tensor:
    """Block numbers of flex's (batch, heads, blocks_q) counts and (..., most) indices."""
    if counts is None or indices is None:
        return torch.zeros(0, dtype=torch.int64)
    counts, indices = counts.cpu().reshape(-1), indices.cpu().flatten(0, -2).long()
    listed = torch.arange(indices.shape[-1]) < counts.unsqueeze(1)
    line = torch.arange(len(counts)).unsqueeze(1).expand_as(listed)
    return (line * blocks_k + indices)[listed].sort().values


def from_flex(mask: FlexBlockMask) -> Parts:
    """Flex's mask as ours."""
    if not hasattr(mask, "mask_mod"):
        raise TypeError(
            f"BlockMask.from_flex: mask is a {type(mask).__name__}; it must be a "
            "torch.nn.attention.flex_attention.BlockMask"
        )
    batch, heads, seqlen_q, seqlen_k = mask.shape
    block_q, block_k = mask.BLOCK_SIZE
    grid = block_build.make_grid(seqlen_q, seqlen_k, (block_q, block_k), batch, heads)
    whole = _numbers(mask.full_kv_num_blocks, mask.full_kv_indices, grid.blocks_k)
    partial = _numbers(mask.kv_num_blocks, mask.kv_indices, grid.blocks_k)
    device = mask.kv_num_blocks.device
    parts = [Listed(whole, torch.zeros_like(whole).int(), block_elements.Rules.none(grid).bitmaps)]
    for s in grid.chunks(len(partial)):
        table, r, c = grid.split(partial[s])
        shown = mask.mask_mod(
            (table // heads).reshape(-1, 1, 1).to(device),
            (table % heads).reshape(-1, 1, 1).to(device),
            grid.rows_of(r).clamp(max=max(0, seqlen_q - 1)).unsqueeze(2).to(device),
            grid.keys_of(c).clamp(max=max(0, seqlen_k - 1)).unsqueeze(1).to(device),
        )
        bits = shown.cpu().bool().expand(len(r), block_q, block_k) & grid.inside(r, c)
        parts.append(block_elements.listed_from_bits(grid, partial[s], torch.arange(len(r)), bits))
    return block_build.of(grid, block_elements.joined(grid, parts))


def to_flex(mask: Parts, kinds: Tensor, device: torch.device) -> FlexBlockMask:
    """Our mask as flex's.

    Args:
        mask: ours.
        kinds: int8 (batch, heads, blocks_q, blocks_k): 0 not listed, 1 partial, 2 full.
        device: of the result.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    for flag in (BAND, DOCUMENTS):
        mask = block_algebra.as_bitmaps(mask, flag)
    grid, listed, _ = mask
    # As bitmaps, blocks may turn out to show nothing or everything.
    kinds = torch.zeros_like(kinds)
    number = torch.zeros(kinds.numel(), dtype=torch.int64)
    kinds.view(-1)[listed.blocks] = torch.where(listed.rule == 0, 2, 1).to(kinds.dtype)
    number[listed.blocks] = (listed.rule >> BITMAP_SHIFT).long()
    number = number.reshape(kinds.shape).to(device)
    bitmaps = listed.bitmaps
    if len(bitmaps) == 0:  # nothing is partial; the lookup below needs some entry all the same
        bitmaps = torch.zeros((1, grid.block_q, -(-grid.block_k // 32)), dtype=torch.int32)
    bitmaps, shows_all = bitmaps.to(device), (kinds == 2).to(device)
    shows_some = (kinds != 0).to(device)
    block_q, block_k = grid.block_q, grid.block_k

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        b = b * 0 if grid.batch == 1 else b
        h = h * 0 if grid.heads == 1 else h
        r, c = q_idx // block_q, kv_idx // block_k
        key = kv_idx % block_k
        word = bitmaps[number[b, h, r, c], q_idx % block_q, key // 32]
        shown = ((word >> (key % 32)) & 1) != 0
        return (shown & shows_some[b, h, r, c]) | shows_all[b, h, r, c]

    def lists(kind: int) -> tuple[Tensor, Tensor]:
        wanted = (kinds == kind).to(torch.int8)
        order = wanted.argsort(dim=-1, descending=True, stable=True)
        return (
            wanted.sum(-1).to(device, torch.int32),
            order.to(device, torch.int32),
        )

    partial_counts, partial = lists(1)
    full_counts, full = lists(2)
    arguments: dict[str, Any] = {
        "BLOCK_SIZE": (block_q, block_k),
        "mask_mod": mask_mod,
        "seq_lengths": (grid.seqlen_q, grid.seqlen_k),
    }
    return FlexBlockMask.from_kv_blocks(partial_counts, partial, full_counts, full, **arguments)
