"""What transformers hands to the attention function, and the masks that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.masking_utils as masking
from torch import Tensor
from transformers_models import transformers

from flashattn_lite import ArgumentError
from flashattn_lite.integrations import transformers as integration
from flashattn_lite.integrations.transformers_masks import CompactMask, create_mask

# ---- the function itself ------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, 2


def qkv(seqlen_q: int, seqlen_k: int, dim_v: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 4, seqlen_q, 8), (2, 2, seqlen_k, 8), (2, 2, seqlen_k, dim_v)
    q, k, v = (torch.randn(s, generator=generator) for s in shapes)
    return q, k, v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(6, 6), (1, 6), (4, 6)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_without_a_mask_it_does_what_sdpa_does(
    seqlen_q: int, seqlen_k: int, is_causal: bool
) -> None:
    q, k, v = qkv(seqlen_q, seqlen_k, dim_v=12)
    theirs, _ = transformers.AttentionInterface()["sdpa"](Layer(is_causal), q, k, v, None)
    ours, weights = integration.attention_forward(Layer(is_causal), q, k, v, None)
    assert weights is None and ours.shape == (2, seqlen_q, 4, 12)
    torch.testing.assert_close(ours, theirs)


def test_without_a_mask_the_window_holds() -> None:
    q, k, v = qkv(6, 6)
    ours, _ = integration.attention_forward(Layer(True), q, k, v, None, sliding_window=3)
    distance = torch.arange(6)[:, None] - torch.arange(6)
    expected = sdpa(q, k, v, (distance >= 0) & (distance < 3))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_position_bias_has_a_gradient_and_goes_with_masks(kind: str) -> None:
    real = torch.ones(2, 6, dtype=torch.bool)
    function = masking.bidirectional_mask_function
    if kind == "packed":
        segments = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2]])
        function = masking.packed_sequence_mask_function(segments)
    else:
        real[0, slice(4, 6) if kind == "right" else slice(2)] = False
    arguments = dict(
        batch_size=2, q_length=6, kv_length=6, mask_function=function, attention_mask=real
    )
    mask = create_mask(**arguments)
    dense = masking.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert isinstance(mask, CompactMask)
    q, k, v = qkv(6, 6)
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    ours, _ = integration.attention_forward(Layer(False), q, k, v, mask, position_bias=bias)
    (ours.square().sum()).backward()
    wide = bias.detach().double().requires_grad_()
    expected = sdpa(
        q, k, v, wide + torch.zeros(2, 1, 6, 6).double().masked_fill(~dense, -torch.inf)
    )
    expected.square().sum().backward()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_a_sink_for_each_query_joins_the_softmax() -> None:
    q, k, v = qkv(6, 6)
    sinks = torch.randn(2, 4, 6, 1, requires_grad=True)
    ours, _ = integration.attention_forward(Layer(True), q, k, v, create_mask(2, 6, 6), sinks=sinks)
    ours.square().sum().backward()
    wide = sinks.detach().double().requires_grad_()
    scores = q.double() @ k.repeat_interleave(2, 1).mT.double() * 8**-0.5
    scores = scores.masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    weights = torch.softmax(torch.cat([scores, wide], -1), -1)[..., :-1]
    expected = (weights @ v.repeat_interleave(2, 1).double()).transpose(1, 2)
    expected.square().sum().backward()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sinks.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="sinks, a logit for each query, go neither"):
        integration.attention_forward(
            Layer(True), q, k, v, create_mask(2, 6, 6), sinks=sinks, output_attentions=True
        )


def test_columns_of_0_appended_to_a_mask_are_visible() -> None:
    """What models with compressed keys do, as eager attention's masks let them (DeepSeek V4)."""
    mask = torch.nn.functional.pad(create_mask(2, 4, 4), (0, 2), value=0.0)
    dense = torch.cat([torch.ones(4, 4).tril(), torch.ones(4, 2)], 1).bool().expand(2, 1, 4, 6)
    q, k, v = qkv(4, 6)
    ours, _ = integration.attention_forward(Layer(True), q, k, v, mask)
    torch.testing.assert_close(ours.double(), sdpa(q, k, v, dense), rtol=1e-5, atol=1e-6)


