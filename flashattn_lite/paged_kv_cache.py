"""``PagedKVCache``: the keys and values of many sequences in one pool of pages, with copy-on-write
forks. A class for serving loops of any make: it knows tokens and pages, not requests or models.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(SOSP 2023). All pages are alike, so the pool never fragments and is never moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashattn_lite import _argument_types
from flashattn_lite._ops import ArgumentError
from flashattn_lite.attention import attention
from flashattn_lite.kv_cache import append_kv_cache
from flashattn_lite.merge import merge_attention_states
from flashattn_lite.tree import tree_attention

__all__ = ["OutOfPagesError", "PagedKVCache"]

_QUANTISED = (torch.int8, torch.float8_e4m3fn)


class OutOfPagesError(RuntimeError):
    """The pool has too few free pages; nothing has changed."""


class PagedKVCache:
    """A pool of pages, a list of pages and a length for each sequence, a count for each page.

    A sequence is an int that ``create`` or ``fork`` returned. Slots are reserved for all layers at
    once (``extend``) and written layer by layer (``write``); ``append`` does both for one layer.
    Pages that several sequences hold are never written: ``extend`` gives the writer a copy first.

    Args:
        num_pages: pages in the pool.
        page_size: tokens of a page, any number >= 1.
        heads_k: K/V heads.
        head_dim: of K, and of V unless head_dim_v is given.
        head_dim_v: of V.
        num_layers: K/V pairs that share the pages' numbers.
        dtype: float32, float16 or bfloat16; or int8 or float8_e4m3fn, quantised when written with a
            factor for each (token, head).
        device: where the pool lives.

    >>> cache = PagedKVCache(num_pages=8, page_size=4, heads_k=1, head_dim=2)
    >>> prompt = cache.create()
    >>> cache.append([prompt], torch.ones(1, 6, 1, 2), torch.ones(1, 6, 1, 2))
    >>> twin = cache.fork(prompt)  # shares both pages
    >>> cache.append([twin], torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))  # copies the second
    >>> cache.length(prompt), cache.length(twin), cache.free_pages
    (6, 7, 5)
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        heads_k: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        num_layers: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {
            **{"num_layers": num_layers, "num_pages": num_pages, "page_size": page_size},
            **{"heads_k": heads_k, "head_dim": head_dim, "head_dim_v": head_dim_v},
        }
        for argument, value in sizes.items():
            sizes[argument] = _argument_types.index("PagedKVCache", argument, value)
            most = 576 if argument.startswith("head_dim") else 2**31 - 1
            if not 1 <= value <= most:
                raise ArgumentError(f"PagedKVCache: {argument} is {value}; it must be 1 to {most}")
        *shape, head_dim, head_dim_v = sizes.values()
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, *_QUANTISED):
            raise ArgumentError(
                f"PagedKVCache: dtype is {dtype}; it must be float32, float16, bfloat16, int8 or "
                "float8_e4m3fn"
            )
        self.k = torch.zeros((*shape, head_dim), dtype=dtype, device=device)
        self.v = torch.zeros((*shape, head_dim_v), dtype=dtype, device=device)
        self.k_scale = self.v_scale = None
        if dtype in _QUANTISED:
            self.k_scale = torch.zeros(shape, dtype=torch.float32, device=device)
            self.v_scale = torch.zeros(shape, dtype=torch.float32, device=device)
        self._references = [0] * self.num_pages
        self._free = list(reversed(range(self.num_pages)))
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    # ---- what there is --------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> list[int]:
        return list(self._pages)

    def length(self, sequence: int) -> int:
        """Tokens in the sequence."""
        return self._lengths[self._known(sequence)]

    def pages(self, sequence: int) -> tuple[int, ...]:
        """Its physical pages, in order."""
        return tuple(self._pages[self._known(sequence)])

    def references(self, page: int) -> int:
        """How many sequences hold a page."""
        if not 0 <= _argument_types.index("PagedKVCache.references", "page", page) < self.num_pages:
            raise ArgumentError(
                f"PagedKVCache.references: page is {page}; it must be 0 to {self.num_pages - 1}"
            )
        return self._references[page]

    def block_table(self, sequences: Sequence[int]) -> Tensor:
        """int32 (batch, longest in pages); unused entries are 0."""
        rows = [self._pages[s] for s in self._all_known(sequences)]
        longest = max((len(row) for row in rows), default=0)
        padded = [row + [0] * (longest - len(row)) for row in rows]
        table = torch.tensor(padded, dtype=torch.int32).reshape(len(rows), longest)
        return table.to(self.k.device)

    def lengths(self, sequences: Sequence[int]) -> Tensor:
        """int32 (batch)."""
        values = [self._lengths[s] for s in self._all_known(sequences)]
        return torch.tensor(values, dtype=torch.int32, device=self.k.device)

    # ---- sequences ------------------------------------------------------------------------------

    def create(self) -> int:
        """A new, empty sequence. It holds no page."""
        return self._add([], 0)

    def fork(self, sequence: int) -> int:
        """A sequence with the same contents that shares every page; nothing is copied."""
        pages = self._pages[self._known(sequence)]
        for page in pages:
            self._references[page] += 1
        return self._add(list(pages), self._lengths[sequence])

    def free(self, sequence: int) -> None:
        """Forgets the sequence; pages that nobody else holds go back to the pool."""
        for page in reversed(self._pages[self._known(sequence)]):
            self._release(page)
        del self._pages[sequence], self._lengths[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Drops the tokens from `length` on, e.g. those of a draft that was refused."""
        length = _argument_types.index("PagedKVCache.truncate", "length", length)
        if not 0 <= length <= self.length(sequence):
            raise ArgumentError(
                f"PagedKVCache.truncate: length is {length}; sequence {sequence} has "
                f"{self.length(sequence)} tokens, and it must be 0 to that"
            )
        pages = self._pages[sequence]
        while len(pages) > -(-length // self.page_size):
            self._release(pages.pop())
        self._lengths[sequence] = length

    def pages_needed(self, sequences: Sequence[int], counts: Sequence[int]) -> int:
        """Free pages that ``extend`` with the same arguments would take, copies included."""
        sequences, counts = self._counted("pages_needed", sequences, counts)
        fresh, writers = 0, Counter[int]()
        for sequence, count in zip(sequences, counts, strict=True):
            pages, length = self._pages[sequence], self._lengths[sequence]
            fresh += -(-(length + count) // self.page_size) - len(pages)
            if count > 0 and length % self.page_size:
                writers[pages[-1]] += 1
        # Of a page's holders that write, all copy it but the one that may keep it.
        return fresh + sum(min(n, self._holders(page) - 1) for page, n in writers.items())

    def extend(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Reserves slots for `counts[i]` more tokens of `sequences[i]`; ``write`` fills them.

        Raises:
            OutOfPagesError: when the pool has too few pages for all of them together; then nothing
                has changed.
        """
        sequences, counts = self._counted("extend", sequences, counts)
        if len(set(sequences)) != len(sequences):
            raise ArgumentError(
                f"PagedKVCache.extend: sequences is {sequences}; none must be named twice"
            )
        needed = self.pages_needed(sequences, counts)
        if needed > self.free_pages:
            raise OutOfPagesError(
                f"PagedKVCache.extend: {needed} pages are needed but {self.free_pages} of "
                f"{self.num_pages} are free"
            )
        for sequence, count in zip(sequences, counts, strict=True):
            pages, length = self._pages[sequence], self._lengths[sequence]
            if count > 0 and length % self.page_size and self._holders(pages[-1]) > 1:
                pages[-1] = self._copy(pages[-1])
            while len(pages) * self.page_size < length + count:
                pages.append(self._take())
            self._lengths[sequence] = length + count

    # ---- contents -------------------------------------------------------------------------------

    def write(
        self,
        sequences: Sequence[int],
        k: Tensor,
        v: Tensor,
        *,
        layer: int = 0,
        cu_seqlens: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = True,
    ) -> None:
        """Writes the last tokens of each sequence, in place: those that ``extend`` reserved.

        Args:
            sequences: whose tokens these are.
            k: (batch, new, heads_k, head_dim), or (total, heads_k, head_dim) with cu_seqlens.
            v: like k.
            layer: which of num_layers.
            cu_seqlens: int32 (batch + 1), offsets of the sequences in k.
            rotary_cos: as in ``append_kv_cache``; positions are the tokens' places.
            rotary_sin: like rotary_cos.
            rotary_interleaved: as in ``append_kv_cache``.
        """
        sequences, layer = self._all_known(sequences), self._layer("write", layer)
        new = self._new_rows("PagedKVCache.write", k, v, cu_seqlens, len(sequences))
        append_kv_cache(
            k,
            v,
            self.k[layer],
            self.v[layer],
            (self.lengths(sequences) - new).to(torch.int32),
            block_table=self.block_table(sequences),
            cu_seqlens=cu_seqlens,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            name="PagedKVCache.write",
            **self._scales(layer),
        )

    def append(self, sequences: Sequence[int], k: Tensor, v: Tensor, **options: Any) -> None:
        """``extend`` by k's rows and ``write`` them: for caches of one layer. If it raises, the
        sequences are as long as before."""
        cu_seqlens: Tensor | None = options.get("cu_seqlens")
        sequences = self._all_known(sequences)
        new = self._new_rows("PagedKVCache.append", k, v, cu_seqlens, len(sequences))
        counts = new.tolist() if isinstance(new, Tensor) else [new] * len(sequences)
        before = [self._lengths[s] for s in sequences]
        self.extend(sequences, counts)
        try:
            self.write(sequences, k, v, **options)
        except BaseException:
            for sequence, length in zip(sequences, before, strict=True):
                self.truncate(sequence, length)
            raise

    def attend(self, sequences: Sequence[int], q: Tensor, *, layer: int = 0, **options: Any) -> Any:
        """``attention`` of q (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim)
        with cu_seqlens_q, over the sequences; its options and results."""
        layer = self._layer("attend", layer)
        more: dict[str, Any] = {"name": "PagedKVCache.attend"} | self._scales(layer) | options
        return attention(
            q,
            self.k[layer],
            self.v[layer],
            block_table=self.block_table(sequences),
            seqused_k=self.lengths(sequences),
            **more,
        )

    def attend_tree(
        self,
        sequences: Sequence[int],
        q: Tensor,
        tree_mask: Tensor,
        *,
        layer: int = 0,
        **options: Any,
    ) -> Any:
        """Attention of trees of draft tokens: the last seqlen_q tokens of each sequence are the
        nodes, in q's order; ``truncate`` and ``append`` then keep the path that was accepted. See
        ``tree_attention`` for tree_mask, the options and the results."""
        layer = self._layer("attend_tree", layer)
        more: dict[str, Any] = {"name": "PagedKVCache.attend_tree"} | self._scales(layer) | options
        return tree_attention(
            *(q, self.k[layer], self.v[layer], tree_mask),
            block_table=self.block_table(sequences),
            seqused_k=self.lengths(sequences),
            **more,
        )

    def shared_prefix(self, sequences: Sequence[int]) -> int:
        """Tokens at the start that all sequences have in the same pages: a multiple of
        page_size, at most every one's length."""
        sequences, pages = self._all_known(sequences), 0
        for column in zip(*(self._pages[s] for s in sequences), strict=False):
            if len(set(column)) > 1:
                break
            pages += 1
        shortest = min((self.length(s) for s in sequences), default=0)
        return min(pages, shortest // self.page_size) * self.page_size

    def attend_cascade(
        self, sequences: Sequence[int], q: Tensor, *, layer: int = 0, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The same as ``attend(..., return_lse=True)``, reading the shared prefix once for all
        sequences instead of once for each: their queries attend to it as one sequence's, and the
        result is merged with that over the rest. Causal or full; no window, ALiBi, sinks or bias,
        which would need the rows' own positions.

        Args:
            sequences: the batch.
            q: (batch, seqlen_q, heads_q, head_dim); with causal, seqlen_q must not exceed the
                shortest sequence's part after the shared prefix (the prefix is then shortened by
                whole pages until it fits).

        Source: Ye et al., "Cascade Inference" (FlashInfer, 2024).
        """
        unknown = set(options) - {"causal", "softmax_scale", "softcap", "backend"}
        if unknown:
            raise ArgumentError(
                f"PagedKVCache.attend_cascade: {', '.join(sorted(unknown))} cannot be used here; "
                "use attend"
            )
        name = "PagedKVCache.attend_cascade"
        _argument_types.dense(name, q=q)
        sequences, layer = self._all_known(sequences), self._layer("attend_cascade", layer)
        if q.dim() != 4 or q.shape[0] != len(sequences):
            raise ArgumentError(
                f"{name}: q has shape {tuple(q.shape)}; it must be (batch, seqlen_q, heads_q, "
                f"head_dim) for {len(sequences)} sequences"
            )
        batch, seqlen_q, heads_q, head_dim = q.shape
        prefix = self.shared_prefix(sequences)
        shortest = min((self.length(s) for s in sequences), default=0)
        if options.get("causal", False):
            prefix = max(0, min(prefix, shortest - seqlen_q)) // self.page_size * self.page_size
        if prefix == 0:
            return self.attend(sequences, q, layer=layer, return_lse=True, name=name, **options)  # type: ignore[no-any-return]
        first = prefix // self.page_size
        table, lengths = self.block_table(sequences), self.lengths(sequences)
        cache = (self.k[layer], self.v[layer])
        more: dict[str, Any] = {"return_lse": True, "name": name}
        more |= self._scales(layer) | options
        out_prefix, lse_prefix = attention(
            q.reshape(1, batch * seqlen_q, heads_q, head_dim),
            *cache,
            block_table=table[:1, :first],
            seqused_k=torch.full_like(lengths[:1], prefix),
            **more | {"causal": False},
        )
        out_rest, lse_rest = attention(
            q,
            *cache,
            block_table=table[:, first:].contiguous(),
            seqused_k=lengths - prefix,
            **more,
        )
        lse_prefix = lse_prefix.reshape(heads_q, batch, seqlen_q).transpose(0, 1)
        return merge_attention_states(
            out_prefix.reshape(out_rest.shape), lse_prefix, out_rest, lse_rest
        )

    # ---- pages ----------------------------------------------------------------------------------

    def _known(self, sequence: int) -> int:
        try:
            known = sequence in self._pages
        except TypeError:  # a list, say
            known = False
        if not known:
            raise ArgumentError(
                f"PagedKVCache: there is no sequence {sequence!r}; a sequence is what create or "
                "fork returned"
            )
        return sequence

    def _all_known(self, sequences: Sequence[int]) -> list[int]:
        try:
            return [self._known(s) for s in sequences]
        except TypeError:
            raise TypeError(
                f"PagedKVCache: sequences is {sequences!r}; it must be a list of what create or "
                "fork returned"
            ) from None

    def _counted(
        self, method: str, sequences: Sequence[int], counts: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Both as lists of the same length."""
        sequences, name = self._all_known(sequences), f"PagedKVCache.{method}"
        try:
            numbers = [_argument_types.index(name, "counts", count) for count in counts]
        except TypeError as error:
            if str(error).startswith(name):
                raise
            raise TypeError(f"{name}: counts is {counts!r}; it must be a list of ints") from None
        if len(sequences) != len(numbers) or min(numbers, default=0) < 0:
            raise ArgumentError(
                f"{name}: counts is {numbers}; it must hold a number >= 0 for each of "
                f"{len(sequences)} sequences"
            )
        return sequences, numbers

    @staticmethod
    def _new_rows(
        name: str, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, batch: int
    ) -> Tensor | int:
        """How many each sequence gets: one number for all, or int32 (batch)."""
        _argument_types.dense(name, k=k, v=v, **_argument_types.given(cu_seqlens=cu_seqlens))
        if cu_seqlens is None:
            if k.dim() != 4 or k.shape[0] != batch:
                raise ArgumentError(
                    f"{name}: k has shape {tuple(k.shape)}; it must be (batch, new, heads_k, "
                    f"head_dim) for {batch} sequences"
                )
            return k.shape[1]
        if cu_seqlens.dtype is not torch.int32 or tuple(cu_seqlens.shape) != (batch + 1,):
            raise ArgumentError(
                f"{name}: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it "
                f"must be int32, ({batch + 1},), for {batch} sequences"
            )
        return cu_seqlens.diff()

    def _layer(self, method: str, layer: int) -> int:
        name, layers = f"PagedKVCache.{method}", self.k.shape[0]
        layer = _argument_types.index(name, "layer", layer)
        if not 0 <= layer < layers:
            raise ArgumentError(f"{name}: layer is {layer}; it must be 0 to {layers - 1}")
        return layer

    def _add(self, pages: list[int], length: int) -> int:
        sequence, self._next = self._next, self._next + 1
        self._pages[sequence], self._lengths[sequence] = pages, length
        return sequence

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _holders(self, page: int) -> int:
        """Who rely on its contents: with more than one, a writer gets a copy."""
        return self._references[page]

    def _release(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def _copy(self, page: int) -> int:
        """A page of one's own with the same contents, in place of a shared one."""
        own = self._take()
        for pool in (self.k, self.v, self.k_scale, self.v_scale):
            if pool is not None:
                pool[:, own] = pool[:, page]
        self._release(page)
        return own

    def _scales(self, layer: int) -> dict[str, Any]:
        if self.k_scale is None or self.v_scale is None:
            return {}
        return {"k_scale": self.k_scale[layer], "v_scale": self.v_scale[layer]}
