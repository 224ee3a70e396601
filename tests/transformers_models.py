"""Small random models of each family of transformers, and what to give them, for tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.23")

import transformers.masking_utils as masking  # noqa: E402

from flashattn_lite.integrations import transformers as integration  # noqa: E402
from flashattn_lite.testing import check_within_budget  # noqa: E402

NAME = integration.register()
VOCAB = 61

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {n: v for n, v in COMMON.items() if n != "num_key_value_heads"}
WINDOWED = ["sliding_attention", "full_attention"]
# family -> (config, its options, model)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", COMMON, "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", COMMON, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 16}, "Qwen3ForCausalLM"),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 5}, "MistralForCausalLM"),
    "gemma2": (
        "Gemma2Config",
        {**COMMON, "head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 2.0,
         "query_pre_attn_scalar": 7, "layer_types": WINDOWED},
        "Gemma2ForCausalLM",
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**COMMON, "head_dim": 16, "sliding_window": 4, "layer_types": WINDOWED},
        "Gemma3ForCausalLM",
    ),
    "phi3": ("Phi3Config", {**COMMON, "sliding_window": 6}, "Phi3ForCausalLM"),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2},
        "GPT2LMHeadModel",
    ),
    "gpt_neox": ("GPTNeoXConfig", ENCODER, "GPTNeoXForCausalLM"),
    "gpt_oss": (
        "GptOssConfig",
        {**COMMON, "head_dim": 16, "sliding_window": 4, "num_local_experts": 2,
         "num_experts_per_tok": 2, "layer_types": WINDOWED},
        "GptOssForCausalLM",
    ),
    "bert": (
        "BertConfig",
        {**ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "BertForMaskedLM",
    ),
    "modernbert": (
        "ModernBertConfig",
        {**ENCODER, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1,
         "sep_token_id": 2},
        "ModernBertForMaskedLM",
    ),
}  # fmt: skip
DECODERS = [name for name in FAMILIES if "bert" not in name]


def make(family: str) -> Any:
    """A small model with weights large enough that attention matters."""
    config_name, options, model_name = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(std=0.15)
    if family == "gpt_oss":
        model.set_experts_implementation("eager")  # the others refuse float64
    return model.eval()


def finite_eager_mask(*arguments: Any, dtype: torch.dtype, **options: Any) -> Tensor | None:
    """Eager's mask; in float64 with float32's least value, for its own overflows when a negative
    score is added, and rows that see nothing become NaN."""
    mask = masking.eager_mask(
        *arguments, dtype=torch.float32 if dtype == torch.float64 else dtype, **options
    )
    return mask if mask is None else mask.to(dtype)


@pytest.fixture(autouse=True)
def finite_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = masking.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(functions, "eager", finite_eager_mask)


def tokens(batch: int = 3, seqlen: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, seqlen), generator=generator)


def inputs_of(kind: str) -> dict[str, Tensor]:
    """Arguments of a forward: 11 tokens, padded or packed."""
    ids = tokens()
    lengths = torch.tensor([11, 6, 9])[:, None]
    position = torch.arange(11)
    if kind == "plain":
        return {"input_ids": ids}
    if kind == "right":
        return {"input_ids": ids, "attention_mask": (position < lengths).long()}
    if kind == "left":
        return {"input_ids": ids, "attention_mask": (position >= 11 - lengths).long()}
    if kind == "holes":
        mask = torch.ones(3, 11, dtype=torch.long)
        mask[0, 3] = mask[2, 5:7] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "packed":
        starts = [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3], [*range(11)], [0, *range(10)]]
        return {"input_ids": ids, "position_ids": torch.tensor(starts)}
    raise ValueError(kind)


def logits_and_gradients(
    model: Any, implementation: str, arguments: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Logits of the real tokens, and the parameters' gradients of a random weighting of them."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(implementation)
    real = arguments.get("attention_mask", torch.ones(3, 11)).bool()
    logits = model(**arguments).logits[real]
    generator = torch.Generator().manual_seed(5)
    dout = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(dtype)
    (logits * dout).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def check_model(family: str, kind: str, dtype: torch.dtype) -> None:
    model, arguments = make(family), inputs_of(kind)
    truth = logits_and_gradients(model, "eager", arguments, torch.float64)
    low = logits_and_gradients(model, "eager", arguments, dtype)
    got = logits_and_gradients(model, NAME, arguments, dtype)
    assert got.keys() == truth.keys()
    check_within_budget("logits", got.pop("logits"), truth.pop("logits"), low.pop("logits"))
    largest = max(float(t.abs().max()) for t in truth.values())
    for name, gradient in got.items():
        exact = truth[name]
        if float(exact.abs().max()) < 1e-12 * largest:  # zero, but for rounding: BERT's key bias
            rounding = 3 * float(low[name].double().abs().max())
            assert gradient.abs().max() <= rounding + 4 * torch.finfo(dtype).eps * largest, name
            continue
        check_within_budget(name, gradient, exact, low[name], factor=3.0)
