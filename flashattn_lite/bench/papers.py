"""``papers.md``: what the FlashAttention papers claim, beside what results of this benchmark show.

The papers' figures are theirs, on their machines (A100). Ratios carry over to another machine,
times do not, so only ratios and shares of a peak are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flashattn_lite.bench import tables
from flashattn_lite.bench.results import FLASH1, Results, Row
from flashattn_lite.bench.timing import geometric_mean

FA1 = "[FlashAttention](https://arxiv.org/abs/2205.14135)"
FA2 = "[FlashAttention-2](https://arxiv.org/abs/2307.08691)"
STANDARD = "standard"

INTRODUCTION = """\
# The papers' results, reproduced

Made by `flashattn-lite bench report` from {sources}; do not edit. What the FlashAttention papers
state (on an A100), and what this library shows on the machines at hand. Ratios are compared, since
times do not carry over from one machine to another. Standard attention is what the papers mean by
it: S = Q K^T, P = softmax(S), O = P V as three PyTorch operators, S and P in memory between them.
IO complexity, counted byte by byte without any clock, block masks included, has
[a page of its own](io_complexity.md).
"""


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and how a run's rows answer it (None: they do not)."""

    paper: str
    where: str
    says: str
    command: str
    answer: Callable[[Sequence[Row]], str | None]
    device: str  # "cpu", "cuda", or "" for either


def _span(figures: Sequence[float], unit: str = "x") -> str | None:
    if not figures:
        return None
    mean = geometric_mean(figures)
    return f"{min(figures):.1f}-{max(figures):.1f}{unit}, geometric mean {mean:.1f}{unit}"


def _against_standard(rows: Sequence[Row]) -> str | None:
    measured = [r for r in rows if r.case.suite == "papers" and STANDARD in r.ratios]
    return _span([r.ratios[STANDARD].median for r in measured])


def _flash1_against_standard(rows: Sequence[Row]) -> str | None:
    """FlashAttention (1)'s engine against standard attention: only CUDA has it."""
    figures = [
        r.ratios[STANDARD].median / r.ratios[FLASH1].median
        for r in rows
        if r.case.suite == "papers" and {STANDARD, FLASH1} <= r.ratios.keys()
    ]
    return _span(figures)


def _against_flash1(rows: Sequence[Row]) -> str | None:
    measured = [r for r in rows if r.case.suite == "papers" and FLASH1 in r.ratios]
    return _span([r.ratios[FLASH1].median for r in measured])


def _memory(rows: Sequence[Row]) -> str | None:
    figures = {
        r.case.seqlen: r.samples["sdpa_math"].wall[0] / max(r.samples[r.ours].wall[0], 1.0)
        for r in rows
        if r.case.suite == "memory" and {"sdpa_math", r.ours} <= r.samples.keys()
    }
    if not figures:
        return None
    longest = max(figures)
    return f"{figures[longest]:.0f}x less at length {longest}, forward + backward"


def _fewer_bytes(rows: Sequence[Row]) -> str | None:
    """Standard attention's bytes over those of the loop that runs here."""
    figures = {
        r.case.seqlen: r.moved[STANDARD] / r.moved[r.ours]
        for r in rows
        if r.case.suite == "io" and {STANDARD, r.ours} <= r.moved.keys() and not r.case.causal
    }
    if not figures:
        return None
    longest = max(figures)
    return f"{figures[longest]:.1f}x fewer at length {longest}, by the loop that runs"


def _by_density(rows: Sequence[Row]) -> str | None:
    """Our time under block masks, as a share of that with all blocks listed in the same run."""
    times: dict[tuple[str, bool], dict[float, float]] = {}
    for row in rows:
        if row.case.suite == "sparse" and row.failure is None:
            clock = "wall" if row.cpu_ratio is None else "cpu"
            taken = times.setdefault((row.case.dtype, row.case.backward), {})
            taken[row.case.block_density or 1.0] = row.samples[row.ours].median(clock)
    shares: dict[float, list[float]] = {}
    for taken in times.values():
        for density in sorted(taken.keys() - {1.0}) if 1.0 in taken else ():
            shares.setdefault(density, []).append(taken[density] / taken[1.0])
    texts = [
        f"{min(found):.1%}-{max(found):.1%} of the time with {density:.1%} of the blocks"
        for density, found in sorted(shares.items())
    ]
    return "; ".join(texts) or None


