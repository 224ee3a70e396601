"""What is computed: one ``Case`` is one row of a table. suites.py lists them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

# Short names of the command line and the tables, in the order in which tables show them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

BLOCK = 128  # rows and keys of a block mask's blocks


@dataclass(frozen=True, kw_only=True)
class Case:
    """One computation. Lengths count tokens; ``lengths`` makes it a ragged batch of sequences."""

    suite: str
    dtype: str  # a key of DTYPES
    head_dim: int
    seqlen: int  # of queries and keys; the longest one of a ragged batch
    tokens: int = 0  # queries of each sequence, over a cache of its length; 0: as many as keys
    storage: str = ""  # "int8" or "fp8": how the cache holds K and V; default: as dtype
    page_size: int = 0  # of a paged cache; 0: contiguous
    batch: int = 1
    heads: int = 1
    heads_k: int = 0  # 0: as many as heads
    causal: bool = False
    window: int | None = None  # keys before the diagonal that a row sees, with causal
    lengths: tuple[int, ...] = ()
    score: str = ""  # "bias" or "alibi": what is added to the scores
    block_density: float | None = None  # share of 128 x 128 blocks that a block mask lists
    backward: bool = False
    drop_in: bool = False  # ours is called as torch's scaled_dot_product_attention is
    threads: int = 1  # CPU only
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"Case: dtype is {self.dtype!r}; it must be one of {list(DTYPES)}")
        if self.lengths and max(self.lengths) != self.seqlen:
            raise ValueError(f"Case: the longest of lengths must be seqlen, {self.seqlen}")
        if self.window is not None and not self.causal:
            raise ValueError("Case: a window is measured with causal=True")
        if self.block_density is not None and (self.causal or self.lengths or self.seqlen % BLOCK):
            raise ValueError(
                f"Case: a block mask is measured alone, at lengths that are multiples of {BLOCK}"
            )
        if self.storage not in ("", "int8", "fp8"):
            raise ValueError(f"Case: storage is {self.storage!r}; it must be int8, fp8 or empty")
        if self.tokens and (self.causal or self.backward):
            raise ValueError("Case: decoding is measured forward, every query seeing all keys")
        if self.drop_in and (self.tokens or self.lengths or self.window or self.score):
            raise ValueError("Case: the drop-in is measured dense or causal, without more")
        if not self.tokens and (self.storage or self.page_size):
            raise ValueError("Case: a cache is measured with tokens")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def kv_heads(self) -> int:
        return self.heads_k or self.heads

    def sequences(self) -> tuple[int, ...]:
        """The length of every sequence."""
        return self.lengths or (self.seqlen,) * self.batch

    def listed_blocks(self) -> int:
        """Blocks in each block row of the case's block mask."""
        assert self.block_density is not None
        return max(1, round(self.block_density * (self.seqlen // BLOCK)))

    def visible(self) -> int:
        """Pairs (query row, key) that attend, over all sequences, per head."""
        if self.block_density is not None:
            return self.batch * self.seqlen * self.listed_blocks() * BLOCK
        if self.tokens:
            return self.tokens * sum(self.sequences())
        return sum(visible_pairs(n, self.causal, self.window) for n in self.sequences())

    def cache_bytes(self) -> int:
        """Bytes of K and V, factors of quantised rows included: what decoding has to read."""
        element = 1 if self.storage else self.torch_dtype.itemsize
        row = element * self.head_dim + (4 if self.storage else 0)
        return 2 * sum(self.sequences()) * self.kv_heads * row

    def flops(self) -> int:
        """Useful floating-point operations: two products forward, five more backward."""
        return (14 if self.backward else 4) * self.visible() * self.heads * self.head_dim

    def mask_name(self) -> str:
        if self.block_density is not None:
            return f"{100 * self.block_density:g} % of the blocks"
        if self.window is not None:
            return f"window {self.window}"
        if self.tokens:
            queries = f"{self.tokens} queries" if self.tokens > 1 else "1 query"
            cache = f", {self.storage}" if self.storage else ""
            return queries + cache + (f", pages of {self.page_size}" if self.page_size else "")
        return "causal" if self.causal else "dense"

    def label(self) -> str:
        """What the row computes, apart from its dtype and threads.

        >>> Case(suite="forward", dtype="fp32", head_dim=64, seqlen=1024, heads=8).label()
        '1x8 heads, length 1024, head dim 64, dense'
        """
        if self.lengths:
            size = f"{len(self.lengths)} sequences of {min(self.lengths)}-{self.seqlen}"
            size += f", {self.heads} heads"
        else:
            heads = str(self.heads) if not self.heads_k else f"{self.heads}/{self.heads_k}"
            size = f"{self.batch}x{heads} heads, length {self.seqlen}"
        more = f", {self.score}" if self.score else ""
        more += ", drop-in" if self.drop_in else ""
        return f"{size}, head dim {self.head_dim}, {self.mask_name()}{more}"

    def short(self) -> str:
        """The same in a table's width.

        >>> Case(suite="forward", dtype="fp32", head_dim=64, seqlen=1024, heads=8).short()
        '1x8x1024x64 dense'
        """
        heads = str(self.heads) if not self.heads_k else f"{self.heads}/{self.heads_k}"
        size = f"{self.batch}x{heads}x{self.seqlen}x{self.head_dim}"
        if self.lengths:
            size = f"{len(self.lengths)} ragged x{heads}x{self.seqlen}x{self.head_dim}"
        more = " " + self.score if self.score else ""
        more += " drop-in" if self.drop_in else ""
        more += " + backward" if self.backward and self.suite in ("overhead", "sparse") else ""
        return f"{size} {self.mask_name()}{more}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "lengths": list(self.lengths)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        return cls(**{**data, "lengths": tuple(data["lengths"])})


def visible_pairs(seqlen: int, causal: bool, window: int | None) -> int:
    """
    >>> visible_pairs(4, False, None), visible_pairs(4, True, None), visible_pairs(4, True, 1)
    (16, 10, 7)
    """
    if not causal:
        return seqlen * seqlen
    reach = seqlen if window is None else min(window + 1, seqlen)  # keys that a late row sees
    return reach * (reach + 1) // 2 + (seqlen - reach) * reach
