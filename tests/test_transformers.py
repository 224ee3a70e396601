"""The transformers integration: small random models of each family against eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.23")

import transformers.masking_utils as masking  # noqa: E402

import flashattn_lite  # noqa: E402
from flashattn_lite import ArgumentError  # noqa: E402
from flashattn_lite.integrations import transformers as integration  # noqa: E402
from flashattn_lite.integrations.transformers_masks import CompactMask, create_mask  # noqa: E402
from flashattn_lite.testing import check_within_budget  # noqa: E402

NAME = integration.register()
VOCAB = 61

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {n: v for n, v in COMMON.items() if n != "num_key_value_heads"}
WINDOWED = ["sliding_attention", "full_attention"]
# family -> (config, its options, model)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", COMMON, "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", COMMON, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 16}, "Qwen3ForCausalLM"),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 5}, "MistralForCausalLM"),
    "gemma2": (
        "Gemma2Config",
        {**COMMON, "head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 2.0,
         "query_pre_attn_scalar": 7, "layer_types": WINDOWED},
        "Gemma2ForCausalLM",
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**COMMON, "head_dim": 16, "sliding_window": 4, "layer_types": WINDOWED},
        "Gemma3ForCausalLM",
    ),
    "phi3": ("Phi3Config", {**COMMON, "sliding_window": 6}, "Phi3ForCausalLM"),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2},
        "GPT2LMHeadModel",
    ),
    "gpt_neox": ("GPTNeoXConfig", ENCODER, "GPTNeoXForCausalLM"),
    "gpt_oss": (
        "GptOssConfig",
        {**COMMON, "head_dim": 16, "sliding_window": 4, "num_local_experts": 2,
         "num_experts_per_tok": 2, "layer_types": WINDOWED},
        "GptOssForCausalLM",
    ),
    "bert": (
        "BertConfig",
        {**ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "BertForMaskedLM",
    ),
    "modernbert": (
        "ModernBertConfig",
        {**ENCODER, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1,
         "sep_token_id": 2},
        "ModernBertForMaskedLM",
    ),
}  # fmt: skip
DECODERS = [name for name in FAMILIES if "bert" not in name]


def make(family: str) -> Any:
    """A small model with weights large enough that attention matters."""
    config_name, options, model_name = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(std=0.15)
    if family == "gpt_oss":
        model.set_experts_implementation("eager")  # the others refuse float64
    return model.eval()


def finite_eager_mask(*arguments: Any, dtype: torch.dtype, **options: Any) -> Tensor | None:
    """Eager's mask; in float64 with float32's least value, for its own overflows when a negative
    score is added, and rows that see nothing become NaN."""
    mask = masking.eager_mask(
        *arguments, dtype=torch.float32 if dtype == torch.float64 else dtype, **options
    )
    return mask if mask is None else mask.to(dtype)


@pytest.fixture(autouse=True)
def _finite_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = masking.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(functions, "eager", finite_eager_mask)


def tokens(batch: int = 3, seqlen: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, seqlen), generator=generator)


def inputs_of(kind: str) -> dict[str, Tensor]:
    """Arguments of a forward: 11 tokens, padded or packed."""
    ids = tokens()
    lengths = torch.tensor([11, 6, 9])[:, None]
    position = torch.arange(11)
    if kind == "plain":
        return {"input_ids": ids}
    if kind == "right":
        return {"input_ids": ids, "attention_mask": (position < lengths).long()}
    if kind == "left":
        return {"input_ids": ids, "attention_mask": (position >= 11 - lengths).long()}
    if kind == "holes":
        mask = torch.ones(3, 11, dtype=torch.long)
        mask[0, 3] = mask[2, 5:7] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "packed":
        starts = [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3], [*range(11)], [0, *range(10)]]
        return {"input_ids": ids, "position_ids": torch.tensor(starts)}
    raise ValueError(kind)


def logits_and_gradients(
    model: Any, implementation: str, arguments: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Logits of the real tokens, and the parameters' gradients of a random weighting of them."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(implementation)
    real = arguments.get("attention_mask", torch.ones(3, 11)).bool()
    logits = model(**arguments).logits[real]
    generator = torch.Generator().manual_seed(5)
    dout = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(dtype)
    (logits * dout).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def check_model(family: str, kind: str, dtype: torch.dtype) -> None:
    model, arguments = make(family), inputs_of(kind)
    truth = logits_and_gradients(model, "eager", arguments, torch.float64)
    low = logits_and_gradients(model, "eager", arguments, dtype)
    got = logits_and_gradients(model, NAME, arguments, dtype)
    assert got.keys() == truth.keys()
    check_within_budget("logits", got.pop("logits"), truth.pop("logits"), low.pop("logits"))
    largest = max(float(t.abs().max()) for t in truth.values())
    for name, gradient in got.items():
        exact = truth[name]
        if float(exact.abs().max()) < 1e-12 * largest:  # zero, but for rounding: BERT's key bias
            rounding = 3 * float(low[name].double().abs().max())
            assert gradient.abs().max() <= rounding + 4 * torch.finfo(dtype).eps * largest, name
            continue
        check_within_budget(name, gradient, exact, low[name], factor=3.0)


@pytest.mark.parametrize("kind", ["plain", "right", "left", "holes", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_eagers(family: str, kind: str) -> None:
    if kind == "packed" and family not in DECODERS:
        pytest.skip("transformers packs bidirectional models by cu_seq_lens only: another test")
    check_model(family, kind, torch.float32)


@pytest.mark.parametrize("kind", ["plain", "right", "left", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str, kind: str) -> None:
    if kind == "packed" and family not in DECODERS:
        pytest.skip("transformers packs bidirectional models by cu_seq_lens only: another test")
    check_model(family, kind, torch.bfloat16)


def test_the_sinks_have_a_gradient() -> None:
    found = logits_and_gradients(make("gpt_oss"), NAME, inputs_of("left"), torch.float32)
    sinks = [t for n, t in found.items() if n.endswith("self_attn.sinks")]
    assert len(sinks) == 2 and all(t.abs().min() > 0 for t in sinks)


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_generation_gives_the_same_tokens(family: str) -> None:
    model = make(family)
    for arguments in (inputs_of("plain"), inputs_of("left")):
        found = []
        for implementation in ("eager", NAME):
            model.set_attn_implementation(implementation)
            out = model.generate(
                **arguments, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            found.append(out)
        assert found[0].shape == (3, 20)
        assert torch.equal(*found)


def test_generation_with_a_static_cache() -> None:
    for family in ("llama", "gemma3"):
        model, found = make(family), []
        for implementation in ("eager", NAME):
            model.set_attn_implementation(implementation)
            out = model.generate(
                **inputs_of("left"), max_new_tokens=6, do_sample=False, eos_token_id=None,
                pad_token_id=0, cache_implementation="static",
            )  # fmt: skip
            found.append(out)
        assert torch.equal(*found)


def test_beam_search_and_chunked_prefill() -> None:
    model = make("llama")
    found = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        beams = model.generate(
            **inputs_of("plain"), max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0
        )
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [
                model(ids, past_key_values=cache).logits for ids in tokens().split([4, 1, 6], 1)
            ]
        found.append((beams, torch.cat(parts, 1)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "mistral"])
def test_packing_by_cu_seq_lens_is_each_sequence_alone(family: str) -> None:
    model = make(family)
    model.set_attn_implementation(NAME)
    sequences = [tokens(1, n, seed=n) for n in (5, 9, 2)]
    cu_seq_lens = torch.tensor([0, 5, 14, 16])
    options = {"position_ids": torch.cat([torch.arange(s.shape[1]) for s in sequences])[None]}
    with torch.no_grad():
        packed = model(
            torch.cat(sequences, 1),
            cu_seq_lens_q=cu_seq_lens,
            cu_seq_lens_k=cu_seq_lens,
            max_length_q=9,
            max_length_k=9,
            **options,
        ).logits
        alone = torch.cat([model(s).logits for s in sequences], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_packing_refuses_what_it_would_get_wrong() -> None:
    model = make("bert")
    model.set_attn_implementation(NAME)
    cu_seq_lens = torch.tensor([0, 5, 11])
    with pytest.raises(ArgumentError, match="batch is 3; with cu_seq_lens_q it must be 1"):
        model(tokens(), cu_seq_lens_q=cu_seq_lens)
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[0, 9:] = 0
    with pytest.raises(ArgumentError, match="does not go with an attention_mask that hides"):
        model(tokens(1), attention_mask=mask, cu_seq_lens_q=cu_seq_lens)


def test_custom_masks_are_applied() -> None:
    """4-D masks that the caller made, bool and float, in place of transformers' own."""
    model = make("llama")
    allowed = torch.rand(3, 1, 11, 11, generator=torch.Generator().manual_seed(2)) < 0.6
    allowed |= torch.eye(11, dtype=torch.bool)
    added = torch.zeros(3, 1, 11, 11).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(tokens(), attention_mask=added).logits
        model.set_attn_implementation(NAME)
        for mask in (added, allowed):
            got = model(tokens(), attention_mask=mask).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_applied_in_training_only() -> None:
    model = make("bert")
    model.set_attn_implementation(NAME)
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    with torch.no_grad():
        plain = model(tokens()).logits
        assert torch.equal(model(tokens()).logits, plain)
        model.train()
        torch.manual_seed(1)
        first = model(tokens()).logits
        torch.manual_seed(1)
        assert torch.equal(model(tokens()).logits, first)
    assert not torch.allclose(first, plain)


