"""The latencies of a played workload as an SVG; nothing is drawn where matplotlib is missing."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashattn_lite.bench.serving.measures import Served

__all__ = ["draw"]


def draw(served: Sequence[Served], path: Path, title: str) -> bool:
    """Distributions of TTFT, TPOT and ITL, open requests over time; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("svg")
    pyplot.rcParams["svg.hashsalt"] = "flashattn_lite"  # the same data gives the same file
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    answered = [s for s in served if s.failure is None and s.times_s]
    for name, values in (
        ("TTFT", [s.ttft_s for s in answered]),
        ("TPOT", [t for s in answered if (t := s.tpot_s) is not None]),
        ("ITL", [gap for s in answered for gap in s.gaps_s]),
    ):
        ordered = sorted(max(v, 1e-5) * 1e3 for v in values)[:: max(1, len(values) // 1000)]
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        left.plot(ordered, shares, label=name)
    left.set_xscale("log")
    left.set_xlabel("ms")
    left.set_ylabel("share of requests (ITL: of gaps)")
    left.axhline(0.99, color="black", linewidth=0.5)
    left.grid(alpha=0.3)
    left.legend()
    changes = sorted(
        [(s.arrival_s, 1) for s in answered] + [(s.finish_s or 0.0, -1) for s in answered]
    )
    times, counts, now = [], [], 0
    for moment, change in changes:
        now += change
        times.append(moment)
        counts.append(now)
    thin = max(1, len(times) // 1000)
    right.step(times[::thin], counts[::thin], where="post", linewidth=0.8)
    right.set_xlabel("s")
    right.set_ylabel("open requests")
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
