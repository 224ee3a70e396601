"""``block_mask=`` in FlashAttention-2's kernels, on the SIMT emulator: the oracle's results forward
and backward, empty rows and columns, what hidden elements may hold, and cost by what is listed."""

import dataclasses
import math
from typing import Any

import io_complexity
import pytest
import torch
from native import cuda_problem, emulated_ops, kv_caches
from test_block_mask import OPTIONS, PATTERNS, SIZES, S, check, holes
from test_cuda_emulated import check_forward, clean, emulated
from test_cuda_nonfinite import by_the_rule, poisoned, rounded, run

from flashattn_lite import (
    BlockMask,
    block_patterns,
    flash_attn_with_kvcache,
    reference,
    testing,
)
from flashattn_lite.testing import Case, check_within_budget, make_inputs

BF16, F16 = torch.bfloat16, torch.float16


def masked(
    name: str, size: int | tuple[int, int], *, deterministic: bool, seed: int = 1, **more: Any
) -> None:
    """Forward and backward with a pattern of test_block_mask.py within the budget."""
    fields = {"heads_q": 2, "heads_k": 1, "dtype": BF16} | more
    if name == "heads":
        fields |= {"heads_q": 4, "heads_k": 2}
    case = Case(name, fields.pop("seqlens", ((S, S),) * (1 + (name == "batch"))), **fields)
    function = emulated("flash2", deterministic=deterministic, seed=seed)
    what = f"{name} {size} {more}"
    check(function, make_inputs(case), PATTERNS[name](size), case.dtype, what)


@pytest.mark.parametrize("number", range(len(PATTERNS)), ids=list(PATTERNS))
def test_every_pattern_equals_the_dense_mask(number: int) -> None:
    """Blocks smaller than a tile, as large, larger, and that do not divide one; dQ by
    atomics or in rows."""
    sizes = [*SIZES, 64]
    name = list(PATTERNS)[number]
    if number % 2 or name == "heads":
        masked(name, sizes[number % 5], deterministic=False)
    else:
        masked(name, sizes[number % 5], deterministic=True, seed=2, dtype=F16)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "bias"])
def test_it_composes_with_every_option(option: str) -> None:
    options = {n: o for n, o in OPTIONS[option].items() if n != "bias"}
    masked("holes", (64, 32), deterministic=option == "all", **options)
    if option in ("causal", "dropout"):
        masked("heads", 48, deterministic=True, **options)


@pytest.mark.parametrize("head_dim", [128, 192, 256, 37])
@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=("plain", "softcap"))
def test_head_dims(head_dim: int, softcap: float) -> None:
    """Every kernel that takes a mask."""
    for deterministic in (False, True):
        more = {"head_dim": head_dim, "softcap": softcap, "heads_q": 1}
        masked("holes", 48, deterministic=deterministic, seqlens=((150, S),), **more)


@pytest.mark.parametrize("layout", ["varlen", "seqused", "leftpad"])
def test_sequences_of_other_lengths(layout: str) -> None:
    """One mask, placed by position: also where it ends inside, and with more rows than keys."""
    lengths = ((130, 200), (0, 40), (1, 330), (33, 170), (60, 20))
    for name, softcap in (("holes", 0.0), ("documents", 2.0)):
        more = {"layout": layout, "seqlens": lengths, "softcap": softcap}
        masked(name, 32, deterministic=softcap > 0, **more)


@pytest.mark.parametrize("page_size", [5, 64])
@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=("plain", "softcap"))
def test_pages(page_size: int, softcap: float) -> None:
    """Prefill, a chunk and a decoding step over shuffled pages: NaN in slots that nobody owns and
    huge numbers in unused entries of the table."""
    lengths = [S, 3, 130, 41]
    generator = torch.Generator().manual_seed(page_size)
    k, v = ([torch.randn(n, 2, 64, generator=generator).to(BF16) for n in lengths] for _ in "kv")
    cache = kv_caches.make_cache(f"page{page_size}", "same", k, v, S)
    kv_caches.forget_unused_pages(cache, lengths)
    used = torch.tensor(lengths, dtype=torch.int32)
    for tokens, name, size in ((40, "vertical_slash", 32), (1, "holes", 16), (140, "heads", 128)):
        q = torch.randn(4, tokens, 4, 64, generator=generator).to(BF16)
        options = {**cache.options, "seqused_k": used, "softcap": softcap}
        options["block_mask"] = PATTERNS[name](size)
        result = cuda_problem.forward("flash2", q, cache.k, cache.v, **options)
        clean(result)
        check_forward(result, testing.Inputs(q, cache.k, cache.v, options), BF16)


