"""torch.compile, torch.export and opcheck. The "aot_eager" backend traces, functionalises and
partitions as inductor does, without its code generation, which one test adds."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.library import opcheck

from flashattn_lite import (
    _ops,
    attention,
    attention_weights,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flashattn_lite.testing import EDGE_CASES, Case, make_inputs

CASES = [
    Case("plain"),
    Case("causal", causal=True, dtype=torch.bfloat16),
    Case("varlen", ((3, 3), (0, 4), (40, 10)), "varlen", causal=True),
    Case("seqused", ((3, 9), (9, 30)), "seqused", window=(4, 0)),
    Case("modified", softcap=3.0, alibi="heads", sinks=True, bias="broadcast"),
    next(c for c in EDGE_CASES if c.name == "everything"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = attention(*tensors, **options, return_lse=True)
    return out * 2, lse + 1


def leaves_of(case: Case) -> tuple[list[Tensor], dict[str, Any], list[Tensor]]:
    inputs = make_inputs(case)
    differentiable = [inputs.q, inputs.k, inputs.v]
    differentiable += [inputs.options[n] for n in ("sinks", "bias") if n in inputs.options]
    for t in differentiable:
        t.nan_to_num_(0.0).requires_grad_()
    return [inputs.q, inputs.k, inputs.v], inputs.options, differentiable


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fullgraph_with_gradients(case: Case) -> None:
    tensors, options, leaves = leaves_of(case)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        out, lse = function(*tensors, **options)
        loss = out.float().square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("grad", [False, True])
def test_dynamic_shapes_do_not_recompile(grad: bool) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    frames = []
    for batch, seqlen_q, seqlen_k in ((2, 5, 9), (3, 8, 17), (4, 31, 11)):
        q, k, v = (
            torch.randn(batch, n, 6, 8, requires_grad=grad) for n in (seqlen_q, seqlen_k, seqlen_k)
        )
        out = compiled(q, k, v)
        frames.append(counter.frame_count)
        expected = flash_attn_func(q, k, v, causal=True)
        assert torch.equal(out, expected)
        if grad:
            for a, b in zip(
                torch.autograd.grad(out.sum(), (q, k, v)),
                torch.autograd.grad(expected.sum(), (q, k, v)),
                strict=True,
            ):
                assert torch.equal(a, b)
    assert len(set(frames)) == 1


def test_dynamic_varlen() -> None:
    compiled = torch.compile(
        flash_attn_varlen_func, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for lengths in ([3, 5], [7, 1], [4, 20]):
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        q = torch.randn(sum(lengths), 2, 8)
        arguments = (q, q, q, cu, cu, max(lengths), max(lengths))
        assert torch.equal(compiled(*arguments), flash_attn_varlen_func(*arguments))


def test_dropout_under_compile_follows_torch_seed() -> None:
    q = torch.randn(1, 40, 2, 8)
    compiled = torch.compile(
        lambda t: flash_attn_func(t, t, t, dropout_p=0.3), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(7)
    first, second = compiled(q), compiled(q)
    torch.manual_seed(7)
    assert torch.equal(compiled(q), first) and not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(flash_attn_func(q, q, q, dropout_p=0.3), first)


def test_what_inspects_attention_compiles() -> None:
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)

    def weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_weights(q, k, causal=True)

    def signed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True)[2]

    for function in (weights, signed):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        expected = function(q, k, v)
        torch.manual_seed(3)
        assert torch.equal(compiled(q, k, v), expected)


def test_what_has_to_be_read_ends_the_graph_and_fullgraph_says_why() -> None:
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    q, tokens = torch.randn(1, 7, 2, 8), torch.randn(7, 2, 8, dtype=torch.float64)

    def windowed(q: Tensor, window: Tensor) -> Any:
        return flash_attn_func(q, q, q, window_size=window)

    def scaled(q: Tensor, scale: Tensor) -> Any:
        return flash_attn_func(q, q, q, softmax_scale=scale)  # type: ignore[arg-type]

    def packed(q: Tensor, cu_seqlens: Tensor) -> Any:
        return flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 4, 4)

    for function, arguments, reason in (
        (windowed, (q, torch.tensor([3, 1])), r"window_size\[0\] is a tensor, which has"),
        (scaled, (q, torch.tensor(0.5)), "softmax_scale is a tensor, which has"),
        (packed, (tokens, cu_seqlens), "cu_seqlens_q has to be read by the reference"),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match=f"flash_attn_.*: {reason}"):
            compiled(*arguments)
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager")
        assert torch.equal(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("window", [(-1, -1), (2, 2)])
def test_function_transforms_are_not_traced_but_right(window: tuple[int, int]) -> None:
    """In a trace their inputs say that they require no gradient: it came out as zero."""
    q = torch.randn(1, 5, 2, 8)

    def gradient(q: Tensor) -> Tensor:
        loss = torch.func.grad(lambda q: flash_attn_func(q, q, q, window_size=window).norm())
        return loss(q)  # type: ignore[no-any-return]

    compiled = torch.compile(gradient, backend="aot_eager")
    assert torch.equal(compiled(q), gradient(q)) and gradient(q).any()
    torch._dynamo.reset()
    whole = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch.func's transforms are not"):
        whole(q)


@pytest.mark.parametrize("tree", [False, True])
def test_a_step_over_a_cache_is_one_graph(tree: bool) -> None:
    options: dict[str, Any] = {"causal": True}
    if tree:
        options = {"tree_mask": torch.ones(3, 3, dtype=torch.bool).tril()}

    def step(q: Tensor, k: Tensor, cache: Tensor, used: Tensor) -> Any:
        out = flash_attn_with_kvcache(q, cache, cache.clone(), k, k, cache_seqlens=used, **options)
        return out, cache + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    used, cache = torch.tensor([4, 7], dtype=torch.int32), torch.randn(2, 16, 2, 8)
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
    expected, actual = step(q, k, cache.clone(), used), compiled(q, k, cache.clone(), used)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_inductor() -> None:
    """Code generation and all: needs a C++ compiler at run time, as the build did."""
    q, k, v = (torch.randn(2, 9, 2, 8, requires_grad=True) for _ in range(3))
    compiled = torch.compile(
        lambda *t: flash_attn_func(*(x * 1.5 for x in t), causal=True).relu(), fullgraph=True
    )
    out = compiled(q, k, v)
    expected = flash_attn_func(q * 1.5, k * 1.5, v * 1.5, causal=True).relu()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), (q, k, v)),
        torch.autograd.grad(expected.sum(), (q, k, v)),
    )


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch_and_length(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, causal=True, window=(7, None))

    example = tuple(torch.randn(2, n, 2, 8) for n in (6, 9, 9))
    batch, rows, keys = (torch.export.Dim(n, min=2, max=64) for n in ("batch", "rows", "keys"))
    shapes = ({0: batch, 1: rows}, {0: batch, 1: keys}, {0: batch, 1: keys})
    program = torch.export.export(Model(), example, dynamic_shapes=shapes, strict=strict)
    other = tuple(torch.randn(3, n, 2, 8) for n in (11, 5, 5))
    assert torch.equal(program.module()(*other), Model()(*other))


def operator_arguments(case: Case) -> tuple[Any, ...]:
    inputs = make_inputs(case)
    o = inputs.options
    names = _ops.FORWARD_ARGUMENTS[3:19]
    scale = o["softmax_scale"] or case.head_dim**-0.5
    left, right = (-1 if side is None else side for side in case.window)
    longest = inputs.q.shape[1], inputs.k.shape[1]
    lengths = {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]} | o
    return (
        *(inputs.q, inputs.k, inputs.v, *(lengths.get(n) for n in names)),
        *(scale, case.softcap, left, 0 if case.causal else right, case.dropout_p),
    )


# Autograd is an autograd.Function around the raw operators, so no kernel of theirs is for autograd.
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    arguments = operator_arguments(case)
    inputs = make_inputs(case)
    opcheck(_ops.forward, (*arguments, "auto"), test_utils=OPCHECKS)
    out, lse = _ops.forward(*arguments, "auto")
    q, k, v, *options = arguments
    for dlse in (None, inputs.dlse):
        opcheck(
            _ops.backward,
            (
                *(inputs.dout, dlse, q, k, v, out, lse, *options),
                *(False, case.sinks, bool(case.bias), "auto"),
            ),
            test_utils=OPCHECKS,
        )


@pytest.mark.parametrize("heads_first", [False, True])
def test_opcheck_of_the_plain_operators(heads_first: bool) -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    v = torch.randn(2, 7, 2, 8).transpose(1, 2)
    if not heads_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    for scale in (0.3, None):
        options = (heads_first, 0, scale)
        for forward in (_ops.forward_plain, _ops.forward_plain_training):
            opcheck(forward, (q, k, v, *options), test_utils=OPCHECKS)
        out, lse = _ops.forward_plain_training(q, k, v, *options)
        assert torch.equal(_ops.forward_plain(q, k, v, *options), out)
        arguments = (torch.randn_like(out), q, k, v, out, lse, *options)
        opcheck(_ops.backward_plain, arguments, test_utils=OPCHECKS)


def test_fakes_have_the_shapes_of_the_real_ones() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k, v = torch.empty(2, 5, 4, 8), torch.empty(2, 7, 2, 8), torch.empty(2, 7, 2, 16)
        out, lse = attention(q, k, v, return_lse=True)
    assert out.shape == (2, 5, 4, 16) and lse.shape == (2, 4, 5) and lse.dtype == torch.float32