def test_compiled_models_agree() -> None:
    model = make("llama")
    model.set_attn_implementation(NAME)
    arguments = inputs_of("left")
    real = arguments["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**arguments).logits[real]
        got = torch.compile(model.forward, backend="eager")(**arguments).logits[real]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


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


def test_position_bias_has_a_gradient_and_goes_with_masks() -> None:
    q, k, v = qkv(6, 6)
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    mask = create_mask(2, 6, 6, mask_function=masking.bidirectional_mask_function,
                       attention_mask=padding)  # fmt: skip
    assert isinstance(mask, CompactMask)
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    ours, _ = integration.attention_forward(Layer(False), q, k, v, mask, position_bias=bias)
    (ours.square().sum()).backward()
    wide = bias.detach().double().requires_grad_()
    expected = sdpa(q, k, v, wide + torch.zeros(2, 1, 1, 6).double().masked_fill(
        ~padding[:, None, None], -torch.inf))  # fmt: skip
    expected.square().sum().backward()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


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
        assert torch.equal(mask.dense(), dense)
        assert torch.equal(mask & True, dense)  # any operation sees the dense mask
        assert torch.equal(mask[:, :, 0], dense[:, :, 0])
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
    assert mask.shape == (1, 1, 1 << 20, 1 << 20) and mask.dtype == torch.bool
    assert "CompactMask(shape=(1, 1, 1048576, 1048576)" in repr(mask)


# ---- registration -------------------------------------------------------------------------------


def test_register_twice_and_under_any_name() -> None:
    assert integration.register() == NAME == "fal"
    assert integration.register("another") == "another"
    model = make("llama")
    with torch.no_grad():
        expected = model(tokens()).logits
        model.set_attn_implementation("another")
        assert model.config._attn_implementation == "another"
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="names with 'flash'"):
        integration.register("my_flash")


