"""Who decodes: this library over caches of every make, and what each is held against.

A row of the decode and paged suites has one baseline: a quantised cache the same numbers
unquantised, a ragged batch its sequences one by one, a paged cache the contiguous one, any other
PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.inputs import Entry, Inputs


def ours(case: Case, inputs: Inputs) -> Entry:
    """flash_attn_with_kvcache over the case's own cache."""
    from flashattn_lite import flash_attn_with_kvcache

    return over_cache(inputs, arguments(case, inputs), flash_attn_with_kvcache)


def over_cache(inputs: Inputs, cache: dict[str, Any], function: Callable[..., Any]) -> Entry:
    """A function with the arguments of flash_attn_with_kvcache, over ``arguments`` of a cache."""
    return Entry(lambda: (function(inputs.q, **cache),), "native")


def contiguous(case: Case, inputs: Inputs) -> Entry:
    """The same without pages."""
    return ours(replace(case, page_size=0), inputs)


def unquantised(case: Case, inputs: Inputs) -> Entry:
    """The numbers that were quantised, in the case's dtype."""
    from flashattn_lite import flash_attn_with_kvcache

    cache = {"k_cache": inputs.k, "v_cache": inputs.v, **_used(case)}
    return over_cache(inputs, cache, flash_attn_with_kvcache)


def one_by_one(case: Case, inputs: Inputs) -> Entry:
    """A call for each sequence, over a cache of its own length."""
    from flashattn_lite import flash_attn_with_kvcache

    calls = []
    begin = 0
    for b, n in enumerate(case.sequences()):
        k, v = (t[begin : begin + n][None].clone() for t in (inputs.k, inputs.v))
        calls.append((inputs.q[b : b + 1], k, v))
        begin += n

    def run() -> tuple[Tensor, ...]:
        return (torch.cat([flash_attn_with_kvcache(*call) for call in calls]),)  # type: ignore[misc]

    return Entry(run, "native")


def _used(case: Case) -> dict[str, Tensor]:
    return {"cache_seqlens": torch.tensor(case.sequences(), dtype=torch.int32, device=case.device)}


def arguments(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Arguments of flash_attn_with_kvcache: the cache, its factors, lengths and block table."""
    names = {"k": "k_cache", "v": "v_cache"}
    stored = {names.get(name, name): t for name, t in inputs.stored.items()}
    if not case.page_size:
        rows = {n: inputs.padded(t) if case.lengths else t for n, t in stored.items()}
        return {**rows, **_used(case)}
    table = _shuffled_table(case)
    return {
        **{name: _paged(case, t, table) for name, t in stored.items()},
        **_used(case),
        "block_table": table.to(case.device),
    }


def _shuffled_table(case: Case) -> Tensor:
    """int32 (batch, longest in pages): every page of the pool in use once, in a random order."""
    counts = [-(-n // case.page_size) for n in case.sequences()]
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(sum(counts), generator=generator).to(torch.int32)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, pages in zip(table, torch.split(order, counts), strict=True):
        row[: len(pages)] = pages
    return table


def _paged(case: Case, rows: Tensor, table: Tensor) -> Tensor:
    """(batch, seqlen, ...) or packed rows -> (pages, page_size, ...)."""
    size = case.page_size
    packed = rows if case.lengths else rows.flatten(0, 1)
    if rows.dtype.itemsize == 1:  # float8 by bytes: not every torch can index it on every device
        packed = packed.view(torch.int8)
    counts = [-(-n // size) for n in case.sequences()]
    pool = packed.new_zeros(sum(counts), size, *packed.shape[1:])
    for b, (count, own) in enumerate(
        zip(counts, torch.split(packed, list(case.sequences())), strict=True)
    ):
        pages = pool.new_zeros(count * size, *packed.shape[1:])
        pages[: len(own)] = own
        pool[table[b, :count].long()] = pages.view(count, size, *packed.shape[1:])
    return pool.view(rows.dtype)
