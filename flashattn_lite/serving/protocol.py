"""The OpenAI API's requests, checked, and its answers. https://platform.openai.com/docs/api-reference

What this server does not do is refused by name; what has no bearing on the text (``user``,
``metadata`` ...) is taken and not used. Beyond OpenAI's: top_k, min_p, repetition_penalty,
stop_token_ids and ignore_eos, which that client sends in ``extra_body``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from flashattn_lite.serving.request import (
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from flashattn_lite.serving.tokenizer import Tokenizer

__all__ = ["Answer", "ChatRequest", "CompletionRequest", "Usage", "error_body"]

# Values of what is not supported that ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can say it, UTF-8 and tokenizers cannot
        raise ValueError(f"half of a surrogate pair at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text | None = None
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Text | list[Text] = Field(default_factory=list)
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    # no bearing on the text
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # beyond OpenAI's
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, data: Any) -> Any:
        """Drops nulls and values that ask for nothing, so that the rest can be refused by name."""
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and not (name in NOTHING and value in NOTHING[name])
        }

    def in_its_words(self, error: RequestError) -> RequestError:
        """The same error with this API's names for what sampling parameters call otherwise."""
        return error

    def _sampling(self, max_tokens: int, logprobs: int | None) -> list[SamplingParams]:
        """One for each of the n choices; with a seed, each has its own made from it."""
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                seed=None if self.seed is None else self.seed + choice,
                stop=self.stop,
                stop_token_ids=self.stop_token_ids,
                logprobs=logprobs,
                ignore_eos=self.ignore_eos,
            )
            for choice in range(self.n)
        ]


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False

    @property
    def prompt_count(self) -> int:
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return 1 if one else len(self.prompt)

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of each prompt."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [tokenizer.encode(prompt)]
        if not prompt:
            raise RequestError("prompt is an empty list; give at least one prompt", "prompt")
        if isinstance(prompt[0], int):
            return [prompt]
        return [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompt]

    def sampling(self, room: int) -> list[SamplingParams]:
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo with logprobs is not supported: log-probabilities are of generated tokens "
                "only; leave one of them out",
                "echo",
            )
        return self._sampling(self.max_tokens, self.logprobs)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Text
    content: Text | list[TextPart]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        message = {"role": self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    prompt_count: ClassVar[int] = 1

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of the conversation."""
        text = tokenizer.apply_chat_template([message.plain() for message in self.messages])
        return [tokenizer.encode(text, add_special_tokens=False)]

    def sampling(self, room: int) -> list[SamplingParams]:
        """room: tokens that the context has left; what is generated at most by default."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        limit = self.max_completion_tokens
        limit = self.max_tokens if limit is None else limit
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(max(1, room) if limit is None else limit, logprobs)

    def in_its_words(self, error: RequestError) -> RequestError:
        words = {"logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            words["max_tokens"] = "max_completion_tokens"
        if error.param not in words:
            return error
        name = words[error.param]
        return RequestError(str(error).replace(error.param, name, 1), name)


class Usage:
    """Tokens of a request: prompts once, whatever n is, and what all choices generated."""

    def __init__(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        self.prompt = sum(len(prompt) for prompt in prompts)
        self.n = n
        self.cached: dict[int, int] = {}
        self.completion: dict[int, int] = {}

    def add(self, index: int, output: RequestOutput) -> None:
        self.completion[index] = output.completion_tokens
        if index % self.n == 0:
            self.cached[index] = output.cached_tokens

    def body(self) -> dict[str, Any]:
        completion = sum(self.completion.values())
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": completion,
            "total_tokens": self.prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


class Answer:
    """Bodies of one request's answer: whole, or chunk by chunk.

    Args:
        model: the name to answer with.
        chat: which of the two APIs.
        tokenizer: for the texts of log-probabilities.
    """

    def __init__(self, model: str, chat: bool, tokenizer: Tokenizer) -> None:
        self.model, self.chat, self.tokenizer = model, chat, tokenizer
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def body(self, choices: list[dict[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {
            **{"id": self.id, "object": kind, "created": self.created, "model": self.model},
            "choices": choices,
        }

    def choice(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
        *,
        chunk: bool = False,
        offset: int = 0,
    ) -> dict[str, Any]:
        """One choice, or what a chunk adds to it; offset: characters of it sent before."""
        common = {"index": index, "finish_reason": finish_reason}
        if self.chat:
            content = {"content": text} if chunk else {"role": "assistant", "content": text}
            listed = None
            if logprobs is not None:
                listed = {"content": [self._chat_logprob(t) for t in logprobs], "refusal": None}
            return {**common, "delta" if chunk else "message": content, "logprobs": listed}
        listed = None if logprobs is None else self._logprobs(logprobs, offset)
        return {**common, "text": text, "logprobs": listed}

    def role(self, index: int) -> dict[str, Any]:
        """A chat stream's first chunk of each choice."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        texts = [self.tokenizer.token_text(t.token_id) for t in logprobs]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in logprobs],
            "top_logprobs": [
                {self.tokenizer.token_text(token): value for token, value in t.top}
                for t in logprobs
            ],
            "text_offset": offsets,
        }

    def _chat_logprob(self, token: TokenLogprob) -> dict[str, Any]:
        return {
            **self._token(token.token_id, token.logprob),
            "top_logprobs": [self._token(token_id, value) for token_id, value in token.top],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.token_text(token_id)
        # A part of a character has no text of its own; its bytes are not known here either.
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object.

    >>> error_body("no", "invalid_request_error", param="n")["error"]["param"]
    'n'
    """
    message = message.encode(errors="replace").decode()  # it may quote what the client sent
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
