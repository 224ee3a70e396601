"""An engine that repeats the prompt: for tests of what stands around an engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from flashattn_lite.serving import RequestError, RequestOutput, SamplingParams, TokenLogprob
from flashattn_lite.serving.tokenizer import Tokenizer


@dataclass
class _Entry:
    prompt: list[int]
    params: SamplingParams
    done: int = 0
    ended: bool = False


@dataclass
class FakeEngine:
    """Each step gives each request the prompt's next token, over and over.

    Args:
        step_s: seconds that a step takes.
        fail_at: the step at which the engine breaks.
        spoil: a token id; a request ends with an error when it comes to it.
    """

    tokenizer: Tokenizer
    context: int = 1024
    step_s: float = 0.0
    fail_at: int | None = None
    spoil: int | None = None
    steps: int = 0
    entries: dict[str, _Entry] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, prompt: Sequence[int], params: SamplingParams, *, request_id: str) -> str:
        if not prompt or len(prompt) >= self.context:
            raise RequestError(f"prompt has {len(prompt)} tokens", "prompt")
        with self.lock:
            self.entries[request_id] = _Entry(list(prompt), params)
        return request_id

    def abort(self, request_id: str) -> None:
        with self.lock:
            if request_id in self.entries and not self.entries[request_id].ended:
                self.entries[request_id].ended = True
                self.aborted.append(request_id)

    def has_work(self) -> bool:
        return bool(self.entries)

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("the fake engine breaks, as told")
        time.sleep(self.step_s)
        with self.lock:
            outputs = [self._advance(*item) for item in self.entries.items()]
            for output in outputs:
                if output.finished:
                    del self.entries[output.request_id]
        return outputs

    def _advance(self, request_id: str, entry: _Entry) -> RequestOutput:
        if entry.ended:
            return RequestOutput(request_id, finish_reason="abort")
        token = entry.prompt[entry.done % len(entry.prompt)]
        if token == self.spoil:
            return RequestOutput(request_id, finish_reason="error", error="a spoilt token")
        entry.done += 1
        logprobs = None
        if entry.params.logprobs is not None:
            top = tuple((token, -0.5) for _ in range(entry.params.logprobs))
            logprobs = (TokenLogprob(token, -0.5, top),)
        return RequestOutput(
            request_id,
            (token,),
            self.tokenizer.token_text(token),
            logprobs,
            "length" if entry.done == entry.params.max_tokens else None,
            prompt_tokens=len(entry.prompt),
            completion_tokens=entry.done,
        )

    def stats(self) -> dict[str, int | float]:
        return {
            **{"waiting": 0, "running": len(self.entries), "pages": 8, "free_pages": 8},
            **{"cached_pages": 0, "steps": self.steps, "aborted": len(self.aborted)},
        }
