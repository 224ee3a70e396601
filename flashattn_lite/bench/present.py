"""What a run's tables say: columns, group summaries, losses. Terminal and Markdown share them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from flashattn_lite.bench import isa, machine, tables
from flashattn_lite.bench.aims import SHARES
from flashattn_lite.bench.ceilings import COPY, READ, READ_BYTES, units
from flashattn_lite.bench.results import FLASH1, Results, Row, groups_of
from flashattn_lite.bench.timing import geometric_mean

TITLES = {
    "forward": "Forward",
    "training": "Training: forward and backward",
    "masks": "Masks: window, ragged batches, bias, ALiBi, grouped heads",
    "overhead": "Small calls",
    "memory": "Peak memory of a call beyond its inputs",
    "scaling": "From one thread to several",
    "sparse": "Block masks: time over the share of blocks that are listed",
    "decode": "Decoding: one query a sequence over its KV cache",
    "paged": "Decoding over pages, against the same cache without",
    "papers": "The papers' figures: forward and backward against standard attention",
    "io": "Bytes through memory, by the papers' loops (docs/io_complexity.md), beside time",
}
SHAPE = "batch x heads x length x head dim"
FLASH1_AIM = 1.7
GROWTH_AIM = 1.1  # peak memory grows like length^1: the fitted exponent is at most this

Table = tuple[list[str], list[list[str]]]


def header(results: Results) -> list[str]:
    """The machine, the ceilings, who took part."""
    lines = machine.headline(results.facts)
    load = results.facts.get("load", 0.0)
    if load > 0.5 * results.facts["cpu"]["cores"]:
        lines.append(
            f"NOTE     the machine was busy (load {load:.1f}): figures by wall clock are unsteady, "
            "those of several\n         threads most; --clock cpu judges one thread by CPU time"
        )
    emulated = results.settings.get("isa")
    if emulated:
        lines.append(f"NOTE     {isa.sentence(emulated)}")
    for first in range(0, len(results.ceilings), 4):
        some = list(results.ceilings.items())[first : first + 4]
        text = "; ".join(f"{name}: {units(name, rate)}" for name, rate in some)
        lines.append(f"{'' if first else 'ceilings':<8} {text}")
    for reason in dict.fromkeys(results.absent.values()):
        names = [name for name, why in results.absent.items() if why == reason]
        lines.append(f"absent   {', '.join(names)}: {reason}")
    return lines


def mark(figure: float, aim: float = 1.0, digits: int = 2) -> str:
    """The figure with the mark that tables.py colours: at the aim or better, or under it."""
    return f"{'+' if figure >= aim else '!'}{figure:.{digits}f}"


def suite_table(suite: str, results: Results) -> Table:
    """The suite's rows."""
    rows = [row for row in results.rows if row.case.suite == suite]
    if suite == "memory":
        return _memory_table(rows)
    if suite == "scaling":
        return _scaling_table(rows)
    if suite == "io":
        return _io_table(rows, results.ceilings)
    return _speed_table(rows, results.ceilings)


def _speed_table(rows: Sequence[Row], ceilings: dict[str, float]) -> Table:
    others = list(dict.fromkeys(n for r in rows for n in r.ratios if n != r.baseline))
    with_peak = any(row.peak is not None for row in rows)
    with_cpu = any(row.cpu_ratio is not None for row in rows)
    on_cpu = any(row.case.device == "cpu" for row in rows)
    headers = [SHAPE, "dtype"] + (["threads"] if on_cpu else [])
    theirs = "baseline" if any(row.case.tokens for row in rows) else "PyTorch"
    headers += ["ours", theirs, "ratio", "quartiles"] + (["CPU time"] if with_cpu else [])
    headers += [f"vs {name}" for name in others] + ([_ceiling(rows)] if with_peak else [])
    if not on_cpu:
        decoding = any(row.case.tokens for row in rows)
        headers += ["GB/s of K and V"] if decoding else ["TFLOP/s", "of matmul"]
    headers += ["error", f"{theirs}'s"]
    body = []
    for row in rows:
        cells = [row.case.short(), row.case.dtype] + ([str(row.case.threads)] if on_cpu else [])
        if row.failure is not None:
            body.append([*cells, "!FAILED", *[""] * (len(headers) - len(cells) - 1)])
            continue
        main = row.ratios.get(row.baseline)
        cells.append(tables.seconds(row.samples[row.ours].median("wall")))
        if main is None:
            cells += ["-", "-", "-"]
        else:
            cells.append(tables.seconds(row.samples[row.baseline].median("wall")))
            cells += [mark(main.median), f"{main.q1:.2f}-{main.q3:.2f}"]
        if with_cpu:
            cells.append(mark(row.cpu_ratio.median) if row.cpu_ratio else "")
        cells += [f"{row.ratios[n].median:.2f}" if n in row.ratios else "" for n in others]
        if with_peak:
            cells.append("" if row.peak is None else f"{row.peak:.0%}")
        if not on_cpu:
            seconds = row.samples[row.ours].median()
            if row.case.tokens:
                cells.append(f"{row.case.cache_bytes() / seconds / 1e9:.1f}")
            else:
                rate, most = row.case.flops() / seconds, ceilings.get(f"matmul {row.case.dtype}")
                cells += [f"{rate / 1e12:.1f}", f"{rate / most:.0%}" if most else ""]
        body.append([*cells, _scientific(row.error), _scientific(row.baseline_error)])
    return headers, body