def test_the_kv_cache_call_takes_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows into pages, then attention to all of them: decode says why not, and
    FlashAttention-2 runs."""
    lengths, generator = [200, 61], torch.Generator().manual_seed(3)
    k, v = ([torch.randn(n, 2, 64, generator=generator).to(F16) for n in lengths] for _ in "kv")
    cache = kv_caches.make_cache("page16", "same", k, v, S)
    q, k_new, v_new = (torch.randn(2, 3, h, 64, generator=generator).to(F16) for h in (4, 2, 2))
    used = torch.tensor(lengths, dtype=torch.int32)
    options = {"causal": True, "block_mask": PATTERNS["vertical_slash"](32), **cache.options}
    emulated_ops.install(monkeypatch)
    out = flash_attn_with_kvcache(q, cache.k, cache.v, k_new, v_new, cache_seqlens=used, **options)
    options["seqused_k"] = used + 3
    truth, _ = reference.attention(q, cache.k, cache.v, **options)
    low, _ = reference.attention(q, cache.k, cache.v, **options, precision=F16)
    assert isinstance(out, torch.Tensor)
    check_within_budget("out", out, truth, low)


def test_schedules_change_nothing() -> None:
    """Whatever order the threads run in, the bits are the same and no race is seen."""
    inputs = make_inputs(Case("schedules", ((S, S),), heads_q=4, heads_k=2, dtype=BF16))
    options = {"block_mask": PATTERNS["heads"](32)}
    results = []
    for seed in (0, 1, 2):
        forward = cuda_problem.forward("flash2", inputs.q, inputs.k, inputs.v, seed=seed, **options)
        clean(forward)
        arguments = (inputs.q, inputs.k, inputs.v, forward.out, forward.lse, inputs.dout)
        backward = cuda_problem.backward(
            "flash2", *arguments, deterministic=True, seed=seed, **options
        )
        clean(backward)
        results.append(
            [t for t in (forward.out, forward.lse, backward.dq, backward.dk) if t is not None]
        )
    for result in results[1:]:
        assert len(result) == 4 and all(map(torch.equal, result, results[0]))


def test_a_list_of_many_parts() -> None:
    """More tiles than a list holds, with gaps that are skipped: the list goes on where it ended."""
    seqlen = 64 * 150
    rows = torch.zeros(2, 75, dtype=torch.bool)
    rows[0, :33] = rows[0, 60] = rows[1, 3::36] = True
    mask = BlockMask.from_blocks(rows, 256, seqlen)
    for q, k in ((256, seqlen), (seqlen, 256)):
        if q > k:
            mask = BlockMask.from_blocks(rows.T, seqlen, 256)
        inputs = make_inputs(Case("long", ((q, k),), heads_q=1, heads_k=1, dtype=BF16))
        function = emulated("flash2", deterministic=q < k, seed=1)
        check(function, inputs, mask, BF16, f"{q} x {k}")


POISONS = [("q", math.nan), ("k", math.nan), ("v", math.inf), ("dout", -math.inf)]


@pytest.mark.parametrize("poison", POISONS, ids=lambda p: f"{p[0]}_{p[1]}")
@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=("plain", "softcap"))
def test_a_nan_shows_where_it_is_visible_and_nowhere_else(
    poison: tuple[str, float], softcap: float
) -> None:
    name = "holes" if poison[0] in "qv" else "documents"
    options = {"block_mask": PATTERNS[name](32)}
    case = Case("nan", ((S, S),), heads_q=2, heads_k=1, softcap=softcap, dtype=BF16)
    clean_inputs = make_inputs(case)
    clean_inputs = dataclasses.replace(clean_inputs, options=clean_inputs.options | options)
    inputs = poisoned(clean_inputs, *poison)
    truth, low = by_the_rule(inputs), rounded(clean_inputs)
    for deterministic in (False, True):
        for result, actual in run("flash2", inputs, deterministic).items():
            factor = 2.0 if result in ("out", "lse") else 3.0
            check_within_budget(result, actual, truth[result], low[result], factor=factor)


def test_empty_rows_and_columns() -> None:
    """0, -inf and no gradient; and a sink is all that an empty row sees."""
    inputs = make_inputs(Case("empty", ((S, S),), heads_q=2, heads_k=1, sinks=True, dtype=F16))
    options = inputs.reference_options() | {"block_mask": PATTERNS["holes"](128)}
    forward = cuda_problem.forward("flash2", inputs.q, inputs.k, inputs.v, **options)
    rows, columns = ~holes().any(1), ~holes().any(0)
    assert rows.sum() > 50 and columns.sum() > 100
    assert (forward.out[:, rows] == 0).all()
    assert torch.equal(forward.lse[0, :, rows], options["sinks"][:, None].expand(-1, rows.sum()))
    for deterministic in (False, True):
        result = cuda_problem.backward(
            *("flash2", inputs.q, inputs.k, inputs.v, forward.out, forward.lse, inputs.dout),
            deterministic=deterministic,
            **options,
        )
        assert result.dq is not None and result.dk is not None and result.dv is not None
        assert (result.dq[:, rows] == 0).all()
        assert (result.dk[:, columns] == 0).all() and (result.dv[:, columns] == 0).all()


@pytest.mark.parametrize("backward", [False, True], ids=("forward", "backward"))
def test_cost_is_proportional_to_density(backward: bool) -> None:
    """Bytes and FLOPs, within 5 %: what is not listed costs neither; and all of it listed costs
    what a call without a mask does."""
    counts = {d: io_complexity.sparse(d, backward) for d in (0.0, *io_complexity.DENSITIES, None)}
    nothing, whole = counts[0.0], counts[1.0]
    assert nothing.flops == 0 and whole.flops == counts[None].flops
    assert whole.moved == pytest.approx(counts[None].moved, rel=0.05)
    for density in io_complexity.DENSITIES:
        count = counts[density]
        assert count.flops == density * whole.flops
        assert count.moved == pytest.approx(density * whole.moved, rel=0.05)


def test_the_other_engines_say_why_not() -> None:
    """So a decoding step with a mask is FlashAttention-2's."""
    q = torch.randn(1, 4, 2, 64).to(BF16)
    mask = block_patterns.causal(16, block_size=16)
    reasons = {
        a: cuda_problem.reason_against(a, q, q, q, block_mask=mask) for a in ("flash1", "decode")
    }
    assert set(reasons.values()) == {
        "a block_mask is given, which flash2 and the CPU engine alone take"
    }
    assert cuda_problem.reason_against("flash2", q, q, q, block_mask=mask) is None