def test_weights_on_request_are_eagers() -> None:
    q, k, v = qkv(6, 6)
    mask = create_mask(2, 6, 6)
    _, weights = integration.attention_forward(
        Layer(True), q, k, v, mask, softcap=2.0, output_attentions=True
    )
    scores = torch.tanh(q.double() @ k.repeat_interleave(2, 1).mT.double() * 8**-0.5 / 2.0) * 2.0
    expected = torch.softmax(scores.masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf), -1)
    assert weights is not None
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_mask_for_other_lengths_is_refused() -> None:
    q, k, v = qkv(6, 6)
    with pytest.raises(ArgumentError, match=r"mask is for \(5, 6\) queries and keys"):
        integration.attention_forward(Layer(True), q, k, v, create_mask(2, 5, 6))


# ---- masks --------------------------------------------------------------------------------------

PADDINGS: dict[str, Tensor | None] = {
    "none": None,
    "right": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool(),
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]).bool(),
    "empty": torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool(),
    "holes": torch.tensor([[1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1]]).bool(),
}
RULES: dict[str, Callable[..., Any]] = {
    "causal": masking.causal_mask_function,
    "bidirectional": masking.bidirectional_mask_function,
    "window": masking.sliding_window_causal_mask_function(3),
    "window_both_sides": masking.sliding_window_bidirectional_mask_function(2),
    "chunked": masking.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
    "packed": masking.packed_sequence_compatibility_function(
        masking.causal_mask_function,
        torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]]),
        torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]),
    ),
    "or": masking.or_masks(masking.causal_mask_function, lambda b, h, i, j: (i < 3) & (j < 3)),
}
COMPACT = {"causal", "bidirectional", "window", "window_both_sides", "packed"}


@pytest.mark.parametrize("rows", ["all", "last", "last_of_longer", "first_of_longer"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("rule", RULES)
def test_masks_mean_what_transformers_means(rule: str, padding: str, rows: str) -> None:
    """What attention computes with the mask, against the dense mask that transformers makes."""
    # (queries, keys, position of the first query, of the first key): without a cache, decoding,
    # decoding several with a windowed cache, and prefill with a static cache.
    q_length, kv_length, q_offset, kv_offset = {
        "all": (7, 7, 0, 0),
        "last": (1, 7, 6, 0),
        "last_of_longer": (2, 5, 5, 2),
        "first_of_longer": (4, 7, 0, 0),
    }[rows]
    arguments = dict(
        batch_size=2, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=RULES[rule], attention_mask=PADDINGS[padding],
    )  # fmt: skip
    dense = masking.sdpa_mask(**arguments, allow_is_causal_skip=False)
    mask = create_mask(**arguments)
    possible = rule in COMPACT and padding != "holes" and rows != "first_of_longer"
    if possible and (rule != "packed" or (rows == "all" and padding == "none")):
        assert isinstance(mask, CompactMask)
    if isinstance(mask, CompactMask):
        added = torch.zeros(()).where(dense, -torch.inf)
        assert mask.dtype == added.dtype and torch.equal(mask.dense(), added)
        assert torch.equal(mask + 0, added)  # any operation sees the dense mask
        assert torch.equal(mask[:, :, 0], added[:, :, 0])
    q, k, v = qkv(q_length, kv_length)
    ours, _ = integration.attention_forward(Layer(True), q, k, v, mask)
    expected = sdpa(q, k, v, dense)
    # A query that is padding itself may give 0 instead; a row that sees nothing gives 0 always.
    real = torch.ones(2, q_length, dtype=torch.bool)
    if PADDINGS[padding] is not None:
        real = PADDINGS[padding][:, q_offset : q_offset + q_length]
    torch.testing.assert_close(ours.double()[real], expected[real], rtol=1e-5, atol=1e-6)
    rest = ours[~real].double()
    same = (rest - expected[~real]).abs().amax((-1, -2)) < 1e-5
    assert bool((same | (rest == 0).all(-1).all(-1)).all())


def test_a_compact_mask_holds_no_elements() -> None:
    mask = create_mask(1, 1 << 20, 1 << 20)  # 2^40 elements, if it were dense
    assert mask.shape == (1, 1, 1 << 20, 1 << 20) and mask.dtype == torch.float32
    assert "CompactMask(shape=(1, 1, 1048576, 1048576)" in repr(mask)
