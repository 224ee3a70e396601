"""The flash_attn 2.8 surface, as that package's own tests use it: packed variants, tuples, windows,
S_dmask, the LSE of empty rows. Exactness itself is test_attention.py's business."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flashattn_lite
from flashattn_lite import (
    attention,
    attention_weights,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_interface,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    reference,
)
from flashattn_lite.bert_padding import pad_input, unpad_input

TAIL = [
    *("dropout_p", "softmax_scale", "causal", "window_size", "softcap"),
    *("alibi_slopes", "deterministic", "return_attn_probs"),
]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": ["q", "k", "v", *TAIL],
    "flash_attn_qkvpacked_func": ["qkv", *TAIL],
    "flash_attn_kvpacked_func": ["q", "kv", *TAIL],
    "flash_attn_varlen_func": ["q", "k", "v", *LENGTHS, *TAIL, "block_table"],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *TAIL],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *LENGTHS, *TAIL],
    "flash_attn_combine": ["out_partial", "lse_partial", "out", "out_dtype"],
}
DEFAULTS = [0.0, None, False, (-1, -1), 0.0, None, False, False]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_flash_attn_s(name: str) -> None:
    function = getattr(flashattn_lite, name)
    assert getattr(flash_attn_interface, name) is function
    parameters = inspect.signature(function).parameters
    ours = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert ours in ([], ["block_mask"])  # beyond flash_attn: by keyword, after its own
    assert list(parameters) == SIGNATURES[name] + ours
    if name != "flash_attn_combine":
        assert [parameters[n].default for n in TAIL] == DEFAULTS
    assert all(
        parameters[n].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for n in SIGNATURES[name]
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "softcap": 5.0},
    {"window_size": (5, 3), "softmax_scale": 0.3},
    {"window_size": (4, 4), "causal": True, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
]


def gradients(out: Tensor, dout: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(out, leaf, dout)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_equals_unpacked(options: dict[str, Any]) -> None:
    qkv = torch.randn(2, 19, 3, 4, 8, requires_grad=True)
    dout = torch.randn(2, 19, 4, 8)
    expected = flash_attn_func(*qkv.unbind(2), **options)
    wanted = gradients(expected, dout, qkv)
    out = flash_attn_qkvpacked_func(qkv, **options)
    assert torch.equal(out, expected) and torch.equal(gradients(out, dout, qkv), wanted)
    out = flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options)
    assert torch.equal(out, expected) and torch.equal(gradients(out, dout, qkv), wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen_packed_equals_unpacked(options: dict[str, Any]) -> None:
    cu = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    qkv = torch.randn(20, 3, 4, 8, requires_grad=True)
    dout = torch.randn(20, 4, 8)
    expected = flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 13, 13, **options)
    wanted = gradients(expected, dout, qkv)
    out = flash_attn_varlen_qkvpacked_func(qkv, cu, 13, **options)
    assert torch.equal(out, expected) and torch.equal(gradients(out, dout, qkv), wanted)
    out = flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu, 13, 13, **options)
    assert torch.equal(out, expected) and torch.equal(gradients(out, dout, qkv), wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen_of_unpadded_equals_dense_of_each(options: dict[str, Any]) -> None:
    """unpad, attend, pad: as flash_attn's tests go about it."""
    lengths = [9, 0, 16, 1]
    mask = torch.arange(16) < torch.tensor(lengths).unsqueeze(1)
    q, k, v = (torch.randn(4, 16, 4, 8) for _ in range(3))
    tokens, indices, cu, longest, _ = unpad_input(q, mask)
    k_tokens, v_tokens = (unpad_input(t, mask)[0] for t in (k, v))
    out, lse, s_dmask = flash_attn_varlen_func(
        tokens, k_tokens, v_tokens, cu, cu, longest, longest, **options, return_attn_probs=True
    )
    assert lse.shape == (4, 26) and s_dmask.numel() == 0
    padded = pad_input(out, indices, 4, 16)
    for b, n in enumerate(lengths):
        alone = attention(
            *(t[b : b + 1, :n] for t in (q, k, v)),
            causal=options.get("causal", False),
            window=options.get("window_size", (None, None)),
            softcap=options.get("softcap", 0.0),
            softmax_scale=options.get("softmax_scale"),
            alibi_slopes=options.get("alibi_slopes"),
        )
        assert torch.equal(padded[b, :n], alone[0]) and padded[b, n:].eq(0).all()


