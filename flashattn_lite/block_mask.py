"""``BlockMask``: which keys each query row may see, block by block.

Rows and keys are cut into blocks. A block that is not listed is skipped, reads and products alike,
so that time and traffic fall in proportion to what is listed; a listed block shows all its elements
or those that its rule names. Masks come from patterns (``flashattn_lite.block_patterns``), a
predicate, a dense mask or scores, combine with ``&`` and ``|``, and go to every attention function
as ``block_mask=``.

A mask of another shape than the call keeps its place by position: key j is column j, and query rows
count from the diagonal, as ``causal`` does. One square mask of the longest context thus serves
prefill, chunks, decoding and sequences of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashattn_lite import block_algebra, block_build, block_elements, block_flex, block_render
from flashattn_lite._ops import ArgumentError
from flashattn_lite.block_algebra import Parts
from flashattn_lite.block_build import BlockSize, make_grid, makes_mask, on_cpu
from flashattn_lite.block_elements import FULL, Grid, Listed, Rules

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

__all__ = ["BlockMask"]

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class BlockMask:
    """A block-sparse mask for attention. Made by the class methods and by ``block_patterns``.

    >>> from flashattn_lite import block_patterns
    >>> mask = block_patterns.sliding_window(1024, 256, block_size=128)
    >>> mask
    BlockMask(batch=1, heads=1, 1024 x 1024, blocks 128 x 128: 21 of 64 listed, 14 partial)
    >>> round(mask.density(), 3)
    0.219

    Source: Dao et al., FlashAttention (2022), section 3.3 and appendix D.
    """

    def __init__(self, grid: Grid, listed: Listed, rules: Rules) -> None:
        """Of parts that belong together; see ``block_elements``."""
        self._grid = grid
        self._blocks, self._rule = listed.blocks, listed.rule
        self._rules = rules._replace(bitmaps=listed.bitmaps)
        self._packed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    # ---- from what is at hand --------------------------------------------------------------------

    @classmethod
    @makes_mask
    def from_dense(cls, mask: Tensor, *, block_size: BlockSize = 128) -> BlockMask:
        """A mask from a boolean one, as ``scaled_dot_product_attention`` takes it: True shows.

        Args:
            mask: bool (seqlen_q, seqlen_k), (heads, seqlen_q, seqlen_k) or (batch, heads, seqlen_q,
                seqlen_k); size 1 broadcasts over batch or heads.
            block_size: rows and keys of a block, or (rows, keys): multiples of 16 up to 256.

        >>> BlockMask.from_dense(torch.ones(64, 64, dtype=torch.bool), block_size=32)
        BlockMask(batch=1, heads=1, 64 x 64, blocks 32 x 32: 4 of 4 listed, 0 partial)
        """
        if mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
            raise ArgumentError(
                f"BlockMask.from_dense: mask is {mask.dtype} of shape {tuple(mask.shape)}; it must "
                "be bool of 2 to 4 dimensions"
            )
        mask = mask.detach().cpu()[(None,) * (4 - mask.dim())]
        batch, heads, seqlen_q, seqlen_k = mask.shape
        grid = make_grid(seqlen_q, seqlen_k, block_size, batch, heads)

        def rows(table: int, begin: int, end: int) -> Tensor:
            return mask[table // heads, table % heads, begin:end]

        return cls(*block_build.from_rows(grid, rows))

    @classmethod
    @makes_mask
    def from_predicate(
        cls,
        predicate: Predicate,
        seqlen_q: int,
        seqlen_k: int | None = None,
        *,
        batch: int = 1,
        heads: int = 1,
        block_size: BlockSize = 128,
    ) -> BlockMask:
        """A mask from a function of indices, as ``flex_attention``'s ``mask_mod``.

        It is asked about a few block rows at a time, so memory stays linear in length; its time is
        that of seqlen_q x seqlen_k answers. The patterns of ``block_patterns`` need no such time.

        Args:
            predicate: (batch entry, head, query row, key) -> bool, on index tensors that broadcast.
            seqlen_q: rows.
            seqlen_k: keys; default: seqlen_q.
            batch: entries that differ; 1 broadcasts.
            heads: query heads that differ; 1 broadcasts.
            block_size: rows and keys of a block, or (rows, keys).

        >>> mask = BlockMask.from_predicate(lambda b, h, i, j: i >= j, 64, block_size=16)
        >>> mask.to_dense().sum().item()
        2080
        """
        if not callable(predicate):
            raise TypeError(
                f"BlockMask.from_predicate: predicate is {predicate!r}; it must be a function of "
                "(batch entry, head, query row, key)"
            )
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        grid = make_grid(seqlen_q, seqlen_k, block_size, batch, heads)
        key = torch.arange(seqlen_k).unsqueeze(0)

        def rows(table: int, begin: int, end: int) -> Tensor:
            b, h = torch.tensor(table // heads), torch.tensor(table % heads)
            seen = torch.as_tensor(predicate(b, h, torch.arange(begin, end).unsqueeze(1), key))
            try:
                return seen.bool().expand(end - begin, seqlen_k)
            except RuntimeError:
                raise ArgumentError(
                    f"BlockMask.from_predicate: predicate gave shape {tuple(seen.shape)}; it must "
                    f"broadcast to {(end - begin, seqlen_k)}, rows and keys"
                ) from None

        return cls(*block_build.from_rows(grid, rows))

    @classmethod
    @makes_mask
    def from_blocks(
        cls, blocks: Tensor, seqlen_q: int, seqlen_k: int, *, block_size: BlockSize = 128
    ) -> BlockMask:
        """A mask of whole blocks: True lists the block, all its elements visible.

        Args:
            blocks: bool (blocks_q, blocks_k), (heads, blocks_q, blocks_k) or with batch before.
            seqlen_q: rows, of which the last block may hold fewer.
            seqlen_k: keys.
            block_size: rows and keys of a block, or (rows, keys).

        >>> BlockMask.from_blocks(torch.eye(3, dtype=torch.bool), 90, 96, block_size=32)
        BlockMask(batch=1, heads=1, 90 x 96, blocks 32 x 32: 3 of 9 listed, 0 partial)
        """
        blocks = blocks.detach().cpu().bool()[(None,) * (4 - blocks.dim())]
        grid = make_grid(seqlen_q, seqlen_k, block_size, blocks.shape[0], blocks.shape[1])
        if tuple(blocks.shape[2:]) != (grid.blocks_q, grid.blocks_k):
            raise ArgumentError(
                f"BlockMask.from_blocks: blocks is {tuple(blocks.shape[2:])} blocks; {seqlen_q} x "
                f"{seqlen_k} elements are {(grid.blocks_q, grid.blocks_k)}"
            )
        numbers = blocks.reshape(-1).nonzero().squeeze(1)
        none = Rules.none(grid)
        return cls(grid, Listed(numbers, torch.zeros_like(numbers).int(), none.bitmaps), none)

    @classmethod
    @makes_mask
    def from_scores(
        cls,
        scores: Tensor,
        keep: int,
        seqlen_q: int,
        seqlen_k: int,
        *,
        block_size: BlockSize = 128,
        causal: bool = False,
    ) -> BlockMask:
        """The ``keep`` best-scored blocks of every block row (mixture of block attention, Quest).

        Args:
            scores: floating (…, blocks_q, blocks_k), a score per block; -inf is never kept.
            keep: blocks kept in each block row, at most.
            seqlen_q: rows.
            seqlen_k: keys.
            block_size: rows and keys of a block, or (rows, keys).
            causal: choose among the blocks that causal attention sees, and mask the diagonal ones.

        >>> scores = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> print(BlockMask.from_scores(scores, 1, 32, 32, block_size=16).text())
        ·█
        █·
        """
        if not (2 <= scores.dim() <= 4 and scores.is_floating_point() and keep >= 0):
            raise ArgumentError(
                f"BlockMask.from_scores: keep is {keep} and scores {scores.dtype} of shape "
                f"{tuple(scores.shape)}; they must be >= 0 and floating of 2 to 4 dimensions"
            )
        scores = scores.detach().cpu()[(None,) * (4 - scores.dim())]
        grid = make_grid(seqlen_q, seqlen_k, block_size, scores.shape[0], scores.shape[1])
        if tuple(scores.shape[2:]) != (grid.blocks_q, grid.blocks_k):
            raise ArgumentError(
                f"BlockMask.from_scores: scores is {tuple(scores.shape[2:])} blocks; {seqlen_q} x "
                f"{seqlen_k} elements are {(grid.blocks_q, grid.blocks_k)}"
            )
        if causal:
            r, c = torch.arange(grid.blocks_q).unsqueeze(1), torch.arange(grid.blocks_k)
            last_row = ((r + 1) * grid.block_q).clamp(max=seqlen_q) - 1
            hidden = c * grid.block_k > last_row + grid.shift
            scores = scores.masked_fill(hidden, -torch.inf)
        best = scores.topk(min(keep, grid.blocks_k), -1)
        kept = torch.zeros(scores.shape, dtype=torch.bool)
        kept.scatter_(-1, best.indices, best.values > -torch.inf)
        mask = cls.from_blocks(kept, seqlen_q, seqlen_k, block_size=block_size)
        return (
            mask & cls(*block_build.band(grid._replace(batch=1, heads=1), -1, 0))
            if causal
            else mask
        )

    # ---- flex_attention --------------------------------------------------------------------------

    @classmethod
    @on_cpu
    def from_flex(cls, mask: FlexBlockMask) -> BlockMask:
        """A mask from ``torch.nn.attention.flex_attention.BlockMask``, its full blocks full.

        The ``mask_mod`` is asked about the other listed blocks, once.

        Args:
            mask: with blocks of multiples of 16 up to 256.

        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> flex = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 256, 256, device="cpu")
        >>> BlockMask.from_flex(flex)
        BlockMask(batch=1, heads=1, 256 x 256, blocks 128 x 128: 3 of 4 listed, 2 partial)
        """
        return cls(*block_flex.from_flex(mask))

    @on_cpu
    def to_flex(self, device: torch.device | str = "cpu") -> FlexBlockMask:
        """The same as a ``torch.nn.attention.flex_attention.BlockMask`` on a device.

        >>> from flashattn_lite import block_patterns
        >>> block_patterns.causal(256).to_flex().shape
        (1, 1, 256, 256)
        """
        return block_flex.to_flex(self._parts(), self.kinds(), torch.device(device))

    # ---- combined --------------------------------------------------------------------------------

    def _parts(self) -> Parts:
        return Parts(self._grid, Listed(self._blocks, self._rule, self._rules.bitmaps), self._rules)

    def _with(self, other: BlockMask, operator: str) -> tuple[Parts, Parts]:
        a, b = self._grid, other._grid
        if a[2:] != b[2:]:
            raise ArgumentError(
                f"BlockMask {operator}: the masks are {a.seqlen_q} x {a.seqlen_k} in blocks of "
                f"{a.block_q} x {a.block_k} and {b.seqlen_q} x {b.seqlen_k} in blocks of "
                f"{b.block_q} x {b.block_k}; they must agree"
            )
        for side, x, y in (("batch", a.batch, b.batch), ("heads", a.heads, b.heads)):
            if 1 not in (x, y) and x != y:
                raise ArgumentError(
                    f"BlockMask {operator}: the masks have {side} {x} and {y}; they must agree, or "
                    "one must be 1"
                )
        return self._parts(), other._parts()

    @on_cpu
    def __and__(self, other: BlockMask) -> BlockMask:
        """What both masks show."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        return BlockMask(*block_algebra.intersection(*self._with(other, "&")))

    @on_cpu
    def __or__(self, other: BlockMask) -> BlockMask:
        """What either mask shows."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        return BlockMask(*block_algebra.union(*self._with(other, "|")))

    @staticmethod
    def stack_heads(masks: Sequence[BlockMask]) -> BlockMask:
        """A mask whose head h is ``masks[h]``: a mixture of patterns.

        >>> from flashattn_lite import block_patterns
        >>> local = block_patterns.sliding_window(256, 64, block_size=64)
        >>> BlockMask.stack_heads([local, block_patterns.causal(256, block_size=64)]).heads
        2
        """
        return BlockMask._stacked(masks, heads=True)

    @staticmethod
    def stack_batch(masks: Sequence[BlockMask]) -> BlockMask:
        """A mask whose batch entry b is ``masks[b]``.

        >>> from flashattn_lite import block_patterns
        >>> masks = [block_patterns.prefix_lm(256, n, block_size=64) for n in (0, 100)]
        >>> BlockMask.stack_batch(masks).batch
        2
        """
        return BlockMask._stacked(masks, heads=False)

    @staticmethod
    @on_cpu
    def _stacked(masks: Sequence[BlockMask], *, heads: bool) -> BlockMask:
        along = "heads" if heads else "batch"
        if not isinstance(masks, Sequence) or not all(isinstance(m, BlockMask) for m in masks):
            raise TypeError(f"BlockMask.stack_{along}: masks must be a sequence of BlockMask")
        if not masks:
            raise ArgumentError(f"BlockMask.stack_{along}: masks is empty; give at least one")
        for mask in masks:
            masks[0]._with(mask, f"stack_{along}")
            if (mask.heads if heads else mask.batch) != 1:
                raise ArgumentError(f"BlockMask.stack_{along}: every mask must have {along} 1")
        return BlockMask(*block_algebra.stacked([mask._parts() for mask in masks], heads=heads))

    def packed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The operators' arguments, kept for the next call on that device."""
        if device not in self._packed:
            self._pack(device)
        return self._packed[device]

    @on_cpu
    @torch.inference_mode(False)  # a call that trains may be next, and saves these for its backward
    def _pack(self, device: torch.device) -> None:
        numbers, layout = block_algebra.packed(self._parts())
        self._packed[device] = numbers.to(device), layout

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Batch entries that differ; 1 broadcasts."""
        return self._grid.batch

    @property
    def heads(self) -> int:
        """Query heads that differ; 1 broadcasts."""
        return self._grid.heads

    @property
    def seqlen_q(self) -> int:
        """Rows."""
        return self._grid.seqlen_q

    @property
    def seqlen_k(self) -> int:
        """Keys."""
        return self._grid.seqlen_k

    @property
    def block_size(self) -> tuple[int, int]:
        """(rows, keys) of a block."""
        return self._grid.block_q, self._grid.block_k

    def __repr__(self) -> str:
        g, partial = self._grid, int((self._rule != FULL).sum())
        return (
            f"BlockMask(batch={g.batch}, heads={g.heads}, {g.seqlen_q} x {g.seqlen_k}, blocks "
            f"{g.block_q} x {g.block_k}: {len(self._blocks)} of "
            f"{g.tables * g.blocks_q * g.blocks_k} listed, {partial} partial)"
        )

    @on_cpu
    def kinds(self) -> Tensor:
        """int8 (batch, heads, blocks_q, blocks_k): 0 not listed, 1 partial, 2 full."""
        g = self._grid
        kinds = torch.zeros(g.tables * g.blocks_q * g.blocks_k, dtype=torch.int8)
        kinds[self._blocks] = torch.where(self._rule == FULL, 2, 1).to(torch.int8)
        return kinds.reshape(g.batch, g.heads, g.blocks_q, g.blocks_k)

    @makes_mask
    def to_dense(self, seqlen_q: int | None = None, seqlen_k: int | None = None) -> Tensor:
        """bool (batch, heads, seqlen_q, seqlen_k), True where visible.

        Args:
            seqlen_q: rows of the call that the mask is used in; default: the mask's.
            seqlen_k: keys of the call; default: the mask's.

        >>> mask = BlockMask.from_predicate(lambda b, h, i, j: i >= j, 64, block_size=16)
        >>> mask.to_dense(1, 40).sum().item()  # the query at position 39, over 40 keys
        40
        """
        g = self._grid
        wanted_q = g.seqlen_q if seqlen_q is None else seqlen_q
        wanted_k = g.seqlen_k if seqlen_k is None else seqlen_k
        offset = (wanted_k - wanted_q) - g.shift
        dense = torch.zeros((g.batch, g.heads, wanted_q, wanted_k), dtype=torch.bool)
        # Rows [begin, end) of the call are rows of the mask, and so are its first `keys` keys.
        begin, end = max(0, -offset), min(wanted_q, g.seqlen_q - offset)
        keys = min(wanted_k, g.seqlen_k)
        if begin >= end or keys == 0:
            return dense
        first, last = (begin + offset) // g.block_q, (end + offset - 1) // g.block_q + 1
        columns = -(-keys // g.block_k)
        table, r, c = g.split(self._blocks)
        needed = ((r >= first) & (r < last) & (c < columns)).nonzero().squeeze(1)
        place = ((table * (last - first) + r - first) * columns + c)[needed]
        tiles = torch.zeros(
            (g.tables, last - first, columns, g.block_q, g.block_k), dtype=torch.bool
        )
        flat = tiles.reshape(-1, g.block_q, g.block_k)
        for s in g.chunks(len(needed)):
            index = needed[s]
            flat[place[s]] = block_elements.elements(
                g, self._rules, self._blocks[index], self._rule[index]
            )
        rows = tiles.transpose(2, 3).reshape(g.batch, g.heads, -1, columns * g.block_k)
        start = begin + offset - first * g.block_q
        dense[:, :, begin:end, :keys] = rows[:, :, start : start + end - begin, :keys]
        return dense

    def block_density(self) -> float:
        """The share of blocks that are listed: what the kernels compute."""
        g = self._grid
        return len(self._blocks) / max(1, g.tables * g.blocks_q * g.blocks_k)

    def density(self) -> float:
        """The share of elements that are visible."""
        g = self._grid
        return self._visible() / max(1, g.tables * g.seqlen_q * g.seqlen_k)

    def _areas(self, blocks: Tensor) -> Tensor:
        """int64, the elements of each block."""
        _, r, c = self._grid.split(blocks)
        height = (self.seqlen_q - r * self._grid.block_q).clamp(max=self._grid.block_q)
        return height * (self.seqlen_k - c * self._grid.block_k).clamp(max=self._grid.block_k)

    @on_cpu
    def _visible(self) -> int:
        partial = (self._rule != FULL).nonzero().squeeze(1)
        count = int(self._areas(self._blocks[self._rule == FULL]).sum())
        for s in self._grid.chunks(len(partial)):
            index = partial[s]
            shown = block_elements.elements(
                self._grid, self._rules, self._blocks[index], self._rule[index]
            )
            count += int(shown.sum())
        return count

    @makes_mask
    def flops(self, head_dim: int, head_dim_v: int | None = None, *, backward: bool = False) -> int:
        """Multiplications and additions of the listed blocks' products, over the mask's tables.

        Args:
            head_dim: of q and k.
            head_dim_v: of v; default: head_dim.
            backward: of the backward pass (five products) instead of the forward pass (two).
        """
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        per_element = 2 * (head_dim + head_dim_v)
        if backward:
            per_element = 2 * (3 * head_dim + 2 * head_dim_v)
        return per_element * int(self._areas(self._blocks).sum())

    @makes_mask
    def text(self, *, batch: int = 0, head: int = 0, width: int = 64) -> str:
        """The blocks as characters: full, partial, not listed. Wide masks are summed up.

        >>> from flashattn_lite import block_patterns
        >>> print(block_patterns.sliding_window(256, 64, block_size=64).text())
        ▒···
        ▒▒··
        ·▒▒·
        ··▒▒
        """
        if width < 1:
            raise ArgumentError(f"BlockMask.text: width is {width}; it must be >= 1")
        return block_render.text(self._table("text", batch, head), width)

    @makes_mask
    def picture(
        self, path: Any = None, *, batch: int = 0, head: int = 0, title: str | None = None
    ) -> Any:
        """The blocks as an image, with matplotlib (an optional dependency).

        Args:
            path: a file to write; None returns the figure.
            batch: entry to draw.
            head: head to draw.
            title: above the picture.
        """
        return block_render.picture(self._table("picture", batch, head), path, title)

    def _table(self, method: str, batch: int, head: int) -> Tensor:
        """int8 (blocks_q, blocks_k), the kinds of one batch entry and head."""
        kinds = self.kinds()
        for side, number, size in (("batch", batch, self.batch), ("head", head, self.heads)):
            if not 0 <= number < size:
                raise ArgumentError(
                    f"BlockMask.{method}: {side} is {number}; it must be 0 to {size - 1}"
                )
        return kinds[batch, head]
