"""scaled_dot_product_attention against torch's, option by option."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from dense_masks import additive, band, padding
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from flashattn_lite import ArgumentError, attention
from flashattn_lite.sdpa import scaled_dot_product_attention
from flashattn_lite.testing import check_within_budget

TORCH_SDPA = functional.scaled_dot_product_attention


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The definition in torch's documentation, every step in the inputs' dtype; a row that sees
    nothing gives 0."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return weights @ value


@dataclass(frozen=True)
class SdpaCase:
    name: str
    query: tuple[int, ...] = (2, 4, 33, 16)
    key: tuple[int, ...] = (2, 4, 47, 16)
    value: tuple[int, ...] | None = None  # None: like key
    mask: Callable[[], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def bools(*shape: int, p: float = 0.7, seed: int = 0) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def with_dark_rows() -> Tensor:
    mask = bools(2, 4, 33, 47)()
    mask[:, :, 5:9] = False
    mask[1] = False
    return mask


CASES = [
    SdpaCase("plain"),
    SdpaCase("scale", options={"scale": 0.3}),
    SdpaCase("scale_0", options={"scale": 0.0}),
    SdpaCase("scale_negative", options={"scale": -0.2}),
    SdpaCase("value_dim", value=(2, 4, 47, 24)),
    SdpaCase("causal_square", (2, 4, 47, 16), options={"is_causal": True}),
    SdpaCase("causal_fewer_rows", options={"is_causal": True}),
    SdpaCase("causal_more_rows", (2, 4, 80, 16), options={"is_causal": True}),
    SdpaCase("causal_one_row", (2, 4, 1, 16), options={"is_causal": True}),
    SdpaCase("gqa", (2, 6, 33, 16), (2, 2, 47, 16), options={"enable_gqa": True}),
    SdpaCase("gqa_causal", (2, 6, 33, 16), (2, 1, 33, 16), None, None,
             {"enable_gqa": True, "is_causal": True}),
    SdpaCase("gqa_key_value_differ", (2, 6, 33, 16), (2, 2, 47, 16), (2, 3, 47, 16), None,
             {"enable_gqa": True}),
    SdpaCase("two_dimensional", (33, 16), (47, 16), (47, 8)),
    SdpaCase("two_dimensional_mask", (33, 16), (47, 16), None, bools(33, 47)),
    SdpaCase("three_dimensional", (5, 33, 16), (5, 47, 16)),
    SdpaCase("three_dimensional_mask", (5, 33, 16), (5, 47, 16), None, bools(5, 1, 47)),
    SdpaCase("three_dimensional_causal", (5, 33, 16), (5, 47, 16), options={"is_causal": True}),
    SdpaCase("three_dimensional_gqa", (4, 33, 16), (2, 47, 16), options={"enable_gqa": True}),
    SdpaCase("five_dimensional", (2, 3, 2, 9, 8), (2, 3, 2, 11, 8)),
    SdpaCase("five_dimensional_mask", (2, 3, 2, 9, 8), (2, 3, 2, 11, 8), None,
             bools(2, 1, 1, 9, 11)),
    SdpaCase("five_dimensional_shared_mask", (2, 3, 2, 9, 8), (2, 3, 2, 11, 8), None,
             bools(1, 1, 1, 9, 11)),
    SdpaCase("batch_broadcasts", (2, 4, 9, 8), (1, 4, 11, 8)),
    SdpaCase("query_batch_broadcasts", (1, 4, 9, 8), (3, 4, 11, 8)),
    SdpaCase("ranks_differ", (2, 4, 9, 8), (4, 11, 8)),
    SdpaCase("leading_broadcast", (3, 1, 2, 9, 8), (1, 2, 2, 11, 8), (3, 2, 2, 11, 8)),
    SdpaCase("heads_broadcast", (2, 4, 9, 8), (2, 1, 11, 8)),
    SdpaCase("key_heads_broadcast", (2, 4, 9, 8), (2, 1, 11, 8), (2, 4, 11, 8)),
    SdpaCase("query_heads_broadcast", (2, 1, 9, 8), (2, 4, 11, 8)),
    SdpaCase("bool_2d", mask=bools(33, 47)),
    SdpaCase("bool_4d", mask=bools(2, 4, 33, 47)),
    SdpaCase("bool_heads", mask=bools(4, 1, 47)),
    SdpaCase("bool_rows", mask=bools(2, 1, 33, 1)),
    SdpaCase("bool_per_batch", mask=bools(2, 1, 33, 47)),
    SdpaCase("bool_expanded", mask=lambda: bools(2, 1, 1, 47)().expand(2, 4, 33, 47)),
    SdpaCase("bool_1d", mask=bools(47)),
    SdpaCase("bool_gqa", (2, 6, 33, 16), (2, 2, 47, 16), None, bools(2, 6, 33, 47),
             {"enable_gqa": True}),
    SdpaCase("dark_rows", mask=with_dark_rows),
    SdpaCase("dark_rows_float", mask=additive(with_dark_rows)),
    SdpaCase("float_2d", mask=floats(33, 47)),
    SdpaCase("float_4d", mask=floats(2, 4, 33, 47)),
    SdpaCase("float_heads", mask=floats(4, 33, 1)),
    SdpaCase("float_columns", mask=floats(2, 1, 1, 47)),
    SdpaCase("padding_right", mask=padding((0, 31), (0, 47))),
    SdpaCase("padding_left", mask=padding((12, 47), (1, 47))),
    SdpaCase("padding_both_and_empty", mask=padding((12, 20), (0, 0))),
    SdpaCase("padding_shared", mask=padding((3, 30))),
    SdpaCase("padding_with_holes", mask=bools(2, 1, 1, 47)),
    SdpaCase("padding_additive", mask=additive(padding((0, 31), (0, 47)))),
    SdpaCase("band_causal", mask=lambda: band(33, 47, None, 0)),
    SdpaCase("band_bottom_right", mask=lambda: band(33, 47, None, 14)),
    SdpaCase("band_additive", mask=additive(lambda: band(33, 47, 6, 3))),
    SdpaCase("band_window", mask=lambda: band(33, 47, 4, 9)[None, None]),
    SdpaCase("band_left_only", mask=lambda: band(33, 47, 4, None)),
    SdpaCase("band_hides_its_diagonal", mask=lambda: band(33, 47, -3, None)),
    SdpaCase("band_hides_first_rows", mask=lambda: band(33, 47, None, -3)),
    SdpaCase("no_rows", (2, 4, 0, 16)),
    SdpaCase("no_keys", key=(2, 4, 0, 16)),
    SdpaCase("no_keys_causal", key=(2, 4, 0, 16), options={"is_causal": True}),
    SdpaCase("no_keys_mask", key=(2, 4, 0, 16), mask=bools(33, 0)),
    SdpaCase("no_batch", (0, 4, 33, 16), (0, 4, 47, 16)),
]  # fmt: skip


def inputs_of(case: SdpaCase, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value, and the mask if there is one; floats in dtype."""
    generator = torch.Generator().manual_seed(7)
    shapes = (case.query, case.key, case.key if case.value is None else case.value)
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    if case.mask is not None:
        mask = case.mask()
        tensors.append(mask.to(dtype) if mask.is_floating_point() else mask)
    return tensors


