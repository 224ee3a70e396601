"""llama.cpp on the same weights and token ids, through xllamacpp, its server as a Python package.

The weights go into a GGUF file in the dtype of the comparison. Token ids go in as they are, and
come back as text, of which every token has as many letters: the vocabulary is made up for that.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import string
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashattn_lite.serving._extras import require

__all__ = ["NAME", "missing", "runs", "their_name", "write_gguf"]

NAME = "llama.cpp"
PACKAGES = ("xllamacpp", "gguf")
LETTERS = 4  # of each token's text: 26^4 tokens at most


def missing() -> str | None:
    """Why it takes no part, or None."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed (pip install {' '.join(PACKAGES)})"


def runs(
    folder: Path, dtype: torch.dtype, prompts: Sequence[Sequence[int]], tokens: int, scratch: Path
) -> Callable[[], list[list[int]]]:
    """All prompts at once, a slot for each, greedy, on torch's number of threads; the first call
    writes the file and starts the server.

    Args:
        scratch: a folder for the GGUF file, which is read as long as the result is used.

    Returns: raises ValueError for a model that is not of the Llama family.
    """

    @cache
    def server() -> Any:
        path = scratch / "model.gguf"
        write_gguf(folder, path, dtype)
        llama: Any = importlib.import_module("xllamacpp")
        params = llama.CommonParams()
        params.model.path = str(path)
        params.n_parallel = len(prompts)
        params.n_ctx = len(prompts) * -(-(len(prompts[0]) + tokens + 1) // 32) * 32
        params.n_predict = tokens
        params.verbosity = 0  # its own log, of which there is a lot
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        return llama.Server(params)

    def ask(prompt: Sequence[int]) -> list[int]:
        answer = server().handle_completions(
            {
                **{"prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True},
                **{"temperature": 0, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False},
            }
        )
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp answers {json.dumps(answer)[:200]}")
        return ids_of(answer["choices"][0]["text"])

    def run() -> list[list[int]]:
        server()  # once, before many threads ask for it
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, prompts))

    return run


def text_of(token: int) -> str:
    """
    >>> text_of(0), text_of(27), ids_of(text_of(27) + text_of(3))
    ('aaaa', 'aabb', [27, 3])
    """
    letters = ""
    for _ in range(LETTERS):
        token, rest = divmod(token, 26)
        letters = string.ascii_lowercase[rest] + letters
    return letters


def ids_of(text: str) -> list[int]:
    """The inverse, of many."""
    digits = [string.ascii_lowercase.index(letter) for letter in text]
    words = (digits[i : i + LETTERS] for i in range(0, len(digits), LETTERS))
    return [sum(d * 26**place for place, d in enumerate(reversed(word))) for word in words]


def write_gguf(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """A Llama's weights out of a Hugging Face folder, norms in float32, the others in dtype."""
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rope = config.get("rope_parameters") or config
    for name, value, written in (
        ("model_type", config.get("model_type"), "llama"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ):
        if value != written:
            raise ValueError(f"llama.cpp: {name} is {value!r}; {written} is written")
    if config["vocab_size"] > 26**LETTERS:
        raise ValueError(f"llama.cpp: vocab_size is {config['vocab_size']}; {26**LETTERS} at most")
    heads, heads_k = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads_k)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text_of(i) for i in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["a a"])
    writer.add_add_bos_token(False)
    for name, tensor in _tensors(folder):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, heads if "q_proj" in name else heads_k)
        low = dtype is torch.bfloat16 and tensor.dim() > 1
        data = tensor.to(torch.bfloat16 if low else torch.float32).contiguous()
        kind = gguf.GGMLQuantizationType.BF16 if low else gguf.GGMLQuantizationType.F32
        array = data.view(torch.uint8).numpy() if low else data.numpy()
        writer.add_tensor(their_name(name), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path) -> list[tuple[str, Tensor]]:
    safe_open = require("safetensors").safe_open
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found += [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    return found


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """A head's rows in another order: a rotary pair is neighbours there, half a head apart here."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


THEIR_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def their_name(name: str) -> str:
    """
    >>> their_name("model.layers.3.mlp.up_proj.weight")
    'blk.3.ffn_up.weight'
    """
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{THEIR_NAMES[part]}.{kind}"
    return f"{THEIR_NAMES[stem]}.{kind}"
