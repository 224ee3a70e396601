"""Two results of the same suites: what became slower, what became faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashattn_lite.bench import tables
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.results import Results, Row, groups_of

TOLERANCE = 0.05  # a figure must change by more than this, and leave the other's quartiles


@dataclass(frozen=True)
class Change:
    """One case in both results; the figures are baseline / ours."""

    case: Case
    before: Row
    after: Row

    @property
    def factor(self) -> float:
        before, after = self.before.figure(), self.after.figure()
        assert before is not None and after is not None
        return after / before

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "": beyond the tolerance, and outside each other's quartiles."""
        a = self.before.ratios[self.before.baseline]
        b = self.after.ratios[self.after.baseline]
        if self.factor < 1 - TOLERANCE and b.q3 < a.q1:
            return "slower"
        if self.factor > 1 + TOLERANCE and b.q1 > a.q3:
            return "faster"
        return ""


def changes(before: Results, after: Results) -> list[Change]:
    """The cases that both measured against the same baseline."""
    known = {row.case: row for row in before.rows if row.figure() is not None}
    return [
        Change(row.case, known[row.case], row)
        for row in after.rows
        if row.case in known
        and row.figure() is not None
        and known[row.case].baseline == row.baseline
    ]


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
                *(str(change.case.threads), f"{change.before.figure():.2f}"),
                *(f"{change.after.figure():.2f}", f"{sign}{change.factor:.2f}"),
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
            f"{name:<7} {facts['cpu']['model']}, flashattn_lite {facts['library']['version']} "
            f"({facts['library']['commit'] or 'no commit'}), torch {facts['torch']['version']}: "
            f"{results.command}"
        )
    found = changes(before, after)
    if not found:
        print("the two have no case in common")
        return 2
    print("\nbaseline / ours; changes beyond 5 % and outside each other's quartiles are named")
    print(tables.terminal(*table(found), left=2))
    means = {g.group: g.mean for g in groups_of(before.rows)}
    rows = [
        [f"{g.group.suite}: {g.group.title}", f"{means[g.group]:.2f}", f"{g.mean:.2f}"]
        for g in groups_of(after.rows)
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
