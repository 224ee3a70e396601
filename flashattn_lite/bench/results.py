"""The JSON of a run: everything needed to judge it, to compare it and to print it again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashattn_lite.bench.aims import GROUPS, Group
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.timing import Ratio, Samples, geometric_mean

FLASH1 = "flash1"  # our FlashAttention (1) engine among the samples, on CUDA
KIND, VERSION = "flashattn_lite-bench", 1


@dataclass
class Row:
    """One case. ``samples`` are seconds per call (bytes, in the memory suite) by contender."""

    case: Case
    samples: dict[str, Samples] = field(default_factory=dict)
    ours: str = ""
    baseline: str = ""
    ratios: dict[str, Ratio] = field(default_factory=dict)  # contender / ours, by wall clock
    cpu_ratio: Ratio | None = None  # baseline / ours by CPU time, with one thread
    peak: float | None = None  # useful FLOP/s of the FMA peak; decoding: bytes/s of the read rate
    error: float | None = None  # of the output against float64, largest element
    baseline_error: float | None = None
    budget_used: float | None = None  # the worst error as a share of what is allowed
    moved: dict[str, int] = field(default_factory=dict)  # bytes, by io_model.py; suite io
    notes: list[str] = field(default_factory=list)
    failure: str | None = None

    def ratio(self, clock: str = "wall") -> Ratio | None:
        """Baseline / ours."""
        if clock == "cpu" and self.cpu_ratio is not None:
            return self.cpu_ratio
        return self.ratios.get(self.baseline)

    def figure(self, clock: str = "wall") -> float | None:
        """The row's headline: the median of ``ratio``."""
        found = self.ratio(clock)
        return None if found is None else found.median

    def loses(self, clock: str = "wall") -> bool:
        figure = self.figure(clock)
        return figure is not None and figure < 1.0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "case": self.case.as_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        return cls(
            **{
                **data,
                "case": Case.from_json(data["case"]),
                "samples": {name: Samples(**s) for name, s in data["samples"].items()},
                "ratios": {name: Ratio(**r) for name, r in data["ratios"].items()},
                "cpu_ratio": None if data["cpu_ratio"] is None else Ratio(**data["cpu_ratio"]),
            }
        )


@dataclass
class Results:
    """One run of the benchmark."""

    command: str
    created: str  # ISO 8601, UTC
    facts: dict[str, Any]  # machine.describe()
    settings: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # competitor: why it took no part
    rows: list[Row] = field(default_factory=list)

    @property
    def clock(self) -> str:
        return str(self.settings.get("clock", "wall"))

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.failure is not None]

    def suites(self) -> list[str]:
        return list(dict.fromkeys(row.case.suite for row in self.rows))

    def save(self, path: Path) -> None:
        data = {**asdict(self), "rows": [row.as_json() for row in self.rows]}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.new")  # never half a file, whenever the run is killed
        whole.write_text(json.dumps({"kind": KIND, "version": VERSION, **data}, indent=1) + "\n")
        whole.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise ResultsError(f"{path} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.pop("kind", None) != KIND:
            raise ResultsError(f"{path} is not a result of `flashattn-lite bench`")
        version = data.pop("version", None)
        if version != VERSION:
            raise ResultsError(f"{path} has version {version}; this program reads {VERSION}")
        try:
            return cls(**{**data, "rows": [Row.from_json(row) for row in data["rows"]]})
        except (KeyError, TypeError) as error:
            raise ResultsError(f"{path} is damaged: {error}") from None


class ResultsError(Exception):
    """A file that cannot be read as results; the message says which and why."""


@dataclass(frozen=True)
class GroupResult:
    """A group's geometric mean beside its aim."""

    group: Group
    mean: float
    least: float
    rows: int

    @property
    def met(self) -> bool | None:
        return None if self.group.aim is None else self.mean >= self.group.aim


def groups_of(rows: Iterable[Row], clock: str = "wall") -> list[GroupResult]:
    """Every group that has at least one measured row, in the order of the aims."""
    rows = list(rows)
    found = []
    for group in GROUPS:
        figures = [row.figure(clock) for row in rows if group.contains(row.case)]
        measured = [figure for figure in figures if figure is not None]
        if measured:
            mean = geometric_mean(measured)
            found.append(GroupResult(group, mean, min(measured), len(measured)))
    return found