def _ceiling(rows: Sequence[Row]) -> str:
    return "of read rate" if any(row.case.tokens for row in rows) else "of FMA peak"


def _memory_table(rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.samples))
    headers = [SHAPE, "dtype", *names, "ratio"]
    body = []
    for row in rows:
        kept = [tables.size(row.samples[n].wall[0]) if n in row.samples else "" for n in names]
        figure = row.figure()
        last = "!FAILED" if row.failure else "" if figure is None else mark(figure)
        body.append([row.case.short(), row.case.dtype, *kept, last])
    return headers, body


def _scaling_table(rows: Sequence[Row]) -> Table:
    headers = [SHAPE, "dtype", "threads", "work", "ours", "quartiles", "PyTorch's"]
    body = []
    for row in rows:
        work = "training" if row.case.backward else "forward"
        cells = [row.case.short(), row.case.dtype, f"1 -> {row.case.threads}", work]
        mine = row.ratios.get(row.baseline)
        if row.failure is not None or mine is None:
            body.append([*cells, "!FAILED", "", ""])
            continue
        theirs = row.ratios.get("sdpa")
        cells += [mark(mine.median, 1.85), f"{mine.q1:.2f}-{mine.q3:.2f}"]
        body.append([*cells, f"{theirs.median:.2f}" if theirs else ""])
    return headers, body


def _io_table(rows: Sequence[Row], ceilings: dict[str, float]) -> Table:
    """Times and bytes of those whose loop is known, and how near their bytes a second come to what
    the memory gives."""
    names = list(dict.fromkeys(name for row in rows for name in row.moved))
    shown = {row.ours: "ours" for row in rows}
    others = [name for name in names if name not in shown]
    headers = [SHAPE, "dtype"]
    for kind in ("time", "bytes"):
        headers += [f"{kind}: {shown.get(name, name)}" for name in names]
        headers += [f"{kind}: {name} / ours" for name in others]
    headers += [f"of read rate: {shown.get(name, name)}" for name in names]
    body = []
    for row in rows:
        cells = [row.case.short(), row.case.dtype]
        if row.failure is not None:
            body.append([*cells, "!FAILED", *[""] * (len(headers) - 3)])
            continue
        rate = memory_rate(row, ceilings)
        times = {name: row.samples[name].median() for name in row.moved}
        shares = {n: row.moved[n] / t / rate for n, t in times.items()} if rate else {}
        shrunk = {n: moved / row.moved[row.ours] for n, moved in row.moved.items()}
        cells += [tables.seconds(times[n]) if n in times else "" for n in names]
        cells += [mark(row.ratios[n].median) if n in row.ratios else "" for n in others]
        cells += [tables.size(row.moved[n]) if n in times else "" for n in names]
        cells += [f"{shrunk[n]:.1f}" if n in times else "" for n in others]
        cells += [f"{shares[n]:.0%}" if n in shares else "" for n in names]
        body.append(cells)
    return headers, body


def memory_rate(row: Row, ceilings: dict[str, float]) -> float | None:
    """Bytes a second that memory gives: the read of the same rounds, or CUDA's ceiling."""
    if READ in row.samples:
        return READ_BYTES / row.samples[READ].median()
    return max((ceilings[name] for name in (READ, COPY) if name in ceilings), default=None)


