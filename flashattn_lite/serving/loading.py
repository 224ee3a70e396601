"""A decoder from a Hugging Face folder: config.json and safetensors, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flashattn_lite.serving._extras import require
from flashattn_lite.serving.int8_linear import Int8Linear
from flashattn_lite.serving.linear import Linear
from flashattn_lite.serving.model import Layer, Model
from flashattn_lite.serving.model_config import ModelConfig

__all__ = ["load_model"]


class _Weights:
    """Tensors by name out of the mapped files; knows which of them nobody asked for."""

    def __init__(
        self,
        files: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        product: Callable[..., Linear],
    ) -> None:
        self._files, self._dtype, self._device, self.product = files, dtype, device, product
        self._unused = set(files)

    def has(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, *shape: int) -> Tensor:
        if name not in self._files:
            raise ValueError(f"load_model: the safetensors hold no tensor {name}")
        self._unused.discard(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"load_model: {name} has shape {tuple(tensor.shape)}; config.json makes it {shape}"
            )
        return tensor.to(self._device, self._dtype)

    def linear(self, names: list[str], rows: list[int], columns: int, bias: bool) -> Linear:
        """One product for several projections of the same input, their rows one after another."""
        weights = [
            self.get(f"{name}.weight", n, columns) for name, n in zip(names, rows, strict=True)
        ]
        biases = [self.get(f"{name}.bias", n) for name, n in zip(names, rows, strict=True) if bias]
        return self.product(
            weights[0] if len(weights) == 1 else torch.cat(weights),
            torch.cat(biases) if biases else None,
        )

    def refuse_unused(self) -> None:
        """A tensor that nothing reads is something that this decoder does not compute."""
        unused = sorted(n for n in self._unused if not n.endswith("rotary_emb.inv_freq"))
        if unused:
            raise ValueError(
                f"load_model: the decoder has no use for {len(unused)} tensors of the safetensors, "
                f"first {unused[0]}"
            )


@contextmanager
def _mapped(folder: Path) -> Iterator[dict[str, Any]]:
    """The open file of each tensor's name."""
    safe_open = require("safetensors").safe_open
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    elif single.is_file():
        names = [single.name]
    else:
        raise FileNotFoundError(
            f"load_model: there is no {single} and no {index.name}; save the model as safetensors"
        )
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(str(folder / n), framework="pt")) for n in names]
        yield {key: file for file in files for key in file.keys()}  # noqa: SIM118


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: Literal["int8"] | None = None,
) -> Model:
    """The model of a Hugging Face folder, of the Llama, Mistral, Qwen2 or Qwen3 family.

    The files are memory-mapped and read tensor by tensor, so no second copy of the weights is held.

    Args:
        folder: holds config.json and model.safetensors (or its shards and their index).
        dtype: of weights and cache, float32, bfloat16 or float16; default: config.json's.
        device: "cpu" or a CUDA device.
        quantize: "int8" keeps the weights of all matrix products in int8, by torchao; for bfloat16
            on the CPU. It is faster with one or two requests at a time, and slower with many.

    Returns: a model whose ``config`` holds vocab_size, max_context (tokens), eos_token_ids, dtype.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for a model that this decoder does not compute exactly; it says why.
        ImportError: when ``quantize`` needs torchao and it is not installed.
    """
    folder = Path(folder)
    config = ModelConfig.load(folder)
    dtype, device = dtype or config.dtype, torch.device(device)
    product = _product(quantize, dtype, device)
    with _mapped(folder) as files:
        weights = _Weights(files, dtype, device, product)
        model = _assemble(config, weights)
        weights.refuse_unused()
    return model


def _product(
    quantize: str | None, dtype: torch.dtype, device: torch.device
) -> Callable[..., Linear]:
    if quantize is None:
        return Linear
    if quantize != "int8":
        raise ValueError(f"load_model: quantize is {quantize!r}; it must be 'int8' or None")
    if dtype is not torch.bfloat16 or device.type != "cpu":
        raise ValueError(
            f"load_model: quantize is 'int8' with {dtype} on {device}; int8 weights are multiplied "
            "in torch.bfloat16 on the CPU"
        )
    return Int8Linear


def _assemble(c: ModelConfig, weights: _Weights) -> Model:
    hidden, q_rows, k_rows = c.hidden_size, c.heads_q * c.head_dim, c.heads_k * c.head_dim
    embedding = weights.get("model.embed_tokens.weight", c.vocab_size, hidden)
    layers = []
    for i in range(c.num_layers):
        at = f"model.layers.{i}"
        attn, mlp = f"{at}.self_attn", f"{at}.mlp"
        layers.append(
            Layer(
                input_norm=weights.get(f"{at}.input_layernorm.weight", hidden),
                qkv=weights.linear(
                    [f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"],
                    [q_rows, k_rows, k_rows],
                    hidden,
                    c.qkv_bias,
                ),
                out=weights.linear([f"{attn}.o_proj"], [hidden], q_rows, c.out_bias),
                post_norm=weights.get(f"{at}.post_attention_layernorm.weight", hidden),
                gate_up=weights.linear(
                    [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
                    [c.intermediate_size] * 2,
                    hidden,
                    c.mlp_bias,
                ),
                down=weights.linear(
                    [f"{mlp}.down_proj"], [hidden], c.intermediate_size, c.mlp_bias
                ),
                q_norm=weights.get(f"{attn}.q_norm.weight", c.head_dim) if c.qk_norm else None,
                k_norm=weights.get(f"{attn}.k_norm.weight", c.head_dim) if c.qk_norm else None,
            )
        )
    norm = weights.get("model.norm.weight", hidden)
    if c.tied:
        if weights.has("lm_head.weight"):  # some savers write it twice
            weights.get("lm_head.weight", c.vocab_size, hidden)
        head = weights.product(embedding)
    else:
        head = weights.linear(["lm_head"], [c.vocab_size], hidden, False)
    return Model(c, embedding, layers, norm, head)
