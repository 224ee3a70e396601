"""The serving benchmark: workloads, the player under a simulated clock, measures, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine
from serve_http import serving

from flashattn_lite.bench.progress import Progress
from flashattn_lite.bench.serving import (
    contenders,
    drive,
    drive_http,
    measures,
    plots,
    workload,
)
from flashattn_lite.bench.serving.workload import Ask, Scale
from flashattn_lite.cli import main
from flashattn_lite.serving import RequestError, RequestOutput, SamplingParams, load_tokenizer
from flashattn_lite.serving.command import EMBEDDED
from flashattn_lite.serving.server import create_app

TRACE = Path(__file__).parent / "data/azure_code_excerpt.csv"


class SimulatedEngine:
    """One token a request and step; a step takes 10 ms of a clock that it owns."""

    def __init__(self, refuse: int | None = None) -> None:
        self.now = 0.0
        self.refuse = refuse
        self.left: dict[str, int] = {}
        self.count = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + 1e-9

    def submit(self, prompt: list[int], params: SamplingParams) -> str:
        self.count += 1
        if self.count == self.refuse:
            raise RequestError("too long")
        self.left[str(self.count)] = params.max_tokens
        return str(self.count)

    def has_work(self) -> bool:
        return bool(self.left)

    def step(self) -> list[RequestOutput]:
        self.now += 0.01
        outputs = []
        for name in list(self.left):
            self.left[name] -= 1
            reason: Any = None if self.left[name] else "length"
            outputs.append(RequestOutput(name, (1,), finish_reason=reason))
            if reason:
                del self.left[name]
        return outputs


def play(engine: Any, asks: list[Ask]) -> list[measures.Served]:
    prompts = [[1] * ask.prompt for ask in asks]
    return drive.play(engine, asks, prompts, clock=engine.clock, sleep=engine.sleep)


# ---- workloads -----------------------------------------------------------------------------------


def test_a_trace_is_read_to_a_tenth_of_a_microsecond() -> None:
    asks = workload.read_trace(TRACE)
    assert len(asks) == 40
    assert asks[0] == Ask(0.0, 4808, 10)
    assert asks[1].arrival_s == pytest.approx(0.052, abs=2e-6)  # a double holds that much of a date
    assert asks == sorted(asks, key=lambda ask: ask.arrival_s)


def test_scaling_keeps_order_and_what_fits() -> None:
    asks = workload.read_trace(TRACE)
    scaled = Scale(every=3, tokens=1 / 16, speed=4.0, longest=64).of(asks)
    assert len(scaled) == 14
    for ask, was in zip(scaled, asks[::3], strict=True):
        assert ask.arrival_s == pytest.approx(was.arrival_s / 4)
        assert 1 <= ask.prompt <= -(-was.prompt // 16) and ask.prompt + ask.output <= 64
        assert 1 <= ask.output <= -(-was.output // 16)
    assert Scale(longest=10).of([Ask(0, 100, 100)]) == [Ask(0, 5, 5)]
    assert Scale(longest=10).of([Ask(0, 100, 2)]) == [Ask(0, 8, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,ContextTokens\n1,2\n", "no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nx,2,3\n", "line 2: Invalid isoformat"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,2,\n", "line 2: invalid"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        workload.read_trace(path)


def test_prompts_share_their_beginning_and_no_more() -> None:
    asks = [Ask(0, 100, 1), Ask(0, 50, 1), Ask(0, 1, 1)]
    long, short, one = workload.token_ids(asks, 5000, shared=0.5, seed=0)
    assert [len(long), len(short), len(one)] == [100, 50, 1]
    assert long[:25] == short[:25] and long[25:50] != short[25:]
    assert workload.token_ids(asks, 5000, shared=0.5, seed=0) == [long, short, one]
    assert workload.token_ids(asks, 5000, shared=0.5, seed=1) != [long, short, one]


# ---- playing and measuring -----------------------------------------------------------------------


def test_arrivals_wait_for_nobody() -> None:
    # The second comes during the first's third step, the third long after both have ended.
    served = play(SimulatedEngine(), [Ask(0.0, 3, 5), Ask(0.025, 3, 2), Ask(1.0, 3, 1)])
    assert served[0].times_s == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert served[1].times_s == pytest.approx([0.04, 0.05])
    assert served[1].ttft_s == pytest.approx(0.015)  # from when it was sent, not when it was taken
    assert served[2].times_s == pytest.approx([1.01])
    assert [s.finish_s for s in served] == pytest.approx([0.05, 0.05, 1.01])


def test_what_the_engine_refuses_is_a_failure() -> None:
    served = play(SimulatedEngine(refuse=2), [Ask(0.0, 3, 2), Ask(0.0, 3, 2), Ask(0.5, 3, 1)])
    assert [s.failure for s in served] == [None, "too long", None]
    summary = measures.summarise(served, measures.Limits())
    assert summary.failures == {"too long": 1} and summary.output_tokens == 3
    assert summary.attainment == pytest.approx(2 / 3)


def test_an_engine_that_loses_a_request_is_found_out() -> None:
    engine = SimulatedEngine()
    engine.step = lambda: engine.left.clear() or []  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(RuntimeError, match="1 requests have no end"):
        play(engine, [Ask(0.0, 1, 5)])


def test_a_stall_shows_in_the_gaps_not_in_the_mean() -> None:
    times = [0.1 * i for i in range(1, 101)] + [15.0]
    served = measures.Served(0.0, 1, times, [1] * 101, finish_s=15.0)
    summary = measures.summarise([served], measures.Limits(ttft_s=0.2, tpot_s=0.2))
    assert summary.tpot_s["p99"] == pytest.approx(14.9 / 100)
    assert summary.itl_s["p50"] == pytest.approx(0.1) and summary.itl_s["p99"] > 0.14
    assert measures.percentile(sorted(served.gaps_s), 100) == pytest.approx(5.0)
    assert summary.goodput_per_s == pytest.approx(1 / 15)


def test_goodput_needs_both_limits() -> None:
    fast = measures.Served(0.0, 1, [0.1, 0.2], [1, 1], 0.2)
    late = measures.Served(0.0, 1, [2.0, 2.1], [1, 1], 2.1)
    slow = measures.Served(0.0, 1, [0.1, 4.0], [1, 1], 4.0)
    summary = measures.summarise([fast, late, slow], measures.Limits(1.0, 1.0))
    assert summary.attainment == pytest.approx(1 / 3)
    assert summary.goodput_per_s == pytest.approx(1 / 4)


def test_ratios_are_medians_of_rounds() -> None:
    runs = {contenders.OURS: lambda: [[1, 2], [3, 4]], "theirs": lambda: [[1, 2], [3, 5]]}
    with Progress(8) as progress:
        found = contenders.compare(runs, 4, 3, progress)
    assert found.agree == {contenders.OURS: 1.0, "theirs": 0.75}
    found.seconds = {contenders.OURS: [1.0, 1.0, 2.0], "theirs": [2.0, 3.0, 2.0]}
    assert found.ratio("theirs") == 2.0 and found.rate("theirs") == 2.0


def test_a_contender_that_cannot_run_is_named() -> None:
    def broken() -> list[list[int]]:
        raise RuntimeError("not today")

    runs = {contenders.OURS: lambda: [[1]], "theirs": broken}
    with Progress(4) as progress:
        found = contenders.compare(runs, 1, 1, progress)
    assert found.failures == {"theirs": "RuntimeError: not today"}
    assert list(found.seconds) == [contenders.OURS]


def test_latencies_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    served = play(SimulatedEngine(), [Ask(0.0, 3, 5), Ask(0.025, 3, 2)])
    assert plots.draw(served, tmp_path / "a.svg", "two")
    assert "TTFT" not in (tmp_path / "a.svg").read_text()[:100]
    assert (tmp_path / "a.svg").stat().st_size > 5000


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0"], "'0' is not a number above 0"),
        (["--token-scale", "1/0"], "'1/0' is not a number above 0"),
        (["--shared", "1"], "'1' is not a share in [0, 1)"),
        (["--every", "x"], "'x' is not a whole number above 0"),
        (["race"], "invalid choice: 'race'"),
        (["prefix", "--url", "http://127.0.0.1:1"], "--url goes with load, not with prefix"),
    ],
)
def test_wrong_usage_says_why(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "serving", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_trace_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serving", "--trace", "none.csv"]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_a_trace_is_replayed_on_the_embedded_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    words = ["bench", "serving", "--trace", str(TRACE), "--every", "4", "--token-scale", "1/64"]
    words += ["--speed", "20", "--ttft", "60000", "--tpot", "60000", "--json", str(path)]
    assert main([*words, "--plot", str(tmp_path / "p.svg")]) == 0
    text = capsys.readouterr().out
    assert "10 of 10 requests answered" in text and "100.0% kept TTFT <= 60000 ms" in text
    data = json.loads(path.read_text())
    assert str(tmp_path) not in data["command"] and "azure_code_excerpt.csv" in data["command"]
    assert data["summary"]["attainment"] == 1.0
    assert data["summary"]["output_tokens"] == data["stats"]["generated_tokens"] > 0
    assert data["stats"]["pages"] == data["stats"]["free_pages"]


def test_a_server_is_loaded_over_http(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    engine: Any = FakeEngine(tokenizer, step_s=0.001)
    app = create_app(engine, tokenizer, model="fake", context=1024)
    path = tmp_path / "r.json"
    words = ["bench", "serving", "--url", "", "--requests", "20", "--rate", "100", "--output", "8"]
    with serving(app) as url:
        words[3] = f"{url}/v1"
        assert main([*words, "--ttft", "60000", "--tpot", "60000", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["summary"]["requests"] == 20 and data["summary"]["attainment"] == 1.0
    asks = workload.poisson(20, 100.0, 64, 8, 0)
    assert data["summary"]["output_tokens"] == sum(ask.output for ask in asks)
    assert data["summary"]["prompt_tokens"] == sum(ask.prompt for ask in asks)
    assert engine.entries == {} and "over HTTP" in capsys.readouterr().out


def test_errors_over_http_are_failures() -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    engine: Any = FakeEngine(tokenizer, context=50, spoil=7)
    app = create_app(engine, tokenizer, model="fake", context=50)
    asks = [Ask(0.0, 60, 2), Ask(0.0, 3, 2), Ask(0.01, 3, 4)]
    prompts = [[1] * 60, [1, 7, 1], [1, 2, 3]]
    with serving(app) as url:
        assert drive_http.served_model(url) == ("fake", 50)
        served = drive_http.play_http(url, "fake", asks, prompts)
    assert [s.failure for s in served] == ["prompt has 60 tokens", "a spoilt token", None]
    assert served[2].output == 4 and len(served[2].times_s) == 4


def test_no_server_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serving", "--url", "http://127.0.0.1:9"]) == 2
    assert "--url http://127.0.0.1:9: /v1/models: ConnectError" in capsys.readouterr().err


def test_compare_runs_all_contenders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    path = tmp_path / "r.json"
    words = ["compare", "--requests", "2", "--prompt", "9", "--output", "4", "--rounds", "1"]
    assert main(["bench", "serving", *words, "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["failures"] == {}
    names = {"generate, batch 1", "generate, batch 8", "generate_batch"}
    assert set(data["ratios"]) == names
    assert data["agree"] == dict.fromkeys({contenders.OURS, *names}, 1.0)
    assert "generate_batch" in capsys.readouterr().out


def test_prefix_gives_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prefix", "--requests", "3", "--prompt", "100", "--output", "3", "--rounds", "1"]
    assert main(["bench", "serving", *words]) == 0
    assert "100.0% of the tokens are the same" in capsys.readouterr().out


def test_int8_weights_can_be_loaded_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quantize", "int8", "--requests", "3", "--rate", "100", "--prompt", "8"]
    assert main(["bench", "serving", *words, "--output", "3"]) == 0
    assert "3 of 3 requests answered" in capsys.readouterr().out
