"""A progress line with the time that is left, on stderr: rich's bar where rich is installed, plain
text otherwise, and a line now and then where stderr is no terminal."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """``with Progress(total_weight) as p: p.step("what runs now", weight)``.

    Weights are estimated costs: the time left is the time spent, scaled by the weight left.
    """

    QUIET_S = 15.0  # between lines where stderr is no terminal

    def __init__(self, total: float, title: str = "", stream: TextIO | None = None) -> None:
        self.total, self.title, self.stream = max(total, 1e-9), title, stream or sys.stderr
        self.done = self.pending = 0.0
        self.begin = self.last = time.monotonic()
        self.bar: Any = None
        self.terminal = self.stream.isatty()

    def __enter__(self) -> Progress:
        if self.terminal:
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return self
            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.percentage:>3.0f} %"),
                progress.TimeRemainingColumn(),
                console=Console(file=self.stream),
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total)
        return self

    def step(self, what: str, weight: float) -> None:
        """The step before this one is done; this one has begun."""
        self.done += self.pending
        self.pending = weight
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=self._text(what))
        elif self.terminal:
            columns = shutil.get_terminal_size().columns
            self.stream.write("\r\x1b[K" + self._line(what)[: columns - 1])
            self.stream.flush()
        elif time.monotonic() - self.last >= self.QUIET_S:
            self.last = time.monotonic()
            print(self._line(what), file=self.stream, flush=True)

    def _text(self, what: str) -> str:
        return f"{self.title}: {what}" if self.title else what

    def _line(self, what: str) -> str:
        share = self.done / self.total
        spent = time.monotonic() - self.begin
        left = f", about {_duration(spent / share - spent)} left" if share > 0.02 else ""
        filled = round(20 * share)
        return f"[{'#' * filled}{'.' * (20 - filled)}] {share:4.0%}{left}  {self._text(what)}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def _duration(seconds: float) -> str:
    """
    >>> _duration(8), _duration(125)
    ('8 s', '2 min 05 s')
    """
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
