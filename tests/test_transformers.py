"""The transformers integration: small random models of each family against eager attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_models import (
    DECODERS,
    FAMILIES,
    NAME,
    VOCAB,
    check_model,
    finite_masks,
    inputs_of,
    logits_and_gradients,
    make,
    tokens,
    transformers,
)

from flashattn_lite import ArgumentError
from flashattn_lite.testing import check_within_budget

__all__ = ["finite_masks"]


@pytest.mark.parametrize("kind", ["plain", "right", "left", "holes", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_eagers(family: str, kind: str) -> None:
    if kind == "packed" and family not in DECODERS:
        pytest.skip("transformers packs bidirectional models by cu_seq_lens only: another test")
    check_model(family, kind, torch.float32)


@pytest.mark.parametrize("kind", ["plain", "right", "left", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str, kind: str) -> None:
    if kind == "packed" and family not in DECODERS:
        pytest.skip("transformers packs bidirectional models by cu_seq_lens only: another test")
    check_model(family, kind, torch.bfloat16)


@pytest.mark.parametrize("kind", ["right", "left", "holes", "packed"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_weights_of_padded_batches_are_eagers(family: str, kind: str) -> None:
    if kind == "packed" and family == "bert":
        pytest.skip("transformers packs bidirectional models by cu_seq_lens only: another test")
    model, arguments, found = make(family), inputs_of(kind), []
    real = arguments.get("attention_mask", torch.ones(3, 11)).bool()
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            out = model(**arguments, output_attentions=True, use_cache=False)
        found.append(torch.stack(out.attentions).transpose(2, 3)[:, real])
    torch.testing.assert_close(*found)


def test_weights_with_a_static_cache_have_its_length() -> None:
    model, found = make("llama"), []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        cache = transformers.StaticCache(model.config, max_cache_len=16)
        with torch.no_grad():
            out = model(tokens(), past_key_values=cache, output_attentions=True)
        found.append(out.attentions)
    assert found[0][0].shape == (3, 4, 11, 16)
    torch.testing.assert_close(*found)


def test_the_sinks_have_a_gradient() -> None:
    found = logits_and_gradients(make("gpt_oss"), NAME, inputs_of("left"), torch.float32)
    sinks = [t for n, t in found.items() if n.endswith("self_attn.sinks")]
    assert len(sinks) == 2 and all(t.abs().min() > 0 for t in sinks)


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_generation_gives_the_same_tokens(family: str) -> None:
    model = make(family)
    for arguments in (inputs_of("plain"), inputs_of("left")):
        found = []
        for implementation in ("eager", NAME):
            model.set_attn_implementation(implementation)
            out = model.generate(
                **arguments, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            found.append(out)
        assert found[0].shape == (3, 20)
        assert torch.equal(*found)


def test_generation_of_a_model_that_sees_everything() -> None:
    """BERT's decoder that is none masks the new token alone, and attends to the whole cache."""
    config = transformers.BertConfig(**FAMILIES["bert"][1])
    torch.manual_seed(0)
    model, found = transformers.BertLMHeadModel(config).eval(), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    for implementation in ("eager", "sdpa", NAME):
        model.set_attn_implementation(implementation)
        out = model.generate(
            input_ids=tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=6,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        found.append(out)
    assert found[0].shape == (3, 17)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_generation_with_a_static_cache() -> None:
    for family in ("llama", "gemma3"):
        model, found = make(family), []
        for implementation in ("eager", NAME):
            model.set_attn_implementation(implementation)
            out = model.generate(
                **inputs_of("left"), max_new_tokens=6, do_sample=False, eos_token_id=None,
                pad_token_id=0, cache_implementation="static",
            )  # fmt: skip
            found.append(out)
        assert torch.equal(*found)


def test_beam_search_and_chunked_prefill() -> None:
    model = make("llama")
    found = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        beams = model.generate(
            **inputs_of("plain"), max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0
        )
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [
                model(ids, past_key_values=cache).logits for ids in tokens().split([4, 1, 6], 1)
            ]
        found.append((beams, torch.cat(parts, 1)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "mistral"])
def test_packing_by_cu_seq_lens_is_each_sequence_alone(family: str) -> None:
    model = make(family)
    model.set_attn_implementation(NAME)
    sequences = [tokens(1, n, seed=n) for n in (5, 9, 2)]
    cu_seq_lens = torch.tensor([0, 5, 14, 16])
    options = {"position_ids": torch.cat([torch.arange(s.shape[1]) for s in sequences])[None]}
    with torch.no_grad():
        packed = model(
            torch.cat(sequences, 1),
            cu_seq_lens_q=cu_seq_lens,
            cu_seq_lens_k=cu_seq_lens,
            max_length_q=9,
            max_length_k=9,
            **options,
        ).logits
        alone = torch.cat([model(s).logits for s in sequences], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_packing_refuses_what_it_would_get_wrong() -> None:
    model = make("bert")
    model.set_attn_implementation(NAME)
    cu_seq_lens = torch.tensor([0, 5, 11])
    with pytest.raises(ArgumentError, match="batch is 3; with cu_seq_lens_q it must be 1"):
        model(tokens(), cu_seq_lens_q=cu_seq_lens)
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[0, 9:] = 0
    with pytest.raises(ArgumentError, match="does not go with an attention_mask that hides"):
        model(tokens(1), attention_mask=mask, cu_seq_lens_q=cu_seq_lens)


def test_custom_masks_are_applied() -> None:
    """4-D masks that the caller made, bool and float, in place of transformers' own."""
    model = make("llama")
    allowed = torch.rand(3, 1, 11, 11, generator=torch.Generator().manual_seed(2)) < 0.6
    allowed |= torch.eye(11, dtype=torch.bool)
    added = torch.zeros(3, 1, 11, 11).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(tokens(), attention_mask=added).logits
        model.set_attn_implementation(NAME)
        for mask in (added, allowed):
            got = model(tokens(), attention_mask=mask).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_applied_in_training_only() -> None:
    model = make("bert")
    model.set_attn_implementation(NAME)
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    with torch.no_grad():
        plain = model(tokens()).logits
        assert torch.equal(model(tokens()).logits, plain)
        model.train()
        torch.manual_seed(1)
        first = model(tokens()).logits
        torch.manual_seed(1)
        assert torch.equal(model(tokens()).logits, first)
    assert not torch.allclose(first, plain)


def test_compiled_models_agree() -> None:
    model = make("llama")
    model.set_attn_implementation(NAME)
    arguments = inputs_of("left")
    real = arguments["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**arguments).logits[real]
        got = torch.compile(model.forward, backend="eager")(**arguments).logits[real]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ---- other kinds of models ----------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    model, arguments = make("mistral"), inputs_of("left")
    expected = logits_and_gradients(model, NAME, arguments, torch.float32)
    model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    got = logits_and_gradients(model, NAME, arguments, torch.float32)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


SEQUENCE_TO_SEQUENCE: dict[str, tuple[str, dict[str, Any], str]] = {
    "bart": (
        "BartConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "vocab_size": VOCAB, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        "BartForConditionalGeneration",
    ),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "vocab_size": VOCAB, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2,
         "decoder_start_token_id": 1},
        "T5ForConditionalGeneration",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("seqlen", "padding"), [(7, "right"), (11, "right"), (7, "left")])
@pytest.mark.parametrize("family", SEQUENCE_TO_SEQUENCE)
def test_cross_attention(family: str, seqlen: int, padding: str) -> None:
    """Encoder and decoder of equal lengths too: the encoder's padding is not the decoder's."""
    config_name, options, model_name = SEQUENCE_TO_SEQUENCE[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**options)).eval()
    arguments = {**inputs_of(padding), "decoder_input_ids": tokens(3, seqlen, seed=8)}

    def once(implementation: str, dtype: torch.dtype) -> Tensor:
        other = copy.deepcopy(model).to(dtype)
        other.set_attn_implementation(implementation)
        with torch.no_grad():
            return other(**arguments).logits

    truth, low = once("eager", torch.float64), once("eager", torch.float32)
    check_within_budget("logits", once(NAME, torch.float32), truth, low)


def test_a_vision_encoder() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    images = torch.randn(2, 3, 32, 32)

    def once(implementation: str, dtype: torch.dtype) -> Tensor:
        other = copy.deepcopy(model).to(dtype)
        other.set_attn_implementation(implementation)
        with torch.no_grad():
            return other(images.to(dtype)).last_hidden_state

    truth, low = once("eager", torch.float64), once("eager", torch.float32)
    check_within_budget("states", once(NAME, torch.float32), truth, low)
