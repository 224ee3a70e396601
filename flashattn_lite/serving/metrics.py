"""Prometheus metrics of a server: the engine's counters and gauges, and latencies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from flashattn_lite.serving.engine import Engine

__all__ = ["Metrics"]

GAUGES = ("waiting", "running", "pages", "free_pages", "cached_pages")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LATENCIES = {
    "first_token": ("time_to_first_token", "From a request's arrival to its first token."),
    "next_token": ("inter_token_latency", "Between two outputs of a request."),
    "request": ("request_latency", "From a request's arrival to its end."),
}


class Metrics:
    """One registry a server, so that several can live in a process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineStats(engine))
        self.latencies = {
            what: Histogram(
                f"flashattn_lite_{name}_seconds", help_, buckets=SECONDS, registry=self.registry
            )
            for what, (name, help_) in LATENCIES.items()
        }
        self.answers = Counter(
            "flashattn_lite_http_requests",
            "HTTP requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )

    def observe(self, what: str, seconds: float) -> None:
        """Takes one of LATENCIES, as a Worker reports them."""
        self.latencies[what].observe(seconds)

    def text(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self.registry)


class _EngineStats:
    """``Engine.stats`` at the moment of the scrape."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        stats: dict[str, Any] = self.engine.stats()
        for name, value in stats.items():
            words = f"The engine's {name.replace('_', ' ')}."
            family = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            yield family(f"flashattn_lite_{name}", words, value=value)
