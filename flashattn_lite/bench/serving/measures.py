"""What a served workload was like for those who asked: latencies, throughput, goodput.

TTFT is the first token's time after the request was sent, waiting included. TPOT is the mean time a
token after the first; ITL are all gaps between a request's outputs, whose high percentiles show the
stalls that a mean hides. Goodput counts requests within every limit, per second (DistServe, Zhong
et al., 2024, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["PERCENTILES", "Limits", "Served", "Summary", "percentile", "summarise"]

PERCENTILES = (50, 90, 99)


@dataclass
class Served:
    """One request as it went: times in seconds on the clock of the arrivals.

    Args:
        arrival_s: when it was sent.
        times_s: when each of its outputs came; tokens: how many tokens with each.
        finish_s: when it ended; None: it has not.
        failure: why it has no answer.
    """

    arrival_s: float
    prompt: int
    times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_s: float | None = None
    failure: str | None = None

    @property
    def output(self) -> int:
        return sum(self.tokens)

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """None with one token."""
        if self.output < 2:
            return None
        return (self.times_s[-1] - self.times_s[0]) / (self.output - self.tokens[0])

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)]


@dataclass(frozen=True)
class Limits:
    """What a request must keep to count for goodput, in seconds."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1

    def kept_by(self, served: Served) -> bool:
        tpot = served.tpot_s
        return served.ttft_s <= self.ttft_s and (tpot is None or tpot <= self.tpot_s)


@dataclass
class Summary:
    """Of one run. Seconds; percentiles by name, such as "p50"."""

    requests: int
    failures: dict[str, int]
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    itl_s: dict[str, float]
    limits: Limits
    goodput_per_s: float
    attainment: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(served: Sequence[Served], limits: Limits) -> Summary:
    """
    >>> one = Served(0.0, 7, times_s=[0.5, 0.6, 0.8], tokens=[1, 1, 1], finish_s=0.8)
    >>> late = Served(0.0, 7, times_s=[2.0], tokens=[1], finish_s=2.0)
    >>> s = summarise([one, late], Limits(ttft_s=1.0, tpot_s=0.2))
    >>> s.goodput_per_s, s.attainment, round(s.tpot_s["p50"], 3), s.output_tokens_per_s
    (0.5, 0.5, 0.15, 2.0)
    """
    answered = [s for s in served if s.failure is None and s.times_s]
    failures: dict[str, int] = {}
    for s in served:
        if s.failure is not None:
            failures[s.failure] = failures.get(s.failure, 0) + 1
    begin = min((s.arrival_s for s in served), default=0.0)
    duration = max((s.finish_s or s.arrival_s for s in served), default=0.0) - begin
    duration = max(duration, 1e-9)
    good = sum(limits.kept_by(s) for s in answered)
    output = sum(s.output for s in answered)
    return Summary(
        requests=len(served),
        failures=failures,
        duration_s=duration,
        prompt_tokens=sum(s.prompt for s in answered),
        output_tokens=output,
        requests_per_s=len(answered) / duration,
        output_tokens_per_s=output / duration,
        ttft_s=_percentiles(s.ttft_s for s in answered),
        tpot_s=_percentiles(t for s in answered if (t := s.tpot_s) is not None),
        itl_s=_percentiles(gap for s in answered for gap in s.gaps_s),
        limits=limits,
        goodput_per_s=good / duration,
        attainment=good / max(1, len(served)),
    )


def _percentiles(values: Iterable[float]) -> dict[str, float]:
    found = sorted(values)
    return {f"p{p}": percentile(found, p) for p in PERCENTILES} if found else {}


def percentile(ordered: Sequence[float], p: float) -> float:
    """Of values in order, with linear interpolation.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50), percentile([5.0], 99)
    (2.5, 5.0)
    """
    place = (len(ordered) - 1) * p / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
