"""The HTTP server: the OpenAI API as its own client uses it, errors, limits, lost clients."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from fake_engine import FakeEngine
from serve_http import serving, wait_until

import flashattn_lite
from flashattn_lite.serving import (
    Engine,
    EngineConfig,
    RequestOutput,
    SamplingParams,
    load_model,
    load_tokenizer,
)
from flashattn_lite.serving.command import EMBEDDED, EMBEDDED_NAME
from flashattn_lite.serving.server import Limits, create_app
from flashattn_lite.serving.tokenizer import Tokenizer

PROMPT = "def read(path):\n"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass
class Server:
    """A server on the real engine, whose pool is small: 200 clients do not fit at once."""

    url: str
    engine: Engine

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def nothing_leaks(self) -> None:
        def empty() -> bool:
            s = self.engine.stats()
            return s["waiting"] == s["running"] == 0 and s["free_pages"] == s["pages"]

        wait_until(empty, "all pages are free")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(EMBEDDED)


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    config = EngineConfig(
        num_pages=96, page_size=16, max_running=16, max_step_tokens=256, reproducible=True
    )
    model = load_model(EMBEDDED, dtype=torch.float32)
    engine = Engine(model, tokenizer, config)
    app = create_app(engine, tokenizer, model=EMBEDDED_NAME, context=model.config.max_context)
    with serving(app) as url:
        found = Server(url, engine)
        yield found
        found.nothing_leaks()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def direct(server: Server, prompt: str, **options: Any) -> str:
    """What a request gives without the server."""
    engine = Engine(server.engine.model, server.engine.tokenizer, EngineConfig(reproducible=True))
    return engine.generate([prompt], SamplingParams(**options))[0].text


# ---- the openai client ---------------------------------------------------------------------------


def test_models_are_listed(server: Server) -> None:
    client = server.client()
    assert [m.id for m in client.models.list()] == [EMBEDDED_NAME]
    assert client.models.retrieve(EMBEDDED_NAME).owned_by == "flashattn_lite"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_the_engines_text(server: Server, tokenizer: Tokenizer) -> None:
    found = server.client().completions.create(
        model=EMBEDDED_NAME, prompt=PROMPT, max_tokens=24, temperature=0
    )
    assert found.object == "text_completion" and found.model == EMBEDDED_NAME
    choice = found.choices[0]
    assert choice.text == direct(server, PROMPT, max_tokens=24, temperature=0) != ""
    assert choice.finish_reason in ("length", "stop")
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert found.usage.completion_tokens == 24 or choice.finish_reason == "stop"
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_stream_is_the_same_text_in_parts(server: Server) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "seed": 5}
    stream = server.client().completions.create(
        model=EMBEDDED_NAME, prompt=PROMPT, stream=True, stream_options={"include_usage": True},
        **options,
    )  # fmt: skip
    chunks = list(stream)
    assert len(chunks) > 8
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == direct(server, PROMPT, **options)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] in ("length", "stop") and set(reasons[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0


def test_token_ids_and_several_prompts_and_choices(server: Server, tokenizer: Tokenizer) -> None:
    client = server.client()
    prompts = [PROMPT, "import os\n"]
    by_text = client.completions.create(
        model=EMBEDDED_NAME, prompt=prompts, n=2, max_tokens=8, seed=3
    )
    ids = [tokenizer.encode(p) for p in prompts]
    by_ids = client.completions.create(model=EMBEDDED_NAME, prompt=ids, n=2, max_tokens=8, seed=3)
    texts = [c.text for c in by_text.choices]
    assert [c.index for c in by_text.choices] == [0, 1, 2, 3]
    assert texts == [c.text for c in by_ids.choices]
    assert len(set(texts)) >= 3  # choices of one prompt have seeds of their own
    assert texts[0] == direct(server, PROMPT, max_tokens=8, seed=3)
    assert texts[1] == direct(server, PROMPT, max_tokens=8, seed=4)
    assert by_text.usage is not None and by_text.usage.prompt_tokens == sum(map(len, ids))


def test_echo_gives_the_prompt_first(server: Server) -> None:
    client = server.client()
    options: dict[str, Any] = {"model": EMBEDDED_NAME, "prompt": PROMPT, "max_tokens": 4, "seed": 1}
    whole = client.completions.create(echo=True, **options).choices[0].text
    parts = [
        c.choices[0].text for c in client.completions.create(echo=True, stream=True, **options)
    ]
    assert whole.startswith(PROMPT) and "".join(parts) == whole and parts[0] == PROMPT


def test_stop_strings_end_the_text_before_them(server: Server) -> None:
    text = direct(server, PROMPT, max_tokens=40, temperature=0)
    stop = text[10:13]
    found = server.client().completions.create(
        model=EMBEDDED_NAME, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "\0"]
    )
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_completion_logprobs(server: Server) -> None:
    found = server.client().completions.create(
        model=EMBEDDED_NAME, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.text_offset
    assert logprobs.token_logprobs and logprobs.top_logprobs
    assert "".join(logprobs.tokens) == found.choices[0].text
    assert logprobs.text_offset[3] == len("".join(logprobs.tokens[:3]))
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3 and max(top, key=top.__getitem__) == token  # greedy
        assert value == top[token] <= 0 and sum(map(math.exp, top.values())) < 1.0001


def test_chat_whole_and_streamed(server: Server) -> None:
    client = server.client()
    options: dict[str, Any] = {
        **{"model": EMBEDDED_NAME, "max_completion_tokens": 12, "seed": 2},
        "messages": [
            {"role": "system", "content": "A module that reads files."},
            {"role": "user", "content": [{"type": "text", "text": "Write a parser."}]},
        ],
    }
    whole = client.chat.completions.create(logprobs=True, top_logprobs=2, **options)
    message = whole.choices[0].message
    assert message.role == "assistant" and message.content
    prompt = "# A module that reads files.\n# Write a parser.\n"
    assert message.content == direct(server, prompt, max_tokens=12, seed=2)
    listed = whole.choices[0].logprobs
    assert listed is not None and listed.content is not None
    assert "".join(t.token for t in listed.content) == message.content
    assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in listed.content)
    assert bytes(b for t in listed.content for b in t.bytes or []).decode() == message.content
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_asynchronous_client_too(server: Server) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.completions.create(
                model=EMBEDDED_NAME, prompt=PROMPT, max_tokens=8, temperature=0, stream=True
            )
            return [chunk.choices[0].text async for chunk in stream]

    assert "".join(asyncio.run(ask())) == direct(server, PROMPT, max_tokens=8, temperature=0)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    app = create_app(
        FakeSplit(tokenizer),
        tokenizer,
        model="split",
        context=1024,  # type: ignore[arg-type]
    )
    text = "naïve 日本語 🙂"
    with serving(app) as url, httpx.Client(base_url=url) as client:
        body = {"prompt": text, "max_tokens": len(tokenizer.encode(text)), "stream": True}
        events = client.post(COMPLETIONS, json=body).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        parts = [json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events[:-2]]
        assert "".join(parts) == text and "\ufffd" not in "".join(parts)


@dataclass
class FakeSplit(FakeEngine):
    """Gives a character when all its tokens are there, as the engine does."""

    given: dict[str, list[int]] = field(default_factory=dict)

    def step(self) -> list[RequestOutput]:
        return [replace(output, text=self._certain(output)) for output in super().step()]

    def _certain(self, output: RequestOutput) -> str:
        tokens = self.given.setdefault(output.request_id, [])
        before = self.tokenizer.decode(tokens).rstrip("\ufffd")
        tokens += output.token_ids
        return self.tokenizer.decode(tokens).rstrip("\ufffd")[len(before) :]


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        (COMPLETIONS, b"{bad", 400, None, "the body is not JSON"),
        (COMPLETIONS, b"[" * 50_000, 400, None, "parsing the body"),
        (COMPLETIONS, [1], 400, None, "must be a JSON object"),
        (COMPLETIONS, {}, 400, "prompt", "prompt must be a string"),
        (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt", "prompt must be a string"),
        (COMPLETIONS, {"prompt": [True]}, 400, "prompt", "prompt must be a string"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt", "empty"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt", "empty list"),
        (COMPLETIONS, {"prompt": [10**6]}, 400, "prompt", "1000000"),
        (COMPLETIONS, {"prompt": "x", "model": "gpt-4"}, 404, "model", "no model 'gpt-4'"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "must be >= 1"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 5000}, 400, "max_tokens", "limit is 4096"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature", "temperature is -1"),
        (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, 400, "temperature", "valid number"),
        (COMPLETIONS, {"prompt": "x", "n": 65}, 400, "n", "limit is 64"),
        (COMPLETIONS, {"prompt": "x", "stop": [""]}, 400, "stop", "none empty"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, 400, "logprobs", "0 to 20"),
        (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 1}, 400, "echo", "not supported"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, 400, "best_of", "not supported"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": 2}}, 400, "logit_bias", "not supported"),
        (COMPLETIONS, {"prompt": "x", "sufix": "y"}, 400, "sufix", "not supported"),
        (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "prompt", "surrogate"),
        (COMPLETIONS, b'{"prompt": "x", "top_p": NaN}', 400, "top_p", "top_p is nan"),
        (COMPLETIONS, {"prompt": "word " * 2000}, 400, "prompt", "1024"),
        (CHAT, {"messages": []}, 400, "messages", "at least 1 item"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages", "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools", ""),
        (CHAT, {"messages": [{"role": "u", "content": "x"}], "top_logprobs": 1}, 400,
         "top_logprobs", "needs logprobs"),
        (COMPLETIONS, b'{"prompt": "' + b"x" * (1 << 20) + b'"}', 413, None, "1048576 bytes"),
        ("/v1/nothing", {}, 404, None, "Not Found"),
        ("/health", {}, 405, None, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_errors_are_openais(
    http: httpx.Client, path: str, body: Any, status: int, param: str | None, words: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert words in error["message"]


def test_what_asks_for_nothing_is_taken(http: httpx.Client) -> None:
    body = {
        **{"prompt": PROMPT, "max_tokens": 2, "best_of": 1, "logit_bias": {}, "suffix": None},
        **{"user": "me", "stop": None, "logprobs": None, "seed": None},
    }
    assert http.post(COMPLETIONS, json=body).status_code == 200


def test_a_body_of_unknown_length_is_cut_off(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, content=(b" " * 65536 for _ in range(20)))
    assert answer.status_code == 413


def test_the_client_raises_the_right_errors(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="limit is 4096") as stop:
        client.completions.create(model=EMBEDDED_NAME, prompt="x", max_tokens=10**5)
    assert stop.value.param == "max_tokens" and stop.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="x", messages=[{"role": "user", "content": "x"}])
    assert unknown.value.code == "model_not_found"


def test_metrics_and_health(server: Server, http: httpx.Client) -> None:
    http.post(COMPLETIONS, json={"prompt": PROMPT, "max_tokens": 3})
    assert http.get("/health").json()["status"] == "ok"
    lines = http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["flashattn_lite_pages"]) == 96
    assert float(values["flashattn_lite_generated_tokens_total"]) >= 3
    assert float(values["flashattn_lite_time_to_first_token_seconds_count"]) >= 1
    assert float(values["flashattn_lite_inter_token_latency_seconds_count"]) >= 2
    answered = 'flashattn_lite_http_requests_total{route="/v1/completions",status="200"}'
    assert float(values[answered]) >= 1


# ---- load, disconnects, failures -----------------------------------------------------------------


def test_200_clients_at_once_all_get_their_own_answer(server: Server) -> None:
    prompts = [f"class Case{i % 20}:\n    value = {i % 20}\n" for i in range(200)]
    before = server.engine.stats()["finished"]

    async def ask_all() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:

            async def ask(i: int) -> str:
                body = {
                    "prompt": prompts[i],
                    "max_tokens": 16,
                    "seed": i % 20,
                    "stream": i % 2 == 0,
                }
                answer = await client.post(COMPLETIONS, json=body)
                assert answer.status_code == 200, answer.text
                if not body["stream"]:
                    return str(answer.json()["choices"][0]["text"])
                events = answer.text.split("\n\n")
                assert events[-2] == "data: [DONE]"
                found = [json.loads(e.removeprefix("data: ")) for e in events[:-2]]
                return "".join(e["choices"][0]["text"] for e in found)

            return list(await asyncio.gather(*(ask(i) for i in range(200))))

    texts = asyncio.run(ask_all())
    assert server.engine.stats()["finished"] - before == 200
    for i, text in enumerate(texts):  # whatever shared the batch, streamed or not
        assert text == texts[i % 20]
    assert texts[7] == direct(server, prompts[7], max_tokens=16, seed=7)
    server.nothing_leaks()


def test_requests_larger_together_than_the_pool_all_end(server: Server) -> None:
    # 12 requests of up to 300 tokens: 19 pages each, 96 in the pool.
    def ask(i: int) -> str | None:
        found = server.client(timeout=600).completions.create(
            model=EMBEDDED_NAME, prompt=PROMPT * 3 + f"# {i}\n", max_tokens=270, seed=i,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return found.choices[0].finish_reason

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == ["length"] * 12
    server.nothing_leaks()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_aborted(server: Server, stream: bool) -> None:
    before = server.engine.stats()["aborted"]
    body = json.dumps(
        {"prompt": PROMPT, "max_tokens": 900, "stream": stream, "ignore_eos": True}
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_until(lambda: server.engine.stats()["running"] > 0, "the request runs")
            if stream:
                assert b"200 OK" in connection.recv(4096)
        wait_until(lambda: server.engine.stats()["running"] == 0, "the request is gone")
    assert server.engine.stats()["aborted"] == before + 3
    server.nothing_leaks()


def test_a_reader_that_stops_reading_holds_no_pages(server: Server) -> None:
    with httpx.stream(
        "POST",
        server.url + COMPLETIONS,
        json={"prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True},
        timeout=120,
    ) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.nothing_leaks()  # while the rest is unread
        assert sum(line.startswith("data: ") for line in lines) >= 2


def fake(tokenizer: Tokenizer, limits: Limits | None = None, **options: Any) -> tuple[Any, Any]:
    engine: Any = FakeEngine(tokenizer, **options)
    return engine, create_app(engine, tokenizer, model="fake", context=1024, limits=limits)


def test_too_many_at_once_are_told_to_come_again(tokenizer: Tokenizer) -> None:
    engine, app = fake(tokenizer, Limits(open=4), step_s=0.005)
    body = {"prompt": "a b c", "max_tokens": 200}
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        refused = client.post(COMPLETIONS, json={**body, "n": 5})
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert "above the limit of 4" in refused.json()["error"]["message"]
        with ThreadPoolExecutor(12) as pool:
            posts = [pool.submit(httpx.post, url + COMPLETIONS, json=body) for _ in range(12)]
            found = [post.result().status_code for post in posts]
        assert set(found) == {200, 503} and found.count(200) >= 4
        assert client.post(COMPLETIONS, json=body).status_code == 200  # and later there is room
    assert engine.entries == {}


def test_all_choices_of_a_request_are_taken_or_none(tokenizer: Tokenizer) -> None:
    engine, app = fake(tokenizer, step_s=0.001)
    with serving(app) as url:
        body = {"prompt": ["good", "x " * 2000], "max_tokens": 500}
        answer = httpx.post(url + COMPLETIONS, json=body)
        assert answer.status_code == 400
        wait_until(lambda: not engine.entries, "the good one is taken back")
        assert len(engine.aborted) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_failed_request_is_an_error(tokenizer: Tokenizer, stream: bool) -> None:
    ids = tokenizer.encode("one two three")
    _, app = fake(tokenizer, spoil=ids[2])
    with serving(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="a spoilt token"):
            answer = client.completions.create(
                model="fake", prompt=ids, max_tokens=9, stream=stream
            )
            assert [c.choices[0].text for c in answer] == ["never read"]
        good = client.completions.create(model="fake", prompt=ids[:2], max_tokens=2)
        assert good.choices[0].finish_reason == "length"


def test_a_broken_engine_ends_everything_with_an_error(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    _, app = fake(tokenizer, fail_at=20, step_s=0.005)
    body = {"prompt": "a b c", "max_tokens": 500}
    with serving(app) as url, ThreadPoolExecutor(5) as pool:
        posts = [pool.submit(httpx.post, url + COMPLETIONS, json=body) for _ in range(5)]
        for post in posts:
            answer = post.result()
            assert answer.status_code in (500, 503)  # 503 if it came too late
            assert "the fake engine breaks" in answer.json()["error"]["message"]
        assert httpx.get(url + "/health").status_code == 503
        late = httpx.post(url + COMPLETIONS, json=body)
        assert late.status_code == 503 and "has failed" in late.json()["error"]["message"]
    assert "the engine has failed" in caplog.text


# ---- the command ---------------------------------------------------------------------------------


def start_command(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`flashattn-lite serve` as a process, and its address."""
    root = Path(flashattn_lite.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "flashattn_lite", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "running on " in line:
            return process, line.split("running on ")[1].split()[0]
    raise AssertionError("the server did not start")


def test_sigterm_lets_open_requests_end() -> None:
    process, url = start_command("--threads", "1")
    try:
        body = {"prompt": PROMPT, "max_tokens": 300, "stream": True, "ignore_eos": True, "seed": 0}
        with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=120) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_after_the_drain_time_open_requests_are_ended() -> None:
    process, url = start_command("--threads", "1", "--drain", "1")
    try:
        body = {"prompt": PROMPT, "max_tokens": 1000, "n": 32, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=120) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = list(lines)
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["message"] == "the server is shutting down"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
