"""Gradients: numerically in float64, of every differentiable argument, and what is refused."""

import math

import pytest
import torch

from flashattn_lite import ArgumentError, _ops, attention, flash_attn_func, reference
from flashattn_lite.testing import Case, check_within_budget, make_inputs


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", ((3, 5),), head_dim=4, heads_q=2, heads_k=1),
        Case(
            "modified",
            ((4, 3),) * 2,
            head_dim=3,
            head_dim_v=5,
            heads_q=2,
            heads_k=2,
            window=(1, 1),
            softcap=1.5,
            alibi="batch",
            sinks=True,
            bias="broadcast",
            dropout_p=0.4,
        ),
        Case("varlen", ((3, 2), (0, 2), (1, 4)), "varlen", head_dim=3, heads_q=2, heads_k=1),
    ],
    ids=str,
)
def test_gradcheck_in_float64(case: Case) -> None:
    """First and second derivatives of the float64 path against finite differences."""
    inputs = make_inputs(Case(**{**case.__dict__, "dtype": torch.float64}))
    names = [n for n in ("sinks", "bias") if n in inputs.options]
    leaves = [inputs.q, inputs.k, inputs.v, *(inputs.options[n].double() for n in names)]
    leaves = [t.detach().requires_grad_() for t in leaves]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = inputs.options | dict(zip(names, tensors[3:], strict=True))
        out, lse = reference.attention(
            *tensors[:3], **{n: o for n, o in options.items() if not n.startswith("max_")}
        )
        return out, torch.where(lse == -math.inf, 0.0, lse)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_float64_attention_passes_gradcheck() -> None:
    q, k, v = (torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *t: attention(*t, causal=True), (q, k, v))


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    assert attention(q, k, v).grad_fn is None
    with torch.no_grad():
        assert attention(q.requires_grad_(), k, v).grad_fn is None
    out = attention(q, k, v)
    out.sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is None


def test_lse_alone_is_differentiable() -> None:
    q, k, v = (torch.randn(2, 5, 2, 8, requires_grad=True) for _ in range(3))
    _, lse = attention(q, k, v, causal=True, return_lse=True)
    dlse = torch.randn_like(lse)
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), dlse)
    truth = torch.autograd.grad(reference.attention(q, k, v, causal=True)[1], (q, k), dlse.double())
    torch.testing.assert_close((dq, dk), truth, check_dtype=False, rtol=1e-5, atol=1e-5)
    assert dv.eq(0).all()


def test_gradient_of_a_sink_in_half_precision() -> None:
    q, k, v = (torch.randn(1, 6, 4, 16) for _ in range(3))
    sinks = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    attention(q, k, v, sinks=sinks).sum().backward()
    wide = sinks.detach().double().requires_grad_()
    reference.attention(q, k, v, sinks=wide)[0].sum().backward()
    assert sinks.grad is not None and sinks.grad.dtype == torch.bfloat16
    torch.testing.assert_close(sinks.grad.double(), wide.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(5, 7), (3, 1, 7), (2, 1, 5, 1), (1, 3, 5, 7), (2, 3, 5, 7), ()])
def test_gradient_of_a_bias_is_summed_over_what_it_broadcasts(shape: tuple[int, ...]) -> None:
    q = torch.randn(2, 5, 3, 8)
    k, v = (torch.randn(2, 7, 3, 8) for _ in range(2))
    bias = torch.randn(shape, requires_grad=True)
    dout = torch.randn(2, 5, 3, 8)
    grads = []
    for precision in (torch.float64, torch.float32):
        out, _ = reference.attention(q, k, v, bias=bias.expand(2, 3, 5, 7), precision=precision)
        grads.append(torch.autograd.grad(out, bias, dout.to(precision))[0])
    actual = torch.autograd.grad(attention(q, k, v, bias=bias), bias, dout)[0]
    assert actual.shape == shape
    # Softmax does not see a constant: that gradient is a sum of terms of size one that cancel.
    floor = 1e-5 if bias.numel() == 1 or shape[-1:] == (1,) else 0.0
    if floor:
        assert float(actual.abs().max()) <= floor
    else:
        check_within_budget("dbias", actual, grads[0].double(), grads[1], factor=3.0)


