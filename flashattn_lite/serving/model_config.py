"""What a Hugging Face config.json says, as the decoder needs it, and what it may not say."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ModelConfig", "rotary_table"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family.

    Args:
        family: config.json's model_type.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_layers: blocks.
        heads_q: query heads.
        heads_k: K/V heads.
        head_dim: elements of a head.
        max_context: tokens that positions exist for.
        rms_eps: of the norms.
        rope_theta: base of the rotary frequencies.
        rope: parameters of the rotary scaling, {"rope_type": "default"} for none.
        rotary_dim: elements of a head that are rotated.
        windows: of each layer, tokens that a row sees, itself included; None is all.
        qkv_bias: the q, k, v projections have one.
        out_bias: the attention's output projection has one.
        mlp_bias: the MLP's projections have one.
        qk_norm: q and k are normalised head by head (Qwen3).
        tied: the output's matrix is the embedding's.
        dtype: of the weights in the folder.
        eos_token_ids: tokens that end a text.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads_q: int
    heads_k: int
    head_dim: int
    max_context: int
    rms_eps: float
    rope_theta: float
    rope: dict[str, Any]
    rotary_dim: int
    windows: tuple[int | None, ...]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, folder: str | Path) -> ModelConfig:
        """From config.json, and the end tokens from generation_config.json if that is there."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"load_model: there is no {path}; give the folder of a Hugging Face model"
            )
        raw = json.loads(path.read_text("utf-8"))
        generation = Path(folder) / "generation_config.json"
        if generation.is_file():
            eos = json.loads(generation.read_text("utf-8")).get("eos_token_id")
            raw = raw | ({} if eos is None else {"eos_token_id": eos})
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """From config.json's contents.

        Raises:
            ValueError: when the model has something that this decoder does not compute.
        """
        family = str(raw.get("model_type"))
        _demand(family in FAMILIES, "model_type", family, f"one of {', '.join(FAMILIES)}")
        activation = raw.get("hidden_act", "silu")
        _demand(activation in ("silu", "swish"), "hidden_act", activation, "silu")
        quantised = raw.get("quantization_config")
        _demand(not quantised, "quantization_config", quantised, "absent: unquantised weights")
        heads_q, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
        head_dim = raw.get("head_dim") or raw["hidden_size"] // heads_q
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        nested = any(isinstance(value, dict) for value in rope.values())
        _demand(not nested, "rope_parameters", rope, "the same for all layers")
        rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        kind, context = rope["rope_type"], raw["max_position_embeddings"]
        _demand(kind in _FREQUENCIES, "rope_type", kind, f"one of {', '.join(_FREQUENCIES)}")
        fraction = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
        eos = raw.get("eos_token_id")
        name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        _demand(name in DTYPES, "dtype", name, f"one of {', '.join(DTYPES)}")
        bias = bool(raw.get("attention_bias", False))
        return cls(
            family=family,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=layers,
            heads_q=heads_q,
            heads_k=raw.get("num_key_value_heads") or heads_q,
            head_dim=head_dim,
            max_context=context,
            rms_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            rope=rope,
            rotary_dim=int(head_dim * fraction),
            windows=_windows(raw, family, layers),
            qkv_bias=family == "qwen2" or bias,
            out_bias=family in ("llama", "qwen3") and bias,
            mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            tied=bool(raw.get("tie_word_embeddings", False)),
            dtype=DTYPES[name],
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )


def _demand(holds: bool, name: str, value: Any, words: str) -> None:
    if not holds:
        raise ValueError(f"load_model: config.json's {name} is {value!r}; it must be {words}")


def _windows(raw: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer."""
    window = raw.get("sliding_window")
    if family == "llama" or window is None:
        return (None,) * layers
    if family == "mistral":
        return (window,) * layers
    if not raw.get("use_sliding_window", False):
        return (None,) * layers
    kinds = raw.get("layer_types")
    if kinds is None:
        full = raw.get("max_window_layers", layers)
        kinds = ["sliding_attention" if i >= full else "full_attention" for i in range(layers)]
    for kind in kinds:
        _demand(
            kind in ("sliding_attention", "full_attention"),
            "layer_types",
            kind,
            "sliding_attention or full_attention",
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# ---- rotary frequencies ---------------------------------------------------------------------


def _default(config: ModelConfig) -> Tensor:
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float()
    frequencies: Tensor = 1.0 / (config.rope_theta ** (exponents / config.rotary_dim))
    return frequencies


def _linear(config: ModelConfig) -> Tensor:
    return _default(config) / float(config.rope["factor"])


def _llama3(config: ModelConfig) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a ramp between (Llama 3.1)."""
    frequencies, rope = _default(config), config.rope
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = frequencies * (float(rope["original_max_position_embeddings"]) / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies / float(rope["factor"]) * (1 - kept) + frequencies * kept


# "dynamic" stretches beyond max_position_embeddings only, and requests end there: it is "default".
_FREQUENCIES = {"default": _default, "dynamic": _default, "linear": _linear, "llama3": _llama3}


def rotary_table(config: ModelConfig, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, rotary_dim / 2), float32, as transformers computes them."""
    frequencies = _FREQUENCIES[config.rope["rope_type"]](config)
    angles = torch.arange(positions).float()[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()
