"""The CPU engine against the oracle: the whole case table, forward and backward, on every
instruction set; and what is promised about memory, strides and repeatability."""

import math
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from flashattn_lite import ArgumentError, attention, attention_weights, reference
from flashattn_lite._ops import backward, build_info, cpu_isa, forward, set_cpu_isa
from flashattn_lite.testing import (
    EDGE_CASES,
    Case,
    all_cases,
    check_case,
    check_within_budget,
    gradients_of,
    make_inputs,
)

EVERYTHING = next(c for c in EDGE_CASES if c.name == "everything")


def with_lse(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = attention(*tensors, **options, return_lse=True)
    return out, lse


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_case_table(case: Case, isa: str) -> None:
    check_case(with_lse, case)


@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_gradients_are_bitwise_repeatable_whatever_the_threads(case: Case) -> None:
    inputs = make_inputs(case)
    first = gradients_of(with_lse, inputs, inputs.options)
    threads = torch.get_num_threads()
    try:
        for other in (1, 2, threads):
            torch.set_num_threads(other)
            again = gradients_of(with_lse, inputs, inputs.options)
            torch.testing.assert_close(again.out, first.out, rtol=0, atol=0)
            torch.testing.assert_close(again.lse, first.lse, rtol=0, atol=0)
            for name, gradient in first.grads.items():
                assert torch.equal(again.grads[name], gradient), f"{name}, {other} threads"
    finally:
        torch.set_num_threads(threads)


def test_unit_last_strides_are_not_copied() -> None:
    """A view that a copy would read in full, but whose sequence is short: memory that does not
    belong to it is never read (it is NaN), and results equal those of a contiguous tensor."""
    memory = torch.full((2, 5, 64, 24), math.nan)
    memory[:, :, 10:30, 3:19] = torch.randn(2, 5, 20, 16)
    q = memory[:, :, 10:30, 3:19].transpose(1, 2)
    out = attention(q, q, q, causal=True)
    assert torch.equal(out, attention(*(q.contiguous(),) * 3, causal=True))


@pytest.mark.parametrize("form", ["expanded", "transposed", "last"])
def test_gradients_of_any_strides(form: str) -> None:
    """A stride-0 gradient (of a sum) and a transposed one."""
    q, k, v = (torch.randn(2, 9, 3, 8, requires_grad=True) for _ in range(3))
    out = attention(q, k, v)
    if form == "expanded":
        dout = torch.ones(()).expand(out.shape)
    elif form == "transposed":
        dout = torch.randn(2, 3, 9, 8).transpose(1, 2)
    else:
        dout = torch.randn(2, 9, 8, 3).transpose(2, 3)
    grads = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    expected = torch.autograd.grad(out, (q, k, v), dout.contiguous())
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^29 elements apart: the last one is beyond 2^31 elements from the first. The storage
    is virtual memory that is touched only where rows lie."""
    rows, step = 5, 2**29 + 8
    memory = mmap.mmap(-1, ((rows - 1) * step + 16) * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    q = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(
        (1, rows, 1, 16), (0, step, 16, 1)
    )
    q.copy_(torch.randn(1, rows, 1, 16))
    assert torch.equal(attention(q, q, q), attention(*(q.contiguous(),) * 3))
    leaves = [t.detach().requires_grad_() for t in (q, q.contiguous())]
    grads = [torch.autograd.grad(attention(t, t, t).float().sum(), t)[0] for t in leaves]
    assert torch.equal(*grads)


def test_outputs_never_hold_stale_memory() -> None:
    """Rows that belong to no sequence are written too: beyond seqused, and after cu_seqlens[-1]."""
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    for _ in range(3):
        poison = torch.full((9, 2, 8), math.nan)  # freed at once: what the allocator hands out next
        del poison
        leaves = [torch.randn(9, 2, 8, requires_grad=True) for _ in range(3)]
        out, lse = with_lse(*leaves, cu_seqlens_q=cu, cu_seqlens_k=cu)
        assert out[5:].eq(0).all() and lse[:, 5:].eq(-math.inf).all()
        for gradient in torch.autograd.grad(out.sum(), leaves):
            assert gradient[5:].eq(0).all() and torch.isfinite(gradient).all()
    q, k, v = (torch.randn(2, 6, 2, 8) for _ in range(3))
    used = torch.tensor([2, 6], dtype=torch.int32)
    out, lse = with_lse(q, k, v, seqused_q=used)
    assert out[0, 2:].eq(0).all() and lse[0, :, 2:].eq(-math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_at_a_visible_key_shows(dtype: torch.dtype, isa: str) -> None:
    q, k, v = (torch.randn(1, 40, 1, 16).to(dtype) for _ in range(3))
    for poisoned in (k, v):
        clean = poisoned[0, 20, 0, 3].clone()
        poisoned[0, 20, 0, 3] = math.nan
        out, lse = with_lse(q, k, v, causal=True)
        assert out[0, 20:].isnan().any(-1).all()
        if poisoned is k:
            assert lse[0, 0, 20:].isnan().all()
        poisoned[0, 20, 0, 3] = clean


def test_an_infinite_score_is_not_an_empty_row() -> None:
    q = torch.full((1, 1, 1, 4), 1e30)
    k = torch.cat([torch.full((1, 1, 1, 4), 1e30), torch.ones(1, 1, 1, 4)], 1)
    _, lse = with_lse(q, k, torch.ones(1, 2, 1, 4))
    assert lse.isnan().all() or lse.eq(math.inf).all()


def test_float64_runs_through_the_reference() -> None:
    inputs = make_inputs(Case("float64", dtype=torch.float64, causal=True, sinks=True, softcap=2.0))
    out, lse = with_lse(inputs.q, inputs.k, inputs.v, **inputs.options)
    assert out.dtype == torch.float64 and lse.dtype == torch.float64
    expected, _ = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.reference_options())
    assert torch.equal(out, expected)


def test_backend_reference_equals_the_kernels() -> None:
    inputs = make_inputs(EVERYTHING)
    out, lse = with_lse(inputs.q, inputs.k, inputs.v, **inputs.options, backend="reference")
    assert out.dtype == torch.float32 and lse.dtype == torch.float32
    actual, actual_lse = with_lse(inputs.q, inputs.k, inputs.v, **inputs.options, backend="cpu")
    torch.testing.assert_close(actual, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual_lse, lse, rtol=1e-5, atol=1e-5)


def test_a_backend_that_cannot_run_says_why() -> None:
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(ArgumentError) as raised:
        attention(q, q, q, backend="flash2")
    text = str(raised.value)
    assert text.startswith("attention: backend 'flash2' cannot run this call")
    for engine in ("decode", "flash2", "flash1"):
        assert f"{engine}: q is not a CUDA tensor" in text
    assert "cpu: can run this call" in text
    with pytest.raises(ArgumentError, match="backend is 'fast'; it must be auto, cpu"):
        attention(q, q, q, backend="fast")
    with pytest.raises(
        ArgumentError, match="backend 'cuda' cannot run this call:\\n  cpu: can run"
    ):
        attention(q, q, q, backend="cuda")
    with pytest.raises(ArgumentError, match="flash1: q is not a CUDA tensor"):
        attention(q, q, q, algorithm="flash1")
    with pytest.raises(
        ArgumentError, match="algorithm is 'flash3' with backend 'auto'; it must be"
    ):
        attention(q, q, q, algorithm="flash3")
    with pytest.raises(ArgumentError, match="algorithm is 'flash2' with backend 'cpu'; it must be"):
        attention(q, q, q, algorithm="flash2", backend="cpu")


def test_instruction_sets_can_be_chosen() -> None:
    before = cpu_isa()
    assert f'"{before}"' in build_info()
    with pytest.raises(RuntimeError, match="isa is 'mmx'; available here: "):
        set_cpu_isa("mmx")
    assert cpu_isa() == before


def test_dropout_follows_torch_seed_and_its_definition() -> None:
    q, k, v = (torch.randn(2, 40, 2, 16) for _ in range(3))
    torch.manual_seed(5)
    first = attention(q, k, v, dropout_p=0.3)
    second = attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(attention(q, k, v, dropout_p=0.3), first) and not torch.equal(first, second)
    seed = torch.tensor([-7])
    out = attention(q, k, v, dropout_p=0.3, dropout_seed=seed)
    weights = attention_weights(q, k, dropout_p=0.3, dropout_seed=seed)
    expected = (weights @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ((1, 1, 6, 7), (2, 1, 1, 7), (1, 4, 6, 1), (1, 1, 1, 1)))
def test_a_bias_broadcasts_where_nobody_needs_a_gradient(shape: tuple[int, ...]) -> None:
    """The operator reads it as it is; with a gradient it is expanded first."""
    q, k, v = (torch.randn(2, n, 4, 8) for n in (6, 7, 7))
    bias = torch.randn(shape)
    expanded = bias.expand(2, 4, 6, 7).contiguous()
    assert torch.equal(attention(q, k, v, bias=bias), attention(q, k, v, bias=expanded))


def test_attention_weights_take_a_bias_of_any_rank() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8)
    bias = torch.randn(3, 5)
    shown = attention_weights(q, k, bias=bias)
    assert torch.equal(shown, attention_weights(q, k, bias=bias.expand(2, 4, 3, 5)))
    assert not shown.isclose(attention_weights(q, k)).all()


def test_attention_weights_are_normalised() -> None:
    q, k = torch.randn(2, 7, 4, 8), torch.randn(2, 9, 2, 8)
    weights = attention_weights(q, k, causal=True)
    assert weights.shape == (2, 4, 7, 9) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
    with_sink = attention_weights(q, k, sinks=torch.zeros(4))
    assert (with_sink.sum(-1) < 1).all()


def test_lse_is_the_softmax_normaliser() -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    _, lse = with_lse(q, k, v, softmax_scale=0.5)
    scores = 0.5 * torch.einsum("bihd,bjhd->bhij", q, k)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_operators_called_directly_agree_with_attention() -> None:
    """The operators are public under torch.ops: positional, every option named in the schema."""
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    lengths = (None,) * 8
    options = (*lengths, 5, 5, *(None,) * 6, 8**-0.5, 0.0, -1, 0, 0.0)
    out, lse = forward(q, k, v, *options, "auto")
    expected, expected_lse = with_lse(q, k, v, causal=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    dq, dk, dv, dsinks, dbias = backward(
        torch.ones_like(out), None, q, k, v, out, lse, *options, False, False, False, "auto"
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    for a, b in zip(
        (dq, dk, dv),
        torch.autograd.grad(attention(*leaves, causal=True).sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert dsinks.numel() == 0 and dbias.numel() == 0


def test_budget_reports_the_worst_element() -> None:
    truth = torch.zeros(2, 3, dtype=torch.float64)
    truth[1, 2] = 1.0
    actual = truth.float()
    check_within_budget("same", actual, truth, truth)
    actual[1, 2] = 1.5
    with pytest.raises(AssertionError, match=r"shifted: 1.5 at \(1, 2\), expected 1.0: error 0.5"):
        check_within_budget("shifted", actual, truth, truth)
    actual[1, 2] = math.nan
    with pytest.raises(AssertionError, match=r"nan at \(1, 2\)"):
        check_within_budget("nan", actual, truth, truth)
