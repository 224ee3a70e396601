"""Small random models of each family as Hugging Face folders, and a byte tokenizer, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from flashattn_lite.serving.model import Batch
from flashattn_lite.serving.model_config import ModelConfig

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 258,
}

# name: (class, options beside SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                                                   "rope_theta": 5000.0}}),
    "llama_dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                                    "rope_theta": 10000.0}}),
    "llama3": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 10000.0}}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "mistral_full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 20,
                               "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}  # fmt: skip


def save(folder: Path, name: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    """Writes a model with random weights, norms and biases included; returns transformers' own."""
    family, more = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | more | options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if "norm" in label:
                parameter.uniform_(0.5, 1.5)
            elif label.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:  # enough for logits that differ clearly from one another
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    return model


def byte_tokenizer(folder: Path | None = None) -> Any:
    """A byte-level tokenizer: a token for each byte, 257 <s> and 258 </s>; saved, if wanted."""
    import tokenizers

    from flashattn_lite.serving import Tokenizer

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    if folder is not None:
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": template}), "utf-8"
        )
    return Tokenizer(backend, config, template)


class ScriptedModel:
    """Stands where a model does and says given tokens; a step takes simulated time.

    Args:
        script: the token after each place: token at place p + 1 is script(p + 1).
        clock: a list of one number, the time; every forward pass adds 1 and 0.01 for each token.
    """

    def __init__(self, script: Callable[[int], int], clock: list[float] | None = None) -> None:
        self.script, self.clock = script, clock
        self.config = ModelConfig.from_dict({"model_type": "llama", **SIZES})
        self.batches: list[int] = []  # tokens of each step

    def new_pool(self, pool: Any, num_pages: int, page_size: int) -> Any:
        return pool(num_pages, page_size, 1, 1)

    def forward(self, batch: Batch, pool: Any, **_hooks: Any) -> torch.Tensor:
        self.batches.append(len(batch.token_ids))
        if self.clock is not None:
            self.clock[0] += 1 + 0.01 * len(batch.token_ids)
        logits = torch.zeros(len(batch.sample), self.config.vocab_size)
        ends = (batch.rows.cu_seqlens[1:] - 1).tolist()
        for row, place in enumerate(batch.sample.tolist()):
            length = int(batch.rows.seqused_k[ends.index(place)])
            logits[row, self.script(length)] = 50.0
        return logits