@pytest.mark.parametrize("window", ((None, None), (1, 0), (0, 2), (None, 1)))
def test_a_graph_of_the_gradients_is_harmless(window: tuple[int | None, int | None]) -> None:
    q, k, v = (torch.randn(1, 6, 1, 4, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, window=window, softmax_scale=0.3)
    plain = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    with_graph = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    assert all(map(torch.equal, plain, with_graph))


@pytest.mark.parametrize("name", ("dout", "dlse", "out", "lse"))
def test_the_backward_operator_refuses_other_shapes(name: str) -> None:
    """Autograd gives it none; no call can make it read beyond a tensor."""
    q, k, v = (torch.randn(2, n, 2, 8) for n in (5, 7, 7))
    out, lse = attention(q, k, v, return_lse=True)
    given = {"dout": out, "dlse": lse, "out": out, "lse": lse}
    given[name] = given[name][..., :-1].contiguous()
    options = {"softcap": 0.0, "dropout_p": 0.0, "max_seqlen_q": 5, "max_seqlen_k": 7}
    options |= {"window_left": -1, "window_right": -1}
    with pytest.raises(RuntimeError, match=f"{name} has shape .* it must be"):
        _ops.backward(
            *(given["dout"], given["dlse"], q, k, v, given["out"], given["lse"]),
            *map(options.get, _ops.SHARED_ARGUMENTS),
            *(True, False, False, "auto"),
        )


def test_second_derivatives_are_refused_with_the_remedy() -> None:
    q, k, v = (torch.randn(1, 3, 1, 4, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention: second derivatives .* use float64"):
        dq.sum().backward()
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    dq.sum().backward()
    assert q.grad is not None and torch.isfinite(q.grad).all()


def test_a_gradient_of_alibi_slopes_is_refused() -> None:
    q = torch.randn(1, 3, 2, 4)
    slopes = torch.rand(2, requires_grad=True)
    with pytest.raises(ArgumentError, match="attention: alibi_slopes has no gradient"):
        attention(q, q, q, alibi_slopes=slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_no_rows_are_zero(dtype: torch.dtype) -> None:
    for shape_q, shape_k in (((0, 3, 2, 4), (0, 5, 2, 4)), ((2, 0, 2, 4), (2, 5, 2, 4))):
        shapes = (shape_q, shape_k, shape_k, (2,), (1, 2, 1, 1))
        leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        q, k, v, sinks, bias = leaves
        out = attention(q, k, v, sinks=sinks.float(), bias=bias)
        assert isinstance(out, torch.Tensor) and out.shape == shape_q
        for t, g in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert g.shape == t.shape and g.eq(0).all()


def test_autocast_casts_as_sdpa_does() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_func(q, k.bfloat16(), v)
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16 == sdpa.dtype
    expected = flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.equal(out, expected)
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_gradients_in_a_checkpointed_block() -> None:
    """Dropout is drawn from torch's generator, so a recomputed forward drops the same elements."""
    from torch.utils.checkpoint import checkpoint

    q, k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3))

    def block(*t: torch.Tensor) -> torch.Tensor:
        return attention(*t, causal=True, dropout_p=0.4)

    torch.manual_seed(3)
    expected = torch.autograd.grad(block(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(3)
    actual = torch.autograd.grad(
        checkpoint(block, q, k, v, use_reentrant=False).square().sum(), (q, k, v)
    )
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_function_transforms_give_what_autograd_gives() -> None:
    q, k, v = torch.randn(3, 6, 2, 8), torch.randn(3, 7, 2, 8), torch.randn(3, 7, 2, 8)
    sinks = torch.randn(2)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        out = attention(q, k, v, sinks=s, causal=True)
        assert isinstance(out, torch.Tensor)
        return out.square().sum()

    def of_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return loss(q[None], k[None], v[None], sinks)

    leaves = [t.clone().requires_grad_() for t in (q, k, v, sinks)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.func.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, sinks)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    of_samples = torch.func.vmap(torch.func.grad(of_one, argnums=(0, 1, 2)))(q, k, v)
    for a, e in zip(of_samples, expected[:3], strict=True):
        assert torch.equal(a, e)
    with pytest.raises(RuntimeError, match=r"attention: second derivatives"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v, sinks).sum())(q)


def test_forward_mode_is_refused_with_the_remedy() -> None:
    q = torch.randn(1, 3, 2, 4)
    for function in (attention, flash_attn_func):
        with pytest.raises(NotImplementedError, match=r"forward-mode .* use float64"):
            torch.func.jvp(lambda q, f=function: f(q, q, q), (q,), (q,))
        with pytest.raises(NotImplementedError, match=r"forward-mode .* use float64"):
            torch.func.hessian(lambda q, f=function: f(q, q, q).sum())(q)
    exact, tangent = torch.func.jvp(lambda q: attention(q, q, q), (q.double(),), (q.double(),))
    step = 1e-6 * q.double()
    shifted = attention(*[q.double() + step] * 3)
    torch.testing.assert_close((shifted - exact) / 1e-6, tangent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (3, 1)])
def test_the_plain_operators_give_the_same_bits(window: tuple[int | None, int | None]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 24, requires_grad=True) for n, h in ((9, 4), (13, 2), (13, 2)))
    dout = torch.randn(2, 9, 4, 24)
    plain = attention(q, k, v, window=window, softmax_scale=0.3)
    general, _ = attention(q, k, v, window=window, softmax_scale=0.3, return_lse=True)
    assert plain.grad_fn.name() == "PlainAttentionBackward"  # type: ignore[union-attr]
    assert general.grad_fn.name() == "AttentionBackward"  # type: ignore[union-attr]
    assert torch.equal(plain, general)
    for ours, theirs in zip(
        torch.autograd.grad(plain, (q, k, v), dout),
        torch.autograd.grad(general, (q, k, v), dout),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_sum_over_many_rows_keeps_its_accuracy(isa: str) -> None:
    # dK and dV of few keys sum 8,192 rows. Tile by tile they are within 3 eps of their largest
    # element; one running sum of every product was 12 to 37 off.
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 32, requires_grad=True) for n in (8192, 12, 12))
    dout = torch.rand(1, 8192, 1, 32) + 0.5
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    truth = torch.autograd.grad(reference.attention(*exact)[0], exact, dout.double())
    gradients = torch.autograd.grad(attention(q, k, v), (q, k, v), dout)
    for name, ours, true in zip("qkv", gradients, truth, strict=True):
        error = (ours.double() - true).abs().max() / true.abs().max()
        assert error <= 6 * torch.finfo(torch.float32).eps, f"d{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_that_sees_one_key_has_no_gradient_of_its_score(dtype: torch.dtype, isa: str) -> None:
    """P is 1 whatever the score, which the LSE of a score of 80 says only to 4e-6."""
    if isa == "amx":
        pytest.skip("AMX takes delta from the rounded output: docs/numerics.md")
    torch.manual_seed(0)
    q, k, v, dout = ((torch.rand(8, 1, 4, 32) * 6 + 1).to(dtype) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(attention(*leaves), leaves, dout)
    assert not dq.any() and not dk.any() and dv.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_large_inputs_do_not_inherit_the_rounding_of_out(
    dtype: torch.dtype, isa: str
) -> None:
    # Scores up to 100 leave one key in the softmax, so that dP - delta cancels: with delta from the
    # rounded output, errors were up to 3.4 eps of the largest gradient; they are at most 0.7.
    if isa == "amx":
        pytest.skip("AMX takes delta from the rounded output: docs/numerics.md")
    for seed in range(5):
        torch.manual_seed(seed)
        tensors = [(torch.rand(1, n, 4, 8) * 18 - 9).to(dtype) for n in (6, 6, 6)]
        dout = torch.randn(1, 6, 4, 8).to(dtype)
        options = {"dropout_p": 0.25, "dropout_seed": torch.tensor([seed])} if seed % 2 else {}
        leaves = [t.requires_grad_() for t in tensors]
        exact = [t.detach().double().requires_grad_() for t in tensors]
        truth = torch.autograd.grad(reference.attention(*exact, **options)[0], exact, dout.double())
        gradients = torch.autograd.grad(attention(*leaves, **options), leaves, dout)
        for name, ours, true in zip("qkv", gradients, truth, strict=True):
            error = (ours.double() - true).abs().max() / true.abs().max()
            assert error <= torch.finfo(dtype).eps, f"d{name}: {error}"
