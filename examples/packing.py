"""Sequences of unequal lengths: packed one after the other with cu_seqlens, against padding.

python examples/packing.py [--batch 16] [--longest 512]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flashattn_lite import flash_attn_varlen_func, scaled_dot_product_attention
from flashattn_lite.bert_padding import pad_input, unpad_input


def milliseconds(function: Callable[[], Tensor], repeats: int = 5) -> float:
    """The best of some forward and backward passes."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function().sum().backward()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def main(arguments: list[str] | None = None) -> float:
    """Returns the largest difference between packed and padded, at real tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--longest", type=int, default=512)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    heads, head_dim = 8, 64
    lengths = torch.randint(1, options.longest + 1, (options.batch,))
    lengths[0] = options.longest
    real = torch.arange(options.longest) < lengths[:, None]  # (batch, longest)
    padded = torch.randn(options.batch, options.longest, 3, heads, head_dim, requires_grad=True)

    def pack_and_attend() -> Tensor:
        packed, indices, cu_seqlens, longest, _ = unpad_input(padded, real)
        q, k, v = packed.unbind(1)  # (total, heads, head_dim)
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
        return pad_input(out, indices, options.batch, options.longest)

    def attend_padded(attend: Callable[..., Tensor]) -> Tensor:
        q, k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, longest, head_dim)
        return attend(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2)

    torch_sdpa = torch.nn.functional.scaled_dot_product_attention
    difference = (pack_and_attend() - attend_padded(torch_sdpa))[real].abs().max().item()
    print(f"{lengths.sum()} real tokens of {real.numel()}, forward and backward:")
    print(f"  padded, torch's SDPA       {milliseconds(lambda: attend_padded(torch_sdpa)):7.1f} ms")
    ours = milliseconds(lambda: attend_padded(scaled_dot_product_attention))
    print(f"  padded, flashattn_lite     {ours:7.1f} ms (the mask becomes lengths)")
    print(f"  packed, flashattn_lite     {milliseconds(pack_and_attend):7.1f} ms")
    print(f"  largest difference {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
