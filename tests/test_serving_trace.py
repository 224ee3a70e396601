"""A simulated clock, traces that replay, and two engines that hand requests over."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from serving_workload import Workload, drive, no_leak

from flashattn_lite.serving import Completion, Engine, EngineConfig, SamplingParams, load_model
from flashattn_lite.serving.kv_transfer import InProcessTransfer
from flashattn_lite.serving.trace import TraceError, replay
from tests.serving_models import ScriptedModel, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)


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
