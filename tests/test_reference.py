"""The oracle against a triple loop written from docs/semantics.md, and against PyTorch."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flashattn_lite import reference
from flashattn_lite.testing import (
    EDGE_CASES,
    Case,
    Inputs,
    error_budget,
    make_inputs,
    pairwise_cases,
)

CASES = [c for c in (*EDGE_CASES, *pairwise_cases()) if c.dtype == torch.float32]


def literal(inputs: Inputs, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """out (batch, row, head, dim) and lse, element by element in Python's floats. Dropout is left
    out: it has a test of its own."""
    o = inputs.options
    scale = o["softmax_scale"] if o["softmax_scale"] is not None else case.head_dim**-0.5
    varlen, group = case.layout == "varlen", case.heads_q // case.heads_k
    out = torch.zeros(*inputs.q.shape[:-1], inputs.v.shape[-1], dtype=torch.float64)
    lse_shape = (
        inputs.q.shape[:-1][::-1] if varlen else inputs.q.shape[:1] + inputs.q.shape[1:3][::-1]
    )
    lse = torch.full(lse_shape, -math.inf, dtype=torch.float64)
    q, k, v = inputs.q.double(), inputs.k.double(), inputs.v.double()
    begin_q = begin_k = 0
    for b, (seqlen_q, seqlen_k) in enumerate(case.seqlens):
        pad = int(o["leftpad_k"][b]) if "leftpad_k" in o else 0
        shift = seqlen_k - seqlen_q
        for h in range(case.heads_q):
            for i in range(seqlen_q):
                row = q[begin_q + i, h] if varlen else q[b, i, h]
                scores, values = [], []
                for j in range(seqlen_k):
                    left, right = case.window[0], 0 if case.causal else case.window[1]
                    if left is not None and j < i + shift - left:
                        continue
                    if right is not None and j > i + shift + right:
                        continue
                    at = (begin_k + j, h // group) if varlen else (b, pad + j, h // group)
                    s = scale * float(row @ k[at])
                    if case.softcap:
                        s = case.softcap * math.tanh(s / case.softcap)
                    if case.bias:
                        bias = o["bias"]
                        s += float(bias[min(b, bias.shape[0] - 1), h, min(i, bias.shape[2] - 1), j])
                    if case.alibi:
                        slopes = o["alibi_slopes"]
                        slope = float(slopes[h] if slopes.dim() == 1 else slopes[b, h])
                        s -= slope * abs(i + shift - j)
                    scores.append(s)
                    values.append(v[at])
                logits = scores + ([float(o["sinks"][h])] if case.sinks else [])
                if not logits:
                    continue
                top = max(logits)
                total = sum(math.exp(s - top) for s in logits)
                weights = [math.exp(s - top) / total for s in scores]
                result = sum(
                    (w * x for w, x in zip(weights, values, strict=True)), torch.tensor(0.0)
                )
                if varlen:
                    out[begin_q + i, h], lse[h, begin_q + i] = result, top + math.log(total)
                else:
                    out[b, i, h], lse[b, h, i] = result, top + math.log(total)
        begin_q, begin_k = begin_q + seqlen_q, begin_k + seqlen_k
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_a_literal_triple_loop(case: Case) -> None:
    if sum(a * b for a, b in case.seqlens) * case.heads_q > 40_000:
        pytest.skip("covered by smaller cases: the literal loop is slow")
    inputs = make_inputs(case)
    options = inputs.reference_options()
    options.pop("dropout_p", None)
    out, lse = reference.attention(inputs.q, inputs.k, inputs.v, **options)
    expected_out, expected_lse = literal(inputs, case)
    torch.testing.assert_close(out, expected_out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads_k", [1, 2, 4])
@pytest.mark.parametrize("masking", ["none", "causal", "bias", "mask"])
def test_reference_equals_scaled_dot_product_attention(heads_k: int, masking: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, 19, h, 16, dtype=torch.float64, generator=generator, requires_grad=True)
        for h in (4, heads_k, heads_k)
    )
    dout = torch.randn(2, 19, 4, 16, dtype=torch.float64, generator=generator)
    bias = torch.randn(2, 4, 19, 19, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.rand(2, 1, 19, 19, generator=generator) < 0.7
    mask |= torch.eye(19, dtype=torch.bool)
    ours = {"none": {}, "causal": {"causal": True}, "bias": {"bias": bias}, "mask": {"mask": mask}}
    theirs = {"none": {}, "causal": {"is_causal": True}, "bias": {"attn_mask": bias}}
    theirs["mask"] = {"attn_mask": mask}
    leaves = (q, k, v, bias) if masking == "bias" else (q, k, v)
    out, _ = reference.attention(q, k, v, **ours[masking])
    expected = scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True, **theirs[masking]
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    for ours_grad, theirs_grad in zip(
        torch.autograd.grad(out, leaves, dout),
        torch.autograd.grad(expected, leaves, dout),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, theirs_grad)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_reference_equals_flex_attention_with_every_score_modification() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 4, 24, 16, generator=generator) for _ in range(3))
    slopes, softcap = torch.rand(4, generator=generator), 5.0

    def score_mod(s, b, h, i, j):  # type: ignore[no-untyped-def]
        s = softcap * torch.tanh(s / softcap) - slopes[h] * (i - j).abs()
        return torch.where((j <= i) & (j >= i - 7), s, -math.inf)

    expected, expected_lse = flex_attention(q, k, v, score_mod=score_mod, return_lse=True)
    out, lse = reference.attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        causal=True,
        window=(7, None),
        softcap=softcap,
        alibi_slopes=slopes,
    )
    torch.testing.assert_close(out.transpose(1, 2).float(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.float(), expected_lse, rtol=1e-5, atol=1e-5)


def test_visible_is_bottom_right_aligned() -> None:
    # Two queries after three earlier keys: the last query sees all five keys.
    assert reference.visible(2, 5, (None, 0)).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # More queries than keys: the first ones see nothing.
    assert reference.visible(3, 1, (None, 0)).int().tolist() == [[0], [0], [1]]
    assert reference.visible(3, 3, (1, 0)).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_rows_that_see_nothing() -> None:
    q, k, v = torch.randn(1, 3, 1, 4), torch.randn(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    out, lse = reference.attention(q, k, v, causal=True)
    assert out[0, :2].eq(0).all() and out[0, 2].eq(1).all()
    assert lse[0, 0, :2].eq(-math.inf).all() and torch.isfinite(lse[0, 0, 2])
    out, lse = reference.attention(q, k, v, causal=True, sinks=torch.tensor([0.5]))
    assert out[0, :2].eq(0).all()
    torch.testing.assert_close(lse[0, 0, :2], torch.full((2,), 0.5, dtype=torch.float64))


def test_nan_shows_where_it_is_visible_and_nowhere_else() -> None:
    q, k, v = (torch.randn(1, 6, 1, 4) for _ in range(3))
    for poisoned in (k, v):
        clean = poisoned[0, 4].clone()
        poisoned[0, 4] = math.nan
        out, _ = reference.attention(q, k, v, causal=True)
        assert torch.isfinite(out[0, :4]).all() and out[0, 4:].isnan().all()
        poisoned[0, 4] = clean


def test_dropout_bits_are_philox() -> None:
    """One known answer of Philox4x32-7, computed by hand in Python's integers."""

    def philox(key: int, counter: list[int]) -> list[int]:
        k = [key & 0xFFFFFFFF, key >> 32]
        c = list(counter)
        for _ in range(7):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [
                (p1 >> 32) ^ c[1] ^ k[0],
                p1 & 0xFFFFFFFF,
                (p0 >> 32) ^ c[3] ^ k[1],
                p0 & 0xFFFFFFFF,
            ]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    seed, p = -(2**62) + 12345, 0.4
    keep = reference.dropout_keep(seed, torch.tensor([7]), 40, 37, p)[0]
    for i in range(40):
        for j in range(37):
            words = philox(
                seed % 2**64, [(i >> 4) * 8 + (i & 7), (j >> 4) * 4 + ((j & 7) >> 1), 7, 0]
            )
            draw = words[((i >> 3) & 1) * 2 + ((j >> 3) & 1)] >> (16 * (j & 1)) & 0xFFFF
            assert bool(keep[i, j]) == (draw >= round(p * 65536))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_probability_and_scale(p: float) -> None:
    keep = reference.dropout_keep(3, torch.arange(8), 256, 256, p)
    n = keep.numel()
    applied = reference.dropout_threshold(p) / 65536
    assert abs(applied - p) <= 2**-17
    assert abs(int((~keep).sum()) - applied * n) <= 5 * math.sqrt(n * applied * (1 - applied)) + 1
    assert reference.dropout_keep_scale(p) == pytest.approx(1 / (1 - applied))


