"""Plays a workload against a server with the OpenAI API's routes: an open loop over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

from flashattn_lite.bench.serving.drive import Report
from flashattn_lite.bench.serving.measures import Served
from flashattn_lite.bench.serving.workload import Ask
from flashattn_lite.serving._extras import require

__all__ = ["play_http", "served_model"]


def served_model(url: str) -> tuple[str, int | None]:
    """The name of the model that a server has, and its context in tokens if it says so.

    Raises:
        OSError: nothing answers there, or not as such a server does.
    """
    httpx = require("httpx")
    try:
        card = httpx.get(f"{url}/v1/models", timeout=10).raise_for_status().json()["data"][0]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise OSError(f"--url {url}: /v1/models: {type(error).__name__}: {error}") from None
    return str(card["id"]), card.get("max_model_len")


def play_http(
    url: str,
    model: str,
    asks: Sequence[Ask],
    prompts: Sequence[Sequence[int]],
    *,
    report: Report = lambda done, open_: None,
) -> list[Served]:
    """Sends each request when its time has come and notes when its events come.

    Args:
        url: of the server, without /v1.
        model: the name to ask for.
        asks: in the order of their arrivals.
        prompts: token ids of each.
        report: called after each answer with how many have ended, and how many are open.

    Returns: one for each ask, in order. What is answered with an error has a failure.
    """
    return asyncio.run(_Player(url, model, report).play(asks, prompts))


class _Player:
    def __init__(self, url: str, model: str, report: Report) -> None:
        self.url, self.model, self.report = url, model, report
        self.begin = 0.0
        self.open = self.ended = 0

    async def play(self, asks: Sequence[Ask], prompts: Sequence[Sequence[int]]) -> list[Served]:
        httpx = require("httpx")
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits) as client:
            self.begin = time.monotonic()
            tasks = [self._ask(client, *pair) for pair in zip(asks, prompts, strict=True)]
            return list(await asyncio.gather(*tasks))

    async def _ask(self, client: Any, ask: Ask, prompt: Sequence[int]) -> Served:
        served = Served(ask.arrival_s, ask.prompt)
        await asyncio.sleep(max(0.0, ask.arrival_s - self._now()))
        self.open += 1
        body = {
            **{"model": self.model, "prompt": list(prompt), "max_tokens": ask.output},
            **{"temperature": 0, "ignore_eos": True},
            **{"stream": True, "stream_options": {"include_usage": True}},
        }
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    served.failure = _message(answer.json(), answer.status_code)
                else:
                    await self._read(answer, served)
        except (require("httpx").HTTPError, ValueError) as error:
            served.failure = f"{type(error).__name__}: {error}"
        served.finish_s = self._now()
        self.open, self.ended = self.open - 1, self.ended + 1
        self.report(self.ended, self.open)
        return served

    async def _read(self, answer: Any, served: Served) -> None:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                served.failure = _message(event, 200)
            elif event["choices"]:
                served.times_s.append(self._now())
                served.tokens.append(1)
            elif event.get("usage") and served.tokens:
                # An event may carry no text yet, and is not sent: its token came with the next.
                served.tokens[-1] += event["usage"]["completion_tokens"] - served.output

    def _now(self) -> float:
        return time.monotonic() - self.begin


def _message(body: Any, status: int) -> str:
    """
    >>> _message({"error": {"message": "too long"}}, 400)
    'too long'
    """
    error = body.get("error") if isinstance(body, dict) else None
    return str(error["message"]) if isinstance(error, dict) else f"status {status}"