def group_table(rows: Sequence[Row], clock: str) -> Table:
    """Geometric means beside their aims."""
    headers = ["group", "rows", "geometric mean", "least", "aim", ""]
    body = []
    for found in groups_of(rows, clock):
        name, aim = f"{found.group.suite}: {found.group.title}", found.group.aim
        cells = [name, str(found.rows), mark(found.mean, aim or 1.0), mark(found.least)]
        verdict = {None: "", True: "+met", False: "!missed"}[found.met]
        body.append([*cells, "" if aim is None else f"{aim:.2f}", verdict])
    for suite in ("forward", "training"):
        against = [
            r.ratios[FLASH1].median for r in rows if r.case.suite == suite and FLASH1 in r.ratios
        ]
        if against:
            mean = geometric_mean(against)
            cells = [f"{suite}: FlashAttention-2 against FlashAttention (1)", str(len(against))]
            cells += [mark(mean, FLASH1_AIM), mark(min(against)), f"{FLASH1_AIM:.2f}"]
            body.append([*cells, "+met" if mean >= FLASH1_AIM else "!missed"])
    for held in SHARES:
        shares = [row.peak for row in rows if row.peak is not None and held.holds(row.case)]
        if shares:
            share = held.of(shares)
            met = share >= held.aim
            figure, verdict = ("+" if met else "!") + f"{share:.0%}", "+met" if met else "!missed"
            body.append([held.title, "", figure, "", f"{held.aim:.0%}", verdict])
    exponent = growth(rows)
    if exponent is not None:
        met = exponent <= GROWTH_AIM
        title = "memory: peak grows like length to the power of"
        figure = ("+" if met else "!") + f"{exponent:.2f}"
        body.append([title, "", figure, "", f"{GROWTH_AIM:.2f}", "+met" if met else "!missed"])
    return headers, body


def growth(rows: Sequence[Row]) -> float | None:
    """The exponent of our peak memory over length: slope of the logarithms, least squares."""
    points = [
        (math.log(row.case.seqlen), math.log(max(row.samples[row.ours].wall[0], 1.0)))
        for row in rows
        if row.case.suite == "memory" and row.ours in row.samples
    ]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def losses(rows: Sequence[Row], clock: str) -> list[str]:
    """A sentence for every row in which the baseline is faster (or smaller)."""
    lines = []
    for row in rows:
        figure = row.figure(clock)
        if figure is None or not row.loses(clock) or row.case.suite == "scaling":
            continue
        more = "takes" if row.case.suite != "memory" else "needs"
        of = "the time" if row.case.suite != "memory" else "the memory"
        times = f"{1 / figure:.2f} times"
        times = "barely more than" if times == "1.00 times" else times
        threads = f", {row.case.threads} threads" if row.case.threads > 1 else ""
        work = "training, " if row.case.backward else ""
        lines.append(
            f"{row.case.suite}: {work}{row.case.label()}, {row.case.dtype}{threads}: "
            f"{more} {times} {of} of {row.baseline}"
        )
    return lines


def show(results: Results, out: Callable[[str], None] = print) -> None:
    """All tables, the groups, the losses and the failures, on the terminal."""
    for suite in results.suites():
        show_suite(suite, results, out)
    show_summary(results, out)


def show_suite(suite: str, results: Results, out: Callable[[str], None] = print) -> None:
    out("\n" + tables.paint(TITLES[suite], tables.BOLD))
    out(tables.terminal(*suite_table(suite, results), left=2))


def show_summary(results: Results, out: Callable[[str], None] = print) -> None:
    headers, body = group_table(results.rows, results.clock)
    if body:
        out("\n" + tables.paint("Aims", tables.BOLD) + f" (by {results.clock} time)")
        out(tables.terminal(headers, body))
    lost = losses(results.rows, results.clock)
    measured = sum(row.figure(results.clock) is not None for row in results.rows)
    out(f"\nLosses: {len(lost)} of {measured} rows" + (":" if lost else "."))
    for line in lost:
        out("  " + tables.paint(line, tables.RED))
    for note in dict.fromkeys(note for row in results.rows for note in row.notes):
        out(f"  did not run: {note}")
    for row in results.failures:
        text = f"  FAILED {row.case.suite}: {row.case.label()}, {row.case.dtype}: {row.failure}"
        out(tables.paint(text, tables.RED))


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
