"""A matrix product with weights laid out once, at loading, for the machine.

torch's ``linear`` packs float32 weights anew in every call, which for a decode batch takes as long
as the product: 16 rows through all products of a Llama of 101 million parameters take 63 ms, with
oneDNN's packed weights 36 (one thread of an EPYC with AVX-512; bench/int8_weights.py). oneDNN also
sums a row's products in an order that does not depend on the number of rows, from two rows on,
which torch's does not below 10 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Linear"]

_ROWS = 16  # of a typical decode batch; oneDNN takes any number with the layout for this one


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.is_cpu
        and torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (
            weight.dtype is torch.float32
            or (weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


class Linear:
    """x (rows, in_features) -> (rows, out_features).

    Args:
        weight: (out_features, in_features).
        bias: (out_features), or None.

    >>> Linear(torch.eye(2), torch.ones(2))(torch.tensor([[1.0, 2.0]])).tolist()
    [[2.0, 3.0]]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = weight.shape
        self.bias = bias
        self.packed = _can_pack(weight)
        self.weight = weight
        if self.packed:
            # packing in inference mode gives an inference tensor, as the forward pass wants
            with torch.inference_mode():
                self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            return functional.linear(x, self.weight, self.bias)
        if x.shape[0] == 1:  # alone, a row is summed in another order
            return self._product(x.expand(2, -1))[:1]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self.weight, self.bias, "none", [], ""
        )
        return product

    def depends_on_rows(self, dtype: torch.dtype) -> int | None:
        """A number of rows at which the first row's bits differ from those at 16; None is good.

        Looked for where kernels change: every small number, and around multiples of tiles.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(131, self.shape[1], generator=generator).to(dtype)
        with torch.inference_mode():
            expected = self(x[:16])
            for rows in (*range(1, 18), 31, 33, 48, 63, 65, 100, 128, 131):
                kept = min(rows, 16)
                if not torch.equal(self(x[:rows])[:kept], expected[:kept]):
                    return int(rows)
        return None
