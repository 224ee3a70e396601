"""KV caches for tests: every layout and storage, filled from the sequences' own rows, with
poison wherever nothing may be read (pages that nobody owns, slots beyond a length or before a left
padding, unused entries of the block table)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashattn_lite import testing

LAYOUTS = ("contiguous", "page1", "page5", "page16", "page64", "page256")
STORED_AS = ("same", "int8", "fp8")
STORAGES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows over the last dimension -> stored, and a factor of each row."""
    x = x.float()
    largest = x.abs().amax(-1)
    scale = largest / LIMITS[dtype]
    inverse = torch.where(largest > 0, LIMITS[dtype] / largest, torch.zeros_like(largest))
    scaled = x * inverse.unsqueeze(-1)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (rows, heads, dim), row i rotated for positions[i]; in float64, not rounded."""
    pairs = cos.shape[1]
    c, s = (t.double()[positions].unsqueeze(1) for t in (cos, sin))
    y = x.double().clone()
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    a, b = x.double()[..., first], x.double()[..., second]
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y


def bits(t: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, for comparisons that NaN does not escape."""
    return t.contiguous().reshape(-1).view(torch.uint8)


@dataclass
class Cache:
    """A K and V cache and what says where its rows are."""

    k: Tensor
    v: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # block_table | cache_batch_idx, scales
    table: Tensor | None = None  # (batch, pages) of physical pages; cache_batch_idx's as pages too

    def scales(self) -> list[Tensor]:
        return [self.options[n] for n in ("k_scale", "v_scale") if n in self.options]

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, *self.scales()]

    def where(self, b: int, row: int) -> tuple[int, int]:
        """Block and slot of a sequence's row."""
        block, slot = self.places(b, row, row + 1)
        return int(block), int(slot)

    def places(self, b: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Blocks and slots of a sequence's rows [begin, end)."""
        rows = torch.arange(begin, end)
        if self.table is None:
            return torch.full_like(rows, b), rows
        page_size = self.k.shape[1]
        return self.table[b, rows // page_size].long(), rows % page_size

    def reference_options(self) -> dict[str, Any]:
        more = {n: o for n, o in self.options.items() if n.endswith("_scale")}
        return more if self.table is None else more | {"block_table": self.table}


def make_cache(
    layout: str,
    storage: str,
    k: list[Tensor],
    v: list[Tensor],
    capacity: int,
    *,
    leftpad: list[int] | None = None,
    seed: int = 0,
) -> Cache:
    """A cache of each sequence's k[b], v[b] (rows, heads, dim), with room for `capacity` rows.

    Args:
        layout: "contiguous", "batch_idx" or "page<size>".
        storage: "same" (k's dtype), "int8" or "fp8".
        leftpad: rows at the start of a sequence that are poisoned instead.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, heads, dtype = len(k), k[0].shape[1], k[0].dtype
    table: Tensor | None = None
    if layout.startswith("page"):
        page_size = int(layout.removeprefix("page"))
        pages = -(-capacity // page_size)
        blocks = batch * pages + 3
        owned = torch.randperm(blocks, generator=generator)[: batch * pages]
        table = owned.reshape(batch, pages).to(torch.int32)
    else:
        page_size, blocks = capacity, batch
        if layout == "batch_idx":
            blocks = batch + 2
            table = torch.randperm(blocks, generator=generator)[:batch].to(torch.int32)[:, None]
    stored = STORAGES.get(storage, dtype)
    caches, scales = [], []
    for dim in (k[0].shape[-1], v[0].shape[-1]):
        poison = torch.full((blocks, page_size, heads, dim), torch.nan)
        caches.append(poison.to(stored) if stored is not torch.int8 else poison.zero_().to(stored))
        scales.append(torch.full((blocks, page_size, heads), torch.nan))
    cache = Cache(caches[0], caches[1], table=table)
    if storage in STORAGES:
        cache.options |= {"k_scale": scales[0], "v_scale": scales[1]}
    for b in range(batch):
        begin = 0 if leftpad is None else leftpad[b]
        places = cache.places(b, begin, k[b].shape[0])
        for tensor, scale, x in zip(caches, scales, (k[b][begin:], v[b][begin:]), strict=True):
            if storage in STORAGES:
                x, scale[places] = quantise(x, stored)
            # By bytes: not every element type can be scattered.
            flat = tensor.view(torch.uint8)
            flat[places] = x.contiguous().view(torch.uint8)
    if layout == "batch_idx":
        assert table is not None
        cache.options["cache_batch_idx"] = table[:, 0].clone()
    elif table is not None:
        cache.options["block_table"] = table.clone()
    return cache


def forget_unused_pages(cache: Cache, lengths: list[int]) -> None:
    """Huge numbers in the entries of the block table past each length's last page."""
    table = cache.options.get("block_table")
    if table is not None:
        for b, length in enumerate(lengths):
            table[b, -(-length // cache.k.shape[1]) :] = 2**31 - 1


def over_cache(case: testing.Case, layout: str, storage: str) -> testing.Inputs:
    """The case with its keys in a cache, poison wherever nothing may be read. The queries stay
    dense or varlen, as the case has them."""
    inputs = testing.make_inputs(case)
    options = dict(inputs.options)
    ends = options.pop("cu_seqlens_k", None)
    options.pop("max_seqlen_k", None)
    pad = options.get("leftpad_k")
    used = [n for _, n in case.seqlens]
    total = [n + (0 if pad is None else int(pad[b])) for b, n in enumerate(used)]
    rows: list[list[Tensor]] = []
    for t in (inputs.k, inputs.v):
        starts = [0] * case.batch if ends is None else ends.tolist()
        sequences = range(case.batch)
        of = [t if ends is not None else t[b] for b in sequences]
        rows.append([of[b][starts[b] : starts[b] + total[b]] for b in sequences])
    cache = make_cache(
        layout,
        storage,
        *rows,
        max(total) + 3,
        leftpad=None if pad is None else pad.tolist(),
    )
    forget_unused_pages(cache, total)
    options |= {"seqused_k": torch.tensor(total, dtype=torch.int32), **cache.options}
    return testing.Inputs(inputs.q, cache.k, cache.v, options)
