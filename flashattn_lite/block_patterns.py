"""Patterns of the efficient-transformers literature as block masks.

Each is exact to the element, states its source, and is made without a seqlen x seqlen tensor. Most
describe self-attention over ``seqlen`` tokens and are causal unless said otherwise. ``&`` and ``|``
combine them; ``BlockMask.stack_heads`` mixes them over heads. docs/kernels/block_sparse.md has
pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashattn_lite import _argument_types
from flashattn_lite._ops import ArgumentError
from flashattn_lite.block_build import BlockSize, make_grid, makes_mask
from flashattn_lite.block_mask import BlockMask
from flashattn_lite.block_primitives import (
    band,
    causal,
    documents,
    full,
    key_columns,
    offsets,
    query_rows,
)

__all__ = [
    "a_shape",
    "band",
    "bigbird",
    "butterfly",
    "causal",
    "chunked",
    "dilated_window",
    "documents",
    "fixed",
    "full",
    "key_columns",
    "longformer",
    "offsets",
    "prefix_lm",
    "query_rows",
    "sliding_window",
    "streaming",
    "strided",
    "tree",
    "vertical_slash",
]

# ---- local ---------------------------------------------------------------------------------------


@makes_mask
def sliding_window(
    seqlen: int, window: int, *, is_causal: bool = True, block_size: BlockSize = 128
) -> BlockMask:
    """The ``window`` nearest tokens: before the row and itself, or on both sides.

    Args:
        seqlen: tokens.
        window: tokens seen, the row's own included; without is_causal, on each side of it.
        is_causal: no key after the row's own.
        block_size: rows and keys of a block, or (rows, keys).

    Source: Beltagy et al., Longformer (2020), section 3.1; Jiang et al., Mistral 7B (2023).

    >>> sliding_window(64, 4, block_size=16).to_dense().sum().item()
    250
    """
    if window < 1:
        raise ArgumentError(f"sliding_window: window is {window}; it must be >= 1")
    right = 0 if is_causal else window - 1
    return band(seqlen, seqlen, window - 1, right, block_size=block_size)


@makes_mask
def dilated_window(
    seqlen: int, window: int, dilation: int, *, block_size: BlockSize = 128
) -> BlockMask:
    """``window`` tokens before the row, every ``dilation``-th, its own the first.

    Source: Beltagy et al., Longformer (2020), section 3.1.

    >>> dilated_window(64, 4, 3, block_size=16).to_dense()[0, 0, 20].nonzero().flatten().tolist()
    [11, 14, 17, 20]
    """
    if window < 1 or dilation < 1:
        raise ArgumentError(
            f"dilated_window: window and dilation are {window} and {dilation}; they must be >= 1"
        )
    distance = torch.arange(min(seqlen, (window - 1) * dilation + 1))
    return offsets(seqlen, distance % dilation == 0, block_size=block_size)


@makes_mask
def chunked(seqlen: int, chunk: int, *, block_size: BlockSize = 128) -> BlockMask:
    """The tokens of the row's own chunk, up to itself: attention that starts anew every ``chunk``.

    Source: Llama 4's local layers (2025); ``attention_chunk_size`` in transformers.

    >>> chunked(64, 10, block_size=16).to_dense()[0, 0, 23].nonzero().flatten().tolist()
    [20, 21, 22, 23]
    """
    if chunk < 1:
        raise ArgumentError(f"chunked: chunk is {chunk}; it must be >= 1")
    return documents(torch.arange(seqlen) // chunk, block_size=block_size)


@makes_mask
def streaming(seqlen: int, sinks: int, window: int, *, block_size: BlockSize = 128) -> BlockMask:
    """The first ``sinks`` tokens and the ``window`` nearest: attention sinks.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (2023).

    >>> streaming(64, 2, 4, block_size=16).to_dense()[0, 0, 20].nonzero().flatten().tolist()
    [0, 1, 17, 18, 19, 20]
    """
    if sinks < 0:
        raise ArgumentError(f"streaming: sinks is {sinks}; it must be >= 0")
    first = key_columns(seqlen, torch.arange(seqlen) < sinks, block_size=block_size)
    seen = first & causal(seqlen, block_size=block_size)
    return seen | sliding_window(seqlen, window, block_size=block_size)


@makes_mask
def a_shape(seqlen: int, sinks: int, window: int, *, block_size: BlockSize = 128) -> BlockMask:
    """The first tokens and a window, in the large sizes of long-prompt prefill.

    Source: Jiang et al., MInference 1.0 (2024), section 3.1, whose heads use 1024 and 4096 tokens.

    >>> a_shape(256, 64, 64, block_size=64).block_density()
    0.5625
    """
    return streaming(seqlen, sinks, window, block_size=block_size)


# ---- global and local ----------------------------------------------------------------------------


@makes_mask
def longformer(
    seqlen: int,
    window: int,
    global_tokens: int | Tensor,
    *,
    is_causal: bool = False,
    block_size: BlockSize = 128,
) -> BlockMask:
    """A window on each side, and global tokens that see all and are seen by all.

    Args:
        seqlen: tokens.
        window: tokens seen on each side, the row's own included.
        global_tokens: how many of the first tokens are global, or bool (seqlen).
        is_causal: no key after the row's own.
        block_size: rows and keys of a block, or (rows, keys).

    Source: Beltagy et al., Longformer (2020), section 3.1.

    >>> longformer(64, 4, 2, block_size=16).to_dense()[0, 0, 20].sum().item()
    9
    """
    if not isinstance(global_tokens, Tensor):
        global_tokens = torch.arange(seqlen) < global_tokens
    seen = (
        sliding_window(seqlen, window, is_causal=False, block_size=block_size)
        | key_columns(seqlen, global_tokens, block_size=block_size)
        | query_rows(seqlen, global_tokens, block_size=block_size)
    )
    return seen & causal(seqlen, block_size=block_size) if is_causal else seen


@makes_mask
def bigbird(
    seqlen: int,
    *,
    window_blocks: int = 3,
    global_blocks: int = 1,
    random_blocks: int = 3,
    is_causal: bool = False,
    block_size: BlockSize = 128,
    seed: int = 0,
) -> BlockMask:
    """Blocks: a window around the diagonal, the first ones (rows and columns), some at random.

    Args:
        seqlen: tokens.
        window_blocks: blocks of the window, the diagonal one in its middle.
        global_blocks: blocks that see all and are seen by all.
        random_blocks: more blocks of each block row, drawn without repetition.
        is_causal: no key after the row's own; random blocks are drawn before it.
        block_size: rows and keys of a block, or (rows, keys).
        seed: of the draw.

    Source: Zaheer et al., Big Bird (2020), section 2 and appendix D.

    >>> bigbird(1024, block_size=64)
    BlockMask(batch=1, heads=1, 1024 x 1024, blocks 64 x 64: 119 of 256 listed, 0 partial)
    """
    if min(window_blocks, global_blocks, random_blocks) < 0:
        raise ArgumentError(
            f"bigbird: window_blocks, global_blocks and random_blocks are {window_blocks}, "
            f"{global_blocks} and {random_blocks}; they must be >= 0"
        )
    grid = make_grid(seqlen, seqlen, block_size)
    r = torch.arange(grid.blocks_q).unsqueeze(1) * grid.block_q // grid.block_k
    c = torch.arange(grid.blocks_k)
    blocks = ((r - c).abs() <= window_blocks // 2) | (c < global_blocks)
    if not is_causal:
        blocks |= torch.arange(grid.blocks_q).unsqueeze(1) < global_blocks
    draw = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed))
    draw = draw.masked_fill(blocks | (c > r) if is_causal else blocks, -1.0)
    chosen = draw.topk(min(random_blocks, grid.blocks_k), -1)
    blocks.scatter_(-1, chosen.indices, (chosen.values >= 0) | blocks.gather(-1, chosen.indices))
    mask = BlockMask.from_blocks(blocks, seqlen, seqlen, block_size=block_size)
    return mask & causal(seqlen, block_size=block_size) if is_causal else mask


# ---- factorised ----------------------------------------------------------------------------------


@makes_mask
def strided(
    seqlen: int, stride: int, *, by_block: bool = False, block_size: BlockSize = 128
) -> BlockMask:
    """The last ``stride`` tokens, and every ``stride``-th before them.

    Args:
        seqlen: tokens.
        stride: tokens; about the square root of seqlen in the paper.
        by_block: the same pattern over blocks instead of tokens, stride rounded to whole blocks: to
            the token, every block holds some visible element and none is skipped. The paper's own
            kernels work by block.
        block_size: rows and keys of a block, or (rows, keys).

    Source: Child et al., Generating Long Sequences with Sparse Transformers (2019), section 4.3.

    >>> strided(64, 8, block_size=16).to_dense()[0, 0, 20].nonzero().flatten().tolist()
    [4, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    """
    if stride < 1:
        raise ArgumentError(f"strided: stride is {stride}; it must be >= 1")
    if not by_block:
        distance = torch.arange(seqlen)
        return offsets(
            seqlen, (distance < stride) | (distance % stride == 0), block_size=block_size
        )
    grid = make_grid(seqlen, seqlen, block_size)
    step = max(1, round(stride / grid.block_k))
    r = torch.arange(grid.blocks_q).unsqueeze(1) * grid.block_q // grid.block_k
    distance = r - torch.arange(grid.blocks_k)
    blocks = (distance.abs() < step) | (distance % step == 0)
    mask = BlockMask.from_blocks(blocks, seqlen, seqlen, block_size=block_size)
    return mask & causal(seqlen, block_size=block_size)


@makes_mask
def fixed(seqlen: int, stride: int, summary: int, *, block_size: BlockSize = 128) -> BlockMask:
    """The row's own span of ``stride`` tokens, and the last ``summary`` tokens of earlier spans.

    Source: Child et al., Generating Long Sequences with Sparse Transformers (2019), section 4.3.

    >>> fixed(64, 8, 2, block_size=16).to_dense()[0, 0, 18].nonzero().flatten().tolist()
    [6, 7, 14, 15, 16, 17, 18]
    """
    if not 0 <= summary <= stride or stride < 1:
        raise ArgumentError(
            f"fixed: stride and summary are {stride} and {summary}; summary must be 0 to stride"
        )
    token = torch.arange(seqlen)
    own = documents(token // stride, is_causal=False, block_size=block_size)
    last = key_columns(seqlen, token % stride >= stride - summary, block_size=block_size)
    return (own | last) & causal(seqlen, block_size=block_size)


@makes_mask
def butterfly(
    seqlen: int, *, global_blocks: int = 0, is_causal: bool = False, block_size: BlockSize = 128
) -> BlockMask:
    """Flat block butterfly: block row r sees block r and those whose number differs in one bit.

    With global blocks (the low-rank term) this is pixelfly, the pattern of block-sparse
    FlashAttention's own evaluation.

    Args:
        seqlen: tokens.
        global_blocks: blocks that see all and are seen by all.
        is_causal: no key after the row's own.
        block_size: rows and keys of a block, or (rows, keys); numbers count blocks of each.

    Source: Dao et al., Pixelated Butterfly (2021), section 3; FlashAttention (2022), section 3.3.

    >>> butterfly(512, block_size=64)
    BlockMask(batch=1, heads=1, 512 x 512, blocks 64 x 64: 32 of 64 listed, 0 partial)
    """
    grid = make_grid(seqlen, seqlen, block_size)
    rows, c = torch.arange(grid.blocks_q).unsqueeze(1), torch.arange(grid.blocks_k)
    differ = (rows * grid.block_q // grid.block_k) ^ c
    blocks = (differ & (differ - 1)) == 0  # none, or a power of two
    blocks = blocks | (c < global_blocks) | (rows < global_blocks)
    mask = BlockMask.from_blocks(blocks, seqlen, seqlen, block_size=block_size)
    return mask & causal(seqlen, block_size=block_size) if is_causal else mask


# ---- prompts and trees ---------------------------------------------------------------------------


@makes_mask
def prefix_lm(seqlen: int, prefix: int, *, block_size: BlockSize = 128) -> BlockMask:
    """Causal, but the first ``prefix`` tokens are seen by every row.

    Source: Raffel et al., Exploring the Limits of Transfer Learning (T5, 2019), section 3.2.1.

    >>> prefix_lm(64, 10, block_size=16).to_dense()[0, 0, 3].sum().item()
    10
    """
    seen = key_columns(seqlen, torch.arange(seqlen) < prefix, block_size=block_size)
    return seen | causal(seqlen, block_size=block_size)


@makes_mask
def vertical_slash(
    seqlen: int, verticals: Tensor, slashes: Tensor, *, block_size: BlockSize = 128
) -> BlockMask:
    """Chosen keys for every row (verticals), and chosen distances before it (slashes).

    Args:
        seqlen: tokens.
        verticals: int (any), keys.
        slashes: int (any), distances i - j.
        block_size: rows and keys of a block, or (rows, keys).

    Source: Jiang et al., MInference 1.0 (2024), section 3.1.

    >>> mask = vertical_slash(64, torch.tensor([3]), torch.tensor([0, 5]), block_size=16)
    >>> mask.to_dense()[0, 0, 20].nonzero().flatten().tolist()
    [3, 15, 20]
    """
    keys, distances = (torch.zeros(seqlen, dtype=torch.bool) for _ in range(2))
    for name, chosen, into in (("verticals", verticals, keys), ("slashes", slashes, distances)):
        chosen = chosen.cpu().long().flatten()
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < seqlen:
            raise ArgumentError(
                f"vertical_slash: {name} has {int(chosen.min())} to {int(chosen.max())}; it must "
                f"be 0 to {seqlen - 1}"
            )
        into[chosen] = True
    vertical = key_columns(seqlen, keys, block_size=block_size)
    slash = offsets(seqlen, distances, block_size=block_size)
    return (vertical & causal(seqlen, block_size=block_size)) | slash


@makes_mask
def tree(parents: Sequence[int], context: int, *, block_size: BlockSize = (16, 128)) -> BlockMask:
    """Drafted tokens in a tree after a context: each sees the context, its ancestors and itself.

    Args:
        parents: of each of n nodes, the number of its parent, or -1 for a root; parents come first.
        context: keys before the nodes, seen by all.
        block_size: rows and keys of a block, or (rows, keys).

    Returns: a mask of n rows and context + n keys.

    Source: Miao et al., SpecInfer (2023), section 4.2; Cai et al., Medusa (2024), section 2.1.2.

    >>> tree([-1, 0, 0, 2], 30).to_dense()[0, 0, :, 30:].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 0, 1, 0],
            [1, 0, 1, 1]], dtype=torch.int32)
    """
    parents = [_argument_types.index("tree", f"parents[{i}]", p) for i, p in enumerate(parents)]
    if context < 0:
        raise ArgumentError(f"tree: context is {context}; it must be >= 0")
    n = len(parents)
    seen = torch.zeros((n, context + n), dtype=torch.bool)
    seen[:, :context] = True
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ArgumentError(
                f"tree: parents[{node}] is {parent}; it must be -1 or an earlier node, 0 to "
                f"{node - 1}"
            )
        if parent >= 0:
            seen[node] |= seen[parent]
        seen[node, context + node] = True
    return BlockMask.from_dense(seen, block_size=block_size)
