"""nn.MultiheadAttention against torch's, option by option."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from flashattn_lite import ArgumentError
from flashattn_lite import nn as fal_nn
from flashattn_lite.testing import check_within_budget

E, H, L, S, N = 32, 4, 9, 13, 3


def masks(kind: str, *shape: int) -> Tensor | None:
    """True: hidden; the first key stays, so that no row is empty (torch then gives NaN or 0)."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(3)
    hidden = torch.rand(shape, generator=generator) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    if kind == "runs":
        lengths = torch.arange(shape[0])[:, None] * 2 + 5
        return (torch.arange(shape[-1]) >= lengths).expand(shape).contiguous()
    if kind == "float":
        return torch.randn(shape, generator=generator)
    if kind == "causal":
        return torch.ones(shape, dtype=torch.bool).triu(1)
    if kind == "causal_float":
        return torch.full(shape, -torch.inf).triu(1)
    raise ValueError(kind)


CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "packed": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_and_zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim_vdim": {"kdim": 20, "vdim": 12},
    "kdim_vdim_no_bias": {"kdim": 20, "vdim": 12, "bias": False, "add_bias_kv": True},
}
# (attn_mask, its shape, key_padding_mask, is_causal)
MASKS: dict[str, tuple[str, str, str, bool]] = {
    "none": ("none", "2d", "none", False),
    "padding": ("none", "2d", "bool", False),
    "padding_runs": ("none", "2d", "runs", False),
    "padding_float": ("none", "2d", "float", False),
    "mask_2d": ("bool", "2d", "none", False),
    "mask_2d_float": ("float", "2d", "none", False),
    "mask_3d": ("bool", "3d", "none", False),
    "mask_3d_float": ("float", "3d", "none", False),
    "mask_and_padding": ("bool", "2d", "runs", False),
    "mask_3d_and_padding_float": ("float", "3d", "float", False),
    "causal_hint": ("causal", "2d", "none", True),
    "causal_mask": ("causal_float", "2d", "none", False),
    "causal_and_padding": ("causal", "2d", "runs", False),
    "causal_hint_and_padding": ("causal", "2d", "runs", True),
}


