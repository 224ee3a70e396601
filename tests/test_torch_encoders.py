"""torch's TransformerEncoder and TransformerDecoder built on our MultiheadAttention, and nested
tensors, which torch attends to in eval mode alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from flashattn_lite import ArgumentError
from flashattn_lite import nn as fal_nn
from flashattn_lite.testing import check_within_budget

E, H, L, S, N = 32, 4, 9, 13, 3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_encoder(batch_first: bool, norm_first: bool, training: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        E, H, 40, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    ours = copy.deepcopy(theirs)
    report = fal_nn.replace_attention(ours)
    assert list(report.swapped) == ["layers.0.self_attn", "layers.1.self_attn"]
    x = torch.randn((N, S, E) if batch_first else (S, N, E))
    hidden = torch.arange(S) >= torch.tensor([5, 13, 9])[:, None]
    real = ~hidden if batch_first else ~hidden.T
    mask = torch.nn.Transformer.generate_square_subsequent_mask(S)
    for arguments in (
        {},
        {"src_key_padding_mask": hidden},
        {"mask": mask},
        {"mask": mask, "is_causal": True},
        {"mask": mask.isinf(), "src_key_padding_mask": hidden},
    ):
        with torch.no_grad():
            calls: list[int] = []
            hook = ours.layers[0].self_attn.register_forward_hook(
                lambda *_, seen=calls: seen.append(1)
            )
            got = ours(x, **arguments)
            hook.remove()
            assert calls == [1]  # torch's fused layer has not gone past the module
            low = theirs(x, **arguments)
            wide = {
                n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
                for n, a in arguments.items()
            }
            truth = copy.deepcopy(theirs).double()(x.double(), **wide)
        rows = real if "src_key_padding_mask" in arguments else torch.ones_like(real)
        check_within_budget(str(list(arguments)), got[rows], truth[rows], low[rows])


def test_a_swapped_encoder_layer_runs_without_hooks_too() -> None:
    """In eval mode, without gradients and hooks, torch would take its fused layer."""
    layer = torch.nn.TransformerEncoderLayer(E, H, 40, batch_first=True).eval()
    fal_nn.replace_attention(layer)
    seen = []
    forward = layer.self_attn.forward
    layer.self_attn.forward = lambda *a, **k: seen.append(1) or forward(*a, **k)  # type: ignore
    with torch.no_grad():
        layer(torch.randn(2, 5, E))
    assert seen == [1]


def test_transformer_decoder_values_and_gradients() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(E, H, 40, dropout=0.0, batch_first=True)
    theirs = torch.nn.TransformerDecoder(layer, 2)
    ours = copy.deepcopy(theirs)
    assert len(fal_nn.replace_attention(ours).swapped) == 4
    target, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L)
    hidden = torch.arange(S) >= torch.tensor([5, 13, 9])[:, None]

    def once(module: torch.nn.Module, dtype: torch.dtype) -> list[Tensor]:
        module = copy.deepcopy(module).to(dtype)
        a, b = (t.detach().to(dtype).requires_grad_() for t in (target, memory))
        out = module(a, b, tgt_mask=mask.to(dtype), memory_key_padding_mask=hidden)
        out.square().sum().backward()
        return [out.detach(), a.grad, b.grad, *(p.grad for p in module.parameters())]

    truth, low = once(theirs, torch.float64), once(theirs, torch.float32)
    got = once(ours, torch.float32)
    for number, (g, t, r) in enumerate(zip(got, truth, low, strict=True)):
        check_within_budget(str(number), g, t, r, factor=3.0 if number else 2.0)


# ---- nested tensors -----------------------------------------------------------------------------

LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)


def nested(lengths: list[int], features: int, layout: torch.layout) -> tuple[Tensor, list[Tensor]]:
    """A nested tensor of leaves that require gradients, and the leaves."""
    leaves = [torch.randn(n, features, requires_grad=True) for n in lengths]
    return torch.nested.as_nested_tensor(leaves, layout=layout), leaves


@LAYOUTS
@pytest.mark.parametrize("kdim", [None, 20])
@pytest.mark.parametrize("cross", [False, True])
def test_nested_sequences_are_each_alone(
    cross: bool, kdim: int | None, layout: torch.layout
) -> None:
    module = fal_nn.MultiheadAttention(E, H, kdim=kdim, vdim=kdim, batch_first=True)
    query, leaves = nested([4, 1, 7], E, layout)
    key, leaves_k = nested([5, 3, 2] if cross else [4, 1, 7], kdim or E, layout)
    if not cross and kdim is None:
        key, leaves_k = query, leaves
    out, weights = module(query, key, key, need_weights=False)
    assert weights is None and out.is_nested and out.layout == layout
    parameters = list(module.parameters())
    wanted = [*leaves, *leaves_k, *parameters]
    got = torch.autograd.grad(sum(t.square().sum() for t in out.unbind()), wanted)
    alone = [
        module(q[None], k[None], k[None], need_weights=False)[0][0]
        for q, k in zip(leaves, leaves_k, strict=True)
    ]
    expected = torch.autograd.grad(sum(t.square().sum() for t in alone), wanted)  # type: ignore
    for a, e in zip((*out.unbind(), *got), (*alone, *expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", [False, True])
def test_nested_weights_are_torchs(average: bool) -> None:
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True).eval()
    ours = copy.deepcopy(theirs)
    fal_nn.replace_attention(ours)
    x = torch.nested.nested_tensor([torch.randn(4, E), torch.randn(6, E)])
    with torch.no_grad():
        out, weights = ours(x, x, x, average_attn_weights=average)
        expected, expected_weights = theirs(x, x, x, average_attn_weights=average)
    torch.testing.assert_close(out.to_padded_tensor(0), expected.to_padded_tensor(0))
    torch.testing.assert_close(weights, expected_weights)


@LAYOUTS
@pytest.mark.parametrize("training", [False, True])
def test_nested_encoders_and_decoders(training: bool, layout: torch.layout) -> None:
    """torch's run padded; ours, swapped, the same model nested."""
    layer = torch.nn.TransformerEncoderLayer(E, H, 40, dropout=0.0, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    decoder = torch.nn.TransformerDecoderLayer(E, H, 40, dropout=0.0, batch_first=True)
    decoder.train(training)
    x, leaves = nested([4, 6], E, layout)
    y, leaves_y = nested([5, 2], E, layout)
    padding, padding_y = (
        torch.arange(longest) >= torch.tensor(lengths)[:, None]
        for longest, lengths in ((6, [[4], [6]]), (5, [[5], [2]]))
    )
    padded, padded_y = (
        torch.nn.utils.rnn.pad_sequence(t, batch_first=True) for t in (leaves, leaves_y)
    )
    memory = encoder(padded, src_key_padding_mask=padding[:, 0])
    expected = decoder(
        padded_y,
        memory,
        tgt_key_padding_mask=padding_y[:, 0],
        memory_key_padding_mask=padding[:, 0],
    )
    fal_nn.replace_attention(encoder)
    fal_nn.replace_attention(decoder)
    got = decoder(y, encoder(x))
    for a, e, n in zip(got.unbind(), expected, (5, 2), strict=True):
        torch.testing.assert_close(a, e[:n], rtol=1e-4, atol=1e-5)


def test_nested_calls_that_cannot_run() -> None:
    module = fal_nn.MultiheadAttention(E, H, batch_first=True)
    x, _ = nested([4, 6], E, torch.jagged)
    y, _ = nested([4, 6, 2], E, torch.jagged)
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((x, y, y), {}, r"key has sequences of \[4, 6, 2\] .* 2 of query"),
        ((x, torch.zeros(2, 6, E), x), {}, "key is 3-D and not nested"),
        ((x, x, x), {"attn_mask": torch.zeros(6, 6)}, "masks do not go with nested tensors"),
        ((torch.nested.nested_tensor([]),) * 3, {}, "received 1-D query tensor"),
    ]
    for tensors, arguments, message in calls:
        with pytest.raises(AssertionError, match=message) as raised:
            module(*tensors, need_weights=False, **arguments)
        assert isinstance(raised.value, ArgumentError)
    with pytest.raises(ArgumentError, match="nested tensors need batch_first=True"):
        fal_nn.MultiheadAttention(E, H)(x, x, x)
