"""Properties that hold for every shape and option, tried with hypothesis: what else is in the batch
changes nothing, neither do the order of heads, the split of the keys or the number of threads."""

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashattn_lite import attention, merge_attention_states, reference
from flashattn_lite.testing import Case, check_case, make_inputs

# Deterministic, so that a failure in CI is a failure everywhere.
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SIDES = st.one_of(st.none(), st.integers(0, 70))
LENGTHS = st.tuples(st.integers(0, 70), st.integers(0, 150))


def with_lse(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = attention(*tensors, **options, return_lse=True)
    return out, lse


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads_k = draw(st.integers(1, 3))
    return Case(
        "drawn",
        tuple(draw(st.lists(LENGTHS, min_size=1, max_size=3))),
        draw(st.sampled_from(["varlen", "seqused", "leftpad"])),
        heads_q=heads_k * draw(st.integers(1, 4)),
        heads_k=heads_k,
        head_dim=draw(st.integers(1, 256)),
        head_dim_v=draw(st.integers(1, 256)),
        dtype=draw(DTYPES),
        causal=draw(st.booleans()),
        window=(draw(SIDES), draw(SIDES)),
        softcap=draw(st.sampled_from([0.0, 2.0, 30.0])),
        alibi=draw(st.sampled_from(["", "heads", "batch"])),
        sinks=draw(st.booleans()),
        bias=draw(st.sampled_from(["", "full", "broadcast"])),
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.6])),
        strides=draw(st.sampled_from(["contiguous", "heads_first", "offset", "last"])),
    )


@few
@given(cases())
def test_any_case_is_within_the_budget(case: Case) -> None:
    check_case(with_lse, case)


@few
@given(cases(), st.randoms(use_true_random=False))
def test_batch_composition_changes_nothing(case: Case, random: Any) -> None:
    """Each sequence of a varlen batch, bit for bit, when the others are gone."""
    case = Case(**{**case.__dict__, "layout": "varlen", "dropout_p": 0.0, "bias": ""})
    inputs = make_inputs(case)
    out, lse = with_lse(inputs.q, inputs.k, inputs.v, **inputs.options)
    b = random.randrange(case.batch)
    begin_q, end_q = inputs.options["cu_seqlens_q"][b : b + 2].tolist()
    begin_k, end_k = inputs.options["cu_seqlens_k"][b : b + 2].tolist()
    options = {n: o for n, o in inputs.options.items() if "seqlens" not in n and "seqlen" not in n}
    if case.alibi == "batch":
        options["alibi_slopes"] = options["alibi_slopes"][b : b + 1]
    alone, alone_lse = with_lse(
        inputs.q[None, begin_q:end_q],
        inputs.k[None, begin_k:end_k],
        inputs.v[None, begin_k:end_k],
        **options,
    )
    assert torch.equal(out[begin_q:end_q], alone[0])
    assert torch.equal(lse[:, begin_q:end_q], alone_lse[0])


@few
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 128)
)
def test_splitting_the_keys_and_merging_equals_the_whole(
    splits: list[int], seqlen_q: int, head_dim: int
) -> None:
    """Any split, empty parts included, folded from the left."""
    total = sum(splits)
    q, k, v = (torch.randn(1, n, 2, head_dim) for n in (seqlen_q, total, total))
    whole, whole_lse = with_lse(q, k, v)
    out, lse = torch.zeros_like(whole), torch.full_like(whole_lse, -math.inf)
    begin = 0
    for n in splits:
        part = with_lse(q, k[:, begin : begin + n], v[:, begin : begin + n])
        out, lse = merge_attention_states(out, lse, *part)
        begin += n
    torch.testing.assert_close(out, whole, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=2e-6, atol=2e-6)


@few
@given(st.permutations(range(6)), st.integers(1, 60), st.booleans(), DTYPES)
def test_heads_do_not_know_each_other(
    order: list[int], seqlen: int, causal: bool, dtype: torch.dtype
) -> None:
    """Permuting groups of heads permutes the results, bit for bit."""
    q, k, v = (torch.randn(2, seqlen, 6, 16).to(dtype) for _ in range(3))
    out, lse = with_lse(q, k, v, causal=causal)
    other, other_lse = with_lse(q[:, :, order], k[:, :, order], v[:, :, order], causal=causal)
    assert torch.equal(other, out[:, :, order]) and torch.equal(other_lse, lse[:, order])


@few
@given(st.permutations(range(23)), st.integers(1, 30))
def test_the_order_of_the_keys_does_not_matter_without_a_band(
    order: list[int], seqlen_q: int
) -> None:
    q, k, v = (torch.randn(1, n, 2, 16) for n in (seqlen_q, 23, 23))
    out, lse = with_lse(q, k, v)
    other, other_lse = with_lse(q, k[:, order], v[:, order])
    torch.testing.assert_close(other, out, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(other_lse, lse, rtol=2e-6, atol=2e-6)


@few
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(0.0, 1.0, exclude_max=True),
    st.integers(1, 50),
    st.integers(1, 50),
)
def test_dropout_equals_its_definition(
    seed: int, dropout_p: float, seqlen_q: int, seqlen_k: int
) -> None:
    """With one value 1 and the others 0, the output is P of that key, dropped or scaled."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 3, 8, generator=generator) for n in (seqlen_q, seqlen_k))
    v = torch.eye(seqlen_k).expand(2, 3, -1, -1).transpose(1, 2)
    out = attention(q, k, v, dropout_p=dropout_p, dropout_seed=torch.tensor([seed]))
    p = reference.attention_weights(q, k)
    heads = torch.arange(6).reshape(2, 3)
    keep = reference.dropout_keep(seed, heads, seqlen_q, seqlen_k, dropout_p)
    expected = (p * keep * reference.dropout_keep_scale(dropout_p)).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@few
@given(st.integers(1, 80), st.integers(1, 80), SIDES, SIDES)
def test_a_window_is_the_boolean_mask_it_stands_for(
    seqlen_q: int, seqlen_k: int, left: int | None, right: int | None
) -> None:
    q, k, v = (torch.randn(1, n, 1, 8) for n in (seqlen_q, seqlen_k, seqlen_k))
    seen = reference.visible(seqlen_q, seqlen_k, (left, right))
    bias = torch.where(seen, 0.0, -math.inf)
    out, lse = with_lse(q, k, v, window=(left, right))
    masked, masked_lse = with_lse(q, k, v, bias=bias)
    torch.testing.assert_close(out, masked, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse, masked_lse, rtol=2e-6, atol=2e-6)
