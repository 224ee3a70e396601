"""What goes into the engine and what comes out: sampling parameters, requests, outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from flashattn_lite.serving.kv_transfer import Handover
    from flashattn_lite.serving.pool import PageKey

__all__ = [
    "Completion",
    "FinishReason",
    "QueueFullError",
    "Request",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
]

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_STOPS = 16


class RequestError(ValueError):
    """A request that can never be served: what of it, which value, and what would be right.

    The client's mistake, not the server's: an HTTP layer answers 400 with this text.

    Args:
        message: the sentence.
        param: the argument at fault, for OpenAI-style error objects.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(RequestError):
    """Too many requests wait; the same request can be served later (HTTP 429 or 503)."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Checked when made.

    Args:
        max_tokens: tokens to generate at most, >= 1.
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities sum to top_p; (0, 1].
        min_p: keep tokens at least min_p times as likely as the likeliest; [0, 1].
        repetition_penalty: divides positive logits, multiplies negative ones, of tokens in the
            prompt or the output so far; 1 is off. As in transformers.
        presence_penalty: subtracted from the logit of each token in the output so far; [-2, 2].
        frequency_penalty: the same for each time that it occurred; [-2, 2].
        seed: draws are a function of (seed, place in the output) alone: equal whatever else is in
            the batch. None: the engine draws a seed.
        stop: strings that end the output; they are not part of it. At most 16.
        stop_token_ids: tokens that end the output, beside the model's own; in the output's
            token_ids but not in its text.
        logprobs: None: none; n: that of each chosen token and of the n likeliest, 0 to 20, of the
            model's distribution before temperature and penalties.
        ignore_eos: the model's own end-of-sequence tokens do not end the output.

    Raises:
        RequestError: for a value out of its range.

    >>> SamplingParams(max_tokens=8, temperature=0).greedy
    True
    >>> SamplingParams(top_p=0)
    Traceback (most recent call last):
    flashattn_lite.serving.request.RequestError: top_p is 0; it must be in (0, 1]
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self._tuple("stop", "strings")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", self._tuple("stop_token_ids", "ints"))
        for name, kind, low, high, words in (
            ("max_tokens", int, 1, math.inf, ">= 1"),
            ("temperature", float, 0, math.inf, ">= 0 (0 is greedy)"),
            ("top_k", int, -1, math.inf, ">= 1, or 0 or -1 for all tokens"),
            ("top_p", float, math.ulp(0), 1, "in (0, 1]"),
            ("min_p", float, 0, 1, "in [0, 1]"),
            ("repetition_penalty", float, math.ulp(0), math.inf, "> 0"),
            ("presence_penalty", float, -2, 2, "in [-2, 2]"),
            ("frequency_penalty", float, -2, 2, "in [-2, 2]"),
            ("seed", int, -(2**63), 2**64 - 1, "an int of 64 bits, or None"),
            ("logprobs", int, 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}, or None"),
        ):
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            allowed = int if kind is int else int | float
            if (
                isinstance(value, bool)
                or not isinstance(value, allowed)
                or not (low <= value <= high)
                or (kind is float and value > 1e308)
            ):
                raise RequestError(f"{name} is {value!r}; it must be {words}", name)
            if kind is float:  # torch takes no int of more than 64 bits for one
                object.__setattr__(self, name, float(value))
        if len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
            raise RequestError(
                f"stop is {self.stop!r}; it must be at most {MAX_STOPS} strings, none empty", "stop"
            )
        if not all(isinstance(t, int) and t >= 0 for t in self.stop_token_ids):
            raise RequestError(
                f"stop_token_ids is {self.stop_token_ids!r}; it must hold ints >= 0",
                "stop_token_ids",
            )

    def _tuple(self, name: str, of: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        try:
            return () if value is None else tuple(value)
        except TypeError:
            raise RequestError(f"{name} is {value!r}; it must be a list of {of}", name) from None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (natural log) and the likeliest tokens at its place.

    Args:
        token_id: the token that was chosen.
        logprob: its own.
        top: (token id, log-probability) of the likeliest, best first; params.logprobs of them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestOutput:
    """What one step added to a request.

    Args:
        request_id: whose.
        token_ids: tokens of this step: one, or none when the request only ends.
        text: text that is certain now. It may lag behind the tokens: a character may need more of
            them, and what may yet become a stop string is held back. "" without a tokenizer.
        logprobs: one for each of token_ids, when asked for.
        finish_reason: None while the request goes on; "stop" (a stop token or string), "length"
            (max_tokens, or the model's context is full), "abort", or "error".
        stop_reason: the stop string or token id that ended it, None for an end-of-sequence token.
        error: what went wrong, with finish_reason "error".
        prompt_tokens: tokens in the prompt.
        cached_tokens: how many of them came out of the prefix cache.
        completion_tokens: generated so far, this step's included.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class Completion:
    """A whole request's result, as ``Engine.generate`` returns it."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    cached_tokens: int = 0

    def add(self, output: RequestOutput) -> None:
        """Appends what a step added."""
        self.token_ids += output.token_ids
        self.text += output.text
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + list(output.logprobs)
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        self.error, self.cached_tokens = output.error, output.cached_tokens


@dataclass(eq=False)
class Request:
    """One request's state inside the engine: its tokens, and how many of them are in the cache.

    Args:
        request_id: unique among the requests in flight.
        tokens: the prompt, then what was generated.
        prompt_tokens: how many of them are the prompt.
        params: how to sample.
        seed: params.seed, or the one that the engine drew.
        arrival: the clock's time when it was queued, seconds.
        admitted: the clock's time when it first got pages.
        sequence: its sequence in the page pool; None while it has no pages.
        computed: tokens whose keys and values are in the pool.
        keys: of its full pages, as far as known.
        published: full pages that others can find.
        cached_tokens: prompt tokens that came out of the prefix cache at first admission.
        preemptions: how often it gave its pages up.
        handover: where its prompt's keys and values come from, when another engine computed them.
    """

    request_id: str
    tokens: list[int]
    prompt_tokens: int
    params: SamplingParams
    seed: int = 0
    arrival: float = 0.0
    admitted: float | None = None
    sequence: int | None = None
    computed: int = 0
    keys: list[PageKey] = field(default_factory=list)
    published: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    handover: Handover | None = None

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def decodes(self) -> bool:
        """Whether only its newest token is to be computed."""
        return self.computed == len(self.tokens) - 1 and self.generated > 0