def run(
    function: Callable[..., Tensor], tensors: list[Tensor], options: dict[str, Any], dout: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradient for every float input."""
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
    out = function(*leaves, **options)
    wanted = [t for t in leaves if t.requires_grad]
    return out.detach(), list(torch.autograd.grad(out, wanted, dout.to(out.dtype)))


def dout_like(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_formula_is_torchs(case: SdpaCase) -> None:
    """What the other tests take for the truth, against torch in float64."""
    tensors = inputs_of(case, torch.float64)
    options = dict(case.options)
    expected = TORCH_SDPA(*tensors, **options) if case.name != "bool_1d" else None
    if expected is None:  # refused by one of torch's paths and taken by another
        expected = TORCH_SDPA(*tensors[:3], tensors[3][None], **options)
    assert torch.equal(formula(*tensors, **options).isnan(), expected.isnan())
    torch.testing.assert_close(formula(*tensors, **options), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: SdpaCase, dtype: torch.dtype) -> None:
    tensors = inputs_of(case, dtype)
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    shape = formula(*wide, **case.options).shape
    dout = dout_like(shape).to(dtype).double()
    truth, truth_grads = run(formula, wide, case.options, dout)
    low, low_grads = run(formula, tensors, case.options, dout)
    out, grads = run(scaled_dot_product_attention, tensors, case.options, dout)
    assert out.dtype == dtype
    check_within_budget("out", out, truth, low)
    with torch.no_grad():  # without gradients masks are looked at, which is another path
        check_within_budget(
            "out", scaled_dot_product_attention(*tensors, **case.options), truth, low
        )
    names = ("dquery", "dkey", "dvalue", "dmask")
    for name, got, exact, rounded in zip(names, grads, truth_grads, low_grads, strict=False):
        if exact.any() or name == "dmask":
            check_within_budget(name, got, exact, rounded, factor=3.0)
            continue
        # All of it cancels, for P is 1 everywhere. What is left is the rounding of dP - delta.
        # (16 is the head_dim that dP sums over.)
        sizes = [float(t.abs().amax()) if t.numel() else 0.0 for t in (dout, *wide[1:3])]
        assert got.numel() == 0 or got.abs().max() <= 4 * torch.finfo(dtype).eps * 16 * math.prod(
            sizes
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_float64(case: SdpaCase) -> None:
    tensors = inputs_of(case, torch.float64)
    dout = dout_like(formula(*tensors, **case.options).shape)
    truth, truth_grads = run(formula, tensors, case.options, dout)
    out, grads = run(scaled_dot_product_attention, tensors, case.options, dout)
    for got, exact in zip([out, *grads], [truth, *truth_grads], strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


def test_a_float32_mask_goes_with_half_precision() -> None:
    q, k, v = (torch.randn(2, 3, 20, 16).bfloat16() for _ in range(3))
    mask = torch.randn(20, 20)
    truth = formula(q.double(), k.double(), v.double(), mask.double())
    low = formula(q, k, v, mask.bfloat16())
    check_within_budget("out", scaled_dot_product_attention(q, k, v, mask), truth, low)


def test_strides_do_not_matter() -> None:
    base = torch.randn(2, 20, 3, 4, 16)  # (batch, seqlen, qkv, heads, dim): what a projection gives
    q, k, v = base.permute(2, 0, 3, 1, 4).unbind(0)
    assert not q.is_contiguous()
    contiguous = scaled_dot_product_attention(*(t.contiguous() for t in (q, k, v)), is_causal=True)
    assert torch.equal(scaled_dot_product_attention(q, k, v, is_causal=True), contiguous)


LAYOUTS: dict[str, Callable[[int, int, int], Tensor]] = {  # of heads, rows and head_dim
    "heads, rows": lambda h, n, d: torch.randn(2, h, n, d),
    "rows, heads": lambda h, n, d: torch.randn(2, n, h, d).transpose(1, 2),
    "rows, batch, heads": lambda h, n, d: torch.randn(n, 2, h, d).permute(1, 2, 0, 3),
    "a slice": lambda h, n, d: torch.randn(2, n, 3, h, d)[:, :, 1].transpose(1, 2),
    "expanded": lambda h, n, d: torch.randn(1, h, n, d).expand(2, -1, -1, -1),
    "every other element": lambda h, n, d: torch.randn(2, h, n, 2 * d)[..., ::2],
}


@pytest.mark.parametrize("heads_k", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_before_rows_are_taken_as_they_are(layout: str, heads_k: int) -> None:
    made = LAYOUTS[layout]
    leaves = [made(4, 5, 24), made(heads_k, 9, 24), made(heads_k, 9, 40)]
    q, k, v = (t.requires_grad_() for t in leaves)
    options: dict[str, Any] = {"scale": 0.3, "enable_gqa": heads_k != 4}
    out = scaled_dot_product_attention(q, k, v, **options)
    steps = out.grad_fn.next_functions  # type: ignore[union-attr]
    assert out.grad_fn.name() == "PlainAttentionBackward"  # type: ignore[union-attr]
    assert [node.name() for node, _ in steps if node] == ["torch::autograd::AccumulateGrad"] * 3
    with torch.no_grad():
        assert torch.equal(scaled_dot_product_attention(q, k, v, **options), out)
    expected = attention(*(t.transpose(1, 2) for t in leaves), softmax_scale=0.3)
    assert isinstance(expected, Tensor) and torch.equal(out, expected.transpose(1, 2))
    dout = torch.randn_like(out)
    for ours, true in zip(
        torch.autograd.grad(out, leaves, dout),
        torch.autograd.grad(expected, leaves, dout.transpose(1, 2)),
        strict=True,
    ):
        assert torch.equal(ours, true) and ours.stride() == true.stride()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_gradients_that_keep_their_graph_are_the_same(options: dict[str, Any]) -> None:
    q, k, v = (torch.randn(2, heads, 9, 16, requires_grad=True) for heads in (4, 2, 2))
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    dout = torch.randn_like(out)
    plain = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    kept = torch.autograd.grad(out, (q, k, v), dout, create_graph=True)
    for one, other in zip(plain, kept, strict=True):
        assert other.requires_grad and torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_laid_out_as_torchs(layout: str) -> None:
    q, k, v = LAYOUTS[layout](4, 5, 24), torch.randn(2, 4, 9, 24), torch.randn(2, 4, 9, 24)
    masks: list[Tensor | None] = [None]
    if layout not in ("expanded", "every other element"):  # then q's strides do not tell
        masks.append(torch.rand(5, 9) > 0.5)
    for mask in masks:
        ours = scaled_dot_product_attention(q, k, v, mask)
        assert ours.stride() == functional.scaled_dot_product_attention(q, k, v, mask).stride()
    plain = scaled_dot_product_attention(q, k, v)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v)]
        assert scaled_dot_product_attention(*fakes).stride() == plain.stride()


# ---- dropout, autocast, errors ------------------------------------------------------------------


def test_dropout_follows_the_seed_and_keeps_the_mean() -> None:
    q, k = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 64, 16)
    v = torch.eye(64).expand(2, 4, 64, 64)  # the output is the dropped-out weights themselves
    torch.manual_seed(5)
    first = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    torch.manual_seed(5)
    assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.25), first)
    assert not torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.25), first)
    dropped = (first == 0).double().mean().item()
    elements = first.numel()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / elements) ** 0.5  # five standard deviations
    weights = formula(q.double(), k.double(), v.double())
    kept = first != 0
    torch.testing.assert_close(first[kept].double(), (weights / 0.75)[kept], rtol=1e-5, atol=1e-7)


def test_dropping_everything_gives_zero_and_zero_gradients() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    out = scaled_dot_product_attention(q, k, v, dropout_p=1.0)
    out.sum().backward()
    assert not out.any()
    for t in (q, k, v):
        assert t.grad is not None and not t.grad.any()


def test_autocast_is_torchs() -> None:
    q, k, v = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    mask = torch.randn(20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        out, theirs = scaled_dot_product_attention(q, k, v, mask), TORCH_SDPA(q, k, v, mask)
        mixed = scaled_dot_product_attention(q, k.bfloat16(), v.half())
    assert out.dtype == theirs.dtype == mixed.dtype == torch.bfloat16
    low = [t.bfloat16() for t in (q, k, v)]
    truth = formula(*(t.double() for t in low), mask.double())
    check_within_budget("out", out, truth, formula(*low, mask.bfloat16()))


Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8)
BAD_CALLS: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
    ((Q[0, 0, 0], K, K), {}, "query has shape .* at least 2-dimensional"),
    ((Q, K.double(), K), {}, "query is torch.float32, key torch.float64"),
    ((Q, K[..., :4], K), {}, "key has head_dim 4 but query has 8"),
    ((Q, K, K[:, :, :4]), {}, "key has seqlen 5 but value has 4"),
    ((Q, K[:, :2], K[:, :2]), {}, "4, 2 and 2 heads; enable_gqa=True groups them"),
    ((Q, K[:, :3], K[:, :3]), {"enable_gqa": True}, "key has 3 heads, which do not divide"),
    ((Q, torch.zeros(3, 4, 5, 8), torch.zeros(3, 4, 5, 8)), {}, "do not broadcast to one batch"),
    ((Q, K, K), {"dropout_p": 1.5}, r"dropout_p is 1.5; it must be in \[0, 1\]"),
    ((Q, K, K), {"dropout_p": -0.5}, "dropout_p is -0.5"),
    ((Q, K, K, torch.ones(3, 5, dtype=torch.bool)), {"is_causal": True}, "should not be set when"),
    ((Q, K, K, torch.ones(4, 5, dtype=torch.bool)), {}, r"\(4, 5\); it must broadcast to \(2, 4"),
    ((Q, K, K, torch.ones(1, 1, 1, 1, 5, dtype=torch.bool)), {}, "attn_mask has shape"),
    ((Q, K, K, torch.ones(3, 5, dtype=torch.int32)), {}, "attn_mask is torch.int32"),
    ((Q, K, K, torch.ones(3, 5).double()), {}, "attn_mask is torch.float64"),
    ((Q.int(), K.int(), K.int()), {}, "query is int32; it must be float32, float16"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "message"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong(
    arguments: tuple[Tensor, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"scaled_dot_product_attention: .*{message}"):
        scaled_dot_product_attention(*arguments, **options)


def test_scale_is_keyword_only_as_in_torch() -> None:
    with pytest.raises(TypeError, match="positional"):
        scaled_dot_product_attention(Q, K, K, None, 0.0, False, 1.0)  # type: ignore[misc]


def test_a_head_dim_beyond_the_kernels_is_refused() -> None:
    t = torch.zeros(1, 1, 9, 257)
    with pytest.raises(ArgumentError, match="head_dim 257; it must be 1 to 256"):
        scaled_dot_product_attention(t, t, t)


# ---- torch's CausalBias --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 7), (5, 9), (9, 5)])
def test_a_causal_bias_hides_what_its_attributes_say(
    seqlen_q: int, seqlen_k: int, compiled: bool
) -> None:
    """Its elements are memory that nobody wrote."""
    function: Any = scaled_dot_product_attention
    if compiled:
        function = torch.compile(function, backend="eager", fullgraph=True)
    q, k = torch.randn(2, 3, seqlen_q, 8), torch.randn(2, 3, seqlen_k, 8)
    for make, diagonal in ((causal_upper_left, 0), (causal_lower_right, seqlen_k - seqlen_q)):
        mask = band(seqlen_q, seqlen_k, None, diagonal)
        out = function(q, k, k, make(seqlen_q, seqlen_k))
        torch.testing.assert_close(out, formula(q, k, k, mask))


def test_a_causal_bias_for_other_lengths_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"CausalBias for \(2, 5\) queries and keys but .*3, 5"):
        scaled_dot_product_attention(Q, K, K, causal_lower_right(2, 5))
    with pytest.raises(ArgumentError, match="should not be set when is_causal"):
        scaled_dot_product_attention(Q, K, K, causal_lower_right(3, 5), is_causal=True)
    q, k = Q.transpose(1, 2), K.transpose(1, 2)
    with pytest.raises(ArgumentError, match="bias is torch's CausalBias, which holds no elements"):
        attention(q, k, k, bias=causal_lower_right(3, 5))


# ---- torch.compile ------------------------------------------------------------------------------


def test_compiles_without_a_graph_break() -> None:
    q, mask = torch.randn(2, 4, 9, 8), bools(2, 1, 9, 9)()
    compiled = torch.compile(
        lambda q, m: scaled_dot_product_attention(q, q, q, m), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, mask), TORCH_SDPA(q, q, q, mask))
