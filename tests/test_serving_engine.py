"""The engine: a request's tokens are those that it gets alone; what is refused, what fails."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_workload import Workload, drive, no_leak

from flashattn_lite.serving import (
    Completion,
    Engine,
    EngineConfig,
    QueueFullError,
    RequestError,
    SamplingParams,
    load_model,
)
from tests.serving_models import ScriptedModel, byte_tokenizer, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save(folder)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def any_model(folder: Path, request: pytest.FixtureRequest) -> Any:
    return load_model(folder, dtype=getattr(torch, request.param))


@pytest.mark.parametrize("page_size", [5, 16])
def test_reproducible_tokens_are_those_of_the_request_alone(any_model: Any, page_size: int) -> None:
    """Prefix sharing, preemption, chunks and aborts change not a bit."""
    config = EngineConfig(
        num_pages=112 // page_size, page_size=page_size, max_step_tokens=40, max_running=6,
        reproducible=True,
    )  # fmt: skip
    stats = Counter[str]()
    for seed in range(4):
        work = Workload(seed, 14)
        expected = work.alone(any_model, reproducible=True)
        engine = Engine(any_model, None, config)
        compare(work.together(engine), expected)
        stats.update(engine.stats())
        no_leak(engine)
    assert stats["preemptions"] > 0 and stats["cached_prompt_tokens"] > 0 and stats["aborted"] > 0


def compare(results: dict[int, Completion], expected: list[list[int]]) -> None:
    for i, tokens in enumerate(expected):
        assert results[i].token_ids == tokens[: len(results[i].token_ids)]
        assert results[i].finish_reason == "abort" or results[i].token_ids == tokens


def test_tokens_are_those_of_the_request_alone(model: Any) -> None:
    """Without `reproducible` the logits differ by rounding only. In float32 that is 1e-6 of the
    logits, and none of these tokens is decided by so little."""
    config = EngineConfig(num_pages=28, page_size=4, max_step_tokens=24, max_running=6)
    stats = Counter[str]()
    for seed in range(100, 104):
        work = Workload(seed, 14)
        engine = Engine(model, None, config)
        compare(work.together(engine), work.alone(model))
        stats.update(engine.stats())
        no_leak(engine)
    assert stats["preemptions"] > 0 and stats["cached_prompt_tokens"] > 0 and stats["aborted"] > 0


def test_reproducible_is_refused_where_it_cannot_hold(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.head), "depends_on_rows", lambda self, dtype: 3)
    with pytest.raises(ValueError, match="weights of 3 rows has other bits than one of 16 rows"):
        Engine(model, None, EngineConfig(reproducible=True))


def test_greedy_tokens_are_the_best_of_transformers(folder: Path, model: Any) -> None:
    import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    prompt = list(range(3, 40))
    (ours,) = Engine(model).generate(
        [prompt], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    )
    tokens = prompt + ours.token_ids
    with torch.no_grad():
        best = theirs(torch.tensor([tokens])).logits[0].argmax(-1)
    assert best[len(prompt) - 1 : -1].tolist() == ours.token_ids
    assert ours.finish_reason == "length" and ours.text == ""


def test_logprobs_are_the_models(folder: Path, model: Any) -> None:
    import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    prompt = [5, 6, 7]
    params = SamplingParams(max_tokens=6, temperature=2.0, top_k=9, seed=3, logprobs=4)
    (ours,) = Engine(model).generate([prompt], params)
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + ours.token_ids])).logits[0]
    expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    assert ours.logprobs is not None and len(ours.logprobs) == len(ours.token_ids)
    for row, token, found in zip(expected, ours.token_ids, ours.logprobs, strict=True):
        assert found.token_id == token
        assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [t for t, _ in found.top] == row.topk(4).indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


# ---- what is refused, what fails ------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, 272], {}, "prompt holds 272; token ids must be ints from 0 to 271"),
        ([1, -1], {}, "prompt holds -1"),
        (
            [1] * 100,
            {"max_tokens": 29},
            "100 tokens and max_tokens is 29, together 129; at most 128",
        ),
        ([1], {"stop": "x"}, "stop holds strings, but there is no tokenizer"),
        ("text", {}, "prompt is text, but there is no tokenizer"),
    ],
)
def test_what_can_never_be_served_is_refused(
    model: Any, prompt: Any, params: dict[str, Any], message: str
) -> None:
    engine = Engine(model, None, EngineConfig(num_pages=8, page_size=16))
    with pytest.raises(RequestError, match=message):
        engine.submit(prompt, SamplingParams(**params))
    assert not engine.has_work()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -1), ("temperature", float("nan")), ("top_k", -2),
        ("top_p", 0), ("top_p", 1.1), ("min_p", 2), ("repetition_penalty", 0), ("logprobs", 21),
        ("seed", "1"), ("stop", ["a", ""]), ("stop", ["a"] * 17), ("stop_token_ids", [-1]),
        ("max_tokens", 1.5), ("max_tokens", True), ("presence_penalty", 3),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} is ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_numbers_that_torch_cannot_take_as_ints(name: str, model: Any) -> None:
    params = SamplingParams(max_tokens=2, **{name: 2**63})
    assert len(Engine(model, None).generate([[1, 2]], params)[0].token_ids) == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.submit(3), "prompt is 3; it must be text or a list of ints"),
        (lambda e: e.submit([1], 3), "params is 3; it must be a SamplingParams"),
        (lambda e: e.submit([1], request_id=[1]), r"request_id is \[1\]; it must be a str"),
        (lambda e: e.generate("text"), "prompts is one text; it must be a list of prompts"),
        (lambda e: e.generate([[1]], 3), "params is 3; it must be a SamplingParams"),
        (lambda e: SamplingParams(stop=3), "stop is 3; it must be a list of strings"),
        (lambda e: SamplingParams(stop_token_ids=3), "stop_token_ids is 3; it must be a list of"),
        (lambda e: EngineConfig(num_pages="x"), "num_pages is 'x'; it must be an int"),
        (lambda e: EngineConfig(page_size=2.5), "page_size is 2.5; it must be an int"),
        (lambda e: EngineConfig(max_waiting=-1), "max_waiting is -1; it must be >= 1"),
        (lambda e: EngineConfig(prefix_cache="no"), "prefix_cache is 'no'; it must be a bool"),
    ],
)
def test_other_types_are_named(call: Any, words: str) -> None:
    engine = Engine(ScriptedModel(lambda place: 1), None)
    with pytest.raises((TypeError, ValueError), match=words):
        call(engine)
    assert not engine.has_work()


def test_ids_and_queue() -> None:
    engine = Engine(ScriptedModel(lambda place: 1), None, EngineConfig(max_waiting=2))
    engine.submit([1], request_id="a")
    with pytest.raises(RequestError, match="request_id is 'a', which is in use"):
        engine.submit([1], request_id="a")
    engine.submit([1])
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        engine.submit([1])
    engine.abort("never was")
    drive(engine)
    no_leak(engine)


def test_the_largest_request_that_fits_is_served(model: Any) -> None:
    engine = Engine(model, None, EngineConfig(num_pages=8, page_size=4, max_step_tokens=64))
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    many = engine.generate([[i] * 20 for i in range(5)], params)
    assert [len(c.token_ids) for c in many] == [12] * 5
    no_leak(engine)


def test_a_step_that_fails_ends_its_requests_and_not_the_engine() -> None:
    model = ScriptedModel(lambda place: 1)
    engine = Engine(model)
    engine.submit([1, 2], SamplingParams(max_tokens=3))
    forward = model.forward

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of luck")

    model.forward = fail  # type: ignore[method-assign]
    (output,) = engine.step()
    assert (output.finish_reason, output.error) == ("error", "the step failed: out of luck")
    model.forward = forward  # type: ignore[method-assign]
    (result,) = engine.generate([[1, 2]], SamplingParams(max_tokens=3))
    assert result.token_ids == [1, 1, 1]
    assert engine.stats()["errors"] == 1
    no_leak(engine)


def test_logits_that_are_not_numbers_end_their_request_only() -> None:
    class Broken(ScriptedModel):
        def forward(self, batch: Any, pool: Any, **hooks: Any) -> torch.Tensor:
            logits = super().forward(batch, pool, **hooks)
            logits[batch.rows.seqused_k == 3] = float("nan")
            return logits

    engine = Engine(Broken(lambda place: 1))
    for temperature in (0, 1):
        params = SamplingParams(max_tokens=4, temperature=temperature)
        bad, good = engine.generate([[5] * 3, [5] * 4], params)
        assert bad.finish_reason == "error" and "not numbers" in (bad.error or "")
        assert good.finish_reason == "length"
    no_leak(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pages": 0}, "num_pages is 0"),
        ({"max_running": 64, "max_step_tokens": 63}, "max_step_tokens is 63; it must be >= 64"),
        ({"role": "both"}, "role is 'both'"),
    ],
)
def test_sizes_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


# ---- optional packages ----------------------------------------------------------------------


def test_a_missing_package_is_named_with_its_remedy(folder: Path) -> None:
    program = f"""
import sys
for name in ("xxhash", "safetensors", "tokenizers"):
    sys.modules[name] = None
import flashattn_lite
from flashattn_lite import serving
from flashattn_lite.serving.pool import PagePool
for action in (
    lambda: serving.load_model({str(folder)!r}),
    lambda: serving.load_tokenizer({str(folder)!r}),
    lambda: PagePool(1, 1, 1, 1),
):
    try:
        action()
    except ImportError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        f"serving needs {name}; pip install 'flashattn-lite[serve]'"
        for name in ("safetensors", "tokenizers", "xxhash")
    ], result.stderr