def test_replace_attention_switches_transformers_models() -> None:
    model = torch.nn.ModuleDict({"bert": make("bert"), "mha": torch.nn.MultiheadAttention(32, 4)})
    report = flashattn_lite.nn.replace_attention(model)
    assert report.swapped == {
        "bert": "transformers attn_implementation 'fal'",
        "mha": "flashattn_lite.nn.MultiheadAttention",
    }
    assert not report.left
    assert model["bert"].config._attn_implementation == NAME


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_nn_attention_loads_their_layers(family: str) -> None:
    """nn.Attention with the state dict of a transformers layer computes what that layer does."""
    model = make(family)
    theirs = model.model.layers[0].self_attn
    config = model.config
    bias = theirs.q_proj.bias is not None
    rotary = config.rope_parameters
    ours = flashattn_lite.nn.Attention(
        config.hidden_size,
        config.num_attention_heads,
        heads_kv=config.num_key_value_heads,
        head_dim=theirs.head_dim,
        bias=bias,
        causal=True,
        window=(3, 0) if family == "gpt_oss" else (None, None),
        qk_norm=family == "qwen3",
        sinks=family == "gpt_oss",
        rotary_dim=theirs.head_dim,
        rotary_base=rotary["rope_theta"],
    )
    ours.load_state_dict(theirs.state_dict())
    if family == "gpt_oss":  # YaRN scales its frequencies
        ours.inv_freq = model.model.rotary_emb.inv_freq
    x = torch.randn(2, 11, 32)
    position = torch.arange(11)[None]
    cos, sin = model.model.rotary_emb(x, position)
    scale = model.model.rotary_emb.attention_scaling  # YaRN scales q and k too
    mask = (
        masking.create_sliding_window_causal_mask
        if family == "gpt_oss"
        else masking.create_causal_mask
    )
    attention_mask = mask(config, x, None, None, position_ids=position)
    with torch.no_grad():
        expected, _ = theirs(x, (cos / scale, sin / scale), attention_mask)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


