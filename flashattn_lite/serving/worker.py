"""The engine on a thread of its own, its outputs as asynchronous streams on an event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from flashattn_lite.serving.engine import Engine
from flashattn_lite.serving.request import RequestOutput, SamplingParams

__all__ = ["Stream", "Unavailable", "Worker"]

LOG = logging.getLogger("flashattn_lite.serving")


class Unavailable(RuntimeError):  # noqa: N818  (a state, not a fault of the caller)
    """The engine takes no requests now: too many wait, it is closing, or it has failed."""


class Stream:
    """The outputs of requests that were submitted together, in the order in which they come:
    ``async for index, output in stream``, index telling which of the requests."""

    def __init__(self, worker: Worker, count: int) -> None:
        self.worker = worker
        self.queue: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue()
        self.open: dict[str, int] = {worker.new_id(): index for index in range(count)}

    def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        return self._outputs()

    async def _outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        while self.open:
            index, output = await self.queue.get()
            if output.finished:
                self.open.pop(output.request_id, None)
            yield index, output

    def close(self) -> None:
        """Aborts what has not ended: nobody listens any more."""
        for request_id in self.open:
            self.worker.forget(request_id)
        self.open.clear()


class Worker:
    """Runs ``engine.step`` on a thread while there is work. Everything else here is called on the
    event loop's thread.

    Args:
        engine: nobody else may step it.
        max_open: requests that may be in the engine at once, waiting or running.
        observe: called with (what, seconds): "first_token", "next_token" and "request" latencies.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_open: int = 1024,
        observe: Callable[[str, float], None] = lambda what, seconds: None,
    ) -> None:
        self.engine, self.max_open, self.observe = engine, max_open, observe
        self.failure: BaseException | None = None
        self._streams: dict[str, _Open] = {}
        self._numbers = itertools.count()
        self._wake, self._closing = threading.Event(), False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="flashattn_lite engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; outputs are delivered on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def new_id(self) -> str:
        return f"request-{next(self._numbers)}"

    async def submit(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> Stream:
        """Queues requests, all of them or none.

        Args:
            requests: (prompt's token ids, how to sample) each.

        Raises:
            RequestError: one can never be served.
            Unavailable: the engine takes none now.
        """
        if self.failure is not None:
            raise Unavailable(f"the engine has failed: {self.failure}")
        if self._closing:
            raise Unavailable("the server is shutting down")
        if self.open + len(requests) > self.max_open:
            raise Unavailable(
                f"{self.open} requests are open and {len(requests)} more would be above the limit "
                f"of {self.max_open}; try again later"
            )
        stream = Stream(self, len(requests))
        now = time.monotonic()
        for request_id, index in stream.open.items():
            self._streams[request_id] = _Open(stream, index, begin=now)
        try:
            for request_id, (prompt, params) in zip(list(stream.open), requests, strict=True):
                self.engine.submit(prompt, params, request_id=request_id)
        except BaseException:
            stream.close()
            raise
        finally:
            self._wake.set()
        return stream

    def forget(self, request_id: str) -> None:
        """Aborts a request whose outputs nobody will read."""
        if self._streams.pop(request_id, None) is not None:
            self.engine.abort(request_id)
            self._wake.set()

    def stop(self) -> None:
        """Takes no more, and ends what is open with finish_reason "abort"."""
        self._closing = True
        for request_id in list(self._streams):
            self.engine.abort(request_id)
        self._wake.set()

    async def close(self, timeout_s: float = 10.0) -> None:
        """``stop``, and the thread's end."""
        self.stop()
        await asyncio.to_thread(self._thread.join, timeout_s)

    # ---- the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                while self.engine.has_work():
                    outputs = self.engine.step()
                    if outputs:
                        self._call(self._deliver, outputs)
                if self._closing:
                    return
                self._wake.wait()
        except BaseException as error:
            LOG.exception("the engine has failed; the server answers 503 from now on")
            self.failure = error
            self._call(self._fail, f"the engine has failed: {error}")

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the loop is closed: nobody listens
            LOG.debug("outputs after the event loop's end are dropped")

    # ---- on the event loop -----------------------------------------------------------------------

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        now = time.monotonic()
        for output in outputs:
            request = self._streams.get(output.request_id)
            if request is None:  # aborted meanwhile
                continue
            if output.token_ids:
                kind = "first_token" if request.last is None else "next_token"
                self.observe(kind, now - (request.last or request.begin))
                request.last = now
            if output.finished:
                del self._streams[output.request_id]
                self.observe("request", now - request.begin)
            request.stream.queue.put_nowait((request.index, output))

    def _fail(self, message: str) -> None:
        self._deliver(
            [RequestOutput(i, finish_reason="error", error=message) for i in list(self._streams)]
        )


class _Open:
    """A request that has not ended: where its outputs go, and when it last had one."""

    def __init__(self, stream: Stream, index: int, begin: float) -> None:
        self.stream, self.index, self.begin = stream, index, begin
        self.last: float | None = None
