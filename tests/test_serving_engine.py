"""The engine: a request's tokens are those that it gets alone; text, errors, traces, hand-over."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from flashattn_lite.serving import (
    Completion,
    Engine,
    EngineConfig,
    QueueFullError,
    RequestError,
    SamplingParams,
    load_model,
    load_tokenizer,
)
from flashattn_lite.serving.detokenizer import Detokenizer, StopStrings
from flashattn_lite.serving.kv_transfer import InProcessTransfer
from flashattn_lite.serving.trace import TraceError, replay
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


def drive(engine: Engine, until: int = 10_000) -> dict[str, Completion]:
    """Steps until there is nothing to do; the results by id."""
    results: dict[str, Completion] = defaultdict(lambda: Completion("", []))
    for _ in range(until):
        if not engine.has_work():
            return results
        for output in engine.step():
            results[output.request_id].add(output)
    raise AssertionError(f"after {until} steps there is still work: {engine.stats()}")


def no_leak(engine: Engine) -> None:
    assert engine.pool.free_pages == engine.pool.num_pages
    assert engine.pool.sequences == []
    stats = engine.stats()
    assert stats["waiting"] == stats["running"] == stats["lent"] == 0


class Workload:
    """Random requests with shared beginnings, greedy and seeded, and when they come and go."""

    def __init__(self, seed: int, count: int) -> None:
        self.random = rng = random.Random(seed)
        stems = [[rng.randrange(256) for _ in range(60)] for _ in range(2)]
        self.prompts, self.params = [], []
        for i in range(count):
            stem = rng.choice(stems)[: rng.choice([0, 7, 16, 33, 48, 60])]
            self.prompts.append(stem + [rng.randrange(256) for _ in range(rng.randrange(1, 25))])
            self.params.append(
                SamplingParams(
                    max_tokens=rng.randrange(1, 24),
                    temperature=rng.choice([0, 0, 0.7, 1.3]),
                    top_k=rng.choice([0, 0, 5]),
                    top_p=rng.choice([1, 0.8]),
                    min_p=rng.choice([0, 0.05]),
                    repetition_penalty=rng.choice([1, 1.2]),
                    seed=i,
                    ignore_eos=rng.random() < 0.8,
                )
            )

    def alone(self, model: Any, **config: Any) -> list[list[int]]:
        """Each request by itself, in an engine that has seen nothing."""
        sizes = {"num_pages": 64, "page_size": 4, "prefix_cache": False} | config
        return [
            Engine(model, None, EngineConfig(**sizes)).generate([p], s)[0].token_ids
            for p, s in zip(self.prompts, self.params, strict=True)
        ]

    def together(self, engine: Engine) -> dict[int, Completion]:
        """All of them, arriving over time; some are aborted on the way."""
        results: dict[int, Completion] = defaultdict(lambda: Completion("", []))
        names: dict[str, int] = {}
        queue = list(range(len(self.prompts)))
        while queue or engine.has_work():
            for _ in range(self.random.choice([0, 1, 3])):
                if queue:
                    i = queue.pop(0)
                    names[engine.submit(self.prompts[i], self.params[i])] = i
            if names and self.random.random() < 0.05:
                engine.abort(self.random.choice(list(names)))
            for output in engine.step():
                results[names[output.request_id]].add(output)
        return results


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


# ---- text -----------------------------------------------------------------------------------


TEXT = "naïve 日本語 👩‍👩‍👧 \x00 ok 👍🏽!"


@pytest.mark.parametrize("cut", [0, 3, 20])
def test_characters_split_across_tokens_come_out_whole(cut: int) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) == len(TEXT.encode())
    stream = Detokenizer(tokenizer, tokens[:cut])
    pieces = [stream.add(t) for t in tokens[cut:]]
    assert all("\ufffd" not in piece for piece in pieces)
    # A character that the prompt began belongs to what follows.
    whole = tokenizer.decode(tokens[:cut]).rstrip("\ufffd")
    assert "".join(pieces) == TEXT[len(whole) :]
    assert stream.finish() == ""


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_text_come_out_as_decoded(seed: int) -> None:
    tokenizer = byte_tokenizer()
    rng = random.Random(seed)
    text = "".join(rng.choice("aé日👍") for _ in range(60)).encode()
    noise = bytes(b if rng.random() < 0.9 else rng.randrange(256) for b in text)
    alphabet = {tokenizer.decode([i]): i for i in range(128)}
    assert len(alphabet) >= 95
    table = {b: i for i, b in enumerate(_bytes_of_tokens(tokenizer))}
    tokens = [table[b] for b in noise]
    stream = Detokenizer(tokenizer)
    text_out = "".join(stream.add(t) for t in tokens) + stream.finish()
    assert text_out == tokenizer.decode(tokens) == noise.decode("utf-8", "replace")


def _bytes_of_tokens(tokenizer: Any) -> list[int]:
    """The byte of each of the 256 tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    return [byte_of[tokenizer.backend.id_to_token(i)] for i in range(256)]


