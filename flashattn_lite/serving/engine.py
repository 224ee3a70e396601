"""The engine: three verbs, schedule, run, postprocess, once per step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

from flashattn_lite.serving.request import Completion, RequestOutput, SamplingParams
from flashattn_lite.serving.tokenizer import Tokenizer

__all__ = ["Engine", "EngineConfig"]

Role = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. Every request's prompt and output must fit num_pages * page_size.

    Args:
        num_pages: pages in the pool; default: room for max_running requests of 1024 tokens, or of
            the model's context if that is shorter.
        page_size: tokens of a page.
        max_step_tokens: tokens of a step, decodes and prefill chunks together, >= max_running.
        max_running: requests in the batch at once; the others wait.
        prefix_cache: keep full pages of finished requests and share them by content.
        role: "mixed"; "prefill" ends each request after its first token and hands its pages over;
            "decode" takes such requests.
        max_context: tokens of a request, prompt and output; default: the model's.
        max_waiting: requests that may wait; None is unbounded.
    """

    num_pages: int | None = None
    page_size: int = 16
    max_step_tokens: int = 512
    max_running: int = 64
    prefix_cache: bool = True
    role: Role = "mixed"
    max_context: int | None = None
    max_waiting: int | None = None


class Engine:
    """Serves requests on one model: ``submit`` them, call ``step`` while ``has_work``.

    ``step`` is for one thread. ``submit``, ``abort``, ``has_work`` and ``stats`` may be called from
    any other meanwhile; what they change takes effect at the next step.

    Args:
        model: from ``load_model``.
        tokenizer: makes text; None: token ids only, and no stop strings.
        config: sizes.
        clock: seconds, monotonic; a simulated one will do.
        trace: a file that receives one line of JSON for each step.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        trace: IO[str] | None = None,
    ) -> None:
        raise NotImplementedError

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> str:
        """Queues a request.

        Args:
            prompt: token ids, or text for the tokenizer.
            params: how to sample.
            request_id: default: one is made.

        Returns: the request's id.

        Raises:
            RequestError: when the request can never be served (an empty prompt, token ids outside
                the vocabulary, more tokens than the context or the pool can hold, stop strings
                without a tokenizer, an id in use), or when max_waiting requests wait.
        """
        raise NotImplementedError

    def step(self) -> list[RequestOutput]:
        """One forward pass over whatever is scheduled; what it added to each request. Empty when
        there is nothing to do. A request that fails ends with finish_reason "error"; the others go
        on."""
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """Ends a request; the next step reports it with finish_reason "abort". Unknown or finished
        ids are ignored: they may have ended meanwhile."""
        raise NotImplementedError

    def has_work(self) -> bool:
        """Whether ``step`` has something to do or to report."""
        raise NotImplementedError

    def stats(self) -> dict[str, int | float]:
        """Counters and gauges by name.

        Gauges: waiting, running, pages, free_pages, cached_pages (free, but with contents that may
        be found again). Counters: steps, prompt_tokens, prefilled_tokens (computed),
        cached_prompt_tokens (found), generated_tokens, preemptions, finished, aborted, errors.
        """
        raise NotImplementedError

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Serves the prompts together and returns whole results, in their order. For programs that
        have the engine to themselves.

        Args:
            prompts: texts or lists of token ids.
            params: one for all, or one each.
        """
        raise NotImplementedError
