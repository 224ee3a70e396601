"""Decode steps as CUDA graphs: one launch instead of a dozen for each layer.

A graph replays the same addresses and shapes, so a batch of single tokens is copied into tensors of
a fixed size: as many rows as the next power of two, and a block table as wide as any request's can
get. Rows beyond the batch belong to no request; they write no page and their logits are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashattn_lite.serving.model import Batch, Model, Rows
from flashattn_lite.serving.pool import PagePool

__all__ = ["DecodeGraphs", "FixedBatch"]


class FixedBatch:
    """A decode batch in tensors that stay where they are.

    Args:
        rows: requests at most.
        max_pages: of a request.
        device: where.
    """

    def __init__(self, rows: int, max_pages: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.rows = rows
        self.runs = Rows(rows, zeros(rows + 1), 1, zeros(rows), zeros(rows, max_pages))
        self.batch = Batch(
            zeros(rows, dtype=torch.int64),
            zeros(rows),
            self.runs,
            (self.runs,),
            torch.arange(rows, device=device),
        )

    def fill(self, batch: Batch) -> None:
        """Copies a batch of single tokens in; entries beyond it get no rows and no keys."""
        count, pages = batch.rows.block_table.shape
        self.batch.token_ids[:count] = batch.token_ids
        self.batch.token_ids[count:] = 0
        self.batch.cached[:count] = batch.cached
        self.batch.cached[count:] = 0
        self.runs.cu_seqlens[: count + 1] = batch.rows.cu_seqlens
        self.runs.cu_seqlens[count + 1 :] = count
        self.runs.seqused_k[:count] = batch.rows.seqused_k
        self.runs.seqused_k[count:] = 0
        self.runs.block_table[:count, :pages] = batch.rows.block_table


class DecodeGraphs:
    """A graph for each power of two of requests, captured when first needed.

    Args:
        model: on a CUDA device.
        pool: its pages.
        max_pages: of a request.
    """

    def __init__(self, model: Model, pool: PagePool, max_pages: int) -> None:
        if model.device.type != "cuda":
            raise ValueError(f"cuda_graphs: the model is on {model.device}; it must be on CUDA")
        self.model, self.pool, self.max_pages = model, pool, max_pages
        self._graphs: dict[int, tuple[FixedBatch, torch.cuda.CUDAGraph, Tensor]] = {}

    def forward(self, batch: Batch) -> Tensor:
        """As ``Model.forward``, of a batch of single tokens that all sample."""
        count = batch.token_ids.shape[0]
        rows = 1 << (count - 1).bit_length()
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows, batch)
        fixed, graph, logits = self._graphs[rows]
        fixed.fill(batch)
        graph.replay()
        return logits[:count].clone()

    def _capture(self, rows: int, batch: Batch) -> tuple[FixedBatch, torch.cuda.CUDAGraph, Tensor]:
        fixed = FixedBatch(rows, self.max_pages, self.model.device)
        fixed.fill(batch)
        # A warm-up on a side stream, as torch.cuda.graph asks; it writes what the replay writes.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.model.forward(fixed.batch, self.pool)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.model.forward(fixed.batch, self.pool)
        return fixed, graph, logits
