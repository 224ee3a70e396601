"""A decoder from a Hugging Face folder: config.json and safetensors, memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["load_model"]


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> Any:
    """The model of a Hugging Face folder, of the Llama, Mistral, Qwen2 or Qwen3 family.

    Args:
        folder: holds config.json and model.safetensors (or its shards and their index).
        dtype: of weights and cache, float32 or bfloat16; default: config.json's.
        device: "cpu" or a CUDA device.
        quantize: "int8" for weight-only int8 through torchao, on the CPU; None for none.

    Returns: a model whose ``config`` holds vocab_size, max_context (tokens), eos_token_ids, dtype.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for a model that this loader cannot run exactly; it says why.
    """
    raise NotImplementedError
