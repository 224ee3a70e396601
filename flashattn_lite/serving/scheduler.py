"""Which tokens go into the next step. No tensors here: requests, pages, a budget.

In each step: every running request that decodes gets its one token; then prompts that have begun go
on, in chunks; then waiting requests are admitted while budget and pages last. So no admission makes
a running request wait, and a long prompt delays the others by a step's budget at most. Chunked
prefill is Agrawal et al., Sarathi-Serve (OSDI 2024); preemption by recomputation Kwon et al.
(SOSP 2023, section 4.5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from flashattn_lite.serving.pool import PagePool
from flashattn_lite.serving.request import Request

__all__ = ["BLOCK", "Chunk", "Scheduler", "Step"]

# Prompt tokens of a reproducible engine are computed in whole blocks of so many (docs/serving.md).
BLOCK = 16


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of a request, to be computed in this step."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether its last token's logits give the next token."""
        return self.start + self.count == len(self.request.tokens)


@dataclass
class Step:
    """What is run together, and who lost its pages for it."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """Requests in flight and their pages.

    Args:
        pool: the pages. The scheduler alone reserves and frees them.
        max_step_tokens: tokens of a step.
        max_running: requests with pages at once.
        prefix_cache: find and publish full pages.
        reproducible: compute prompts in whole blocks, share nothing but prompts' blocks.
        clock: stamps arrivals and admissions, seconds; decides nothing, so a step depends on the
            requests alone and a simulation schedules exactly as the real engine does.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_step_tokens: int,
        max_running: int,
        prefix_cache: bool = True,
        reproducible: bool = False,
        clock: Callable[[], float],
    ) -> None:
        self.pool = pool
        self.max_step_tokens, self.max_running = max_step_tokens, max_running
        self.prefix_cache, self.reproducible, self.clock = prefix_cache, reproducible, clock
        self.waiting: deque[Request] = deque()  # in order of arrival; the preempted in front
        self.running: list[Request] = []  # in order of admission: the last is the first to go
        self.preemptions = 0

    def add(self, request: Request) -> None:
        """Queues a request behind all others."""
        request.arrival = self.clock()
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forgets a request, finished or aborted; its pages go back."""
        if request.sequence is None:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._free(request)

    def schedule(self) -> Step:
        """The next step; its slots are reserved."""
        step = Step()
        budget = self.max_step_tokens
        for request in self._decoding(step):
            step.chunks.append(Chunk(request, request.computed, 1))
            budget -= 1
        decoding = {chunk.request.request_id for chunk in step.chunks}
        for request in self.running:
            if request.request_id not in decoding:
                budget -= self._prefill(request, budget, step)
        if not step.preempted:
            self._admit(budget, step)
        return step

    def advance(self, chunk: Chunk) -> None:
        """Notes that a chunk's keys and values are written, and publishes pages that are full."""
        request = chunk.request
        request.computed = chunk.start + chunk.count
        full = self._shareable(request, request.computed) // self.pool.page_size
        if not self.prefix_cache or full <= request.published or request.sequence is None:
            return
        if len(request.keys) < full:
            request.keys = self.pool.keys(request.tokens[: request.computed], request.keys)
        for index in range(request.published, full):
            self.pool.publish(request.sequence, index, request.keys[index])
        request.published = full

    # ---- the parts of a step --------------------------------------------------------------------

    def _decoding(self, step: Step) -> list[Request]:
        """Requests with one token to compute, its slot reserved; the newest give way for it."""
        while True:
            decoding = [r for r in self.running if r.decodes]
            sequences = [r.sequence for r in decoding if r.sequence is not None]
            counts = [
                len(r.tokens) - self.pool.length(s)
                for r, s in zip(decoding, sequences, strict=True)
            ]
            if self.pool.pages_needed(sequences, counts) <= self.pool.free_pages:
                self.pool.extend(sequences, counts)
                return decoding
            self._preempt(self.running[-1], step)

    def _prefill(self, request: Request, budget: int, step: Step) -> int:
        """Gives a request as many of its uncomputed tokens as fit; returns how many."""
        start, end = request.computed, len(request.tokens)
        if end - start > budget:
            end = start + budget
            if self.reproducible:
                end -= end % BLOCK
        if end <= start:
            return 0
        step.chunks.append(Chunk(request, start, end - start))
        return end - start

    def _admit(self, budget: int, step: Step) -> None:
        """Admits in order of arrival. Nobody overtakes for want of pages; a request whose next page
        is being computed by another waits to share it, and those behind it may go first."""
        coming = {key for r in self.running if (key := self._next_key(r)) is not None}
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_running:
                return
            total = len(request.tokens)
            found = 0
            if self.prefix_cache and request.handover is None:
                limit = self._shareable(request, total)
                request.keys = self.pool.keys(request.tokens[:limit], request.keys)
                found = self.pool.find(request.keys)
                if found < len(request.keys) and request.keys[found].digest in coming:
                    continue
            sequence = self.pool.adopt(request.keys[:found])
            # The last token is computed again for its logits, in a copy of its page.
            cached = min(found * self.pool.page_size, total - 1)
            if self.reproducible:
                cached -= cached % BLOCK
            self.pool.truncate(sequence, cached)
            needed = self.pool.pages_needed([sequence], [total - cached])
            # A page for each running request, so that the next steps do not preempt the newcomer.
            if needed + len(self.running) > self.pool.free_pages:
                self.pool.free(sequence)
                return
            self.pool.extend([sequence], [total - cached])
            request.sequence = sequence
            request.computed = cached if request.handover is None else total - 1
            request.published = cached // self.pool.page_size
            if request.admitted is None:
                request.admitted = self.clock()
                if request.handover is None:  # else its sender has said how many
                    request.cached_tokens = cached
            self.waiting.remove(request)
            self.running.append(request)
            budget -= self._prefill(request, budget, step)
            key = self._next_key(request)
            if key is not None:
                coming.add(key)

    def _next_key(self, request: Request) -> int | None:
        """The digest of the prompt page that a running request computes next."""
        if request.decodes or request.published >= len(request.keys):
            return None
        return request.keys[request.published].digest

    def _shareable(self, request: Request, tokens: int) -> int:
        """How many of the first tokens' pages others may use."""
        if self.reproducible:
            return min(tokens, request.prompt_tokens // BLOCK * BLOCK)
        return tokens

    def _preempt(self, request: Request, step: Step) -> None:
        """Takes a request's pages; it comes back as a prompt of all its tokens so far."""
        self.running.remove(request)
        self._free(request)
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)
        step.preempted.append(request)

    def _free(self, request: Request) -> None:
        assert request.sequence is not None
        self.pool.free(request.sequence)
        request.sequence, request.computed, request.published = None, 0, 0