def test_dropout_of_the_output_equals_its_definition() -> None:
    q, k, v = (torch.randn(2, 20, 2, 8) for _ in range(3))
    seed = torch.tensor([99])
    weights = reference.attention_weights(q, k)
    keep = reference.dropout_keep(seed, torch.arange(4).reshape(2, 2), 20, 20, 0.3)
    expected = (weights * keep * reference.dropout_keep_scale(0.3)) @ v.double().transpose(1, 2)
    out, lse = reference.attention(q, k, v, dropout_p=0.3, dropout_seed=seed)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    torch.testing.assert_close(lse, reference.attention(q, k, v)[1])


def test_pages_equal_rows() -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 3, 4, 8, generator=generator)
    k, v = (torch.randn(2, 11, 2, 8, generator=generator) for _ in range(2))
    used = torch.tensor([11, 7], dtype=torch.int32)
    table = torch.tensor([[5, 0, 3], [2, 4, 999]], dtype=torch.int32)
    pages = [torch.full((6, 4, 2, 8), math.nan) for _ in range(2)]
    for b in range(2):
        for row in range(int(used[b])):
            for paged, plain in zip(pages, (k, v), strict=True):
                paged[int(table[b, row // 4]), row % 4] = plain[b, row]
    out, lse = reference.attention(q, *pages, causal=True, seqused_k=used, block_table=table)
    expected, expected_lse = reference.attention(q, k, v, causal=True, seqused_k=used)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_quantised_keys_are_multiplied_by_their_scale() -> None:
    q = torch.randn(1, 2, 2, 8)
    k8, v8 = (torch.randint(-127, 128, (1, 5, 1, 8), dtype=torch.int8) for _ in range(2))
    k_scale, v_scale = torch.rand(1, 5, 1), torch.rand(1, 5, 1)
    out, _ = reference.attention(q, k8, v8, k_scale=k_scale, v_scale=v_scale)
    expected, _ = reference.attention(
        q, k8 * k_scale[..., None].double(), v8 * v_scale[..., None].double()
    )
    torch.testing.assert_close(out, expected)


def test_gradients_exist_and_are_zero_for_an_empty_batch() -> None:
    q, k, v = (torch.randn(0, 3, 2, 4, requires_grad=True) for _ in range(3))
    out, lse = reference.attention(q, k, v)
    assert out.shape == (0, 3, 2, 4) and lse.shape == (0, 2, 3)
    for t, g in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert g.shape == t.shape


def test_the_error_budget_is_what_numerics_md_says() -> None:
    truth = torch.tensor([1.0, -8.0, math.inf], dtype=torch.float64)
    low = torch.tensor([1.25, -7.5, 0.0], dtype=torch.bfloat16)
    eps, eps32 = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps
    for score, summed, largest in ((0.5, 0.0, 8.0), (20.0, 0.0, 8.0), (20.0, 100.0, 100.0)):
        allowed = error_budget(truth, low, low.dtype, 3.0, largest_score=score, summed=summed)
        assert allowed == pytest.approx(3 * 0.5 + (4 * eps + eps32 * max(1.0, score)) * largest)
    assert error_budget(truth[2:], low[2:], low.dtype, 3.0) == 0.0
