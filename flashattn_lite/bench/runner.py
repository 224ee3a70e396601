"""From cases to rows: build the contenders, check exactness, measure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from flashattn_lite import _ops
from flashattn_lite.bench import ceilings, exactness, io_model, machine, memory
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.ceilings import FMA, READ, Ceiling
from flashattn_lite.bench.contenders import COMPETITORS, OURS, ours
from flashattn_lite.bench.inputs import Entry, Inputs
from flashattn_lite.bench.results import FLASH1, Row
from flashattn_lite.bench.timing import (
    Clock,
    Contender,
    CpuClock,
    CudaClock,
    HostClock,
    Rounds,
    Samples,
    interleave,
    ratio,
)

OVERHEAD = Rounds(budget_s=1.0, at_least=15, min_sample_s=0.01)


@dataclass(frozen=True)
class Settings:
    """How rows are measured."""

    rounds: Rounds = field(default_factory=Rounds)
    competitors: tuple[str, ...] = ("sdpa",)  # the first one that runs a case is its baseline
    clock: str = "wall"
    cold_l2: bool = True


def choose(device: str, wanted: Sequence[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """The competitors that take part on a device, and for the others why not."""
    unknown = sorted(set(wanted or ()) - set(COMPETITORS))
    if unknown:
        raise ValueError(f"--competitors has {', '.join(unknown)}; known: {', '.join(COMPETITORS)}")
    present, absent = [], {}
    for name, competitor in COMPETITORS.items():
        if wanted is not None and name not in wanted:
            continue
        reason = competitor.missing(device)
        if reason is None and wanted is None and competitor.explicit(device):
            reason = "not asked for (--competitors)"
        if reason is None:
            present.append(name)
        else:
            absent[name] = reason
    if device == "cuda":  # PyTorch's best there is a backend by name
        present.sort(key=lambda name: {"standard": 0, "sdpa_flash": 1}.get(name, 2))
    return present, absent


def run(
    cases: Iterable[Case], settings: Settings, before: Callable[[Case], None] = lambda case: None
) -> list[Row]:
    """A row for every case; ``before`` is called with each case as it begins."""
    rows = []
    for case in cases:
        before(case)
        rows.append(measure(case, settings))
    return rows


def cost(case: Case, settings: Settings) -> float:
    """Estimated seconds of a row, for the progress bar."""
    if case.suite == "memory":
        return 6.0 + case.flops() / 2e10
    if case.suite == "overhead":
        return 1.2 + OVERHEAD.budget_s
    slow = 8.0 if case.backward and case.dtype != "fp32" else 2.5
    rate = 5e10 * case.threads if case.device == "cpu" else 1e14
    once = slow * case.flops() / rate
    return 0.4 + max(settings.rounds.budget_s, (settings.rounds.at_least + 2) * once)


def measure(case: Case, settings: Settings) -> Row:
    """One row. What goes wrong is in ``failure``: an inexact result, or an error."""
    try:
        if case.suite == "memory":
            return _measure_memory(case, settings)
        return _measure_time(case, settings)
    except Exception as error:  # one broken row must not cost the others
        text = str(error).strip().splitlines() or [""]
        return Row(case, failure=f"{type(error).__name__}: {text[0]}")


def clock_for(case: Case, settings: Settings) -> Clock:
    if case.device == "cpu":
        return CpuClock()
    if case.suite == "overhead":
        return HostClock()
    return CudaClock(torch.device(case.device), settings.cold_l2)


def _measure_time(case: Case, settings: Settings) -> Row:
    row = Row(case, ours=OURS)
    inputs = Inputs(case)
    torch.set_num_threads(_oracle_threads(case))
    known = list(exactness.truths(case, inputs))
    entries = _entries(case, inputs, settings, row)
    if _inexact(case, inputs, entries, known, row):
        return row
    if case.suite == "scaling":
        return _measure_scaling(case, settings, entries, row)
    contenders = {name: Contender(entry.run) for name, entry in entries.items()}
    limits = _ceilings(case)
    contenders |= {name: Contender(run) for name, (run, _) in limits.items()}
    if case.suite == "io":
        row.moved = _moved(case, entries)
        if case.device == "cpu":
            contenders[READ] = Contender(ceilings.read(ceilings.READ_BYTES)[0])
    rounds = OVERHEAD if case.suite == "overhead" else settings.rounds
    row.samples = interleave(contenders, clock_for(case, settings), rounds)
    mine = row.samples[OURS]
    for name, theirs in row.samples.items():
        if name in entries and name != OURS:
            row.ratios[name] = ratio(theirs.wall, mine.wall)
    if case.device == "cpu" and case.threads == 1 and row.baseline:
        row.cpu_ratio = ratio(row.samples[row.baseline].cpu, mine.cpu)
    if limits:
        # Of one CPU thread what it did, not what it waited.
        clock = "cpu" if case.device == "cpu" and case.threads == 1 else "wall"
        row.peak = _share(case, row, limits, clock)
    return row


def _ceilings(case: Case) -> dict[str, Ceiling]:
    """What takes part in the row's rounds to say how fast it could be at most."""
    if case.tokens:
        return ceilings.memory(case)
    if case.device == "cpu" and case.suite != "overhead":
        return {FMA: ceilings.fma_peak()}
    return {}


