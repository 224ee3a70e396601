"""What the contenders work on: a case's tensors in every layout, and a call bound to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashattn_lite.bench.cases import BLOCK, Case
from flashattn_lite.block_mask import BlockMask

Tensors = tuple[Tensor, ...]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs:
    """A case's tensors, the same numbers in every layout."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        # Drawn where they are needed: a CPU takes seconds for a GPU's sizes.
        place: dict[str, Any] = {"device": case.device}
        place["generator"] = torch.Generator(case.device).manual_seed(seed)
        total, dim = sum(case.sequences()), case.head_dim

        def make(heads: int, tokens: int = 0) -> Tensor:
            rows = tokens * len(case.sequences()) or total
            t = torch.randn(rows, heads, dim, **place).to(case.torch_dtype)
            if tokens:
                return t.view(-1, tokens, heads, dim)
            return t if case.lengths else t.view(case.batch, case.seqlen, heads, dim)

        self.q = make(case.heads, case.tokens)
        self.k, self.v = make(case.kv_heads), make(case.kv_heads)
        self.dout = make(case.heads, case.tokens)
        self.bias: Tensor | None = None
        self.slopes: Tensor | None = None
        if case.score == "bias":
            bias = torch.randn(case.heads, case.seqlen, case.seqlen, **place)
            self.bias = bias.to(case.torch_dtype)[None]
        elif case.score == "alibi":
            exponents = torch.arange(1, case.heads + 1) * (-8.0 / case.heads)
            self.slopes = torch.exp2(exponents).to(case.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 (batch + 1)."""
        lengths = torch.tensor([0, *self.case.sequences()])
        return lengths.cumsum(0).to(torch.int32).to(self.case.device)

    @cached_property
    def block_mask(self) -> BlockMask | None:
        """As many blocks in each block row, drawn at random."""
        if self.case.block_density is None:
            return None
        n, generator = self.case.seqlen // BLOCK, torch.Generator().manual_seed(0)
        order = torch.rand(n, n, generator=generator).argsort(-1).argsort(-1)
        listed = order < self.case.listed_blocks()
        return BlockMask.from_blocks(listed, self.case.seqlen, self.case.seqlen, block_size=BLOCK)

    @cached_property
    def dense_mask(self) -> Tensor | None:
        """(1, 1, seqlen, seqlen), True where the block mask lets a row see a key."""
        mask = self.block_mask
        return None if mask is None else mask.to_dense().to(self.case.device)

    @cached_property
    def position(self) -> tuple[Tensor, Tensor]:
        """For every packed row: its sequence, and its place there."""
        lengths = torch.tensor(self.case.sequences())
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        start = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        place = torch.arange(int(lengths.sum())) - start
        return sequence.to(self.case.device), place.to(self.case.device)

    def padded(self, t: Tensor) -> Tensor:
        """(total, heads, dim) -> (batch, longest, heads, dim), zeros at the end."""
        shape = (len(self.case.sequences()), self.case.seqlen, *t.shape[1:])
        result = t.new_zeros(shape)
        result[self.position] = t
        return result

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """k and v as the case's cache stores them; quantised, with their factors."""
        if not self.case.storage:
            return {"k": self.k, "v": self.v}
        dtype, limit = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}[
            self.case.storage
        ]
        found = {}
        for name, rows in (("k", self.k.float()), ("v", self.v.float())):
            found[f"{name}_scale"] = rows.abs().amax(-1) / limit
            scaled = rows / found[f"{name}_scale"].unsqueeze(-1)
            found[name] = (scaled.round() if dtype is torch.int8 else scaled).to(dtype)
        return found

    @cached_property
    def read(self) -> tuple[Tensor, Tensor]:
        """k and v as attention over the cache reads them."""
        if not self.case.storage:
            return self.k, self.v
        k, v = (self.stored[n].float() * self.stored[f"{n}_scale"].unsqueeze(-1) for n in "kv")
        return k, v

    def leaves(self, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (leaves that want gradients if the case has a backward) and dout."""
        tensors = (self.q, self.k, self.v, self.dout)
        if layout in ("padded", "padded_first"):
            tensors = tuple(self.padded(t) for t in tensors)  # type: ignore[assignment]
        if layout in ("heads_first", "padded_first"):
            tensors = tuple(t.transpose(1, 2).contiguous() for t in tensors)  # type: ignore[assignment]
        q, k, v, dout = (t.clone() for t in tensors)
        if self.case.backward:
            q, k, v = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        return q, k, v, dout


@dataclass(frozen=True)
class Entry:
    """A contender bound to its tensors. ``run`` returns out, or (out, dq, dk, dv)."""

    run: Callable[[], Tensors]
    layout: str  # native, heads_first, padded_first
    same_result: bool = True  # False: shown for comparison only, it computes something else


def bind(case: Case, inputs: Inputs, forward: Forward, layout: str, same: bool = True) -> Entry:
    """The forward function over the case's tensors, with its backward if the case has one."""
    q, k, v, dout = inputs.leaves(layout)
    if case.backward:

        def both() -> Tensors:
            out = forward(q, k, v)
            return (out, *torch.autograd.grad(out, (q, k, v), dout))

        return Entry(both, layout, same)

    def only_forward() -> Tensors:
        return (forward(q, k, v),)

    return Entry(only_forward, layout, same)