def test_stop_strings() -> None:
    stops = StopStrings(["</s>", "\n\n"])
    assert stops.add("abc<") == ("abc", None)
    assert stops.add("/b>") == ("</b>", None)
    assert stops.add("x\n") == ("x", None)
    assert stops.add("</") == ("\n", None)
    assert stops.add("s>tail") == ("", "</s>")
    earliest = StopStrings(["bcd", "c"])
    assert earliest.add("abcd") == ("ab", "c")
    longest = StopStrings(["c", "bc"])
    assert longest.add("abcd") == ("a", "bc")
    held = StopStrings(["xyz"])
    assert held.add("axy") == ("a", None) and held.finish() == "xy"


def scripted(text: str, prompt: int = 4, **params: Any) -> tuple[Completion, list[str]]:
    """What an engine makes of a model that says `text`, and the pieces that it came in."""
    tokenizer = byte_tokenizer()
    tokens = [*tokenizer.encode(text), 258]
    engine = Engine(
        ScriptedModel(lambda place: tokens[min(place - prompt, len(tokens) - 1)]), tokenizer
    )
    engine.submit("q" * prompt, SamplingParams(**{"max_tokens": 200, "temperature": 0} | params))
    result, pieces = Completion("", []), []
    while engine.has_work():
        for output in engine.step():
            result.add(output)
            pieces.append(output.text)
    no_leak(engine)
    return result, pieces


def test_the_end_token_ends_and_is_no_text() -> None:
    result, _ = scripted(TEXT)
    assert (result.text, result.finish_reason, result.stop_reason) == (TEXT, "stop", None)
    assert result.token_ids[-1] == 258
    result, _ = scripted("ab", ignore_eos=True, max_tokens=5)
    assert (result.text, result.finish_reason) == ("ab", "length")
    assert result.token_ids[2:] == [258] * 3


def test_a_stop_string_across_tokens_is_cut() -> None:
    result, pieces = scripted("The answer is 42. END of text", stop=["END"])
    assert (result.text, result.finish_reason) == ("The answer is 42. ", "stop")
    assert result.stop_reason == "END"
    assert "E" not in "".join(pieces)
    result, _ = scripted("no end, EN", stop=["END"])
    assert (result.text, result.stop_reason) == ("no end, EN", None)
    result, _ = scripted("日本語", stop="本")
    assert (result.text, result.stop_reason) == ("日", "本")


def test_a_stop_token_ends() -> None:
    token = byte_tokenizer().encode("!")[0]
    result, _ = scripted("stop! here", stop_token_ids=[token])
    assert (result.text, result.finish_reason, result.stop_reason) == ("stop", "stop", token)
    assert result.token_ids[-1] == token


def test_half_a_character_at_the_end_is_given_out() -> None:
    result, pieces = scripted("ab👍", max_tokens=4)
    assert result.text == "ab\ufffd" and result.finish_reason == "length"
    assert pieces == ["a", "b", "", "\ufffd"]


