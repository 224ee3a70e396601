"""A server of flashattn_lite.serving on 127.0.0.1, on a thread of its own, for tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI


@contextlib.contextmanager
def serving(app: FastAPI, **options: Any) -> Iterator[str]:
    """Its address, as http://127.0.0.1:PORT."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=20, **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server starts")
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Fails when the condition does not come true in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"after {timeout_s} s it is not true that {what}"
        time.sleep(0.005)
