"""The page pool with a prefix cache: full pages are found again by the tokens that led to them.

A page's key is a hash of its tokens chained to the key of the page before, so equal keys mean equal
prefixes (Kwon et al., SOSP 2023, section 4.4; vLLM's automatic prefix caching). Pages that nobody
holds keep their contents, and the least recently used is overwritten first.
"""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashattn_lite.paged_kv_cache import PagedKVCache
from flashattn_lite.serving._extras import require

__all__ = ["PageKey", "PagePool"]


class PageKey(NamedTuple):
    """What a full page holds: the hash of all tokens up to its end, and its own tokens."""

    digest: int
    tokens: tuple[int, ...]


class PagePool(PagedKVCache):
    """A ``PagedKVCache`` whose full pages can be published under a key and adopted by it.

    A published page is never written: the cache counts as a holder, so a writer gets a copy. Two
    keys with one digest are told apart by their tokens, and the digests' seed is the process's own,
    so no client can craft a prompt that finds another's pages.

    >>> pool = PagePool(num_pages=4, page_size=2, heads_k=1, head_dim=1)
    >>> first = pool.create()
    >>> pool.extend([first], [5])
    >>> keys = pool.keys([7, 8, 9, 10, 11])  # of two full pages
    >>> pool.publish(first, 0, keys[0])
    >>> pool.free(first)
    >>> pool.free_pages, pool.cached_pages, pool.find(keys)
    (4, 1, 1)
    >>> pool.length(pool.adopt(keys[:1]))
    2
    """

    def __init__(self, num_pages: int, page_size: int, *shape: int, **options: Any) -> None:
        super().__init__(num_pages, page_size, *shape, **options)
        self._hash = require("xxhash").xxh3_128_intdigest
        self._seed = secrets.randbits(64)
        self._key_of: dict[int, PageKey] = {}  # of published pages
        self._page_of: dict[int, int] = {}  # by digest
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # published, held by nobody, oldest first

    @property
    def free_pages(self) -> int:
        """Pages that a sequence could get now, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def cached_pages(self) -> int:
        """Free pages whose contents may be found again."""
        return len(self._idle)

    def keys(self, tokens: Sequence[int], known: Sequence[PageKey] = ()) -> list[PageKey]:
        """Keys of the full pages of a sequence of tokens, continuing those already known."""
        keys = list(known)
        for end in range((len(keys) + 1) * self.page_size, len(tokens) + 1, self.page_size):
            page = tuple(tokens[end - self.page_size : end])
            parent = keys[-1].digest if keys else 0
            contents = parent.to_bytes(16, "little") + array("q", page).tobytes()
            keys.append(PageKey(self._hash(contents, self._seed), page))
        return keys

    def find(self, keys: Sequence[PageKey]) -> int:
        """How many of the leading keys have their page here."""
        for count, key in enumerate(keys):
            page = self._page_of.get(key.digest)
            if page is None or self._key_of[page].tokens != key.tokens:
                return count
        return len(keys)

    def adopt(self, keys: Sequence[PageKey]) -> int:
        """A sequence that shares the pages of all these keys, which ``find`` has found."""
        pages = [self._page_of[key.digest] for key in keys]
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)
        return self._add(pages, len(pages) * self.page_size)

    def publish(self, sequence: int, index: int, key: PageKey) -> None:
        """Lets others find a sequence's page. It is full, its contents are final. If the same
        contents have a page already, that one stays."""
        page = self._pages[self._known(sequence)][index]
        if key.digest not in self._page_of and page not in self._key_of:
            self._page_of[key.digest], self._key_of[page] = page, key

    def slots(self, sequence: int, begin: int, end: int) -> Tensor:
        """int64: where the tokens [begin, end) of a sequence are, counted over the whole pool."""
        size, pages = self.page_size, self._pages[self._known(sequence)]
        places = [pages[i // size] * size + i % size for i in range(begin, end)]
        return torch.tensor(places, dtype=torch.int64, device=self.k.device)

    def drop_cache(self) -> None:
        """Forgets what pages hold; sequences keep theirs."""
        self._free += reversed(self._idle)
        self._idle.clear()
        self._key_of.clear()
        self._page_of.clear()

    # ---- how PagedKVCache takes, keeps and gives back pages -------------------------------------

    def _take(self) -> int:
        if not self._free:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page).digest]
            self._free.append(page)
        return super()._take()

    def _holders(self, page: int) -> int:
        return self._references[page] + (page in self._key_of)

    def _release(self, page: int) -> None:
        super()._release(page)
        if self._references[page] == 0 and page in self._key_of:
            self._free.pop()  # where PagedKVCache has just put it
            self._idle[page] = None
