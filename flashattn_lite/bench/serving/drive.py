"""Plays a workload against an engine: an open loop, in which nobody waits for anybody's answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flashattn_lite.bench.serving.measures import Served
from flashattn_lite.bench.serving.workload import Ask

if TYPE_CHECKING:
    from flashattn_lite.serving import Engine

__all__ = ["play"]

Report = Callable[[int, int], None]


def play(
    engine: Engine,
    asks: Sequence[Ask],
    prompts: Sequence[Sequence[int]],
    *,
    report: Report = lambda done, open_: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Served]:
    """Submits each request when its time has come, steps the engine, and notes when tokens come.

    Args:
        engine: nobody else uses it.
        asks: in the order of their arrivals.
        prompts: token ids of each.
        report: called after each step with how many have ended, and how many are open.
        clock: seconds.
        sleep: waits so many seconds.

    Returns: one for each ask, in order. Those that the engine refuses have a failure.
    """
    from flashattn_lite.serving import RequestError, SamplingParams

    begin = clock()
    served = [Served(ask.arrival_s, ask.prompt) for ask in asks]
    open_: dict[str, Served] = {}
    next_ = ended = 0
    while next_ < len(asks) or open_:
        now = clock() - begin
        while next_ < len(asks) and asks[next_].arrival_s <= now:
            one = served[next_]
            params = SamplingParams(max_tokens=asks[next_].output, temperature=0, ignore_eos=True)
            try:
                open_[engine.submit(prompts[next_], params)] = one
            except RequestError as error:
                one.failure, one.finish_s = str(error), now
                ended += 1
            next_ += 1
        if not engine.has_work():
            if next_ == len(asks):
                raise RuntimeError(f"the engine has no work, but {len(open_)} requests have no end")
            sleep(max(0.0, asks[next_].arrival_s - (clock() - begin)))
            continue
        outputs = engine.step()
        now = clock() - begin
        for output in outputs:
            one = open_[output.request_id]
            if output.token_ids:
                one.times_s.append(now)
                one.tokens.append(len(output.token_ids))
            if output.finished:
                one.finish_s, one.failure = now, output.error
                del open_[output.request_id]
                ended += 1
        report(ended, len(open_))
    return served
