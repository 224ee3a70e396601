"""Rotary embeddings against complex multiplication, in every form that flash_attn offers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashattn_lite import ArgumentError
from flashattn_lite.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)

ROWS, ROTARY_DIM = 40, 12
ANGLES = torch.outer(torch.arange(ROWS), 100.0 ** -torch.linspace(0, 1, ROTARY_DIM // 2))
COS, SIN = ANGLES.cos(), ANGLES.sin()


def by_complex_numbers(x: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (..., heads, dim) with positions (...): each pair times exp(i angle)."""
    x = x.double()
    turned, rest = x[..., :ROTARY_DIM], x[..., ROTARY_DIM:]
    pairs = (
        turned.unflatten(-1, (-1, 2))
        if interleaved
        else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    )
    angle = ANGLES.double()[positions].unsqueeze(-2)
    z = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    real = torch.view_as_real(z)
    flat = real.flatten(-2) if interleaved else real.transpose(-1, -2).flatten(-2)
    return torch.cat([flat, rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offset", [0, 5, "tensor"])
def test_dense(interleaved: bool, inplace: bool, offset: Any) -> None:
    x = torch.randn(3, 10, 2, 16)
    offsets = torch.tensor([0, 7, 30]) if offset == "tensor" else offset
    start = offsets.unsqueeze(1) if offset == "tensor" else offset
    positions = (torch.arange(10) + start).expand(3, 10)
    expected = by_complex_numbers(x, positions, interleaved).float()
    before = x.clone()
    out = apply_rotary_emb(x, COS, SIN, interleaved, inplace, offsets)
    torch.testing.assert_close(out, expected)
    assert (out.data_ptr() == x.data_ptr()) == inplace
    assert inplace or torch.equal(x, before)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([1, 0, 5, 20])])
def test_varlen_with_an_empty_sequence(interleaved: bool, offsets: Any) -> None:
    lengths = [4, 0, 9, 1]
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    x = torch.randn(14, 2, 16)
    start = offsets.tolist() if isinstance(offsets, Tensor) else [offsets] * 4
    positions = torch.cat([torch.arange(n) + s for n, s in zip(lengths, start, strict=True)])
    out = apply_rotary_emb(
        x, COS, SIN, interleaved, seqlen_offsets=offsets, cu_seqlens=cu, max_seqlen=9
    )
    torch.testing.assert_close(out, by_complex_numbers(x, positions, interleaved).float())


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_is_the_rotation_backwards(interleaved: bool) -> None:
    x = torch.randn(2, 6, 2, 16, dtype=torch.float64, requires_grad=True)
    out = apply_rotary_emb(x, COS.double(), SIN.double(), interleaved, seqlen_offsets=2)
    weight = torch.randn_like(out)
    (dx,) = torch.autograd.grad((out * weight).sum(), x)
    back = apply_rotary_emb(weight, COS.double(), -SIN.double(), interleaved, seqlen_offsets=2)
    torch.testing.assert_close(dx, back)


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(2, 6, 2, 16).bfloat16()
    cos, sin = COS.bfloat16(), SIN.bfloat16()
    out = apply_rotary_emb(x, cos, sin)
    exact = apply_rotary_emb(x.double(), cos.double(), sin.double())
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact.bfloat16())


def test_torch_variant_takes_batched_tables() -> None:
    x = torch.randn(3, 10, 2, 16)
    cos, sin = COS[:10], SIN[:10]
    expected = apply_rotary_emb(x, cos, sin, True)
    assert torch.equal(apply_rotary_emb_torch(x, cos, sin, True), expected)
    batched = [t.expand(3, 10, ROTARY_DIM // 2) for t in (cos, sin)]
    assert torch.equal(apply_rotary_emb_torch(x, *batched, interleaved=True), expected)


def test_packed_variants_rotate_q_and_k_in_place_and_leave_v() -> None:
    qkv = torch.randn(2, 5, 3, 2, 16)
    expected = qkv.clone()
    expected[:, :, 0] = apply_rotary_emb(qkv[:, :, 0], COS, SIN, seqlen_offsets=4)
    expected[:, :, 1] = apply_rotary_emb(qkv[:, :, 1], SIN, COS, seqlen_offsets=4)
    out = apply_rotary_emb_qkv_(qkv, COS, SIN, SIN, COS, seqlen_offsets=4)
    assert out is qkv and torch.equal(qkv, expected)

    gqa = torch.randn(2, 5, 4 + 2 * 2, 16)
    expected = gqa.clone()
    expected[:, :, :6] = apply_rotary_emb(gqa[:, :, :6], COS, SIN)
    assert torch.equal(apply_rotary_emb_qkv_(gqa, COS, SIN, num_heads_q=4), expected)

    kv = torch.randn(2, 5, 2, 2, 16)
    expected = kv.clone()
    expected[:, :, 0] = apply_rotary_emb(kv[:, :, 0], COS, SIN, True, seqlen_offsets=1)
    out = apply_rotary_emb_kv_(kv, COS, SIN, True, seqlen_offsets=1)
    assert out is kv and torch.equal(kv, expected)


def test_packed_gradients() -> None:
    qkv = torch.randn(1, 4, 3, 2, 16, requires_grad=True)
    weight = torch.randn(1, 4, 3, 2, 16)
    out = apply_rotary_emb_qkv_(qkv * 1.0, COS, SIN)
    (grad,) = torch.autograd.grad((out * weight).sum(), qkv)
    assert torch.equal(grad[:, :, 2], weight[:, :, 2])
    torch.testing.assert_close(grad[:, :, 0], apply_rotary_emb(weight[:, :, 0], COS, -SIN))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 3, torch.tensor([2, 9])])
