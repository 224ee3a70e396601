"""The engine: three verbs, schedule, run, postprocess, once per step."""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO

import torch
from torch import Tensor

from flashattn_lite.serving.decode_graph import DecodeGraphs
from flashattn_lite.serving.detokenizer import Detokenizer, StopStrings
from flashattn_lite.serving.engine_config import EngineConfig
from flashattn_lite.serving.kv_transfer import Handover, KVTransfer
from flashattn_lite.serving.model import Model
from flashattn_lite.serving.pool import PagePool
from flashattn_lite.serving.request import (
    Completion,
    FinishReason,
    QueueFullError,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from flashattn_lite.serving.runner import Runner
from flashattn_lite.serving.sampler import Sampler
from flashattn_lite.serving.scheduler import Scheduler, Step
from flashattn_lite.serving.tokenizer import Tokenizer
from flashattn_lite.serving.trace import TraceWriter

__all__ = ["Engine", "EngineConfig"]

_DEFAULT_REQUEST = 1024  # tokens of a request that the default pool has room for


class _Stream:
    """What a request needs to become text."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        prompt = request.tokens[: request.prompt_tokens]
        self.text = None if tokenizer is None else Detokenizer(tokenizer, prompt)
        self.stops = StopStrings(tuple(request.params.stop))


class Engine:
    """Serves requests on one model: ``submit`` them, call ``step`` while ``has_work``.

    ``step`` is for one thread. ``submit``, ``abort``, ``has_work`` and ``stats`` may be called from
    any other meanwhile; what they change takes effect at the next step.

    Args:
        model: from ``load_model``.
        tokenizer: makes text; None: token ids only, and no stop strings.
        config: sizes.
        clock: seconds, monotonic; a simulated one will do.
        trace: a file that receives lines of JSON: requests, aborts and steps (``trace.replay``).
        transfer: how keys and values leave a "prefill" engine or reach a "decode" engine.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        trace: IO[str] | None = None,
        transfer: KVTransfer | None = None,
    ) -> None:
        config = config or EngineConfig()
        context = min(config.max_context or model.config.max_context, model.config.max_context)
        if config.num_pages is None:
            tokens = config.max_running * min(context, _DEFAULT_REQUEST)
            config = replace(config, num_pages=-(-tokens // config.page_size))
        assert config.num_pages is not None
        if (transfer is None) != (config.role == "mixed"):
            raise ValueError(
                f"Engine: role is {config.role!r} and transfer is {transfer!r}; a prefill or "
                "decode engine needs one, a mixed engine has no use for it"
            )
        if config.reproducible:
            model.refuse_irreproducible()
        self.model, self.tokenizer, self.config, self.clock = model, tokenizer, config, clock
        self.max_tokens = min(context, config.num_pages * config.page_size)
        self.pool = model.new_pool(PagePool, config.num_pages, config.page_size)
        self.scheduler = Scheduler(
            self.pool,
            max_step_tokens=config.max_step_tokens,
            max_running=config.max_running,
            prefix_cache=config.prefix_cache,
            reproducible=config.reproducible,
            clock=clock,
        )
        max_pages = -(-self.max_tokens // config.page_size)
        self.runner = Runner(
            model,
            self.pool,
            reproducible=config.reproducible,
            transfer=transfer,
            graphs=DecodeGraphs(model, self.pool, max_pages) if config.cuda_graphs else None,
        )
        self.sampler = Sampler()
        self.transfer = transfer
        self.trace = None if trace is None else TraceWriter(trace, config)
        self.end_tokens = set(model.config.eos_token_ids)
        if not self.end_tokens and tokenizer is not None:
            end = tokenizer.special_id("eos_token")
            self.end_tokens = set() if end is None else {end}
        self._streams: dict[str, _Stream] = {}
        self._inbox: deque[Request | str] = deque()  # submitted requests, ids to abort
        self._lent = 0
        self._names = itertools.count()
        self._counts = dict.fromkeys(
            (
                *("steps", "prompt_tokens", "prefilled_tokens", "cached_prompt_tokens"),
                *("generated_tokens", "finished", "aborted", "errors"),
            ),
            0,
        )

    # ---- from any thread ------------------------------------------------------------------------

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
            QueueFullError: when max_waiting requests wait already.
            RequestError: when the request can never be served (an empty prompt, token ids outside
                the vocabulary, more tokens than the context or the pool can hold, stop strings
                without a tokenizer, an id in use).
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params is {params!r}; it must be a SamplingParams")
        if not isinstance(request_id, str | None):
            raise TypeError(f"request_id is {request_id!r}; it must be a str")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("prompt is text, but there is no tokenizer", "prompt")
            prompt = self.tokenizer.encode(prompt)
        try:
            tokens = list(prompt)
        except TypeError:
            raise TypeError(f"prompt is {prompt!r}; it must be text or a list of ints") from None
        self._refuse(tokens, params)
        waiting, limit = self._waiting(), self.config.max_waiting
        if limit is not None and waiting >= limit:
            raise QueueFullError(f"{waiting} requests are waiting already; try again later")
        request_id = request_id or f"request-{next(self._names)}"
        if request_id in self._streams:
            raise RequestError(f"request_id is {request_id!r}, which is in use", "request_id")
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request = Request(request_id, tokens, len(tokens), params, seed)
        self._streams[request_id] = _Stream(request, self.tokenizer)
        self._inbox.append(request)
        return request_id

    def abort(self, request_id: str) -> None:
        """Ends a request; the next step reports it with finish_reason "abort". Unknown or finished
        ids are ignored: they may have ended meanwhile."""
        self._inbox.append(request_id)

    def has_work(self) -> bool:
        """Whether ``step`` has something to do or to report."""
        if self.transfer is not None and self.config.role == "decode" and self.transfer.arrived():
            return True
        return bool(self._streams) or bool(self._inbox) or self._lent > 0

    def stats(self) -> dict[str, int | float]:
        """Counters and gauges by name.

        Gauges: waiting, running, pages, free_pages, cached_pages (free, but with contents that may
        be found again), lent (requests whose pages another engine still reads). Counters: steps,
        prompt_tokens, prefilled_tokens (computed, again after a preemption), cached_prompt_tokens
        (found), generated_tokens, preemptions, finished, aborted, errors.
        """
        return {
            "waiting": self._waiting(),
            "running": len(self.scheduler.running),
            "pages": self.pool.num_pages,
            "free_pages": self.pool.free_pages,
            "cached_pages": self.pool.cached_pages,
            "lent": self._lent,
            "preemptions": self.scheduler.preemptions,
            **self._counts,
        }

    def _waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._inbox)

    def _refuse(self, tokens: list[int], params: SamplingParams) -> None:
        """Raises RequestError for what could never be served."""
        vocabulary = self.model.config.vocab_size
        if not tokens:
            raise RequestError("prompt is empty; it must have at least one token", "prompt")
        wrong = next((t for t in tokens if not isinstance(t, int) or not 0 <= t < vocabulary), None)
        if wrong is not None:
            raise RequestError(
                f"prompt holds {wrong!r}; token ids must be ints from 0 to {vocabulary - 1}",
                "prompt",
            )
        total = len(tokens) + params.max_tokens
        if total > self.max_tokens:
            raise RequestError(
                f"prompt has {len(tokens)} tokens and max_tokens is {params.max_tokens}, together "
                f"{total}; at most {self.max_tokens} fit",
                "max_tokens" if len(tokens) < self.max_tokens else "prompt",
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop holds strings, but there is no tokenizer", "stop")

    # ---- a step ---------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """One forward pass over whatever is scheduled; what it added to each request. Empty when
        there is nothing to do. A request that fails ends with finish_reason "error"; the others go
        on."""
        outputs = self._receive()
        step = self.scheduler.schedule()
        if self.transfer is not None:
            self._start_transfers(step)
        if step.chunks:
            outputs += self._postprocess(step, *self._run(step))
        if self.trace is not None:
            self.trace.step(self._counts["steps"], self.clock(), step, outputs, self.stats())
        self._counts["steps"] += 1
        return outputs

    def _receive(self) -> list[RequestOutput]:
        """Takes in what other threads, and another engine, have left for this step."""
        outputs = []
        for _ in range(len(self._inbox)):
            item = self._inbox.popleft()
            if isinstance(item, Request):
                self._counts["prompt_tokens"] += item.prompt_tokens
                self.scheduler.add(item)
                if self.trace is not None:
                    self.trace.submit(self._counts["steps"], item)
            elif item in self._streams:
                outputs.append(self._finish(self._streams[item].request, "abort"))
                if self.trace is not None:
                    self.trace.abort(self._counts["steps"], item)
        if self.transfer is not None and self.config.role == "decode":
            outputs += [self._accept(handover) for handover in self.transfer.receive()]
        if self.transfer is not None and self.config.role == "prefill":
            for loan in self.transfer.returned():
                self.pool.free(loan)
                self._lent -= 1
        return outputs

    def _run(self, step: Step) -> tuple[list[Request], Tensor | Exception]:
        """The requests that get a token, and their logits, or why there are none."""
        sampling = [chunk.request for chunk in step.chunks if chunk.samples]
        try:
            return sampling, self.runner.run(step.chunks)
        except (RuntimeError, MemoryError) as error:  # ends these requests, not the engine
            return sampling, error

    def _postprocess(
        self, step: Step, sampling: list[Request], logits: Tensor | Exception
    ) -> list[RequestOutput]:
        """Advances the requests, chooses their tokens, makes text, ends those that are done."""
        if isinstance(logits, Exception):
            requests = [chunk.request for chunk in step.chunks]
            return [self._finish(r, "error", error=f"the step failed: {logits}") for r in requests]
        for chunk in step.chunks:
            self.scheduler.advance(chunk)
            if chunk.count > 1 or chunk.start < chunk.request.prompt_tokens:
                self._counts["prefilled_tokens"] += chunk.count
        if not sampling:
            return []
        with torch.inference_mode():
            tokens, logprobs = self.sampler.sample(logits, sampling)
        outputs = []
        for request, token, logprob in zip(sampling, tokens, logprobs, strict=True):
            first = request.generated == 0
            if first:
                self._counts["cached_prompt_tokens"] += request.cached_tokens
            output = self._token(request, token, logprob)
            if first and self.config.role == "prefill" and not output.finished:
                self._hand_over(request, logprob)
            else:
                outputs.append(output)
        return outputs

    def _token(
        self, request: Request, token: int | None, logprob: TokenLogprob | None
    ) -> RequestOutput:
        """Adds a token to a request; ends it when the token does."""
        if token is None:
            return self._finish(request, "error", error="the model's logits are not numbers")
        request.tokens.append(token)
        self._counts["generated_tokens"] += 1
        params, stream = request.params, self._streams[request.request_id]
        text = ""
        reason: FinishReason | None = None
        stop: str | int | None = None
        if token in self.end_tokens and not params.ignore_eos:
            reason = "stop"
        elif token in params.stop_token_ids:
            reason, stop = "stop", token
        elif stream.text is not None:
            text, stop = stream.stops.add(stream.text.add(token))
            reason = None if stop is None else "stop"
        if reason is None and request.generated >= params.max_tokens:
            reason = "length"
        logprobs = None if logprob is None else (logprob,)
        if reason is None:
            return self._output(request, (token,), text, logprobs)
        return self._finish(request, reason, stop, (token,), text, logprobs)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        stop: str | int | None = None,
        tokens: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        """Ends a request: its pages go back, what text was held back comes out."""
        stream = self._streams.pop(request.request_id)
        if stream.text is not None and not isinstance(stop, str):
            piece, late = stream.stops.add(stream.text.finish())
            text += piece
            if late is None:
                text += stream.stops.finish()
            else:
                reason, stop = "stop", late
        self.scheduler.remove(request)
        if self.transfer is not None:
            self.transfer.discard(request.request_id)
        self._counts[{"abort": "aborted", "error": "errors"}.get(reason, "finished")] += 1
        return self._output(request, tokens, text, logprobs, reason, stop, error)

    @staticmethod
    def _output(
        request: Request,
        tokens: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprob, ...] | None,
        reason: FinishReason | None = None,
        stop: str | int | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=request.request_id,
            token_ids=tokens,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop,
            error=error,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=request.cached_tokens,
            completion_tokens=request.generated,
        )

    # ---- between engines ------------------------------------------------------------------------

    def _hand_over(self, request: Request, logprob: TokenLogprob | None) -> None:
        """Gives a request away after its first token. Its pages stay lent until they are read."""
        assert self.transfer is not None and request.sequence is not None
        loan = self.pool.fork(request.sequence)
        self._lent += 1
        handover = Handover(
            request.request_id,
            request.tokens[:-1],
            request.tokens[-1],
            logprob,
            request.params,
            request.seed,
            request.cached_tokens,
        )
        self.transfer.send(handover, loan)
        del self._streams[request.request_id]
        self.scheduler.remove(request)
        self._counts["finished"] += 1

    def _accept(self, handover: Handover) -> RequestOutput:
        """Takes a request with its first token; it waits for pages as any other."""
        request = Request(
            handover.request_id,
            list(handover.prompt),
            len(handover.prompt),
            handover.params,
            handover.seed,
            cached_tokens=handover.cached_tokens,
            handover=handover,
        )
        self._streams[request.request_id] = _Stream(request, self.tokenizer)
        self.scheduler.add(request)
        total = request.prompt_tokens + request.params.max_tokens
        if total > self.max_tokens:
            words = (
                f"the request needs {total} tokens; at most {self.max_tokens} fit the decode engine"
            )
            return self._finish(request, "error", error=words)
        return self._token(request, handover.token, handover.logprob)

    def _start_transfers(self, step: Step) -> None:
        assert self.transfer is not None
        for request in step.preempted:
            self.transfer.discard(request.request_id)
        for chunk in step.chunks:
            request = chunk.request
            if request.handover is not None and request.sequence is not None:
                self.transfer.start_load_kv(request.handover, self.pool, request.sequence)
                request.handover = None

    # ---- for programs that have the engine to themselves ----------------------------------------

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Serves the prompts together and returns whole results, in their order.

        Args:
            prompts: texts or lists of token ids.
            params: one for all, or one each.

        Raises:
            RequestError: when one of them can never be served; then none is.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            kind = "one text" if isinstance(prompts, str) else f"a {type(prompts).__name__}"
            raise TypeError(f"generate: prompts is {kind}; it must be a list of prompts")
        each = [params] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"generate: there are {len(prompts)} prompts and {len(each)} params")
        completions: dict[str, Completion] = {}
        try:
            for prompt, one in zip(prompts, each, strict=True):
                name = self.submit(prompt, one)
                request = self._streams[name].request
                completions[name] = Completion(name, list(request.tokens))
        except (RequestError, TypeError):
            for name in completions:
                self.abort(name)
            self.step()
            raise
        while any(c.finish_reason is None for c in completions.values()):
            for output in self.step():
                if output.request_id in completions:
                    completions[output.request_id].add(output)
        return list(completions.values())