def test_return_attn_probs_without_dropout() -> None:
    """As flash_attn 2.8: (out, lse, empty S_dmask); the LSE of an empty row is +inf here, -inf in
    ``attention``."""
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
    out, lse, s_dmask = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert out[0, :2].eq(0).all() and s_dmask.numel() == 0
    assert lse.shape == (1, 2, 5) and lse.dtype == torch.float32
    assert lse[..., :2].eq(math.inf).all() and torch.isfinite(lse[..., 2:]).all()
    _, ours = attention(q, k, v, causal=True, return_lse=True)
    assert ours[..., :2].eq(-math.inf).all() and torch.equal(ours[..., 2:], lse[..., 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_s_dmask_tells_what_was_dropped(dtype: torch.dtype) -> None:
    """Its sign is the dropout mask, its magnitude proportional to the softmax: together with the
    scale they reproduce the output."""
    q, k, v = (torch.randn(2, n, 2, 16).to(dtype) for n in (21, 34, 34))
    out, _, s_dmask = flash_attn_func(q, k, v, 0.3, None, True, return_attn_probs=True)
    assert s_dmask.shape == (2, 2, 21, 34) and s_dmask.dtype == dtype
    seen = reference.visible(21, 34, (None, 0))
    assert s_dmask[..., ~seen].eq(0).all() and s_dmask[..., seen].ne(0).all()
    kept = s_dmask >= 0
    fraction = float((~kept)[..., seen].float().mean())
    assert abs(fraction - 0.3) < 0.05
    weights = attention_weights(q, k, causal=True)
    magnitude = s_dmask.abs().float()
    torch.testing.assert_close(
        magnitude / magnitude.sum(-1, keepdim=True), weights, rtol=2e-2, atol=2e-2
    )
    dropped = (weights * kept * reference.dropout_keep_scale(0.3)) @ v.float().transpose(1, 2)
    torch.testing.assert_close(out.float(), dropped.transpose(1, 2), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_s_dmask_has_a_sign_where_the_probability_is_nothing(dtype: torch.dtype) -> None:
    q, k, v = (30 * torch.randn(1, 40, 2, 16).to(dtype) for _ in range(3))
    _, _, s_dmask = flash_attn_func(q, k, v, dropout_p=0.9, return_attn_probs=True)
    assert float((s_dmask.abs() < 1e-4).float().mean()) > 0.9
    assert abs(float((s_dmask < 0).float().mean()) - 0.9) < 0.03


def test_s_dmask_becomes_probabilities_as_flash_attn_s_tests_do_it() -> None:
    """Their recipe scales blocks of keys by exp(block maximum - lse); our block is the row."""
    q, k, v = (torch.randn(1, 12, 1, 8) for _ in range(3))
    _, lse, s_dmask = flash_attn_func(q, k, v, dropout_p=0.2, return_attn_probs=True)
    block = flash_attn_interface._get_block_size_n(q.device, 8, True, False)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    maxima = [s.amax(-1) for s in scores.split(block, -1)]
    parts = s_dmask.abs().split(block, -1)
    probabilities = torch.cat(
        [a * torch.exp(m - lse).unsqueeze(-1) for a, m in zip(parts, maxima, strict=True)], -1
    )
    torch.testing.assert_close(probabilities, scores.softmax(-1), rtol=1e-5, atol=1e-5)


def test_s_dmask_of_varlen_is_padded() -> None:
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    q = torch.randn(8, 2, 8)
    _, _, s_dmask = flash_attn_varlen_func(
        q, q, q, cu, cu, 6, 7, dropout_p=0.5, return_attn_probs=True
    )
    assert s_dmask.shape == (2, 2, 6, 7)
    assert s_dmask[0, :, 3:].eq(0).all() and s_dmask[0, :, :, 3:].eq(0).all()
    assert s_dmask[1, :, :5, :5].ne(0).all()


def test_window_size_takes_tensors_and_any_negative_number() -> None:
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    expected = flash_attn_func(q, k, v, window_size=(4, 2))
    assert torch.equal(flash_attn_func(q, k, v, window_size=torch.tensor([4, 2])), expected)
    pair = (torch.tensor(4), torch.tensor(2))
    assert torch.equal(flash_attn_func(q, k, v, window_size=pair), expected)
    assert torch.equal(flash_attn_func(q, k, v, window_size=[4, 2]), expected)
    everything = flash_attn_func(q, k, v)
    for window in ((-1, -1), [-5, -1], torch.tensor([-1, -1]), (20, 99)):
        assert torch.equal(flash_attn_func(q, k, v, window_size=window), everything)


def test_a_window_as_long_as_the_keys_is_unbounded_and_causal_wins() -> None:
    q, k, v = torch.randn(1, 30, 1, 8), torch.randn(1, 10, 1, 8), torch.randn(1, 10, 1, 8)
    everything = flash_attn_func(q, k, v)
    # As a band, (-1, 10) hides every key from the first rows; flash_attn calls it unbounded.
    assert torch.equal(flash_attn_func(q, k, v, window_size=(-1, 10)), everything)
    assert attention(q, k, v, window=(None, 10))[0, 0].eq(0).all()
    causal = flash_attn_func(q, k, v, causal=True, window_size=(7, -1))
    assert torch.equal(flash_attn_func(q, k, v, causal=True, window_size=(7, 7)), causal)
    assert torch.equal(attention(q, k, v, window=(7, 0)), causal)


def test_alibi_per_head_and_per_batch() -> None:
    q, k, v = (torch.randn(3, 9, 2, 8) for _ in range(3))
    slopes = torch.rand(3, 2)
    out = flash_attn_func(q, k, v, alibi_slopes=slopes)
    for b in range(3):
        alone = flash_attn_func(q[b : b + 1], k[b : b + 1], v[b : b + 1], alibi_slopes=slopes[b])
        assert torch.equal(out[b], alone[0])


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_varlen_over_pages(page_size: int) -> None:
    """block_table: the same rows in pages, with unowned slots and pages full of NaN."""
    lengths_q, lengths_k = [4, 1, 0, 7], [19, 33, 5, 7]
    cu_q, cu_k = (
        torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    )
    q, k, v = (torch.randn(n, 4, 8) for n in (12, 64, 64))
    width = -(-33 // page_size)
    numbers = torch.randperm(4 * width + 3)[: 4 * width].to(torch.int32)
    table = numbers.reshape(4, width)
    pages = [torch.full((4 * width + 3, page_size, 4, 8), math.nan) for _ in range(2)]
    for b, n in enumerate(lengths_k):
        for row in range(n):
            for paged, plain in zip(pages, (k, v), strict=True):
                page = int(table[b, row // page_size])
                paged[page, row % page_size] = plain[int(cu_k[b]) + row]
        table[b, -(-n // page_size) :] = 2**30  # entries beyond the last page in use
    out = flash_attn_varlen_func(q, *pages, cu_q, cu_k, 7, 33, causal=True, block_table=table)
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 33, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_deterministic_is_accepted_and_changes_nothing_on_the_cpu() -> None:
    q, k, v = (torch.randn(1, 50, 2, 8, requires_grad=True) for _ in range(3))
    grads = [
        torch.autograd.grad(flash_attn_func(q, k, v, deterministic=d).sum(), (q, k, v))
        for d in (False, True)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_combine_is_exported_where_flash_attn_3_has_it() -> None:
    assert flash_attn_interface.flash_attn_combine is flash_attn_combine
