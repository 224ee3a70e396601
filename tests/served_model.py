"""A server on the real engine and the model in the package, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import torch
from serve_http import serving, wait_until

from flashattn_lite.serving import Engine, EngineConfig, SamplingParams, load_model, load_tokenizer
from flashattn_lite.serving.command import EMBEDDED, EMBEDDED_NAME
from flashattn_lite.serving.server import create_app

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


@contextlib.contextmanager
def served_model() -> Iterator[Server]:
    """It runs as long as the context, and must have leaked nothing at the end."""
    tokenizer = load_tokenizer(EMBEDDED)
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


def direct(server: Server, prompt: str, **options: Any) -> str:
    """What a request gives without the server."""
    engine = Engine(server.engine.model, server.engine.tokenizer, EngineConfig(reproducible=True))
    return engine.generate([prompt], SamplingParams(**options))[0].text