def test_module(interleaved: bool, offset: Any) -> None:
    rotary = RotaryEmbedding(12, base=100.0, interleaved=interleaved)
    angle = torch.outer(torch.arange(ROWS), 100.0 ** (-torch.arange(0, 12, 2) / 12))
    qkv = torch.randn(2, 7, 3, 2, 16)
    q, k = (
        apply_rotary_emb(qkv[:, :, i], angle.cos(), angle.sin(), interleaved, seqlen_offsets=offset)
        for i in (0, 1)
    )
    separate = rotary(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=offset)
    out = rotary(qkv, seqlen_offset=offset)
    torch.testing.assert_close(out[:, :, 0], q)
    torch.testing.assert_close(out[:, :, 1], k)
    torch.testing.assert_close(separate[0], q)
    torch.testing.assert_close(separate[1][:, :, 0], k)
    assert not rotary.state_dict()


def test_module_in_half_precision_keeps_exact_angles() -> None:
    """A model cast to bfloat16 must not count positions in bfloat16 (256 + 1 would be 256)."""
    wide, half = RotaryEmbedding(16), RotaryEmbedding(16).bfloat16()
    device = torch.device("cpu")
    for a, b in zip(
        wide.tables(600, device, torch.bfloat16),
        half.tables(600, device, torch.bfloat16),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_module_trains_with_tables_that_inference_made() -> None:
    rotary = RotaryEmbedding(8)
    with torch.inference_mode():
        rotary(torch.ones(1, 5, 3, 1, 8))
    x = torch.randn(1, 5, 3, 1, 8, requires_grad=True)
    rotary(x.clone()).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_module_xpos_decays_with_distance_only() -> None:
    """Rotated q.k with XPos depends on positions through their difference alone."""
    rotary = RotaryEmbedding(8, scale_base=16.0).double()
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 21, 1, 8).clone() for _ in range(2))
    kv, length = torch.stack([k, k], 2), q[0, 0].norm()
    q_rotated, kv_rotated = rotary(q, kv)
    torch.testing.assert_close(q_rotated[0, 10].norm(), length)  # the middle neither grows nor
    assert not q_rotated[0, 9].norm().isclose(length)  # shrinks, as in flash_attn
    scores = q_rotated[0, :, 0] @ kv_rotated[0, :, 0, 0].T
    for distance in range(1, 10):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: apply_rotary_emb(x, COS, SIN[:, 1:]), "cos has shape"),
        (lambda x: apply_rotary_emb(x[..., :8], COS, SIN), "at most head_dim, 8"),
        (lambda x: apply_rotary_emb(x, COS[:3], SIN[:3]), "x has 5 rows but cos has 3"),
        (lambda x: apply_rotary_emb(x, COS, SIN, seqlen_offsets=36), "positions are 36 to 40"),
        (lambda x: apply_rotary_emb(x, COS, SIN, seqlen_offsets=-1), "positions are -1 to 3"),
        (lambda x: apply_rotary_emb(x, COS, SIN, seqlen_offsets=torch.tensor([1])), r"be \(2,\)"),
        (lambda x: apply_rotary_emb(x[0], COS, SIN), r"x has shape \(5, 2, 16\); it must be"),
        (lambda x: apply_rotary_emb_kv_(x, COS, SIN), "apply_rotary_emb_kv_: kv has shape"),
        (lambda x: apply_rotary_emb_qkv_(x, COS, SIN), "apply_rotary_emb_qkv_: qkv has shape"),
        (lambda x: RotaryEmbedding(7), "dim is 7; it must be even"),
    ],
)
def test_errors(call: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        call(torch.randn(2, 5, 2, 16))


@pytest.mark.parametrize("compiled", [False, True])
def test_in_place_on_a_leaf_that_is_trained(compiled: bool) -> None:
    """torch's own in-place operations refuse it; flash_attn's tests do it throughout."""
    for function, shape in (
        (apply_rotary_emb_qkv_, (2, 4, 3, 2, 16)),
        (apply_rotary_emb_kv_, (2, 4, 2, 2, 16)),
        (lambda x, c, s: apply_rotary_emb(x, c, s, inplace=True), (2, 4, 2, 16)),
    ):
        leaf = torch.randn(shape, requires_grad=True)
        copy = leaf.detach().clone().requires_grad_()
        expected = function(copy.clone(), COS, SIN)
        if compiled:
            function = torch.compile(function, backend="eager", fullgraph=True)
        out = function(leaf, COS, SIN)
        assert torch.equal(out, expected) and torch.equal(leaf, expected)
        g = torch.randn_like(out)
        (dleaf,) = torch.autograd.grad(out, leaf, g)
        assert torch.equal(dleaf, torch.autograd.grad(expected, copy, g)[0])