def _share(case: Case, row: Row, limits: dict[str, Ceiling], clock: str) -> float:
    """Our rate over that of the fastest ceiling, the median over the rounds."""
    work = case.cache_bytes() if case.tokens else case.flops()
    times = {name: row.samples[name].of(clock) for name in limits}
    shares = []
    for i, mine in enumerate(row.samples[OURS].of(clock)):
        most = max(done / times[name][i] for name, (_, done) in limits.items())
        shares.append(work / mine / most)
    return statistics.median(shares)


def _moved(case: Case, names: Iterable[str]) -> dict[str, int]:
    """Bytes by the papers' loops, of those whose loop is known."""
    isa = _ops.cpu_isa() if case.device == "cpu" else ""
    found = {name: io_model.bytes_of(case, name, isa) for name in names}
    return {name: count for name, count in found.items() if count is not None}


def _entries(case: Case, inputs: Inputs, settings: Settings, row: Row) -> dict[str, Entry]:
    """Ours and every competitor that runs the case; the row notes who does not, and why."""
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    entries = {OURS: ours(case, inputs)}
    builds: dict[str, Callable[[Case, Inputs], Entry]] = {
        name: COMPETITORS[name].build
        for name in settings.competitors
        if COMPETITORS[name].refuses(case) is None
    }
    if case.device == "cuda" and case.suite in ("forward", "training", "papers", "io"):
        builds[FLASH1] = lambda c, i: ours(c, i, FLASH1)
    for name, build in builds.items():
        try:
            entry = build(case, inputs)
            entry.run()
        except Exception as error:  # it says here that it cannot: no reason to stop
            text = str(error).strip().splitlines() or [""]
            row.notes.append(f"{name}: {type(error).__name__}: {text[0]}")
            continue
        entries[name] = entry
    return entries


def _inexact(
    case: Case,
    inputs: Inputs,
    entries: dict[str, Entry],
    known: list[exactness.Truth],
    row: Row,
) -> bool:
    """Checks ours, which must be exact, and the others, which must compute the same: the error of
    the baseline is shown beside ours, and who computes something else takes no further part."""
    for name, entry in list(entries.items()):
        if not entry.same_result:
            continue
        found = exactness.check(case, inputs, known, entry.run(), entry.layout)
        if name in (OURS, FLASH1):
            if name == OURS:
                row.error, row.budget_used = found.error, found.used
            if not found.exact:
                row.failure = (
                    f"{name} is inexact: {found.worst} uses {found.used:.3g} times its error budget"
                )
                return True
        elif found.used > exactness.SOMETHING_ELSE:
            row.notes.append(
                f"{name}: its {found.worst} is {found.used:.3g} error budgets off: not the same "
                "computation"
            )
            del entries[name]
        elif not row.baseline:
            row.baseline, row.baseline_error = name, found.error
    return False


def _measure_scaling(case: Case, settings: Settings, entries: dict[str, Entry], row: Row) -> Row:
    """The same call on one thread and on case.threads, in turn."""
    contenders = {
        f"{name}, {threads} thread{'s' if threads > 1 else ''}": Contender(entry.run, threads)
        for name, entry in entries.items()
        for threads in (1, case.threads)
    }
    row.samples = interleave(contenders, CpuClock(), settings.rounds)
    for name in entries:
        one, many = (row.samples[s].wall for s in contenders if s.startswith(name + ","))
        key = f"{OURS}, 1 thread" if name == OURS else name
        row.ratios[key] = ratio(one, many)
    row.ours, row.baseline = f"{OURS}, {case.threads} threads", f"{OURS}, 1 thread"
    return row


def _measure_memory(case: Case, settings: Settings) -> Row:
    row = Row(case, ours=OURS)
    exact = measure(replace(case, suite="training", seqlen=min(case.seqlen, 1024)), _BRIEF)
    row.error, row.budget_used = exact.error, exact.budget_used
    row.baseline_error, row.failure = exact.baseline_error, exact.failure
    if row.failure is not None:
        return row
    names = [OURS, *(n for n in settings.competitors if COMPETITORS[n].refuses(case) is None)]
    if case.seqlen <= 4096 and "sdpa_math" not in names:  # standard attention: the whole matrix
        names.append("sdpa_math")
    for name in names:
        try:
            row.samples[name] = Samples(wall=[float(memory.measure(case, name))])
        except memory.MeasurementError as error:
            if name == OURS:
                row.failure = str(error)
                return row
            row.notes.append(f"{name}: {error}")
            continue
        if name != OURS:
            row.ratios[name] = ratio(row.samples[name].wall, row.samples[OURS].wall)
            row.baseline = row.baseline or name
    return row


_BRIEF = Settings(rounds=Rounds(budget_s=0.0, at_least=1, at_most=1))


def _oracle_threads(case: Case) -> int:
    """The oracle's work on forward probes and small cases is too little to be shared out."""
    return len(machine.usable_processors()) if case.backward and case.flops() > 1e9 else 1
