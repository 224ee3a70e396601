"""A matrix product with int8 weights: quantised by torchao, for one or two requests at a time.

A step of one token reads every weight once and does little with it, so half of the bytes is what
counts; from a handful of tokens on, widening the weights costs more than reading them saves, and
the packed bfloat16 product (linear.py) is faster. bench/int8_weights.py measures where that is.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashattn_lite.serving._extras import require
from flashattn_lite.serving.linear import Linear

__all__ = ["Int8Linear"]

# Up to about so many rows torch's int8 kernel is faster than what torchao does eagerly, which is to
# widen the whole weight and multiply.
_ROWS = 8
_DEPTH = 32  # torch's kernel reads past the end of rows that are no multiple of its step


def _torchao() -> Any:
    """torchao.quantization, without what its import says about CUDA kernels that it misses."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        return require("torchao.quantization", extra="int8")
    finally:
        logging.disable(before)


class Int8Linear(Linear):
    """As ``Linear``, with int8 weights and a factor for each output, both torchao's.

    Args:
        weight: bfloat16 (out_features, in_features), on the CPU.
        bias: (out_features), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        quantization = _torchao()
        self.shape, self.bias, self.packed = weight.shape, bias, False
        holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        holder.weight = nn.Parameter(weight, requires_grad=False)
        config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        quantization.quantize_(holder, config)
        self.weight = holder.weight.detach()
        self._values: Tensor = self.weight.qdata.contiguous()  # type: ignore[attr-defined]
        self._factors: Tensor = self.weight.scale.flatten().to(weight.dtype)  # type: ignore[attr-defined]
        self._few = _ROWS if weight.shape[1] % _DEPTH == 0 else 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > self._few:
            return functional.linear(x, self.weight, self.bias)
        product = torch._weight_int8pack_mm(x.contiguous(), self._values, self._factors)
        return product if self.bias is None else product + self.bias
