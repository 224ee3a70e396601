"""``flashattn-lite bench report``: performance.md and its plots, from JSON results alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from flashattn_lite.bench import machine, present, tables
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
units (AMX) goes beyond the FMA peak in 16-bit types.
"""


def main(paths: Sequence[Path], output: Path | None) -> int:
    """Writes performance.md and performance/*.svg into the output folder."""
    root = machine.checkout()
    if not paths:
        folder = root / "bench" / "results" if root is not None else Path()
        pattern = "*.json" if root is not None else "flashattn-lite-bench-*.json"
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise ResultsError(
                f"no results in {folder.resolve()}; run `flashattn-lite bench` first"
            )
    folder = output if output is not None else root / "docs" if root is not None else Path()
    loaded = {path: Results.load(path) for path in paths}
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "performance.md"
    target.write_text(markdown(loaded, folder, root))
    print(f"written: {target}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
    return 0


def markdown(loaded: dict[Path, Results], folder: Path, root: Path | None) -> str:
    """The document; plots are drawn into ``folder`` where matplotlib is installed."""
    names = [
        str(p.relative_to(root)) if root and p.is_relative_to(root) else p.name for p in loaded
    ]
    parts = [INTRODUCTION.format(sources=", ".join(f"`{name}`" for name in names))]
    for path, results in loaded.items():
        parts.append(section(results, path.stem, folder))
    return "\n".join(parts)


def section(results: Results, stem: str, folder: Path) -> str:
    """One run: machine, aims, losses, then every suite's table."""
    facts, settings = results.facts, results.settings
    on_gpu = settings.get("device") == "cuda"
    title = facts["gpus"][0]["name"] if on_gpu else facts["cpu"]["model"]
    if not on_gpu:
        title += f", {facts['library']['build']['cpu']['active']}"
        title += " (held to it on both sides)" if settings.get("isa") else ""
    parts = [f"\n## {title}\n", "```", *present.header(results), "```\n"]
    parts.append(f"Measured {results.created[:10]} with\n\n```\n{results.command}\n```\n")
    headers, body = present.group_table(results.rows, results.clock)
    if body:
        parts.append(f"### Aims, by {results.clock} time\n")
        parts.append(tables.markdown(headers, body) + "\n")
    lost = present.losses(results.rows, results.clock)
    measured = sum(row.figure(results.clock) is not None for row in results.rows)
    parts.append(f"Rows in which PyTorch is better: {len(lost)} of {measured}.\n")
    parts += [f"- {line}" for line in lost]
    for row in results.failures:
        parts.append(f"- FAILED: {row.case.label()}, {row.case.dtype}: {row.failure}")
    parts.append("")
    for name in draw(results, folder / "performance", stem):
        parts.append(f"![{name}](performance/{name})\n")
    for suite in results.suites():
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
