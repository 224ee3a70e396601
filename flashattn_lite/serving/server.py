"""An HTTP server with the OpenAI API's routes on one engine.

POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health, GET /metrics. Errors
are OpenAI's JSON objects. A client that goes away takes its requests out of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashattn_lite._version import __version__
from flashattn_lite.serving.engine import Engine
from flashattn_lite.serving.metrics import Metrics
from flashattn_lite.serving.protocol import (
    Answer,
    ChatRequest,
    CompletionRequest,
    Usage,
    error_body,
)
from flashattn_lite.serving.request import (
    Completion,
    QueueFullError,
    RequestError,
    RequestOutput,
)
from flashattn_lite.serving.tokenizer import Tokenizer
from flashattn_lite.serving.worker import Stream, Unavailable, Worker

__all__ = ["Limits", "create_app", "run"]

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Args:
        body: bytes of a request's body.
        tokens: max_tokens of a choice.
        choices: prompts times n of a request.
        open: choices in the engine at once, of all clients; more are answered with 503.
    """

    body: int = 1 << 20
    tokens: int = 4096
    choices: int = 64
    open: int = 1024


def create_app(
    engine: Engine, tokenizer: Tokenizer, *, model: str, context: int, limits: Limits | None = None
) -> FastAPI:
    """The ASGI application; it owns the engine while it runs.

    Args:
        engine: nobody else may step it.
        tokenizer: the model's.
        model: the name that clients give.
        context: tokens of a request, prompt and output, that the engine takes.
        limits: what one client may ask for.
    """
    limits = limits or Limits()
    metrics = Metrics(engine)
    worker = Worker(engine, max_open=limits.open, observe=metrics.observe)
    service = _Service(worker, tokenizer, model, context, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.close()

    app = FastAPI(title="flashattn_lite", version=__version__, lifespan=lifespan)
    app.state.worker = worker
    app.add_middleware(_Guard, limit=limits.body, metrics=metrics)
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.answer(body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await service.answer(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.card()

    @app.get("/health")
    async def health() -> Response:
        if worker.failure is not None:
            return _error(503, f"the engine has failed: {worker.failure}", code="engine_failed")
        stats = engine.stats()
        return JSONResponse({"status": "ok", **{n: stats[n] for n in ("waiting", "running")}})

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def run(app: FastAPI, *, host: str, port: int, drain_s: float) -> None:
    """Serves until SIGTERM or SIGINT; then takes no new requests, lets the open ones go on for
    drain_s seconds, and answers with an error what is open after that. A second signal ends it."""

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(drain_s, app.state.worker.stop)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(drain_s) + 10,  # for clients that do not read
    )
    # Each of a step's operators gives up the GIL and waits for it while the event loop has it, up
    # to this long (5 ms by default, which is longer than a small model's whole step).
    sys.setswitchinterval(5e-5)
    # uvicorn raises the signal again when it is done; that it came is no failure.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    Server(config).run()


class _UnknownModel(Exception):  # noqa: N818
    pass


class _Service:
    """Answers completions and chats."""

    def __init__(
        self, worker: Worker, tokenizer: Tokenizer, model: str, context: int, limits: Limits
    ) -> None:
        self.worker, self.tokenizer, self.model = worker, tokenizer, model
        self.context, self.limits = context, limits

    def card(self) -> dict[str, Any]:
        """The model, as /v1/models lists it."""
        return {
            **{"id": self.model, "object": "model", "created": 0, "owned_by": "flashattn_lite"},
            "max_model_len": self.context,
        }

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise _UnknownModel(f"there is no model {name!r} here; this server has {self.model!r}")

    async def answer(self, body: CompletionRequest | ChatRequest, request: Request) -> Response:
        try:
            return await self._answer(body, request)
        except RequestError as error:
            raise body.in_its_words(error) from None

    async def _answer(self, body: CompletionRequest | ChatRequest, request: Request) -> Response:
        self.check_model(body.model)
        chat = isinstance(body, ChatRequest)
        choices = body.prompt_count * body.n
        if choices > self.limits.choices:
            raise RequestError(
                f"{body.prompt_count} prompts and n {body.n} are {choices} choices; this server's "
                f"limit is {self.limits.choices} a request",
                "n",
            )
        # Long texts take a while, and the other clients' tokens must not wait for them.
        prompts = await asyncio.to_thread(body.prompts, self.tokenizer)
        work = [
            (prompt, params)
            for prompt in prompts
            for params in body.sampling(min(self.context - len(prompt), self.limits.tokens))
        ]
        for _, params in work:
            if params.max_tokens > self.limits.tokens:
                raise RequestError(
                    f"max_tokens is {params.max_tokens}; this server's limit is "
                    f"{self.limits.tokens}",
                    "max_tokens",
                )
        echoes = [""] * len(work)
        if isinstance(body, CompletionRequest) and body.echo:
            echoes = [self.tokenizer.decode(prompt) for prompt, _ in work]
        answer, usage = Answer(self.model, chat, self.tokenizer), Usage(prompts, body.n)
        stream = await self.worker.submit(work)
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(stream, answer, usage, echoes, wants_usage)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return await self._whole(stream, answer, usage, echoes, request)

    async def _whole(
        self, stream: Stream, answer: Answer, usage: Usage, echoes: list[str], request: Request
    ) -> Response:
        try:
            found = await _unless_gone(request, _collect(stream, usage, len(echoes)))
        finally:
            stream.close()
        if found is None:  # the client has gone; nobody reads this
            return Response(status_code=499)
        for completion in found:
            failure = _failure(completion)
            if failure is not None:
                return failure
        choices = [
            answer.choice(
                *(index, echoes[index] + c.text, c.logprobs, c.finish_reason),
                offset=len(echoes[index]),
            )
            for index, c in enumerate(found)
        ]
        return JSONResponse({**answer.body(choices), "usage": usage.body()})

    async def _events(
        self, stream: Stream, answer: Answer, usage: Usage, echoes: list[str], wants_usage: bool
    ) -> AsyncIterator[bytes]:
        """Server-sent events, one for each output with something to say."""
        offsets = [len(echo) for echo in echoes]
        try:
            for index, echo in enumerate(echoes):
                if answer.chat:
                    yield _event(answer.body([answer.role(index)], chunk=True))
                elif echo:
                    first = answer.choice(index, echo, None, None, chunk=True)
                    yield _event(answer.body([first], chunk=True))
            async for index, output in stream:
                usage.add(index, output)
                failure = _failure(output)
                if failure is not None:
                    yield b"data: " + bytes(failure.body) + b"\n\n"
                    return
                if not (output.text or output.logprobs or output.finished):
                    continue
                choice = answer.choice(
                    *(index, output.text, output.logprobs, output.finish_reason),
                    chunk=True,
                    offset=offsets[index],
                )
                offsets[index] += sum(
                    len(answer.tokenizer.token_text(t.token_id)) for t in output.logprobs or ()
                )
                yield _event(answer.body([choice], chunk=True))
            if wants_usage:
                yield _event({**answer.body([], chunk=True), "usage": usage.body()})
            yield b"data: [DONE]\n\n"
        finally:
            stream.close()


async def _collect(stream: Stream, usage: Usage, count: int) -> list[Completion]:
    found = [Completion("", []) for _ in range(count)]
    async for index, output in stream:
        usage.add(index, output)
        found[index].add(output)
    return found


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The work's result, or None as soon as the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


def _event(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


# ---- errors --------------------------------------------------------------------------------------


def _failure(found: Completion | RequestOutput) -> JSONResponse | None:
    """The error to answer with, if the engine could not finish this."""
    if found.finish_reason == "error":
        return _error(500, found.error or "the engine has failed")
    if found.finish_reason == "abort":
        return _error(503, "the server is shutting down", code="unavailable")
    return None


def _error(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(error_body(message, kind, param=param, code=code), status, headers)


async def _on_request_error(request: Request, error: Exception) -> Response:
    return _error(400, str(error), param=getattr(error, "param", None))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return _error(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}")
    if not place:
        return _error(
            400, "the body must be a JSON object, with the header Content-Type: application/json"
        )
    if first["type"] == "extra_forbidden":
        name = ".".join(place)
        return _error(400, f"{name} is not supported by this server", param=place[0])
    if place[0] == "prompt" and first["type"] != "value_error":  # a union: an error for each member
        words = "must be a string, a list of strings, token ids, or lists of token ids"
        return _error(400, f"prompt {words}", param="prompt")
    where = ".".join(place) if first["type"] != "value_error" else place[0]  # no union's member
    return _error(400, f"{where}: {first['msg'].removeprefix('Value error, ')}", param=place[0])


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase}"
    return _error(error.status_code, message)


async def _on_unknown_model(request: Request, error: Exception) -> Response:
    return _error(404, str(error), param="model", code="model_not_found")


async def _on_unavailable(request: Request, error: Exception) -> Response:
    return _error(503, str(error), code="unavailable")


async def _on_bug(request: Request, error: Exception) -> Response:
    return _error(500, f"{type(error).__name__}: the server could not answer this; see its log")


HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    RequestError: _on_request_error,
    RequestValidationError: _on_invalid,
    HTTPException: _on_http,
    _UnknownModel: _on_unknown_model,
    Unavailable: _on_unavailable,
    QueueFullError: _on_unavailable,
    Exception: _on_bug,
}


class _Guard:
    """Refuses bodies above the limit before they are read whole, and counts answers."""

    def __init__(self, app: ASGIApp, limit: int, metrics: Metrics) -> None:
        self.app, self.limit, self.metrics = app, limit, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        read = 0 if not announced.isdigit() else int(announced)
        if read <= self.limit:
            read = 0  # count what comes: a chunked body announces nothing

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if message["type"] == "http.request" and read > self.limit:
                raise HTTPException(
                    413, f"the body has more than {self.limit} bytes, this server's limit"
                )
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "unknown")
                self.metrics.answers.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, limited, counted)
