"""The model in the package: transformers loads it and agrees, it knows Python, its card is true."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashattn_lite.serving import Engine, EngineConfig, SamplingParams, load_model
from flashattn_lite.serving.command import EMBEDDED
from flashattn_lite.serving.tokenizer import Tokenizer

TEXT = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n"
FACTS: dict[str, Any] = json.loads((EMBEDDED / "training.json").read_text())


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    assert type(model) is transformers.LlamaForCausalLM
    return model.eval()


def train_tiny() -> ModuleType:
    path = Path(__file__).parents[1] / "examples/train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@torch.inference_mode()
def test_transformers_gives_the_same_logits(theirs: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    engine = Engine(load_model(EMBEDDED, dtype=torch.float32), tokenizer)
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=20, ignore_eos=True)
    found = engine.generate([ids], params)[0]
    assert found.logprobs is not None
    whole = torch.tensor([ids + found.token_ids])
    expected = theirs.double()(whole).logits[0].log_softmax(-1)
    same = theirs.float()(whole).logits[0].log_softmax(-1)
    # Both round in float32: ours may be off by no more than twice what theirs is, and a few ulps.
    allowed = 2 * (same - expected).abs().max().item() + 8 * 2**-23 * expected.abs().max().item()
    for place, chosen in enumerate(found.logprobs):
        row = expected[len(ids) + place - 1]
        assert chosen.token_id == row.argmax().item() and len(chosen.top) == 20
        assert {token for token, _ in chosen.top[:5]} == set(row.topk(5).indices.tolist())
        for token, value in chosen.top:
            assert abs(value - row[token].item()) <= allowed


@torch.inference_mode()
def test_the_training_model_is_that_llama(theirs: Any, tokenizer: Tokenizer) -> None:
    trainer = train_tiny()
    model = trainer.Llama(trainer.Shape())
    state = {name: p for name, p in theirs.float().state_dict().items() if name != "lm_head.weight"}
    model.load_state_dict(state)
    tokens = torch.tensor([*tokenizer.encode(TEXT), 0])
    ours = model(trainer.Batch.pack([tokens]))
    expected = theirs(tokens[None, :-1]).logits[0]
    assert (ours - expected).abs().max() <= 1024 * 2**-23 * expected.abs().max()  # hidden x layers


def test_transformers_has_the_same_tokens(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    other = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    assert other(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    messages = [{"role": "user", "content": "Reads a file.\nQuickly."}]
    text = tokenizer.apply_chat_template(messages)
    assert text == other.apply_chat_template(messages, tokenize=False)
    assert text == "# Reads a file.\n# Quickly.\n"


@pytest.mark.parametrize("text", [TEXT, "naïve 日本語 🙂\t\r\n", "\x00\x7f", " " * 99 + "x"])
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_card_says_what_was_measured() -> None:
    card = (EMBEDDED / "README.md").read_text()
    assert f"perplexity {FACTS['perplexity']:.2f} a token" in card
    assert f"{FACTS['bits_per_byte']:.3f} bits a byte" in card
    assert FACTS["command"] in card and "Python Software Foundation" in card
    assert FACTS["perplexity"] == pytest.approx(math.exp(FACTS["nats"]))
    size = sum(path.stat().st_size for path in EMBEDDED.iterdir())
    assert 5e6 < size < 10e6  # the wheel stays small


@torch.no_grad()
def test_it_knows_held_out_python_as_well_as_the_card_says(tokenizer: Tokenizer) -> None:
    """On this interpreter's own library, whatever its version."""
    trainer = train_tiny()
    _, texts = trainer.documents(None)
    corpus = trainer.Corpus.of(sorted(texts, key=len)[:12], tokenizer.backend)
    model = trainer.Llama(trainer.Shape())
    engine_model = load_model(EMBEDDED, dtype=torch.float32)
    assert engine_model.config.vocab_size == trainer.Shape.vocab
    safetensors = importlib.import_module("safetensors.torch")
    weights = safetensors.load_file(EMBEDDED / "model.safetensors")
    model.load_state_dict({name: w.float() for name, w in weights.items()})
    nats = trainer.evaluate(model, corpus.sequences(1024, None), torch.float32)
    assert math.exp(nats) < 1.5 * FACTS["perplexity"]


def test_greedy_text_is_the_same_in_any_batch(tokenizer: Tokenizer) -> None:
    model = load_model(EMBEDDED, dtype=torch.float32)
    params = SamplingParams(max_tokens=12, temperature=0)
    engine = Engine(model, tokenizer, EngineConfig(reproducible=True))
    starts = [TEXT[:n] for n in (10, 25, 40, 80)]
    together = [c.text for c in engine.generate(starts, params)]
    assert together == [engine.generate([start], params)[0].text for start in starts]