def pair(**options: Any) -> tuple[torch.nn.MultiheadAttention, fal_nn.MultiheadAttention]:
    """torch's module and ours with the same parameters, biases not zero."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = fal_nn.MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(theirs: torch.nn.MultiheadAttention, batched: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, features: int) -> Tensor:
        shape = (N, rows, features) if theirs.batch_first else (rows, N, features)
        return torch.randn(shape if batched else (rows, features), generator=generator)

    return [draw(L, E), draw(S, theirs.kdim), draw(S, theirs.vdim)]


def mask_arguments(name: str, batched: bool, heads: int = H) -> dict[str, Any]:
    kind, form, padding, is_causal = MASKS[name]
    batch = N if batched else 1
    shape = (L, S) if form == "2d" else (batch * heads, L, S)
    key_padding = masks(padding, batch, S)
    return {
        "attn_mask": masks(kind, *shape),
        "key_padding_mask": key_padding
        if batched or key_padding is None
        else key_padding.squeeze(0),
        "is_causal": is_causal,
    }


def results(
    module: torch.nn.Module, tensors: list[Tensor], arguments: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output, weights, and the gradients for inputs, float masks and parameters."""
    module = copy.deepcopy(module).to(dtype)
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    arguments = {
        n: a.detach().to(dtype).requires_grad_()
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for n, a in arguments.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about masks of two kinds
        out, weights = module(*leaves, **arguments)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    (out * dout).sum().backward()
    named = dict(zip(("query", "key", "value"), leaves, strict=True))
    named |= {n: a for n, a in arguments.items() if isinstance(a, Tensor)}
    named |= dict(module.named_parameters())
    found = {f"d{n}": t.grad for n, t in named.items() if t.grad is not None}
    found["out"] = out.detach()
    if weights is not None:
        found["weights"] = weights.detach()
    return found


def compare(
    theirs: torch.nn.Module,
    ours: torch.nn.Module,
    tensors: list[Tensor],
    arguments: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Ours in dtype against torch's in float64, with torch's in dtype as the budget's yardstick."""
    truth = results(theirs, tensors, arguments, torch.float64)
    low = results(theirs, tensors, arguments, dtype)
    got = results(ours, tensors, arguments, dtype)
    assert got.keys() == truth.keys()
    for name in truth:
        factor = 3.0 if name.startswith("d") else 2.0
        check_within_budget(name, got[name], truth[name], low[name], factor=factor)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_values_and_gradients(constructor: str, mask: str) -> None:
    theirs, ours = pair(batch_first=True, **CONSTRUCTORS[constructor])
    arguments = {"need_weights": False, **mask_arguments(mask, batched=True)}
    compare(theirs, ours, inputs(theirs, True), arguments)


@pytest.mark.parametrize("mask", ["none", "padding_runs", "mask_3d", "causal_hint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(mask: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(batch_first=True)
    arguments = {"need_weights": False, **mask_arguments(mask, batched=True)}
    compare(theirs, ours, inputs(theirs, True), arguments, dtype)


@pytest.mark.parametrize("mask", ["none", "padding", "mask_3d_float", "causal_hint"])
@pytest.mark.parametrize("constructor", ["packed", "bias_kv", "kdim_vdim"])
@pytest.mark.parametrize("layout", ["seq_first", "unbatched"])
def test_layouts(layout: str, constructor: str, mask: str) -> None:
    theirs, ours = pair(**CONSTRUCTORS[constructor])
    batched = layout == "seq_first"
    arguments = {"need_weights": False, **mask_arguments(mask, batched)}
    compare(theirs, ours, inputs(theirs, batched), arguments)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "mask_3d", "causal_hint"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_weights(batch_first: bool, mask: str, average: bool) -> None:
    theirs, ours = pair(batch_first=batch_first, kdim=20)
    arguments = {"average_attn_weights": average, **mask_arguments(mask, batched=True)}
    tensors = inputs(theirs, True)
    compare(theirs, ours, tensors, arguments)
    _, weights = ours(*tensors, **arguments)
    assert weights.shape == ((N, L, S) if average else (N, H, L, S))


@pytest.mark.parametrize("same", ["self", "key_is_value"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_shared_inputs_take_one_product(same: str, batch_first: bool, need_weights: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    x, y, _ = inputs(theirs, True)

    def once(module: torch.nn.Module, dtype: torch.dtype) -> list[Tensor]:
        module = copy.deepcopy(module).to(dtype)
        a, b = (t.detach().to(dtype).requires_grad_() for t in (x, y))
        tensors = (a, a, a) if same == "self" else (a, b, b)
        out, _ = module(*tensors, need_weights=need_weights)
        out.square().sum().backward()
        grads = [t.grad for t in (a, b, *module.parameters()) if t.grad is not None]
        return [out.detach(), *grads]

    truth, low = once(theirs, torch.float64), once(theirs, torch.float32)
    got = once(ours, torch.float32)
    for number, (g, t, r) in enumerate(zip(got, truth, low, strict=True)):
        check_within_budget(str(number), g, t, r, factor=3.0 if number else 2.0)


def test_causal_hint_with_extra_keys() -> None:
    """torch hides bias_k's key from all rows but the last ones then; ours does the same."""
    theirs, ours = pair(batch_first=True, add_bias_kv=True)
    x = inputs(theirs, True)[0]
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    arguments = {"need_weights": False, "attn_mask": mask, "is_causal": True}
    compare(theirs, ours, [x, x.clone(), x.clone()], arguments)


def test_a_row_that_sees_nothing_gives_the_bias() -> None:
    theirs, ours = pair(batch_first=True)
    x, y, z = inputs(theirs, True)
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[1] = True
    for module in (theirs, ours):
        out, _ = module(x, y, z, key_padding_mask=hidden, need_weights=False)
        torch.testing.assert_close(out[1], module.out_proj.bias.expand(L, E))


def test_the_constructor_draws_torchs_numbers() -> None:
    for options in CONSTRUCTORS.values():
        torch.manual_seed(3)
        theirs = torch.nn.MultiheadAttention(E, H, **options)
        torch.manual_seed(3)
        ours = fal_nn.MultiheadAttention(E, H, **options)
        state = ours.state_dict()
        assert list(state) == list(theirs.state_dict())
        for name, value in theirs.state_dict().items():
            assert torch.equal(state[name], value), name
        theirs.load_state_dict(state)


def test_copies_and_pickles_work() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 5, E)
    expected, _ = ours(x, x, x, need_weights=False)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fal_nn.MultiheadAttention
        assert torch.equal(other(x, x, x, need_weights=False)[0], expected)


def test_dropout_only_in_training() -> None:
    _, ours = pair(batch_first=True, dropout=0.5)
    x = torch.randn(2, 50, E)
    ours.eval()
    expected, _ = ours(x, x, x, need_weights=False)
    assert torch.equal(ours(x, x, x, need_weights=False)[0], expected)
    ours.train()
    torch.manual_seed(1)
    first, _ = ours(x, x, x, need_weights=False)
    torch.manual_seed(1)
    assert torch.equal(ours(x, x, x, need_weights=False)[0], first)
    assert not torch.allclose(first, expected)


X, Y = torch.zeros(N, L, E), torch.zeros(N, S, E)
BAD_CALLS: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
    ((X[..., :30], Y, Y), {}, "embedding dimension of 32, but got 30 features in query"),
    ((X, Y[..., :5], Y), {}, "key has 5 features; it must be 32"),
    ((X, Y, Y[:, :5]), {}, "key shape .* does not match value shape"),
    ((X, Y[:2], Y[:2]), {}, "key has batch 2 but query has 3"),
    ((X, Y[0], Y[0]), {}, "expected `key` and `value` to be 3-D but found 2-D and 2-D"),
    ((X[0], Y, Y), {}, "expected `key` and `value` to be 2-D but found 3-D and 3-D"),
    ((X[0, 0], Y, Y), {}, "query should be unbatched 2D or batched 3D tensor but received 1-D"),
    ((X.int(), Y, Y), {}, "query is torch.int32; it must be floating-point"),
    ((X, Y, Y), {"is_causal": True}, "Need attn_mask if specifying the is_causal hint"),
    ((X, Y, Y), {"attn_mask": torch.zeros(L, L)}, r"shape of the 2D attn_mask .* be \(9, 13\)"),
    ((X, Y, Y), {"attn_mask": torch.zeros(2, L, S)}, r"`attn_mask` shape to be \(12, 9, 13\)"),
    ((X, Y, Y), {"attn_mask": torch.zeros(S)}, "`attn_mask` to be `None`, 2-D or 3-D but found 1"),
    ((X, Y, Y), {"attn_mask": torch.zeros(L, S).int()}, "bool and floating types of attn_mask"),
    ((X, Y, Y), {"key_padding_mask": torch.zeros(N, L)}, r"must be \(3, 13\)"),
    ((X, Y, Y), {"key_padding_mask": torch.zeros(S)}, "`None` or 2-D but found 1-D tensor"),
    ((X[0], Y[0], Y[0]), {"key_padding_mask": torch.zeros(1, S)}, "`None` or 1-D but found 2-D"),
    ((X, Y, Y), {"key_padding_mask": torch.zeros(N, S).byte()}, "types of key_padding_mask"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "arguments", "message"), BAD_CALLS)
def test_bad_calls(tensors: tuple[Tensor, ...], arguments: dict[str, Any], message: str) -> None:
    ours = fal_nn.MultiheadAttention(E, H, batch_first=True)
    # torch's is an AssertionError for some and a RuntimeError for others, and says much the same.
    for kind in (ArgumentError, AssertionError, RuntimeError):
        with pytest.raises(kind, match=f"MultiheadAttention: .*{message}"):
            ours(*tensors, need_weights=False, **arguments)
    with pytest.raises(ArgumentError, match=message):
        ours(*tensors, **arguments)


def test_wrong_types_are_named() -> None:
    ours = fal_nn.MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(TypeError, match=r"query is None; it must be a torch.Tensor"):
        ours(None, Y, Y)
    with pytest.raises(TypeError, match=r"attn_mask is \[\[0\]\]; it must be a torch.Tensor"):
        ours(X, Y, Y, attn_mask=[[0]])
    with pytest.raises(ArgumentError, match="key is a sparse tensor; it must be a dense one"):
        ours(X, Y.to_sparse(), Y)
    with pytest.raises(ArgumentError, match="value is on meta but query is on cpu"):
        ours(X, Y, Y.to("meta"))
    with pytest.raises(TypeError, match="need_weights is 'no'; it must be a bool"):
        ours(X, Y, Y, need_weights="no")


def test_dropping_everything_gives_the_bias() -> None:
    theirs, ours = pair(batch_first=True, dropout=1.0)
    x = torch.randn(2, 5, E)
    got, expected = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    torch.testing.assert_close(got, expected)


def test_multihead_attention_compiles_without_a_graph_break() -> None:
    _, ours = pair(batch_first=True)
    x, hidden = torch.randn(2, 5, E), torch.arange(5) >= torch.tensor([[3], [5]])

    def forward(x: Tensor, hidden: Tensor) -> Tensor:
        return ours(x, x, x, key_padding_mask=hidden, need_weights=False)[0]

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, hidden), forward(x, hidden))
