"""What an engine did, as lines of JSON, and doing it again.

A step depends on the requests and on when they came, counted in steps, and on nothing else: not on
the clock. So a recorded trace replays exactly: the same chunks, the same preemptions, the same
tokens; a difference is a bug, or another model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from flashattn_lite.serving.request import Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from flashattn_lite.serving.engine import Engine
    from flashattn_lite.serving.engine_config import EngineConfig
    from flashattn_lite.serving.scheduler import Step

__all__ = ["TraceError", "TraceWriter", "replay"]


class TraceError(RuntimeError):
    """A replay that differs from its record; it says in which step and how."""


class TraceWriter:
    """Writes an engine's lines: its configuration, requests and aborts as they take effect, steps.

    Args:
        file: text, open for writing.
        config: the engine's.
    """

    def __init__(self, file: IO[str], config: EngineConfig) -> None:
        self._file = file
        self._write({"event": "engine", "config": asdict(config)})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def submit(self, number: int, request: Request) -> None:
        """A request joined the queue before this step."""
        params = asdict(request.params) | {"seed": request.seed}
        self._write(
            {
                **{"event": "submit", "step": number, "time": request.arrival},
                **{"id": request.request_id, "tokens": request.tokens, "params": params},
            }
        )

    def abort(self, number: int, request_id: str) -> None:
        """A request was aborted before this step."""
        self._write({"event": "abort", "step": number, "id": request_id})

    def step(
        self,
        number: int,
        time: float,
        step: Step,
        outputs: Sequence[RequestOutput],
        stats: dict[str, int | float],
    ) -> None:
        """What a step did."""
        facts = _facts(step, outputs, stats)
        line = {"event": "step", "step": number, "time": time, **facts}
        self._write(line)
        self._file.flush()


def _facts(
    step: Step, outputs: Sequence[RequestOutput], stats: dict[str, int | float]
) -> dict[str, Any]:
    """What a replay must repeat: what was run, what came out, and how full the engine was."""
    return {
        "chunks": [[c.request.request_id, c.start, c.count] for c in step.chunks],
        "preempted": [request.request_id for request in step.preempted],
        "tokens": {o.request_id: list(o.token_ids) for o in outputs if o.token_ids},
        "finished": {o.request_id: o.finish_reason for o in outputs if o.finished},
        **{name: stats[name] for name in ("waiting", "running", "free_pages")},
    }


def replay(lines: Iterable[str], engine: Engine) -> int:
    """Runs a trace on a new engine of the same configuration and model.

    Args:
        lines: of the trace.
        engine: has served nothing yet.

    Returns: the number of steps.

    Raises:
        TraceError: at the first difference.
    """
    recorder = _Recorder()
    steps = 0
    for text in lines:
        line = json.loads(text)
        event = line["event"]
        if event == "engine":
            mine = json.loads(json.dumps(asdict(engine.config)))
            if line["config"] != mine:
                raise TraceError(f"the trace's engine is {line['config']}, this one {mine}")
            engine.trace = recorder
        elif event == "submit":
            engine.submit(line["tokens"], SamplingParams(**line["params"]), request_id=line["id"])
        elif event == "abort":
            engine.abort(line["id"])
        else:
            engine.step()
            steps += 1
            expected = {name: line[name] for name in recorder.facts}
            if recorder.facts != expected:
                raise TraceError(
                    f"step {line['step']} was {json.dumps(expected)}, "
                    f"is now {json.dumps(recorder.facts)}"
                )
    return steps


class _Recorder(TraceWriter):
    """Keeps a step's facts instead of writing them."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def _write(self, line: dict[str, Any]) -> None:
        if line["event"] == "step":
            outside = ("event", "step", "time")
            self.facts = {name: value for name, value in line.items() if name not in outside}

    def step(
        self,
        number: int,
        time: float,
        step: Step,
        outputs: Sequence[RequestOutput],
        stats: dict[str, int | float],
    ) -> None:
        self.facts = _facts(step, outputs, stats)