COMMAND = "flashattn-lite bench papers memory"
CLAIMS = (
    Claim(
        FA1,
        "section 4.3",
        "up to 3x faster than standard attention at lengths 128 to 2K",
        COMMAND,
        _flash1_against_standard,
        "cuda",
    ),
    Claim(
        FA1,
        "section 4.3",
        "up to 20x less memory than exact attention baselines, growing linearly with the length",
        COMMAND,
        _memory,
        "",
    ),
    Claim(
        FA1,
        "section 1, figure 2",
        "up to 9x fewer accesses to device memory than standard attention",
        "flashattn-lite bench io",
        _fewer_bytes,
        "",
    ),
    Claim(
        FA1,
        "section 3.3",
        "block-sparse: cost falls in proportion to the share of the blocks that is computed",
        "flashattn-lite bench sparse",
        _by_density,
        "",
    ),
    Claim(
        FA2,
        "section 4.1",
        "1.7-3.0x faster than FlashAttention, forward + backward",
        COMMAND,
        _against_flash1,
        "cuda",
    ),
    Claim(
        FA2,
        "section 4.1",
        "3-10x faster than standard attention, forward + backward",
        COMMAND,
        _against_standard,
        "",
    ),
)


def markdown(loaded: Mapping[str, Results], plots: Mapping[str, Sequence[str]]) -> str:
    """The page. ``loaded``: results by the name of their file; ``plots``: files drawn for each."""
    relevant = {
        name: results
        for name, results in loaded.items()
        if any(row.case.suite in ("papers", "memory", "io", "sparse") for row in results.rows)
    }
    sources = ", ".join(f"`{name}`" for name in relevant) or "no results yet"
    parts = [INTRODUCTION.format(sources=sources), "\n## Claims\n"]
    headers = ["paper", "states", "here", "on", "with"]
    body = [line for claim in CLAIMS for line in _answers(claim, relevant)]
    parts.append(tables.markdown(headers, body, left=5) + "\n")
    for name, results in relevant.items():
        rows = [r for r in results.rows if r.case.suite == "papers" and r.failure is None]
        if not rows:
            continue
        parts.append(f"\n## Time over the length: {title(results)}\n\n`{results.command}`\n")
        parts += [f"![{plot}](performance/{plot})\n" for plot in plots.get(name, ())]
        parts.append(tables.markdown(*_times(rows), left=2) + "\n")
    return "\n".join(parts)


def title(results: Results) -> str:
    """The machine of a run in a few words."""
    facts = results.facts
    if results.settings.get("device") == "cuda":
        return str(facts["gpus"][0]["name"])
    emulated = " (held to it on both sides)" if results.settings.get("isa") else ""
    return f"{facts['cpu']['model']}, {facts['library']['build']['cpu']['active']}{emulated}"


def _answers(claim: Claim, loaded: Mapping[str, Results]) -> list[list[str]]:
    """A line for every run that answers the claim, or the one that says what would."""
    lines = []
    for results in loaded.values():
        device = str(results.settings.get("device"))
        answer = claim.answer(results.rows) if claim.device in ("", device) else None
        if answer is not None:
            lines.append([_source(claim), claim.says, answer, title(results), f"`{claim.command}`"])
    if not lines:
        where = "an NVIDIA GPU" if claim.device == "cuda" else "any machine"
        missing = "not measured yet"
        lines.append([_source(claim), claim.says, missing, where, f"`{claim.command}`"])
    return lines


def _source(claim: Claim) -> str:
    return f"{claim.paper}, {claim.where}"


def _times(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of every contender, and how many times as long as ours each takes."""
    names = list(dict.fromkeys(name for row in rows for name in row.ratios))
    headers = ["shape", "dtype", "ours", *(text for n in names for text in (n, f"{n} / ours"))]
    body = []
    for row in rows:
        cells = [row.case.short(), row.case.dtype, tables.seconds(row.samples[row.ours].median())]
        for name in names:
            found = row.ratios.get(name)
            took = "" if found is None else tables.seconds(row.samples[name].median())
            cells += [took, "" if found is None else f"{found.median:.2f}"]
        body.append(cells)
    return headers, body
