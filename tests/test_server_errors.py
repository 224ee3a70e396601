"""The HTTP server: what it refuses, in the OpenAI API's words; metrics and health."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served_model import CHAT, COMPLETIONS, PROMPT, Server

from flashattn_lite.serving.command import EMBEDDED_NAME


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


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
        (CHAT, {"messages": [{"role": "u", "content": "x"}], "logprobs": True, "top_logprobs": 21},
         400, "top_logprobs", "top_logprobs is 21; it must be 0 to 20"),
        (CHAT, {"messages": [{"role": "u", "content": "x"}], "max_completion_tokens": 4097}, 400,
         "max_completion_tokens", "max_completion_tokens is 4097"),
        (CHAT, {"messages": [{"role": "u", "content": "x"}], "max_completion_tokens": 1024}, 400,
         "max_completion_tokens", "max_completion_tokens is 1024, together"),
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
