"""Two results of the same suites: what became slower, what became faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashattn_lite.bench import papers, tables
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.results import Results, groups_of
from flashattn_lite.bench.timing import Ratio

TOLERANCE = 0.05  # a figure must change by more than this, and leave the other's quartiles


@dataclass(frozen=True)
class Change:
    """One case in both results; the figures are baseline / ours."""

    case: Case
    before: Ratio
    after: Ratio

    @property
    def factor(self) -> float:
        return self.after.median / self.before.median

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "": beyond the tolerance, and outside each other's quartiles."""
        if self.factor < 1 - TOLERANCE and self.after.q3 < self.before.q1:
            return "slower"
        if self.factor > 1 + TOLERANCE and self.after.q1 > self.before.q3:
            return "faster"
        return ""


def common_clock(before: Results, after: Results) -> str:
    """CPU time where both runs judge by it, the wall clock otherwise."""
    return "cpu" if before.clock == after.clock == "cpu" else "wall"


def changes(before: Results, after: Results) -> list[Change]:
    """The cases that both measured against the same baseline."""
    clock = common_clock(before, after)
    known = {row.case: row for row in before.rows}
    found = []
    for row in after.rows:
        other = known.get(row.case)
        if other is None or other.baseline != row.baseline:
            continue
        a, b = other.ratio(clock), row.ratio(clock)
        if a is not None and b is not None:
            found.append(Change(row.case, a, b))
    return found


def unmatched(before: Results, after: Results) -> list[str]:
    """Rows that only one of the two measured, in words."""
    a = {row.case for row in before.rows if row.figure() is not None}
    b = {row.case for row in after.rows if row.figure() is not None}
    lines = []
    for where, cases in (("first", a - b), ("second", b - a)):
        for c in cases:
            threads = f", {c.threads} threads" if c.threads > 1 else ""
            lines.append(f"only in the {where}: {c.suite}: {c.label()}, {c.dtype}{threads}")
    return sorted(lines)


def table(found: Sequence[Change]) -> tuple[list[str], list[list[str]]]:
    headers = ["case", "dtype", "threads", "before", "after", "factor", ""]
    body = []
    for change in sorted(found, key=lambda c: c.factor):
        sign = {"slower": "!", "faster": "+"}.get(change.verdict, "")
        body.append(
            [
                *(f"{change.case.suite}: {change.case.label()}", change.case.dtype),
                *(str(change.case.threads), f"{change.before.median:.2f}"),
                *(f"{change.after.median:.2f}", f"{sign}{change.factor:.2f}"),
                sign + change.verdict,
            ]
        )
    return headers, body


def main(first: Path, second: Path) -> int:
    """Prints the comparison; 1 if a row became slower."""
    before, after = Results.load(first), Results.load(second)
    for name, results in (("before", before), ("after", after)):
        facts = results.facts
        print(
            f"{name:<7} {papers.title(results)}, flashattn_lite {facts['library']['version']} "
            f"({facts['library']['commit'] or 'no commit'}), torch {facts['torch']['version']}: "
            f"{results.command}"
        )
    found = changes(before, after)
    if not found:
        print("the two have no case in common")
        return 2
    clock = common_clock(before, after)
    print(
        f"\nbaseline / ours by {clock} time; changes beyond {TOLERANCE:.0%} and outside each "
        "other's quartiles are named"
    )
    print(tables.terminal(*table(found), left=2))
    means = {g.group: g.mean for g in groups_of(before.rows, clock)}
    rows = [
        [f"{g.group.suite}: {g.group.title}", f"{means[g.group]:.2f}", f"{g.mean:.2f}"]
        for g in groups_of(after.rows, clock)
        if g.group in means
    ]
    if rows:
        print("\n" + tables.terminal(["geometric mean", "before", "after"], rows))
    for line in unmatched(before, after):
        print(line)
    slower = sum(change.verdict == "slower" for change in found)
    faster = sum(change.verdict == "faster" for change in found)
    print(f"\n{slower} slower, {faster} faster, of {len(found)}")
    return 1 if slower else 0
