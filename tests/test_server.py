"""The HTTP server: the OpenAI API as its own client uses it."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from serve_http import serving
from served_model import COMPLETIONS, PROMPT, Server, direct

from flashattn_lite.serving import RequestOutput
from flashattn_lite.serving.command import EMBEDDED_NAME
from flashattn_lite.serving.server import create_app
from flashattn_lite.serving.tokenizer import Tokenizer


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
