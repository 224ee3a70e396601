"""The benchmark's caches: rows of every make run, and what decoding on a GPU is held to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_bench import ONE_ROUND, SMALL, CountingClock, row_of

from flashattn_lite.bench import ceilings, present, runner
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.suites import Plan, cases_of

ON_CUDA = Plan("quick", dtypes=("bf16",), device="cuda")


@pytest.mark.parametrize(
    "case", [c for s in ("decode", "paged") for c in cases_of(s, ON_CUDA)], ids=Case.short
)
def test_a_gpus_rows_run_here_in_small(case: Case) -> None:
    lengths = (100, 1, 37) if case.lengths else ()
    small = replace(case, device="cpu", batch=3, seqlen=100, lengths=lengths, heads=case.heads // 4)
    small = replace(small, heads_k=case.heads_k // 4, head_dim=64)
    names = ("unquantised", "contiguous", "sdpa")
    row = runner.measure(small, replace(ONE_ROUND, competitors=names))
    assert row.failure is None and row.notes == [] and row.peak is not None and row.peak > 0
    others = {"unquantised": case.storage, "contiguous": case.page_size}
    others["sdpa"] = not (case.storage or case.page_size or case.lengths)
    assert list(row.ratios) == [name for name, runs in others.items() if runs]


def test_the_least_page_size_answers_for_paged_decode_on_cuda() -> None:
    """A batch of 64 caches of 8192 tokens: 80 % of the read rate, over pages of 16 and of 64."""
    cases = cases_of("paged", Plan("quick", dtypes=("bf16",), device="cuda"))
    plain = [c for c in cases if not c.storage]
    assert [(c.batch, c.seqlen, c.heads, c.heads_k, c.head_dim, c.page_size) for c in plain] == [
        *((64, 8192, 32, 8, 128, size) for size in (16, 64)),
    ]
    assert {c.cache_bytes() for c in plain} == {2 * 64 * 8192 * 8 * 128 * 2}
    title = "paged: least share of the read rate, bf16, batch 64, 8192 keys, pages of 16 and 64"
    for least, verdict in ((0.81, "+met"), (0.79, "!missed")):
        rows = [replace(row_of(case, 1.0), peak=0.9) for case in plain]
        rows[1].peak = least
        rows += [replace(row_of(c, 1.0), peak=0.1) for c in cases if c.storage]
        rows.append(replace(row_of(replace(plain[0], dtype="fp16"), 1.0), peak=0.1))
        (found,) = (cells for cells in present.group_table(rows, "wall")[1] if cells[0] == title)
        assert found[2:] == [f"{verdict[0]}{least:.0%}", "", "80%", verdict]


def test_decoding_is_held_against_the_fastest_of_reads_and_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU: over no less than a GiB, by wall clock; here 10 calls read what we read in one."""
    case = replace(SMALL, suite="paged", dtype="bf16", tokens=1, page_size=16)
    gpu = replace(case, device="cuda")
    asked = []

    def limit(reads: int) -> object:
        return lambda size, device: asked.append((size, device)) or (int, reads * gpu.cache_bytes())

    monkeypatch.setattr(ceilings, "read", limit(4))
    monkeypatch.setattr(ceilings, "copy", limit(10))
    limits = ceilings.memory(gpu)
    assert asked == [(2**30, "cuda")] * 2 and list(limits) == ["read", "copy"]
    ceilings.memory(replace(gpu, seqlen=2**20, heads=32, head_dim=128))
    assert asked[-1] == (2 * 2 * 2**20 * 32 * 128 * 2, "cuda")
    monkeypatch.setattr(runner, "_ceilings", lambda _case: limits)
    monkeypatch.setattr(runner, "clock_for", lambda *_: CountingClock())
    row = runner.measure(replace(case, threads=2), replace(ONE_ROUND, competitors=("contiguous",)))
    assert row.failure is None and list(row.samples)[2:] == ["read", "copy"]
    assert row.peak == pytest.approx(0.1)
