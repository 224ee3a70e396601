"""The benchmark's own rules: who runs when, what a ratio is, what a result holds. No timing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashattn_lite import _ops
from flashattn_lite.bench import (
    command,
    compare,
    exactness,
    io_model,
    isa,
    memory,
    present,
    runner,
    tables,
)
from flashattn_lite.bench.aims import GROUPS, SHARES
from flashattn_lite.bench.cases import DTYPES, Case, visible_pairs
from flashattn_lite.bench.ceilings import READ_BYTES
from flashattn_lite.bench.contenders import COMPETITORS, Inputs, ours, sdpa
from flashattn_lite.bench.results import Results, ResultsError, Row, groups_of
from flashattn_lite.bench.suites import LENGTHS, SUITES, Plan, cases_of, ragged_lengths
from flashattn_lite.bench.timing import (
    Contender,
    CpuClock,
    Ratio,
    Rounds,
    Run,
    Samples,
    geometric_mean,
    interleave,
    ratio,
)

SMALL = Case(suite="forward", dtype="fp32", head_dim=16, seqlen=40, heads=2, batch=2)
ONE_ROUND = runner.Settings(rounds=Rounds(budget_s=0.0, at_least=2, at_most=2, min_sample_s=0.0))


class CountingClock:
    """Every call takes one second of wall and half a second of CPU time."""

    def measure(self, run: Run, calls: int) -> tuple[float, float]:
        for _ in range(calls):
            run()
        return float(calls), calls / 2


# ---- timing --------------------------------------------------------------------------------------


def test_rounds_alternate_between_contenders() -> None:
    order: list[str] = []
    contenders = {name: Contender(lambda name=name: order.append(name)) for name in "abc"}
    rounds = Rounds(budget_s=0.0, at_least=4, at_most=9)
    samples = interleave(contenders, CountingClock(), rounds)
    assert "".join(order[6:]) == "abc" * 4  # after one warming and one calibrating call of each
    assert [len(s.wall) for s in samples.values()] == [4, 4, 4]


def test_rounds_end_with_the_budget_between_their_limits() -> None:
    def rounds_done(rounds: Rounds) -> int:
        return len(interleave({"a": Contender(int)}, CountingClock(), rounds)["a"].wall)

    assert rounds_done(Rounds(budget_s=7.0, at_least=3, at_most=100)) == 7
    assert rounds_done(Rounds(budget_s=0.0, at_least=3, at_most=100)) == 3
    assert rounds_done(Rounds(budget_s=1e9, at_least=3, at_most=11)) == 11
    assert rounds_done(Rounds(budget_s=0.1, at_least=9, at_most=100)) == 3  # long rounds
    with pytest.raises(ValueError, match="at_least is 5 and at_most 3"):
        Rounds(at_least=5, at_most=3)


def test_a_sample_repeats_short_calls_after_one_untimed_and_is_per_call() -> None:
    calls: list[int] = []
    rounds = Rounds(budget_s=0.0, at_least=2, at_most=2, min_sample_s=10.0)
    samples = interleave({"a": Contender(lambda: calls.append(1))}, CountingClock(), rounds)
    assert len(calls) == 2 + 2 * (1 + 10)
    assert samples["a"].wall == [1.0, 1.0] and samples["a"].cpu == [0.5, 0.5]


def test_contenders_run_on_their_own_number_of_threads() -> None:
    before, seen = torch.get_num_threads(), []
    contenders = {
        str(n): Contender(lambda: seen.append(torch.get_num_threads()), n) for n in (1, 2)
    }
    try:
        interleave(contenders, CpuClock(), Rounds(0.0, 2, 2, min_sample_s=0.0))
    finally:
        torch.set_num_threads(before)
    assert seen[-1] == 2 and set(seen) == {1, 2}


def test_ratio_is_the_median_of_the_rounds_not_of_the_times() -> None:
    # The machine is three times slower in the second half: per-round ratios stay 2.
    ours_s, theirs_s = [1.0, 1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0, 60.0]
    assert ratio(theirs_s, ours_s) == Ratio(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="2 baseline rounds against 1"):
        ratio([1.0, 2.0], [1.0])
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


# ---- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 0, 3, 50])
def test_visible_pairs_counts_the_mask(window: int | None) -> None:
    from flashattn_lite.reference import visible

    assert visible_pairs(17, True, window) == int(visible(17, 17, (window, 0)).sum())
    assert visible_pairs(17, False, None) == 17 * 17


@pytest.mark.parametrize("size", ["quick", "default", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_are_well_formed(size: str, device: str) -> None:
    plan = Plan(size=size, device=device)
    cases = [case for suite in SUITES for case in cases_of(suite, plan)]
    assert len(cases) == len(set(cases))
    assert all(case.device == device for case in cases)
    assert {case.suite for case in cases} == set(SUITES) - (
        {"scaling"} if device == "cuda" else set()
    )
    assert cases == [Case.from_json(json.loads(json.dumps(c.as_json()))) for c in cases]


def test_the_default_forward_suite_visits_every_axis() -> None:
    cases = cases_of("forward", Plan())
    for dtype in DTYPES:
        for causal in (False, True):
            some = [c for c in cases if (c.dtype, c.causal) == (dtype, causal)]
            assert {c.seqlen for c in some} == set(LENGTHS)
            assert {c.head_dim for c in some} == {64, 80, 96, 128, 256}
            assert {c.threads for c in some} == {1, 2}
            assert min(c.batch * c.heads for c in some) == 1
    full = cases_of("forward", Plan(size="full", dtypes=("fp32",)))
    assert len(full) >= 2 * 2 * 7 * 5 + 2 * 2 * 6 * 5  # 8192 has one batch x heads


def test_filters_leave_only_what_was_asked_for() -> None:
    plan = Plan(dtypes=("bf16",), threads=(1,))
    for suite in SUITES:
        assert all((c.dtype, c.threads) == ("bf16", 1) for c in cases_of(suite, plan))
    with pytest.raises(ValueError, match="suite is 'serving'"):
        cases_of("serving", plan)


def test_every_aim_has_cases() -> None:
    for group in GROUPS:
        cases = cases_of(group.suite, Plan(device=group.device))
        assert any(group.contains(case) for case in cases), group.title
    plans = [
        Plan(size, device=device) for size in ("quick", "default") for device in ("cpu", "cuda")
    ]
    for share in SHARES:
        for size in ("quick", "default"):
            cases = [c for p in plans if p.size == size for s in SUITES for c in cases_of(s, p)]
            assert any(share.holds(case) for case in cases), share.title


def test_ragged_lengths_are_the_same_every_time() -> None:
    assert ragged_lengths() == ragged_lengths()
    assert sum(ragged_lengths()) < 0.5 * 20 * 1024


# ---- exactness -----------------------------------------------------------------------------------

EXACT_CASES = [
    SMALL,
    replace(SMALL, causal=True, seqlen=130),
    replace(SMALL, causal=True, window=9, seqlen=200),
    replace(SMALL, causal=True, score="alibi", seqlen=70),
    replace(SMALL, score="bias", seqlen=70),
    replace(SMALL, heads=4, heads_k=2, causal=True),
    replace(SMALL, lengths=(40, 3, 17), batch=3),
    replace(SMALL, lengths=(40, 3, 17), batch=3, causal=True, backward=True),
    replace(SMALL, backward=True, causal=True, seqlen=600),
    replace(SMALL, backward=True, window=5, causal=True),
]


@pytest.mark.parametrize("case", EXACT_CASES, ids=Case.short)
@pytest.mark.parametrize("build", [ours, sdpa])
def test_exactness_accepts_right_results_and_refuses_wrong_ones(case: Case, build) -> None:  # type: ignore[no-untyped-def]
    inputs = Inputs(case)
    known = list(exactness.truths(case, inputs))
    entry = build(case, inputs)
    got = entry.run()
    assert len(got) == (4 if case.backward else 1)
    assert exactness.check(case, inputs, known, got, entry.layout).exact
    for i in range(len(got)):
        if case.heads_k and i > 1:
            continue
        wrong = list(got)
        wrong[i] = got[i] * 1.01
        assert not exactness.check(case, inputs, known, tuple(wrong), entry.layout).exact
        wrong[i] = torch.full_like(got[i], math.nan)
        assert not exactness.check(case, inputs, known, tuple(wrong), entry.layout).exact


def test_outputs_may_err_twice_and_gradients_three_times_as_rounding_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = replace(SMALL, backward=True)
    inputs, factors = Inputs(case), []

    def error_budget(*arguments: object, **_options: object) -> float:
        factors.append(arguments[3])
        return 1.0

    monkeypatch.setattr(exactness, "error_budget", error_budget)
    known, entry = list(exactness.truths(case, inputs)), ours(case, inputs)
    assert exactness.check(case, inputs, known, entry.run(), entry.layout).exact
    assert factors == [2.0, 3.0, 3.0, 3.0]


def test_the_shortest_sequence_of_a_cache_is_among_the_probes() -> None:
    lengths = (40, 30, 2, 20)
    shape = {"dtype": "fp32", "head_dim": 8, "seqlen": 40, "batch": 4, "heads": 2}
    case = Case(suite="decode", **shape, lengths=lengths, tokens=1)
    assert {sequence for sequence, *_ in exactness.probes(case)} == {0, 2, 3}


def test_competitors_that_compute_the_same_agree() -> None:
    case = replace(SMALL, lengths=(40, 3, 17), batch=3)
    inputs = Inputs(case)
    known = list(exactness.truths(case, inputs))
    for name, competitor in COMPETITORS.items():
        if competitor.missing("cpu") is None and competitor.refuses(case) is None:
            entry = competitor.build(case, inputs)
            assert exactness.check(case, inputs, known, entry.run(), entry.layout).exact, name


# ---- rows ----------------------------------------------------------------------------------------


def test_a_row_holds_every_contender_and_round() -> None:
    row = runner.measure(SMALL, ONE_ROUND)
    assert row.failure is None
    assert list(row.samples) == ["flashattn_lite", "sdpa", "fma"]
    assert all(len(s.wall) == len(s.cpu) == 2 for s in row.samples.values())
    assert set(row.ratios) == {"sdpa"} and row.baseline == "sdpa"
    assert row.cpu_ratio is not None and row.peak is not None
    assert row.error is not None and row.budget_used is not None and row.budget_used <= 1


def test_ratios_are_the_baselines_time_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"flashattn_lite": (2.0, 1.0), "sdpa": (3.0, 4.0), "fma": (0.5, 0.5)}
    samples = {name: Samples([wall] * 3, [cpu] * 3) for name, (wall, cpu) in taken.items()}
    monkeypatch.setattr(runner, "interleave", lambda *_: samples)
    row = runner.measure(SMALL, ONE_ROUND)
    assert (row.figure("wall"), row.figure("cpu")) == (1.5, 4.0)
    assert row.ratios == {"sdpa": Ratio(1.5, 1.5, 1.5)} and row.loses("wall") is False
    bytes_ = {"flashattn_lite": 100, "sdpa": 300, "sdpa_math": 900}
    monkeypatch.setattr(memory, "measure", lambda _case, name: bytes_[name])
    case = replace(SMALL, suite="memory", seqlen=1024, backward=True)
    monkeypatch.setattr(runner, "_measure_time", lambda case, _: Row(case, error=0.0))
    row = runner.measure(case, ONE_ROUND)
    assert {name: r.median for name, r in row.ratios.items()} == {"sdpa": 3.0, "sdpa_math": 9.0}
    assert row.figure() == 3.0


def test_an_inexact_result_is_a_failure_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, inputs: Inputs) -> object:
        entry = ours(case, inputs)
        return replace(entry, run=lambda: tuple(t * 1.01 for t in entry.run()))

    monkeypatch.setattr(runner, "ours", wrong)
    row = runner.measure(SMALL, ONE_ROUND)
    assert row.failure is not None and "flashattn_lite is inexact: out uses" in row.failure
    assert row.samples == {} and row.figure() is None


def test_an_error_costs_its_row_only() -> None:
    rows = runner.run([replace(SMALL, head_dim=-1), SMALL], ONE_ROUND)
    assert [row.failure is None for row in rows] == [False, True]


def test_absent_competitors_are_named_with_the_reason() -> None:
    there, absent = runner.choose("cpu")
    own = ["one_by_one", "unquantised", "contiguous"]  # ours, over another cache
    assert there == ["standard", *own, "sdpa", "sdpa_causal", "sdpa_dense", "sdpa_loop"]
    assert absent["sdpa_cudnn"] == "it runs on CUDA only"
    assert runner.choose("cpu", ["sdpa_math"]) == (["sdpa_math"], {})
    with pytest.raises(ValueError, match="--competitors has torch"):
        runner.choose("cpu", ["torch"])


def test_a_row_of_the_io_suite_has_bytes_and_a_rate() -> None:
    case = replace(SMALL, suite="io", seqlen=400, causal=True)
    settings = replace(ONE_ROUND, competitors=("standard", "sdpa"))
    row = runner.measure(case, settings)
    assert row.failure is None and row.baseline == "standard"
    assert list(row.samples) == ["flashattn_lite", "standard", "sdpa", "fma", "read"]
    assert set(row.moved) == {"flashattn_lite", "standard"}  # nobody knows what sdpa's loop moves
    rows = io_model.flash2(400, 16, 4, causal=True, rows=144)  # 400 rows as three even tiles
    assert row.moved["flashattn_lite"] == 4 * rows.total
    assert row.moved["standard"] == 4 * io_model.standard(400, 16, 4).total
    headers, body = present.suite_table("io", results_of(row, Row(case, failure="broken")))
    cells = dict(zip(headers, body[0], strict=True))
    assert cells["bytes: standard"] == tables.size(row.moved["standard"])
    rate = row.moved["standard"] / row.samples["standard"].median()
    share = rate / (READ_BYTES / row.samples["read"].median())
    assert cells["of read rate: standard"] == f"{share:.0%}"
    assert len(body[1]) == len(headers) and "!FAILED" in body[1]


def test_memory_is_that_of_the_call_alone() -> None:
    case = replace(SMALL, suite="memory", seqlen=1024, backward=True, batch=1, head_dim=64)
    one = 1024 * 2 * 64 * 4  # bytes of the output, and of each gradient
    mine, matrix = memory.measure(case, "flashattn_lite"), memory.measure(case, "sdpa_math")
    assert 3 * one < mine < 64 * one
    assert matrix > 2 * 1024 * 1024 * 4 * 2  # the scores and their softmax, two heads
    with pytest.raises(memory.MeasurementError, match="KeyError"):
        memory.measure(case, "nobody")


# ---- results -------------------------------------------------------------------------------------


def row_of(case: Case, figure: float, spread: float = 0.0) -> Row:
    """A made-up row."""
    samples = {"flashattn_lite": Samples([0.1], [0.1]), "sdpa": Samples([0.1 * figure], [0.1])}
    found = Ratio(figure, figure - spread, figure + spread)
    return Row(
        *(case, samples, "flashattn_lite", "sdpa", {"sdpa": found}),
        **{"cpu_ratio": found if case.threads == 1 else None, "peak": 0.5, "error": 1e-7},
    )


def results_of(*rows: Row) -> Results:
    facts = {
        "cpu": {"model": "A CPU", "cores": 2, "threads": 2, "flags": ["avx2"], "caches": {}}
        | {"memory_gib": 8.0},
        "gpus": [],
        "library": {"version": "0", "commit": "abc"}
        | {
            "build": {"cpu": {"isas": ["avx2"], "active": "avx2"}, "cuda": None, "engines": ["cpu"]}
        },
        "torch": {"version": "2.13", "cpu_capability": "AVX2"},
    }
    settings = {"device": "cpu", "clock": "wall", "size": "quick", "isa": None}
    line = "flashattn-lite bench forward memory --quick"
    return Results(
        *(line, "2026-01-01T00:00:00+00:00", facts, settings),
        **{"ceilings": {"FMA fp32, 1 thread": 1e11}, "absent": {"flex": "why"}, "rows": list(rows)},
    )


def test_results_survive_the_file(tmp_path: Path) -> None:
    case = replace(SMALL, lengths=(40, 3), batch=2)
    before = results_of(row_of(case, 1.5), Row(SMALL, failure="broken"))
    before.save(tmp_path / "deep" / "r.json")
    after = Results.load(tmp_path / "deep" / "r.json")
    assert after == before
    assert [row.failure for row in after.failures] == ["broken"]


def test_rows_are_in_the_file_while_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, found = tmp_path / "r.json", []

    def measure(case: Case, _settings: runner.Settings) -> Row:
        found.append(len(Results.load(path).rows) if path.exists() else 0)
        if len(found) == 3:
            raise KeyboardInterrupt
        return row_of(case, 1.5)

    monkeypatch.setattr(command.runner, "measure", measure)
    monkeypatch.setattr(command.ceilings, "measure", lambda *_: {})
    monkeypatch.setattr(command, "SAVE_EVERY_S", 0.0)
    assert command.measure(results_of(), Plan("quick"), runner.Settings(), ["overhead"], path)
    assert found == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a result of `flashattn-lite bench`"),
        ('{"kind": "flashattn_lite-bench", "version": 99}', "has version 99"),
        ('{"kind": "flashattn_lite-bench", "version": 1}', "is damaged: 'rows'"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ResultsError, match=message):
        Results.load(tmp_path / "r.json")
    with pytest.raises(ResultsError, match="No such file"):
        Results.load(tmp_path / "none.json")


def test_groups_are_geometric_means_beside_aims() -> None:
    rows = [row_of(replace(SMALL, seqlen=n), x) for n, x in ((128, 1.0), (256, 1.21))]
    (found,) = groups_of(rows)
    assert found.mean == pytest.approx(1.1) and found.least == 1.0 and found.rows == 2
    assert found.group.aim == 1.05 and found.met
    causal = [row_of(replace(SMALL, causal=True, seqlen=n), 1.5) for n in (1024, 2048)]
    short = {g.group.title: g for g in groups_of(causal)}
    assert short["fp32 causal"].rows == 2 and short["fp32 causal"].met
    assert short["fp32 causal, lengths up to 1024"].rows == 1
    assert not short["fp32 causal, lengths up to 1024"].met


def test_losses_are_named() -> None:
    rows = [row_of(SMALL, 0.5), row_of(replace(SMALL, dtype="bf16"), 1.5)]
    (line,) = present.losses(rows, "wall")
    assert "length 40" in line and "fp32" in line and "takes 2.00 times the time of sdpa" in line
    (line,) = present.losses([row_of(SMALL, 0.998)], "wall")
    assert line.endswith("takes barely more than the time of sdpa")


def test_on_cuda_prompts_have_flops_and_decoding_has_bytes() -> None:
    prompt = replace(SMALL, suite="forward", dtype="bf16", device="cuda")
    decode = replace(prompt, suite="decode", tokens=1)
    results = results_of(row_of(prompt, 1.5), row_of(decode, 1.5))
    results.ceilings = {"matmul bf16": 40.0 * prompt.flops()}
    for suite, headers, values in (
        ("forward", ("TFLOP/s", "of matmul"), ("0.0", "25%")),  # a call takes 0.1 s
        (
            "decode",
            ("of read rate", "GB/s of K and V"),
            ("50%", f"{decode.cache_bytes() / 1e8:.1f}"),
        ),
    ):
        found, (cells,) = present.suite_table(suite, results)
        assert tuple(found[-4:-2]) == headers and len(cells) == len(found)
        assert tuple(cells[-4:-2]) == values


def test_growth_is_the_exponent_of_memory_over_length() -> None:
    rows = []
    for n in (1024, 2048, 8192):
        row = row_of(replace(SMALL, suite="memory", seqlen=n), 1.0)
        row.samples["flashattn_lite"] = Samples([3.0 * n**1.5])
        rows.append(row)
    assert present.growth(rows) == pytest.approx(1.5)
    assert present.growth(rows[:1]) is None


def test_comparison_names_what_left_both_spreads() -> None:
    cases = [replace(SMALL, seqlen=n) for n in (10, 20, 30, 40)]
    before = results_of(*(row_of(case, 1.0, 0.1) for case in cases[:3]), row_of(cases[3], 2.0))
    after = results_of(
        *(row_of(c, f, 0.1) for c, f in zip(cases, (0.7, 0.95, 1.5), strict=False)),
    )
    found = {c.case.seqlen: c.verdict for c in compare.changes(before, after)}
    assert found == {10: "slower", 20: "", 30: "faster"}
    for results, factor in ((before, 1.0), (after, 0.5)):  # judged by CPU time, if both are
        results.settings["clock"] = "cpu"
        for row in results.rows:
            row.cpu_ratio = Ratio(factor, factor, factor)
    assert {c.verdict for c in compare.changes(before, after)} == {"slower"}
    after.settings["clock"] = "wall"
    assert {c.case.seqlen: c.verdict for c in compare.changes(before, after)} == found
    (only,) = compare.unmatched(before, after)
    assert only.startswith("only in the first") and "length 40" in only
    both = [results_of(row_of(replace(SMALL, threads=n), 1.0)) for n in (1, 2)]
    first, second = compare.unmatched(*both)
    assert "threads" not in first and second.endswith("fp32, 2 threads")


# ---- instruction sets ----------------------------------------------------------------------------


def test_emulation_limits_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = isa.environment("avx2")
    assert variables["FAL_CPU_ISA"] == "avx2" and variables["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert isa.is_set("avx2", variables) and not isa.is_set("baseline", variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert isa.emulated() == "avx2"
    with pytest.raises(ValueError, match="--isa is 'mmx'"):
        isa.environment("mmx")


def test_every_instruction_set_has_a_ceiling() -> None:
    active = _ops.cpu_isa()
    try:
        for name in json.loads(_ops.build_info())["cpu"]["isas"]:
            _ops.set_cpu_isa(name)
            done = _ops.fma_peak(1_000_000)
            per_thread = done / torch.get_num_threads()
            assert 1_000_000 <= per_thread < 1_010_000 and per_thread == int(per_thread)
    finally:
        _ops.set_cpu_isa(active)
    with pytest.raises(RuntimeError, match="flops is 0; it must be positive"):
        _ops.fma_peak(0)
