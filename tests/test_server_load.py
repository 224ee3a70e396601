"""The HTTP server under load: many clients, lost ones, slow ones; failures; SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from serve_http import serving, wait_until
from served_model import COMPLETIONS, PROMPT, Server, direct

import flashattn_lite
from flashattn_lite.serving.command import EMBEDDED_NAME
from flashattn_lite.serving.server import Limits, create_app
from flashattn_lite.serving.tokenizer import Tokenizer


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
            posts = [
                pool.submit(httpx.post, url + COMPLETIONS, json=body, timeout=60) for _ in range(12)
            ]
            found = [post.result().status_code for post in posts]
        assert set(found) == {200, 503} and found.count(200) >= 4
        assert client.post(COMPLETIONS, json=body).status_code == 200  # and later there is room
    assert engine.entries == {}


def test_all_choices_of_a_request_are_taken_or_none(tokenizer: Tokenizer) -> None:
    engine, app = fake(tokenizer, step_s=0.001)
    with serving(app) as url:
        body = {"prompt": ["good", "x " * 2000], "max_tokens": 500}
        answer = httpx.post(url + COMPLETIONS, json=body, timeout=60)
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
        posts = [
            pool.submit(httpx.post, url + COMPLETIONS, json=body, timeout=60) for _ in range(5)
        ]
        for post in posts:
            answer = post.result()
            assert answer.status_code in (500, 503)  # 503 if it came too late
            assert "the fake engine breaks" in answer.json()["error"]["message"]
        assert httpx.get(url + "/health").status_code == 503
        late = httpx.post(url + COMPLETIONS, json=body, timeout=60)
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
