"""The decoder: Llama, Mistral, Qwen2 and Qwen3 over a paged cache, with the library's attention.

One forward pass takes the new tokens of many requests end to end, prompts' chunks and single decode
tokens alike, writes their keys and values into the pages, and attends over the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from flashattn_lite.attention import attention
from flashattn_lite.kv_cache import append_kv_cache, rotate
from flashattn_lite.paged_kv_cache import PagedKVCache
from flashattn_lite.serving.linear import Linear
from flashattn_lite.serving.model_config import ModelConfig, rotary_table

__all__ = ["Batch", "Layer", "Model", "Rows"]

Pool = TypeVar("Pool", bound=PagedKVCache)


@dataclass(frozen=True)
class Rows:
    """Consecutive tokens of the batch, as attention sees them: one entry for each run.

    Args:
        tokens: of all runs.
        cu_seqlens: int32 (runs + 1), offsets of the runs among them.
        max_seqlen: the longest run.
        seqused_k: int32 (runs), tokens in the cache up to and with the run's last.
        block_table: int32 (runs, max_pages).
    """

    tokens: int
    cu_seqlens: Tensor
    max_seqlen: int
    seqused_k: Tensor
    block_table: Tensor


@dataclass(frozen=True)
class Batch:
    """The new tokens of a step.

    Args:
        token_ids: int64 (total).
        cached: int32 (requests), tokens of each that are in the cache already.
        rows: where each request's tokens are, for the cache.
        attend: the same for attention, in parts of the batch that are called one after another;
            more runs than requests when some tokens go alone.
        sample: int64 (samples), rows of the batch whose logits are wanted.
    """

    token_ids: Tensor
    cached: Tensor
    rows: Rows
    attend: tuple[Rows, ...]
    sample: Tensor

    @property
    def decodes(self) -> bool:
        """Whether every request has one token, whose logits are wanted."""
        return self.sample.shape[0] == self.token_ids.shape[0]


@dataclass
class Layer:
    """One block's weights: q, k and v are one product, gate and up another."""

    input_norm: Tensor
    qkv: Linear
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class Model:
    """The weights and the forward pass.

    Args:
        config: sizes.
        embedding: (vocab_size, hidden_size).
        layers: the blocks.
        norm: (hidden_size), of the last norm.
        head: hidden_size -> vocab_size.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: list[Layer],
        norm: Tensor,
        head: Linear,
    ) -> None:
        self.config = config
        self.embedding, self.layers, self.norm, self.head = embedding, layers, norm, head
        self.dtype, self.device = embedding.dtype, embedding.device
        cos, sin = rotary_table(config, config.max_context)
        self.cos, self.sin = cos.to(self.device), sin.to(self.device)

    def new_pool(self, pool: Callable[..., Pool], num_pages: int, page_size: int) -> Pool:
        """A pool of pages of this model's shape."""
        c = self.config
        return pool(
            *(num_pages, page_size, c.heads_k, c.head_dim),
            num_layers=c.num_layers,
            dtype=self.dtype,
            device=self.device,
        )

    def refuse_irreproducible(self) -> None:
        """Raises ValueError when a row's bits depend on how many rows are computed with it."""
        if self.device.type != "cpu":
            raise ValueError(
                f"reproducible: the model is on {self.device}; it is guaranteed on the CPU only"
            )
        products = [p for at in self.layers for p in (at.qkv, at.out, at.gate_up, at.down)]
        for shape, product in {p.shape: p for p in (*products, self.head)}.items():
            rows = product.depends_on_rows(self.dtype)
            if rows is not None:
                raise ValueError(
                    f"reproducible: on this machine a product with {tuple(shape)} {self.dtype} "
                    f"weights of {rows} rows has other bits than one of 16 rows"
                )

    @torch.inference_mode()
    def forward(
        self,
        batch: Batch,
        pool: PagedKVCache,
        *,
        before_layer: Callable[[int], None] | None = None,
        after_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Writes the batch's keys and values into the pool and computes the wanted logits.

        Args:
            batch: the new tokens; their slots are reserved.
            pool: the pages.
            before_layer: called before a layer reads its cache, as KVTransfer.wait_for_layer_load.
            after_layer: called when a layer's cache is written, as KVTransfer.save_kv_layer.

        Returns: float32 (samples, vocab_size).
        """
        eps = self.config.rms_eps
        shape = (self.config.hidden_size,)
        x = functional.embedding(batch.token_ids, self.embedding)  # (total, hidden_size)
        for number, layer in enumerate(self.layers):
            if before_layer is not None:
                before_layer(number)
            h = functional.rms_norm(x, shape, layer.input_norm, eps)
            x = x + self._attention(number, layer, h, batch, pool)
            if after_layer is not None:
                after_layer(number)
            h = functional.rms_norm(x, shape, layer.post_norm, eps)
            gate, up = layer.gate_up(h).chunk(2, -1)
            x = x + layer.down(functional.silu(gate).mul_(up))
        x = functional.rms_norm(x[batch.sample], shape, self.norm, eps)
        return self.head(x).float()

    def _attention(
        self, number: int, layer: Layer, h: Tensor, batch: Batch, pool: PagedKVCache
    ) -> Tensor:
        c, rows = self.config, batch.rows
        heads = layer.qkv(h).view(-1, c.heads_q + 2 * c.heads_k, c.head_dim)
        qk, v = heads[:, : c.heads_q + c.heads_k], heads[:, c.heads_q + c.heads_k :]
        if layer.q_norm is not None and layer.k_norm is not None:
            norm = (c.head_dim,)
            q = functional.rms_norm(qk[:, : c.heads_q], norm, layer.q_norm, c.rms_eps)
            k = functional.rms_norm(qk[:, c.heads_q :], norm, layer.k_norm, c.rms_eps)
            qk = torch.cat([q, k], 1)
        qk = rotate(
            *(qk, self.cos, self.sin, batch.cached),
            interleaved=False,
            cu_seqlens=rows.cu_seqlens,
            max_seqlen=rows.max_seqlen,
            name="serving",
        )
        k_cache, v_cache = pool.k[number], pool.v[number]
        append_kv_cache(
            *(qk[:, c.heads_q :], v, k_cache, v_cache, batch.cached),
            block_table=rows.block_table,
            cu_seqlens=rows.cu_seqlens,
            max_seqlen=rows.max_seqlen,
            name="serving",
        )
        window = c.windows[number]
        queries = torch.split(qk[:, : c.heads_q], [part.tokens for part in batch.attend])
        outs = [
            attention(
                *(q, k_cache, v_cache),
                causal=True,
                window=(None if window is None else window - 1, 0),
                cu_seqlens_q=part.cu_seqlens,
                max_seqlen_q=part.max_seqlen,
                seqused_k=part.seqused_k,
                block_table=part.block_table,
                name="serving",
            )
            for q, part in zip(queries, batch.attend, strict=True)
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return layer.out(out.reshape(h.shape[0], c.heads_q * c.head_dim))
