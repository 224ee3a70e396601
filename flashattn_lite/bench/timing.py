"""Taking time fairly: contenders run in turn (A B A B ...) in one process, each round is kept, and
the figure is the median of the per-round ratios with its quartiles.

A machine that slows down for a while slows both sides of the same round, so it moves a ratio much
less than it moves a time. On a busy machine one thread's CPU time is steadier still.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """A function to time. ``threads``, if given, is set before each of its samples, untimed."""

    run: Run
    threads: int | None = None


@dataclass
class Samples:
    """Seconds per call, one entry a round. ``cpu`` is the whole process's CPU time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def of(self, clock: str) -> list[float]:
        return self.cpu if clock == "cpu" else self.wall

    def median(self, clock: str = "wall") -> float:
        return statistics.median(self.of(clock))


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of per-round ratios; above 1 means that ours is faster."""

    median: float
    q1: float
    q3: float


class Clock(Protocol):
    """Measures ``calls`` calls of a function: (wall seconds, CPU seconds), in total."""

    def measure(self, run: Run, calls: int) -> tuple[float, float]: ...


class CpuClock:
    """time.perf_counter, and time.process_time beside it."""

    def measure(self, run: Run, calls: int) -> tuple[float, float]:
        cpu = time.process_time()
        wall = time.perf_counter()
        for _ in range(calls):
            run()
        wall = time.perf_counter() - wall
        return wall, time.process_time() - cpu


class HostClock:
    """What a call costs the calling thread on CUDA: the device's work is waited for untimed."""

    def measure(self, run: Run, calls: int) -> tuple[float, float]:
        wall, cpu = CpuClock().measure(run, min(calls, 500))  # the launch queue is not endless
        torch.cuda.synchronize()
        scale = calls / min(calls, 500)
        return wall * scale, cpu * scale


class CudaClock:
    """CUDA events around each call; with ``cold_l2`` the L2 cache is overwritten before each."""

    def __init__(self, device: torch.device, cold_l2: bool = True) -> None:
        self.device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size
        # Four times the cache; it also keeps the device busy while the next call is enqueued.
        self.flush = torch.empty(4 * size, dtype=torch.int8, device=device) if cold_l2 else None

    def measure(self, run: Run, calls: int) -> tuple[float, float]:
        cpu = time.process_time()
        events = []
        for _ in range(calls):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            if self.flush is not None:
                self.flush.zero_()
            begin.record()
            run()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(self.device)
        wall = sum(begin.elapsed_time(end) for begin, end in events) / 1e3
        return wall, time.process_time() - cpu


@dataclass(frozen=True)
class Rounds:
    """How long to measure: until ``budget_s`` is spent, but at least and at most so many rounds
    (three do when four times the budget is spent); a sample repeats its call until it takes
    ``min_sample_s``."""

    budget_s: float = 0.8
    at_least: int = 5
    at_most: int = 101
    min_sample_s: float = 0.002

    def __post_init__(self) -> None:
        if not 1 <= self.at_least <= self.at_most:
            raise ValueError(
                f"Rounds: at_least is {self.at_least} and at_most {self.at_most}; "
                "they must be 1 <= at_least <= at_most"
            )

    def enough(self, done: int, spent_s: float) -> bool:
        long = done >= min(3, self.at_least) and spent_s >= 4 * self.budget_s > 0
        return long or (done >= self.at_least and spent_s >= self.budget_s)


def interleave(
    contenders: Mapping[str, Contender], clock: Clock, rounds: Rounds
) -> dict[str, Samples]:
    """Times the contenders in turn, in the mapping's order, round after round.

    Every contender runs untimed first: that warms it up and says how many calls make a sample. So
    it does before every sample of several calls.
    """
    calls = {}
    for name, contender in contenders.items():
        _enter(contender)
        contender.run()
        once, _ = clock.measure(contender.run, 1)
        calls[name] = max(1, min(100_000, round(rounds.min_sample_s / max(once, 1e-9))))
    samples = {name: Samples() for name in contenders}
    spent = 0.0
    for done in range(rounds.at_most):
        if rounds.enough(done, spent):
            break
        for name, contender in contenders.items():
            _enter(contender)
            if calls[name] > 1:  # what the others left in the caches is no part of a short call
                contender.run()
            wall, cpu = clock.measure(contender.run, calls[name])
            samples[name].wall.append(wall / calls[name])
            samples[name].cpu.append(cpu / calls[name])
            spent += wall
    return samples


def _enter(contender: Contender) -> None:
    """Sets the number of threads; when it changes, one untimed call lets the pool adapt."""
    if contender.threads is not None and contender.threads != torch.get_num_threads():
        torch.set_num_threads(contender.threads)
        contender.run()


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Per-round baseline time / our time, as median and quartiles.

    >>> ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    Ratio(median=2.0, q1=2.0, q3=2.5)
    """
    if not baseline or len(baseline) != len(ours):
        raise ValueError(
            f"ratio: {len(baseline)} baseline rounds against {len(ours)}; they must be paired"
        )
    each = [b / max(o, 1e-12) for b, o in zip(baseline, ours, strict=True)]
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    q1, median, q3 = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(median, q1, q3)


def geometric_mean(values: Sequence[float]) -> float:
    """
    >>> geometric_mean([1.0, 4.0])
    2.0
    """
    return statistics.geometric_mean(values)
