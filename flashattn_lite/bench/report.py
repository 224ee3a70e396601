"""``flashattn-lite bench report``: performance.md, papers.md and their plots, from JSON results."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashattn_lite.bench import machine, papers, present, tables
from flashattn_lite.bench.plots import draw
from flashattn_lite.bench.results import Results, ResultsError

INTRODUCTION = """\
# Performance

Made by `flashattn-lite bench report` from {sources}; do not edit. The command beside each table
makes its numbers again.

How it is measured: exactness against float64 is checked before any time is taken (the columns
"error" and "PyTorch's" are the largest element's error of the output). Contenders run in turn in
one process, round after round; a ratio is the median over the rounds of PyTorch's time / our time,
with its quartiles beside it, so above 1 is faster than PyTorch. Each gets the same numbers in the
memory layout it likes best. "CPU time" is the same ratio by the process's CPU time, which other
programs on the machine disturb less; it is taken with one thread. The FMA peak is a loop of fused
multiply-adds on registers, measured in the same rounds (with one thread both by CPU time); useful
floating-point operations count, so a causal case has half of a dense one's. A processor with matrix
units (AMX) goes beyond the FMA peak in 16-bit types. The read rate, which decoding is held against,
is that of a sum over as many bytes as the row's K and V have, in the same rounds; on a GPU the
faster of a sum and a copy, over at least a GiB. The baseline of decoding is PyTorch but for three
kinds of rows, whose question is another one: a quantised cache's is the same numbers unquantised, a
ragged batch's its sequences one by one, a paged cache's the contiguous one, all by this library.
"""


def main(paths: Sequence[Path], output: Path | None) -> int:
    """Writes performance.md, papers.md and performance/*.svg into the output folder."""
    root, found = machine.checkout(), not paths
    if found:
        folder = root / "bench" / "results" if root is not None else Path()
        pattern = "*.json" if root is not None else "flashattn-lite-bench-*.json"
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise ResultsError(
                f"no results in {folder.resolve()}; run `flashattn-lite bench` first"
            )
    folder = output if output is not None else root / "docs" if root is not None else Path()
    named = {_shown(path, root): Results.load(path) for path in paths}
    if found:  # the runs of most suites first
        named = dict(sorted(named.items(), key=lambda item: -len(item[1].suites())))
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        name: draw(results, folder / "performance", Path(name).stem)
        for name, results in named.items()
    }
    for page, text in {
        "performance.md": markdown(named, plots),
        "papers.md": papers.markdown(named, {n: of_papers(drawn) for n, drawn in plots.items()}),
    }.items():
        (folder / page).write_text(text)
        print(f"written: {folder / page}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
    return 0


def _shown(path: Path, root: Path | None) -> str:
    return str(path.relative_to(root)) if root and path.is_relative_to(root) else path.name


def of_papers(plots: Sequence[str]) -> list[str]:
    """Those of the plots that papers.md shows."""
    return [plot for plot in plots if "-papers" in plot]


def markdown(loaded: Mapping[str, Results], plots: Mapping[str, Sequence[str]]) -> str:
    """performance.md. ``loaded``: results by their file's name; ``plots``: files drawn for each."""
    parts = [INTRODUCTION.format(sources=", ".join(f"`{name}`" for name in loaded))]
    for name, results in loaded.items():
        parts.append(section(results, [p for p in plots[name] if p not in of_papers(plots[name])]))
    return "\n".join(parts)


def section(results: Results, plots: Sequence[str]) -> str:
    """One run: machine, aims, losses, plots, then every suite's table."""
    parts = [f"\n## {papers.title(results)}\n", "```", *present.header(results), "```\n"]
    parts.append(f"Measured {results.created[:10]} with\n\n```\n{results.command}\n```\n")
    headers, body = present.group_table(results.rows, results.clock)
    if body:
        parts.append(f"### Aims, by {results.clock} time\n")
        parts.append(tables.markdown(headers, body) + "\n")
    lost = present.losses(results.rows, results.clock)
    measured = sum(row.figure(results.clock) is not None for row in results.rows)
    parts.append(f"Rows in which the baseline is better: {len(lost)} of {measured}.\n")
    parts += [f"- {line}" for line in lost]
    for row in results.failures:
        parts.append(f"- FAILED: {row.case.label()}, {row.case.dtype}: {row.failure}")
    parts.append("")
    parts += [f"![{plot}](performance/{plot})\n" for plot in plots]
    for suite in results.suites():
        if suite == "papers":
            parts.append("### The papers' figures\n\nSee [papers.md](papers.md).\n")
            continue
        headers, body = present.suite_table(suite, results)
        parts.append(f"### {present.TITLES[suite]}\n")
        parts.append(f"`{command_of(results, suite)}`\n")
        parts.append(tables.markdown(headers, body, left=2) + "\n")
    return "\n".join(parts)


def command_of(results: Results, suite: str) -> str:
    """The run's command, for this suite alone."""
    words = results.command.split()
    kept = [word for word in words if word not in present.TITLES]
    place = kept.index("bench") + 1 if "bench" in kept else len(kept)
    return " ".join([*kept[:place], suite, *kept[place:]])
