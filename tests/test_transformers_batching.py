"""Registering the implementation, replacing attention in models, and continuous batching."""

from __future__ import annotations

import pytest
import torch
import transformers.masking_utils as masking
from transformers_models import NAME, finite_masks, make, tokens, transformers

import flashattn_lite
from flashattn_lite.integrations import transformers as integration

__all__ = ["finite_masks"]


# ---- registration -------------------------------------------------------------------------------


def test_register_twice_and_under_any_name() -> None:
    assert integration.register() == NAME == "fal"
    assert integration.register("another") == "another"
    model = make("llama")
    with torch.no_grad():
        expected = model(tokens()).logits
        model.set_attn_implementation("another")
        assert model.config._attn_implementation == "another"
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="names with 'flash'"):
        integration.register("my_flash")


def test_replace_attention_switches_transformers_models() -> None:
    model = torch.nn.ModuleDict({"bert": make("bert"), "mha": torch.nn.MultiheadAttention(32, 4)})
    report = flashattn_lite.nn.replace_attention(model)
    assert report.swapped == {
        "bert": "transformers attn_implementation 'fal'",
        "mha": "flashattn_lite.nn.MultiheadAttention",
    }
    assert not report.left
    assert model["bert"].config._attn_implementation == NAME


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_nn_attention_loads_their_layers(family: str) -> None:
    """nn.Attention with the state dict of a transformers layer computes what that layer does."""
    model = make(family)
    theirs = model.model.layers[0].self_attn
    config = model.config
    bias = theirs.q_proj.bias is not None
    rotary = config.rope_parameters
    ours = flashattn_lite.nn.Attention(
        config.hidden_size,
        config.num_attention_heads,
        heads_kv=config.num_key_value_heads,
        head_dim=theirs.head_dim,
        bias=bias,
        causal=True,
        window=(3, 0) if family == "gpt_oss" else (None, None),
        qk_norm=family == "qwen3",
        sinks=family == "gpt_oss",
        rotary_dim=theirs.head_dim,
        rotary_base=rotary["rope_theta"],
    )
    ours.load_state_dict(theirs.state_dict())
    if family == "gpt_oss":  # YaRN scales its frequencies
        ours.inv_freq = model.model.rotary_emb.inv_freq
    x = torch.randn(2, 11, 32)
    position = torch.arange(11)[None]
    cos, sin = model.model.rotary_emb(x, position)
    scale = model.model.rotary_emb.attention_scaling  # YaRN scales q and k too
    mask = (
        masking.create_sliding_window_causal_mask
        if family == "gpt_oss"
        else masking.create_causal_mask
    )
    attention_mask = mask(config, x, None, None, position_ids=position)
    with torch.no_grad():
        expected, _ = theirs(x, (cos / scale, sin / scale), attention_mask)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


# ---- continuous batching ------------------------------------------------------------------------


@pytest.fixture
def continuous_batching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opted in, for this test only."""
    import importlib

    for module in integration._DECIDING_MODULES:
        name = f"transformers.generation.continuous_batching.{module}"
        theirs = importlib.import_module(name)
        monkeypatch.setattr(
            theirs, "is_flash_attention_requested", theirs.is_flash_attention_requested
        )
    integration.enable_continuous_batching()
    integration.enable_continuous_batching()  # safe to call again


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_generate_batch_gives_the_same_tokens(family: str, continuous_batching: None) -> None:
    model = make(family)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (9, 4, 13, 1)]
    expected = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    model.set_attn_implementation(NAME)
    config = transformers.GenerationConfig(
        max_new_tokens=7, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = transformers.ContinuousBatchingConfig(
        page_size=32, num_blocks=64, max_batch_tokens=32
    )
    results = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    assert [results[f"req_{i}"].generated_tokens for i in range(4)] == expected
    assert model.config._attn_implementation == NAME


def test_without_the_opt_in_it_is_refused() -> None:
    model = make("llama")
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="Implementation fal is not supported"):
        model.generate_batch([[5, 6]], generation_config=transformers.GenerationConfig())


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "6.1.0")
    with pytest.raises(
        RuntimeError, match=r"transformers is 6\.1\.0; this relies on private parts"
    ):
        integration.enable_continuous_batching()
