"""The scheduler and the pool against a plain model of both: who holds which page, and what every
slot must contain."""

from __future__ import annotations

import random
import zlib
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flashattn_lite.serving import SamplingParams
from flashattn_lite.serving.pool import PageKey, PagePool
from flashattn_lite.serving.request import Request
from flashattn_lite.serving.scheduler import BLOCK, Scheduler

STEMS = [[7] * 60, [5, 6] * 30, list(range(60))]  # prompts share beginnings


def contents(tokens: list[int]) -> float:
    """What a key must be: a function of all tokens up to it, exact in float32."""
    return float(zlib.crc32(bytes(tokens)) % 2**24)


def make_scheduler(pool: PagePool, **options: object) -> Scheduler:
    return Scheduler(pool, **{"max_step_tokens": 40, "max_running": 6, "clock": float} | options)  # type: ignore[arg-type]


class Serving(RuleBasedStateMachine):
    """Random requests, steps, aborts; every step is carried out on the pool's own storage."""

    operations = 0

    @initialize(
        pages=st.integers(20, 60),
        page_size=st.sampled_from([1, 3, 4, 16]),
        budget=st.integers(24, 80),
        prefix_cache=st.booleans(),
        reproducible=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def start(
        self,
        pages: int,
        page_size: int,
        budget: int,
        prefix_cache: bool,
        reproducible: bool,
        seed: int,
    ) -> None:
        self.pool = PagePool(pages, page_size, 1, 1)
        self.scheduler = make_scheduler(
            self.pool,
            max_step_tokens=budget,
            prefix_cache=prefix_cache,
            reproducible=reproducible,
        )
        self.limit = min(pages * page_size, 90)
        self.random = random.Random(seed)
        self.live: dict[str, Request] = {}
        self.loans: list[int] = []
        self.names = 0

    @rule(stem=st.sampled_from(STEMS), shared=st.integers(0, 60), own=st.integers(1, 30))
    def submit(self, stem: list[int], shared: int, own: int) -> None:
        Serving.operations += 1
        tokens = stem[:shared] + [self.random.randrange(200) for _ in range(own)]
        tokens = tokens[: self.limit - 8]
        self.names += 1
        params = SamplingParams(max_tokens=self.random.randrange(1, 1 + self.limit - len(tokens)))
        request = Request(f"r{self.names}", tokens, len(tokens), params)
        self.live[request.request_id] = request
        self.scheduler.add(request)

    @rule()
    def twin(self) -> None:
        """The same prompt again, so that whole prompts are found."""
        if self.live:
            Serving.operations += 1
            other = self.random.choice(list(self.live.values()))
            self.names += 1
            prompt = other.tokens[: other.prompt_tokens]
            request = Request(f"r{self.names}", prompt, len(prompt), other.params)
            self.live[request.request_id] = request
            self.scheduler.add(request)

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            Serving.operations += 1
            self.step()

    def step(self) -> None:
        scheduler = self.scheduler
        decoding = [r for r in scheduler.running if r.decodes]
        step = scheduler.schedule()
        chunks = {c.request.request_id: c for c in step.chunks}
        assert len(chunks) == len(step.chunks)
        assert sum(c.count for c in step.chunks) <= scheduler.max_step_tokens
        assert len(scheduler.running) <= scheduler.max_running
        for request in decoding:  # no admission, no prompt makes it wait
            assert request.request_id in chunks or request in step.preempted
        for chunk in step.chunks:
            self.compute(chunk.request, chunk.start, chunk.count)
        for chunk in step.chunks:
            samples = chunk.samples
            scheduler.advance(chunk)
            if samples:
                request = chunk.request
                request.tokens.append(self.random.randrange(200))
                if request.generated >= request.params.max_tokens:
                    scheduler.remove(request)
                    del self.live[request.request_id]

    def compute(self, request: Request, start: int, count: int) -> None:
        """Reads every slot before, as attention would, and writes its own."""
        assert request.sequence is not None
        end = start + count
        if self.scheduler.reproducible:
            whole = request.prompt_tokens // BLOCK * BLOCK
            assert start % BLOCK == 0 or start >= whole
            assert end % BLOCK == 0 or end >= whole
        slots = self.pool.slots(request.sequence, 0, end)
        stored = self.pool.k[0].flatten()
        expected = [contents(request.tokens[: i + 1]) for i in range(end)]
        assert stored[slots[:start]].tolist() == expected[:start]
        for slot in slots[start:end].tolist():
            page = slot // self.pool.page_size
            assert self.pool._holders(page) == 1, "a shared page is written"
        for slot, value in zip(slots[start:end].tolist(), expected[start:], strict=True):
            stored[slot] = value

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        Serving.operations += 1
        request = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.scheduler.remove(request)

    @precondition(lambda self: self.scheduler.running and len(self.loans) < 2)
    @rule()
    def hand_over(self) -> None:
        """A request goes to another engine; its pages stay until they are read."""
        Serving.operations += 1
        request = self.random.choice(self.scheduler.running)
        assert request.sequence is not None
        self.loans.append(self.pool.fork(request.sequence))
        self.scheduler.remove(request)
        del self.live[request.request_id]

    @precondition(lambda self: self.loans)
    @rule()
    def give_back(self) -> None:
        Serving.operations += 1
        self.pool.free(self.loans.pop(0))

    @precondition(lambda self: not self.scheduler.running)
    @rule()
    def forget(self) -> None:
        Serving.operations += 1
        self.pool.drop_cache()

    @invariant()
    def pages_add_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        held = Counter(page for s in pool.sequences for page in pool.pages(s))
        assert [held[p] for p in range(pool.num_pages)] == pool._references
        idle, free = list(pool._idle), pool._free
        assert sorted([*held, *idle, *free]) == list(range(pool.num_pages))
        assert set(idle) <= set(pool._key_of)
        assert not set(free) & set(pool._key_of)
        assert len(pool._key_of) == len(pool._page_of)
        sequences = {r.sequence for r in self.scheduler.running}
        assert sequences | set(self.loans) == set(pool.sequences)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for loan in self.loans:
            self.pool.free(loan)
        self.loans = []
        for _ in range(5000):  # everything ends: nothing starves, nothing is stuck
            if not self.live:
                break
            self.step()
        assert not self.live
        assert self.pool.free_pages == self.pool.num_pages
        assert self.pool.sequences == []


def test_random_operations_leak_nothing_and_starve_nobody() -> None:
    Serving.operations = 0
    run_state_machine_as_test(
        Serving,
        settings=settings(
            max_examples=200,
            stateful_step_count=80,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Serving.operations >= 10_000


def run(scheduler: Scheduler, token: int = 1) -> list[tuple[str, int, int]]:
    """One step, computed in thought; every sample gives the same token."""
    step = scheduler.schedule()
    for chunk in step.chunks:
        samples = chunk.samples
        scheduler.advance(chunk)
        if samples:
            chunk.request.tokens.append(token)
    return [(c.request.request_id, c.start, c.count) for c in step.chunks]


def submit(scheduler: Scheduler, name: str, tokens: list[int], max_tokens: int = 50) -> Request:
    request = Request(name, tokens, len(tokens), SamplingParams(max_tokens=max_tokens))
    scheduler.add(request)
    return request


def test_admissions_never_make_a_running_request_wait() -> None:
    scheduler = make_scheduler(PagePool(200, 4, 1, 1), max_step_tokens=16, max_running=8)
    submit(scheduler, "first", [1, 2, 3])
    run(scheduler)
    for i in range(6):
        submit(scheduler, f"long{i}", [i] * 60)
    for step in range(20):
        chunks = run(scheduler)
        assert chunks[0] == ("first", 3 + step, 1)
        assert sum(count for _, _, count in chunks) == 16  # the rest of the budget is used


def test_requests_are_admitted_in_order() -> None:
    scheduler = make_scheduler(PagePool(12, 4, 1, 1), max_step_tokens=100, max_running=8)
    submit(scheduler, "a", list(range(32)))
    submit(scheduler, "too large for now", list(range(50, 80)))
    submit(scheduler, "small", [9, 9])
    assert [name for name, _, _ in run(scheduler)] == ["a"]
    assert [r.request_id for r in scheduler.waiting] == ["too large for now", "small"]


@pytest.mark.parametrize("pages,admitted", ((4, False), (5, True)))
def test_a_newcomer_leaves_a_page_for_each_running_request(pages: int, admitted: bool) -> None:
    """Else the next step would take its pages back."""
    scheduler = make_scheduler(PagePool(pages, 4, 1, 1), prefix_cache=False)
    submit(scheduler, "first", [1, 2])
    run(scheduler)
    newcomer = submit(scheduler, "newcomer", [3] * 12)  # three pages
    run(scheduler)
    assert (newcomer in scheduler.running) is admitted
    assert newcomer.preemptions == 0


def test_a_shared_prompt_is_computed_once() -> None:
    scheduler = make_scheduler(PagePool(100, 4, 1, 1), max_step_tokens=64)
    stem = list(range(40))
    for i in range(4):
        submit(scheduler, f"r{i}", [*stem, 100 + i])
    submit(scheduler, "other", [200] * 10)
    # r1 to r3 wait for the pages that r0 computes; who shares nothing does not.
    assert run(scheduler) == [("r0", 0, 41), ("other", 0, 10)]
    assert run(scheduler)[2:] == [("r1", 40, 1), ("r2", 40, 1), ("r3", 40, 1)]


def test_a_prompt_found_whole_computes_its_last_token_in_a_copy() -> None:
    pool = PagePool(20, 4, 1, 1)
    scheduler = make_scheduler(pool)
    first = submit(scheduler, "a", list(range(8)))
    run(scheduler)
    pool.k[0, pool.pages(first.sequence)[1]] = 5.0  # type: ignore[arg-type]
    second = submit(scheduler, "b", list(range(8)))
    assert run(scheduler)[1] == ("b", 7, 1)
    assert second.cached_tokens == 7
    ours, theirs = (pool.pages(r.sequence) for r in (second, first))  # type: ignore[arg-type]
    assert ours[0] == theirs[0] and ours[1] != theirs[1]
    assert pool.k[0, ours[1]].flatten().tolist() == [5.0] * 4


def test_the_newest_gives_way_and_comes_back() -> None:
    pool = PagePool(6, 4, 1, 1)
    scheduler = make_scheduler(pool, prefix_cache=False)
    old = submit(scheduler, "old", [1] * 11)
    new = submit(scheduler, "new", [2] * 6)
    run(scheduler)
    assert [r.request_id for r in scheduler.running] == ["old", "new"]
    while not new.preemptions:
        run(scheduler)
    assert old.preemptions == 0 and old.generated > 1
    kept = list(new.tokens)
    scheduler.remove(old)
    assert run(scheduler) == [("new", 0, len(kept))]
    assert new.tokens[: len(kept)] == kept


def test_the_least_recently_used_page_is_overwritten_first() -> None:
    pool = PagePool(4, 2, 1, 1)
    for token in (1, 2):
        sequence = pool.create()
        pool.extend([sequence], [4])
        for index, key in enumerate(pool.keys([token] * 4)):
            pool.publish(sequence, index, key)
        pool.free(sequence)
    assert pool.free_pages == pool.cached_pages == 4
    pool.free(
        pool.adopt(pool.keys([1] * 4))
    )  # used again, so 2's go first, its end before its start
    taker = pool.create()
    pool.extend([taker], [2])
    assert pool.find(pool.keys([2] * 4)) == 1
    pool.extend([taker], [2])
    assert pool.find(pool.keys([2] * 4)) == 0
    assert pool.find(pool.keys([1] * 4)) == 2


def test_equal_digests_of_other_tokens_are_not_found() -> None:
    pool = PagePool(4, 2, 1, 1)
    sequence = pool.create()
    pool.extend([sequence], [2])
    pool.publish(sequence, 0, PageKey(42, (1, 2)))
    assert pool.find([PageKey(42, (1, 2))]) == 1
    assert pool.find([PageKey(42, (1, 3))]) == 0
    assert pool.find([PageKey(41, (1, 2))]) == 0


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_keys_chain(page_size: int) -> None:
    pool = PagePool(4, page_size, 1, 1)
    tokens = list(range(40))
    keys = pool.keys(tokens)
    assert len(keys) == 40 // page_size
    assert pool.keys(tokens, keys[:1]) == keys
    other = pool.keys([99, *tokens[1:]])
    assert not {k.digest for k in keys} & {k.digest for k in other}