def test_the_tokenizer_is_the_folders(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    raw["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.special_id("eos_token") == 258
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<user>hi\n"
    tokenizer.chat_template, tokenizer._compiled = "{{ raise_exception('no roles') }}", None
    with pytest.raises(RequestError, match="do not fit the chat template: no roles"):
        tokenizer.apply_chat_template(messages)
    tokenizer.chat_template, tokenizer._compiled = "{% unknown %}", None
    with pytest.raises(RequestError, match="do not fit the chat template: Encountered unknown tag"):
        tokenizer.apply_chat_template(messages)
    with pytest.raises(FileNotFoundError, match=r"there is no .*tokenizer\.json"):
        load_tokenizer(folder / "none")


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


# ---- clock and trace ------------------------------------------------------------------------


def test_a_simulated_clock_changes_no_step() -> None:
    """Recorded in real time, replayed in a time that a cost model makes: the same steps."""
    config = EngineConfig(num_pages=40, page_size=4, max_step_tokens=24, max_running=6)
    trace, now = io.StringIO(), [0.0]
    model = ScriptedModel(lambda place: place % 250)
    Workload(7, 10).together(Engine(model, None, config, trace=trace))
    simulated = Engine(
        ScriptedModel(lambda place: place % 250, now), None, config, clock=lambda: now[0]
    )
    lines = trace.getvalue().splitlines()
    assert replay(lines, simulated) >= len(model.batches)
    assert simulated.model.batches == model.batches
    assert now[0] == pytest.approx(len(model.batches) + 0.01 * sum(model.batches))


def test_a_trace_replays(model: Any) -> None:
    config = EngineConfig(num_pages=30, page_size=4, max_step_tokens=24, max_running=6)
    trace = io.StringIO()
    Workload(3, 30).together(Engine(model, None, config, trace=trace))
    lines = trace.getvalue().splitlines()
    assert any('"event":"abort"' in line for line in lines)
    assert any(json.loads(line).get("preempted") for line in lines)
    steps = sum('"event":"step"' in line for line in lines)
    assert replay(lines, Engine(model, None, config)) == steps
    wrong = list(lines)
    last = max(i for i, line in enumerate(lines) if '"chunks":[[' in line)
    wrong[last] = json.dumps(json.loads(lines[last]) | {"preempted": ["someone"]})
    with pytest.raises(TraceError, match=f"step {json.loads(lines[last])['step']} was"):
        replay(wrong, Engine(model, None, config))
    with pytest.raises(TraceError, match="the trace's engine is"):
        replay(lines, Engine(model, None, EngineConfig()))


# ---- two engines ----------------------------------------------------------------------------


def test_a_prefill_engine_hands_over_to_a_decode_engine(model: Any) -> None:
    work = Workload(11, 24)
    expected = work.alone(model)
    transfer = InProcessTransfer()
    prefill = Engine(
        model, None,
        EngineConfig(num_pages=60, page_size=4, max_step_tokens=40, max_running=6, role="prefill"),
        transfer=transfer,
    )  # fmt: skip
    decode = Engine(
        model, None,
        EngineConfig(num_pages=14, page_size=8, max_step_tokens=16, max_running=12, role="decode"),
        transfer=transfer,
    )  # fmt: skip
    names = [prefill.submit(p, s) for p, s in zip(work.prompts, work.params, strict=True)]
    results: dict[str, Completion] = defaultdict(lambda: Completion("", []))
    while prefill.has_work() or decode.has_work():
        for engine in (prefill, decode):
            for output in engine.step():
                results[output.request_id].add(output)
    transfer.close()
    assert [results[name].token_ids for name in names] == expected
    assert prefill.stats()["cached_prompt_tokens"] > 0
    found = {name: result.cached_tokens for name, result in results.items()}
    assert sum(found.values()) == prefill.stats()["cached_prompt_tokens"]
    assert decode.stats()["preemptions"] > 0  # what was received is computed again, and equal
    assert decode.stats()["generated_tokens"] == sum(map(len, expected)) - sum(
        len(t) == 1 for t in expected
    )
    for engine in (prefill, decode):
        no_leak(engine)


def test_pages_stay_lent_until_they_are_sent(model: Any) -> None:
    class Slow(InProcessTransfer):
        held = True

        def returned(self) -> list[int]:
            return [] if self.held else super().returned()

    transfer = Slow()
    config = EngineConfig(num_pages=10, page_size=4, max_step_tokens=64, role="prefill")
    engine = Engine(model, None, config, transfer=transfer)
    engine.submit([1] * 20, SamplingParams(max_tokens=9))
    engine.step()
    assert engine.pool.free_pages == 5 and engine.stats()["lent"] == 1
    engine.submit([2] * 24, SamplingParams(max_tokens=9))  # six pages: waits for the loan
    assert engine.step() == [] and engine.stats()["waiting"] == 1
    transfer.wait_for_save()
    transfer.held = False
    drive(engine)
    assert len(transfer.receive()) == 2
    no_leak(engine)
    transfer.close()


def test_what_never_fits_the_decode_engine_ends_there_with_an_error(model: Any) -> None:
    transfer = InProcessTransfer()
    sizes = {"page_size": 4, "max_step_tokens": 64}
    prefill = Engine(model, None, EngineConfig(**sizes, role="prefill"), transfer=transfer)
    decode = Engine(
        model, None, EngineConfig(**sizes, num_pages=5, role="decode"), transfer=transfer
    )
    prefill.submit([1] * 20, SamplingParams(max_tokens=5, ignore_eos=True))
    drive(prefill)
    (result,) = drive(decode).values()
    assert result.finish_reason == "error" and result.token_ids == []
    assert result.error == "the request needs 25 tokens; at most 20 fit the decode engine"
    no_leak(decode)
    transfer.close()


def test_a_role_needs_its_transfer(model: Any) -> None:
    with pytest.raises(ValueError, match="role is 'prefill' and transfer is None"):
        Engine(model, None, EngineConfig(role="prefill"))


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
