"""Plots of a run as SVG files; nothing is drawn where matplotlib is not installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

from flashattn_lite.bench.cases import DTYPES
from flashattn_lite.bench.papers import title as title_of
from flashattn_lite.bench.present import memory_rate
from flashattn_lite.bench.results import Results, Row
from flashattn_lite.bench.timing import geometric_mean

STYLES = {False: "o-", True: "s--"}  # dense, causal
COLOURS = {"fp32": "#1b6ca8", "bf16": "#c1440e", "fp16": "#3c8d40"}


def draw(results: Results, folder: Path, stem: str) -> list[str]:
    """The files drawn into the folder, by name."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("svg")
    pyplot.rcParams["svg.hashsalt"] = "flashattn_lite"  # the same data gives the same file
    drawn = []
    where = f"{title_of(results)}, PyTorch {results.facts['torch']['version']}"
    for suite, title in (("forward", "Forward"), ("training", "Forward and backward")):
        rows = [r for r in results.rows if r.case.suite == suite and r.figure() is not None]
        if len({row.case.seqlen for row in rows}) > 1:
            drawn.append((f"{stem}-{suite}.svg", _speed(pyplot, rows, title, where, results.clock)))
    rows = [r for r in results.rows if r.case.suite == "memory" and r.ours in r.samples]
    if len({row.case.seqlen for row in rows}) > 1:
        drawn.append((f"{stem}-memory.svg", _memory(pyplot, rows, where)))
    rows = [r for r in results.rows if r.case.suite == "papers" and r.ours in r.samples]
    for causal in (False, True):
        some = [row for row in rows if row.case.causal == causal]
        if len({row.case.seqlen for row in some}) > 1:
            name = f"{stem}-papers-{'causal' if causal else 'dense'}.svg"
            drawn.append((name, _times(pyplot, some, where)))
    rows = [r for r in results.rows if r.case.suite == "io" and r.moved]
    if len({row.case.seqlen for row in rows}) > 1:
        drawn.append((f"{stem}-io.svg", _io(pyplot, rows, where, results.ceilings)))
    if drawn:
        folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn:
        figure.savefig(folder / name, metadata={"Date": None})
        pyplot.close(figure)
    return [name for name, _ in drawn]


def _axes(pyplot: Any, title: str, rows: list[Row], where: str, label: str) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.set_title(_titled(title, rows, where), fontsize="medium")
    axes.set_xlabel("sequence length")
    axes.set_ylabel(label)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    return figure, axes


def _titled(title: str, rows: list[Row], where: str) -> str:
    """With the machine, so that the plot alone says where its numbers are from."""
    if rows[0].case.device != "cpu":
        return f"{title}\n{where}"
    threads = sorted({row.case.threads for row in rows})
    count = " and ".join(map(str, threads)) + (" threads" if threads != [1] else " thread")
    return f"{title}\n{where}, {count}"


def _speed(pyplot: Any, rows: list[Row], title: str, where: str, clock: str) -> Any:
    """The ratio over the length: the geometric mean over the shapes of that length, whose head dims
    are below it."""
    label = f"PyTorch's {'CPU ' if clock == 'cpu' else ''}time / ours"
    figure, axes = _axes(pyplot, title, rows, where, label)
    for dtype in DTYPES:
        for causal, style in STYLES.items():
            by_length: dict[int, list[float]] = defaultdict(list)
            for row in rows:
                if (row.case.dtype, row.case.causal) == (dtype, causal):
                    by_length[row.case.seqlen].append(row.figure(clock) or 1.0)
            if by_length:
                lengths = sorted(by_length)
                means = [geometric_mean(by_length[n]) for n in lengths]
                label = f"{dtype} {'causal' if causal else 'dense'}"
                axes.plot(lengths, means, style, color=COLOURS[dtype], label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    dims: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        dims[row.case.seqlen].add(row.case.head_dim)
    ticks = {n: f"{n}\n" + "\n".join(map(str, sorted(dims[n]))) for n in sorted(dims)}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("sequence length; below it the head dims measured")
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def _times(pyplot: Any, rows: list[Row], where: str) -> Any:
    """Milliseconds over the length, as the papers draw it; one shape for each length."""
    case = rows[-1].case
    title = f"Forward and backward, {case.mask_name()}, head dim {case.head_dim}, {case.dtype}"
    rows = [r for r in rows if (r.case.head_dim, r.case.dtype) == (case.head_dim, case.dtype)]
    figure, axes = _axes(pyplot, title, rows, where, "milliseconds")
    for name in dict.fromkeys(name for row in rows for name in (row.ours, *row.ratios)):
        points = [
            (r.case.seqlen, r.samples[name].median() * 1e3) for r in rows if name in r.samples
        ]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.case.seqlen for row in rows}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.legend(fontsize="small")
    return figure


def _io(pyplot: Any, rows: list[Row], where: str, ceilings: dict[str, float]) -> Any:
    """Bytes over the length, and how much of the memory's rate they take; one dtype, dense."""
    case = rows[0].case
    some = [r for r in rows if (r.case.dtype, r.case.causal) == (case.dtype, case.causal)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    title = f"Forward, {case.mask_name()}, head dim {case.head_dim}, {case.dtype}"
    figure.suptitle(_titled(title, some, where), fontsize="medium")
    for name in dict.fromkeys(name for row in some for name in row.moved):
        known = [row for row in some if name in row.moved]
        lengths = [row.case.seqlen for row in known]
        heads = [row.case.batch * row.case.heads * 2**20 for row in known]
        moved = [row.moved[name] for row in known]
        left.plot(lengths, [m / h for m, h in zip(moved, heads, strict=True)], "o-", label=name)
        rates = [memory_rate(row, ceilings) or 0.0 for row in known]
        times = [row.samples[name].median() for row in known]
        shares = [m / t / r for m, t, r in zip(moved, times, rates, strict=True) if r]
        right.plot(lengths[: len(shares)], shares, "o-", label=name)
    left.set_ylabel("MiB through memory, per head")
    right.set_ylabel("share of the memory's rate")
    left.set_yscale("log", base=2)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("sequence length")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row.case.seqlen for row in some}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    left.yaxis.set_major_formatter("{x:g}")
    return figure


def _memory(pyplot: Any, rows: list[Row], where: str) -> Any:
    case, dtype = rows[0].case, rows[0].case.dtype
    title = f"Peak memory beyond the inputs, forward and backward, {case.mask_name()}, {dtype}, "
    title += f"{case.batch * case.heads} heads of {case.head_dim}"
    figure, axes = _axes(pyplot, title, rows, where, "MiB")
    for name in dict.fromkeys(name for row in rows for name in row.samples):
        points = [
            (row.case.seqlen, row.samples[name].wall[0] / 2**20)
            for row in rows
            if name in row.samples and row.case.dtype == dtype
        ]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sorted({row.case.seqlen for row in rows}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="small")
    return figure
