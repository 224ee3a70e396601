"""llama.cpp as a contender: the GGUF file that it gets, and what it is asked and answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashattn_lite.bench.serving import llama_cpp
from tests.serving_models import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "llama"
    path.mkdir()
    save(path)
    return path


def stored(path: Path) -> dict[str, Tensor]:
    """What llama.cpp finds in the file."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(tensor.data.copy())
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            values = values.view(torch.bfloat16)
        found[tensor.name] = values.float()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_the_model(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    llama_cpp.write_gguf(folder, tmp_path / "model.gguf", dtype)
    theirs = stored(tmp_path / "model.gguf")
    ours = load_file(folder / "model.safetensors")
    assert len(theirs) == len(ours)
    for name, weight in ours.items():
        found = theirs[llama_cpp.their_name(name)]
        expected = weight.to(dtype if weight.dim() > 1 else torch.float32).float()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # (head, pair, which of the pair) there, (head, which, pair) here
                found = found.view(heads, 8, 2, 64).transpose(1, 2).reshape(expected.shape)
        assert torch.equal(found, expected), name
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    numbers = {name: field.parts[-1].tolist()[0] for name, field in fields.items()}
    assert numbers["llama.attention.head_count_kv"] == 2
    assert numbers["llama.rope.dimension_count"] == 16
    assert numbers["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "qwen3"}, "model_type is 'qwen3'; llama is written"),
        ({"attention_bias": True}, "attention_bias is True; False is written"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type is 'linear'; default is written"),
        ({"vocab_size": 10**6}, "vocab_size is 1000000; 456976 at most"),
    ],
)
def test_what_it_would_get_wrong_is_refused(
    folder: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    run = llama_cpp.runs(folder, torch.float32, [[1]], 1, tmp_path)
    with pytest.raises(ValueError, match=message):
        run()


class FakeServer:
    """Answers every prompt with its own tokens, in the vocabulary of its file."""

    asked: list[dict[str, Any]]

    def __init__(self, params: Any) -> None:
        self.params, FakeServer.asked = params, []
        field = gguf.GGUFReader(params.model.path).get_field("tokenizer.ggml.tokens")
        self.vocabulary = [bytes(field.parts[i]).decode() for i in field.data]

    def handle_completions(self, body: dict[str, Any]) -> dict[str, Any]:
        FakeServer.asked.append(body)
        if body["prompt"] == [9]:
            return {"error": {"message": "no slot"}}
        text = "".join(self.vocabulary[i] for i in body["prompt"][: body["max_tokens"]])
        return {"choices": [{"text": text}]}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("xllamacpp")
    module.CommonParams = lambda: SimpleNamespace(
        model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
    )
    module.Server = FakeServer
    monkeypatch.setitem(sys.modules, "xllamacpp", module)


def test_prompts_go_in_as_ids_and_come_back_as_ids(
    folder: Path, tmp_path: Path, fake: None
) -> None:
    prompts = [[3, 200, 7], [5, 0, 255]]
    run = llama_cpp.runs(folder, torch.float32, prompts, 2, tmp_path)
    assert run() == [[3, 200], [5, 0]]
    assert run() == [[3, 200], [5, 0]]  # the server stays
    assert len(FakeServer.asked) == 4
    assert all(body["ignore_eos"] and body["top_k"] == 1 for body in FakeServer.asked)


def test_an_error_of_the_server_is_raised(folder: Path, tmp_path: Path, fake: None) -> None:
    with pytest.raises(RuntimeError, match=r"llama\.cpp answers .*no slot"):
        llama_cpp.runs(folder, torch.float32, [[9]], 2, tmp_path)()


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGES", ("json", "no_such_package"))
    assert llama_cpp.missing() == (
        "no_such_package not installed (pip install json no_such_package)"
    )
    monkeypatch.setattr(llama_cpp, "PACKAGES", ("json",))
    assert llama_cpp.missing() is None