# ---- continuous batching ------------------------------------------------------------------------


@pytest.fixture
def continuous_batching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opted in, for this test only."""
    import importlib

    for module in integration._DECIDING_MODULES:
        name = f"transformers.generation.continuous_batching.{module}"
        theirs = importlib.import_module(name)
        monkeypatch.setattr(
            theirs, "is_flash_attention_requested", theirs.is_flash_attention_requested
        )
    integration.enable_continuous_batching()
    integration.enable_continuous_batching()  # safe to call again


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_generate_batch_gives_the_same_tokens(family: str, continuous_batching: None) -> None:
    model = make(family)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (9, 4, 13, 1)]
    expected = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    model.set_attn_implementation(NAME)
    config = transformers.GenerationConfig(
        max_new_tokens=7, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = transformers.ContinuousBatchingConfig(
        page_size=32, num_blocks=64, max_batch_tokens=32
    )
    results = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    assert [results[f"req_{i}"].generated_tokens for i in range(4)] == expected
    assert model.config._attn_implementation == NAME


def test_without_the_opt_in_it_is_refused() -> None:
    model = make("llama")
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="Implementation fal is not supported"):
        model.generate_batch([[5, 6]], generation_config=transformers.GenerationConfig())


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "6.1.0")
    with pytest.raises(
        RuntimeError, match=r"transformers is 6\.1\.0; this relies on private parts"
    ):
        integration.enable_continuous_batching()


# ---- other kinds of models ----------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    model, arguments = make("mistral"), inputs_of("left")
    expected = logits_and_gradients(model, NAME, arguments, torch.float32)
    model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    got = logits_and_gradients(model, NAME, arguments, torch.float32)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


SEQUENCE_TO_SEQUENCE: dict[str, tuple[str, dict[str, Any], str]] = {
    "bart": (
        "BartConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "vocab_size": VOCAB, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        "BartForConditionalGeneration",
    ),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "vocab_size": VOCAB, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2,
         "decoder_start_token_id": 1},
        "T5ForConditionalGeneration",
    ),
}  # fmt: skip


@pytest.mark.parametrize("seqlen", [7, 11])
@pytest.mark.parametrize("family", SEQUENCE_TO_SEQUENCE)
def test_cross_attention(family: str, seqlen: int) -> None:
    """Encoder and decoder of equal lengths too: the encoder's padding is not the decoder's."""
    config_name, options, model_name = SEQUENCE_TO_SEQUENCE[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**options)).eval()
    arguments = {**inputs_of("right"), "decoder_input_ids": tokens(3, seqlen, seed=8)}

    def once(implementation: str, dtype: torch.dtype) -> Tensor:
        other = copy.deepcopy(model).to(dtype)
        other.set_attn_implementation(implementation)
        with torch.no_grad():
            return other(**arguments).logits

    truth, low = once("eager", torch.float64), once("eager", torch.float32)
    check_within_budget("logits", once(NAME, torch.float32), truth, low)


def test_a_vision_encoder() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    images = torch.randn(2, 3, 32, 32)

    def once(implementation: str, dtype: torch.dtype) -> Tensor:
        other = copy.deepcopy(model).to(dtype)
        other.set_attn_implementation(implementation)
        with torch.no_grad():
            return other(images.to(dtype)).last_hidden_state

    truth, low = once("eager", torch.float64), once("eager", torch.float32)
    check_within_budget("states", once(NAME, torch.float32), truth, low)
