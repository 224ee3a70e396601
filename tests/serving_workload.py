"""Random requests for an engine, and what must be left after them, for tests."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from flashattn_lite.serving import Completion, Engine, EngineConfig, SamplingParams


def drive(engine: Engine, until: int = 10_000) -> dict[str, Completion]:
    """Steps until there is nothing to do; the results by id."""
    results: dict[str, Completion] = defaultdict(lambda: Completion("", []))
    for _ in range(until):
        if not engine.has_work():
            return results
        for output in engine.step():
            results[output.request_id].add(output)
    raise AssertionError(f"after {until} steps there is still work: {engine.stats()}")


def no_leak(engine: Engine) -> None:
    assert engine.pool.free_pages == engine.pool.num_pages
    assert engine.pool.sequences == []
    stats = engine.stats()
    assert stats["waiting"] == stats["running"] == stats["lent"] == 0


class Workload:
    """Random requests with shared beginnings, greedy and seeded, and when they come and go."""

    def __init__(self, seed: int, count: int) -> None:
        self.random = rng = random.Random(seed)
        stems = [[rng.randrange(256) for _ in range(60)] for _ in range(2)]
        self.prompts, self.params = [], []
        for i in range(count):
            stem = rng.choice(stems)[: rng.choice([0, 7, 16, 33, 48, 60])]
            self.prompts.append(stem + [rng.randrange(256) for _ in range(rng.randrange(1, 25))])
            self.params.append(
                SamplingParams(
                    max_tokens=rng.randrange(1, 24),
                    temperature=rng.choice([0, 0, 0.7, 1.3]),
                    top_k=rng.choice([0, 0, 5]),
                    top_p=rng.choice([1, 0.8]),
                    min_p=rng.choice([0, 0.05]),
                    repetition_penalty=rng.choice([1, 1.2]),
                    seed=i,
                    ignore_eos=rng.random() < 0.8,
                )
            )

    def alone(self, model: Any, **config: Any) -> list[list[int]]:
        """Each request by itself, in an engine that has seen nothing."""
        sizes = {"num_pages": 64, "page_size": 4, "prefix_cache": False} | config
        return [
            Engine(model, None, EngineConfig(**sizes)).generate([p], s)[0].token_ids
            for p, s in zip(self.prompts, self.params, strict=True)
        ]

    def together(self, engine: Engine) -> dict[int, Completion]:
        """All of them, arriving over time; some are aborted on the way."""
        results: dict[int, Completion] = defaultdict(lambda: Completion("", []))
        names: dict[str, int] = {}
        queue = list(range(len(self.prompts)))
        while queue or engine.has_work():
            for _ in range(self.random.choice([0, 1, 3])):
                if queue:
                    i = queue.pop(0)
                    names[engine.submit(self.prompts[i], self.params[i])] = i
            if names and self.random.random() < 0.05:
                engine.abort(self.random.choice(list(names)))
            for output in engine.step():
                results[names[output.request_id]].add(output)
        return results
