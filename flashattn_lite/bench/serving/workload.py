"""Who asks for what, and when: Poisson arrivals, or a recorded trace, thinned and scaled."""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

__all__ = ["Ask", "Scale", "poisson", "read_trace", "token_ids"]


@dataclass(frozen=True)
class Ask:
    """One request of a workload.

    Args:
        arrival_s: seconds after the first one's arrival.
        prompt: tokens to read.
        output: tokens to write.
    """

    arrival_s: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Scale:
    """How a trace becomes small enough for a machine.

    Args:
        every: keep one request of so many.
        tokens: lengths are multiplied by it, rounded up.
        speed: times between arrivals are divided by it.
        longest: tokens of a prompt and an output together; longer ones are cut, the prompt first
            to no less than half of it.
    """

    every: int = 1
    tokens: float = 1.0
    speed: float = 1.0
    longest: int = 1024

    def of(self, asks: Sequence[Ask]) -> list[Ask]:
        """
        >>> Scale(every=2, tokens=0.1, speed=10).of([Ask(0, 95, 20), Ask(1, 9, 9), Ask(5, 200, 1)])
        [Ask(arrival_s=0.0, prompt=10, output=2), Ask(arrival_s=0.5, prompt=20, output=1)]
        """
        kept = asks[:: self.every]
        first = kept[0].arrival_s if kept else 0.0
        found = []
        for ask in kept:
            prompt, output = (max(1, math.ceil(self.tokens * n)) for n in (ask.prompt, ask.output))
            prompt = min(prompt, max(self.longest // 2, self.longest - output))
            output = min(output, self.longest - prompt)
            found.append(Ask((ask.arrival_s - first) / self.speed, prompt, output))
        return found


def poisson(count: int, rate: float, prompt: int, output: int, seed: int) -> list[Ask]:
    """Independent arrivals, `rate` a second on average; lengths vary evenly from half of the mean
    to one and a half times it.

    >>> asks = poisson(1000, 5.0, 100, 10, seed=0)
    >>> 180 < asks[-1].arrival_s < 220, min(a.prompt for a in asks), max(a.prompt for a in asks)
    (True, 50, 150)
    """
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.rand(count, generator=generator, dtype=torch.float64).neg().log1p().neg() / rate
    arrivals = (gaps.cumsum(0) - gaps[0]).tolist()

    def lengths(mean: int) -> list[int]:
        low, high = max(1, mean // 2), mean + mean // 2
        return torch.randint(low, high + 1, (count,), generator=generator).tolist()

    prompts, outputs = lengths(prompt), lengths(output)
    return [Ask(*values) for values in zip(arrivals, prompts, outputs, strict=True)]


def read_trace(path: Path) -> list[Ask]:
    """The requests of a CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens, as in the
    Azure Public Dataset (Patel et al., Splitwise, ISCA 2024).

    Raises:
        ValueError: when a column or a value is not as it should be; it says which, and where.
    """
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        for name in ("TIMESTAMP", "ContextTokens", "GeneratedTokens"):
            if name not in (rows.fieldnames or ()):
                raise ValueError(f"--trace {path}: there is no column {name}")
        for row in rows:
            try:
                moment = _seconds(row["TIMESTAMP"])
                found.append(Ask(moment, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
            except (ValueError, TypeError) as error:
                raise ValueError(f"--trace {path}, line {rows.line_num}: {error}") from None
    if not found:
        raise ValueError(f"--trace {path}: there is no request in it")
    found.sort(key=lambda ask: ask.arrival_s)
    first = found[0].arrival_s
    return [replace(ask, arrival_s=ask.arrival_s - first) for ask in found]


def _seconds(text: str) -> float:
    """Of a timestamp with up to seven digits after the point (datetime takes six).

    >>> _seconds("2023-11-16 18:17:04.0319600") - _seconds("2023-11-16 18:17:03.9799600")
    0.05200004577636719
    """
    whole, _, part = text.partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.timezone.utc)
    return moment.timestamp() + float(f"0.{part or 0}")


def token_ids(asks: Sequence[Ask], vocab: int, *, shared: float, seed: int) -> list[list[int]]:
    """Random prompts; the first `shared` of each is the same in all, as a system prompt is."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(1, vocab, (count,), generator=generator).tolist()

    common = draw(max((ask.prompt for ask in asks), default=0))
    found = []
    for ask in asks:
        begin = min(int(shared * ask.prompt), ask.prompt - 1)
        found.append(common[:begin] + draw(ask.prompt - begin))
    return found
