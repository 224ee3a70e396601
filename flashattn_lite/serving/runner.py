"""From scheduled chunks to the tensors of one ragged batch, and through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from flashattn_lite.serving.decode_graph import DecodeGraphs
from flashattn_lite.serving.kv_transfer import KVTransfer
from flashattn_lite.serving.model import Batch, Model, Rows
from flashattn_lite.serving.pool import PagePool
from flashattn_lite.serving.scheduler import BLOCK, Chunk

__all__ = ["Runner", "build_batch"]


def build_batch(
    chunks: Sequence[Chunk],
    pool: PagePool,
    *,
    reproducible: bool = False,
    decodes_apart: bool = False,
) -> Batch:
    """The batch of a step: chunks end to end, in their order.

    Args:
        chunks: from the scheduler.
        pool: where their sequences are.
        reproducible: let attention see whole blocks of a prompt as one run, and every other token
            alone, however the step is composed: docs/serving.md.
        decodes_apart: attend to the single tokens at the beginning in a call of their own, where
            another kernel serves them better than the one for chunks.
    """
    device = pool.k.device

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    tokens: list[int] = []
    ends, sample = [0], []
    for chunk in chunks:
        request = chunk.request
        if chunk.count == 1:
            tokens.append(request.tokens[chunk.start])
        else:
            tokens += request.tokens[chunk.start : chunk.start + chunk.count]
        ends.append(len(tokens))
        if chunk.samples:
            sample.append(len(tokens) - 1)
    sequences = [c.request.sequence for c in chunks if c.request.sequence is not None]
    table = pool.block_table(sequences)
    rows = Rows(
        len(tokens),
        int32(ends),
        max(c.count for c in chunks),
        int32([c.start + c.count for c in chunks]),
        table,
    )
    attend = [rows]
    alone = next((i for i, chunk in enumerate(chunks) if chunk.count > 1), 0)
    if reproducible and rows.max_seqlen > 1:
        runs = [run for entry, chunk in enumerate(chunks) for run in _runs(entry, chunk)]
        counts = [count for _, count, _ in runs]
        attend = [
            Rows(
                len(tokens),
                int32([0, *accumulate(counts)]),
                max(counts),
                int32([end for _, _, end in runs]),
                table[torch.tensor([entry for entry, _, _ in runs], device=device)],
            )
        ]
    elif decodes_apart and alone:
        longest = rows.max_seqlen
        offsets = int32([end - alone for end in ends[alone:]])
        used, rest = rows.seqused_k, len(tokens) - alone
        attend = [
            Rows(alone, rows.cu_seqlens[: alone + 1], 1, used[:alone], table[:alone]),
            Rows(rest, offsets, longest, used[alone:], table[alone:]),
        ]
    return Batch(
        torch.tensor(tokens, device=device),
        int32([c.start for c in chunks]),
        rows,
        tuple(attend),
        torch.tensor(sample, dtype=torch.int64, device=device),
    )


def _runs(entry: int, chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """(entry, tokens, end) of a chunk's parts: a prompt's whole blocks, and each token after."""
    end = chunk.start + chunk.count
    whole = min(end, chunk.request.prompt_tokens // BLOCK * BLOCK)
    if whole > chunk.start:
        yield entry, whole - chunk.start, whole
    for position in range(max(whole, chunk.start), end):
        yield entry, 1, position + 1


class Runner:
    """Runs chunks on a model.

    Args:
        model: the decoder.
        pool: its pages.
        reproducible: as in ``build_batch``.
        transfer: told of each layer, when keys and values move between engines.
        graphs: run steps of decode tokens alone, on CUDA.
    """

    def __init__(
        self,
        model: Model,
        pool: PagePool,
        *,
        reproducible: bool = False,
        transfer: KVTransfer | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model, self.pool = model, pool
        self.reproducible, self.transfer, self.graphs = reproducible, transfer, graphs

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits, float32 (samples, vocab_size), of the chunks that sample, in their order."""
        batch = build_batch(
            chunks,
            self.pool,
            reproducible=self.reproducible,
            decodes_apart=self.pool.k.is_cuda,  # whose decode kernel splits the keys
        )
        transfer, pool = self.transfer, self.pool
        if self.graphs is not None and transfer is None and batch.decodes:
            return self.graphs.forward(batch)
        if transfer is None:
            return self.model.forward(batch, pool)
        return self.model.forward(
            batch,
            pool,
            before_layer=transfer.wait_for_layer_load,
            after_layer=lambda layer: transfer.save_kv_layer(layer, pool, chunks),
        )
