"""nn.MultiheadAttention against torch's, option by option; nn.Attention against its definition and
against transformers' attention layers; replace_attention."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import flashattn_lite
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


X, Y = torch.zeros(N, L, E), torch.zeros(N, S, E)
BAD_CALLS: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
    ((X[..., :30], Y, Y), {}, "query has 30 features; it must be 32"),
    ((X, Y, Y[:, :5]), {}, "key has shape .* but value has"),
    ((X, Y[:2], Y[:2]), {}, "key has batch 2 but query has 3"),
    ((X, Y[0], Y[0]), {}, "3, 2, 2 dimensions"),
    ((X, Y, Y), {"is_causal": True}, "is_causal is a hint about attn_mask"),
    ((X, Y, Y), {"attn_mask": torch.zeros(L, L)}, r"attn_mask .*\(9, 9\); it must be \(9, 13"),
    ((X, Y, Y), {"key_padding_mask": torch.zeros(N, L)}, r"must be \(3, 13\)"),
    ((X, Y, Y), {"attn_mask": torch.zeros(L, S).int()}, "attn_mask is torch.int32"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "arguments", "message"), BAD_CALLS)
def test_bad_calls(tensors: tuple[Tensor, ...], arguments: dict[str, Any], message: str) -> None:
    ours = fal_nn.MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(ArgumentError, match=f"MultiheadAttention: .*{message}"):
        ours(*tensors, need_weights=False, **arguments)


def test_nested_tensors_are_refused() -> None:
    ours = fal_nn.MultiheadAttention(E, H, batch_first=True)
    nested = torch.nested.nested_tensor([torch.zeros(2, E), torch.zeros(3, E)])
    with pytest.raises(ArgumentError, match="nested tensors"):
        ours(nested, nested, nested)


# ---- replace_attention --------------------------------------------------------------------------


class HomemadeAttention(torch.nn.Module):
    pass


class DerivedAttention(torch.nn.MultiheadAttention):
    pass


def test_replace_reports_what_it_did_and_why_not() -> None:
    model = torch.nn.ModuleDict(
        {
            "plain": torch.nn.MultiheadAttention(E, H),
            "derived": DerivedAttention(E, H),
            "wide": torch.nn.MultiheadAttention(300, 1),
            "homemade": HomemadeAttention(),
            "ours": fal_nn.MultiheadAttention(E, H),
            "linear": torch.nn.Linear(3, 3),
        }
    )
    parameters = [id(p) for p in model.parameters()]
    seen: list[str] = []
    model["plain"].register_forward_hook(lambda *_: seen.append("hook"))
    report = fal_nn.replace_attention(model)
    assert report.swapped == {"plain": "flashattn_lite.nn.MultiheadAttention"}
    assert sorted(report.left) == ["derived", "homemade", "ours", "wide"]
    assert "derives from torch.nn.MultiheadAttention" in report.left["derived"]
    assert "use_as_sdpa" in report.left["homemade"]
    assert "head_dim is 300" in report.left["wide"]
    assert "already" in report.left["ours"]
    assert str(report).startswith("swapped 1, left 4\n  plain: flashattn_lite.nn")
    assert [id(p) for p in model.parameters()] == parameters
    assert isinstance(model["plain"], fal_nn.MultiheadAttention)
    model["plain"](X, X, X, need_weights=False)
    assert seen == ["hook"]


def test_replace_takes_the_model_itself() -> None:
    model = torch.nn.MultiheadAttention(E, H)
    assert fal_nn.replace_attention(model).swapped == {"": "flashattn_lite.nn.MultiheadAttention"}
    assert type(model) is fal_nn.MultiheadAttention


# ---- nn.Attention -------------------------------------------------------------------------------


def definition(module: fal_nn.Attention, x: Tensor, **options: Any) -> Tensor:
    """nn.Attention of one sequence (seqlen, dim), written out."""
    x = x.to(module.q_proj.weight.dtype)
    context = options.get("context", x)
    n, m = x.shape[0], context.shape[0]
    q = module.q_proj(x).view(n, module.heads, -1).transpose(0, 1)
    k = module.k_proj(context).view(m, module.heads_kv, -1).transpose(0, 1)
    v = module.v_proj(context).view(m, module.heads_kv, -1).transpose(0, 1)
    if module.q_norm is not None:
        q, k = (
            t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
            for t, norm in ((q, module.q_norm), (k, module.k_norm))
        )
    positions = options.get("positions", torch.arange(n))
    half = module.inv_freq.numel()
    if half:
        angle = positions[:, None].double() * module.inv_freq.double()
        turn = torch.polar(torch.ones_like(angle), angle)

        def rotated(t: Tensor) -> Tensor:
            t = t.double()
            if module.rotary_interleaved:
                pairs = torch.view_as_complex(
                    t[..., : 2 * half].unflatten(-1, (half, 2)).contiguous()
                )
                front = torch.view_as_real(pairs * turn).flatten(-2)
            else:
                pairs = torch.complex(t[..., :half], t[..., half : 2 * half]) * turn
                front = torch.cat([pairs.real, pairs.imag], -1)
            return torch.cat([front, t[..., 2 * half :]], -1)

        q, k = rotated(q).to(x.dtype), rotated(k).to(x.dtype)
    k, v = (t.repeat_interleave(module.heads // module.heads_kv, 0) for t in (k, v))
    scale = module.softmax_scale or module.head_dim**-0.5
    s = q @ k.transpose(1, 2) * scale
    if module.softcap:
        s = module.softcap * torch.tanh(s / module.softcap)
    if "bias" in options:
        s = s + options["bias"]
    distance = torch.arange(m) - torch.arange(n)[:, None] - (m - n)
    left, right = module.window
    if left is not None:
        s = s.masked_fill(distance < -left, -torch.inf)
    if module.causal or right is not None:
        s = s.masked_fill(distance > (0 if module.causal else right), -torch.inf)
    if module.sinks is not None:
        s = torch.cat([s, module.sinks[:, None, None].expand(-1, n, 1)], -1)
    p = torch.softmax(s, -1)[..., :m]
    return module.o_proj((p @ v).transpose(0, 1).flatten(1))


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama": {"heads_kv": 2, "causal": True, "rotary_dim": 8},
    "gpt_j": {"causal": True, "rotary_dim": 4, "rotary_interleaved": True, "bias": True},
    "mistral": {"heads_kv": 2, "causal": True, "rotary_dim": 8, "window": (4, 0)},
    "local": {"window": (3, 2), "out_bias": True},
    "qwen3": {"heads_kv": 1, "head_dim": 16, "causal": True, "qk_norm": True, "rotary_dim": 16},
    "gemma2": {"softcap": 5.0, "causal": True, "softmax_scale": 0.2, "rotary_dim": 8},
    "gpt_oss": {"heads_kv": 2, "sinks": True, "causal": True, "window": (6, 0), "bias": True},
}


def make_module(name: str) -> fal_nn.Attention:
    torch.manual_seed(2)
    module = fal_nn.Attention(E, H, **MODULES[name])
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def gradients(module: torch.nn.Module, out: Tensor, x: Tensor) -> list[Tensor]:
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    return list(torch.autograd.grad(out, [x, *module.parameters()], dout))


@pytest.mark.parametrize("name", MODULES)
def test_attention_values_and_gradients(name: str) -> None:
    module = make_module(name)
    x = torch.randn(17, E)

    def once(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        other = copy.deepcopy(module).to(dtype)
        leaf = x.to(dtype).requires_grad_()
        out = other(leaf[None])[0] if ours else definition(other, leaf)
        return [out.detach(), *gradients(other, out, leaf)]

    truth, low = once(torch.float64, False), once(torch.float32, False)
    got = once(torch.float32, True)
    for number, (g, t, r) in enumerate(zip(got, truth, low, strict=True)):
        check_within_budget(str(number), g, t, r, factor=3.0 if number else 2.0)


@pytest.mark.parametrize("name", MODULES)
def test_packed_padded_and_single_sequences_agree(name: str) -> None:
    module = make_module(name)
    sequences = [torch.randn(n, E) for n in (5, 17, 1, 9)]
    alone = [module(x[None])[0] for x in sequences]
    lengths = torch.tensor([len(x) for x in sequences], dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed = module(torch.cat(sequences), cu_seqlens=cu_seqlens, max_seqlen=17)
    padded = module(torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), seqlens=lengths)
    for got, rows, expected in zip(packed.split(lengths.tolist()), padded, alone, strict=True):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(rows[: len(expected)], expected)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt_oss", "gemma2"])
def test_decoding_with_a_cache_is_the_whole_sequence(name: str, paged: bool) -> None:
    module = make_module(name).eval()
    x = torch.randn(2, 12, E)
    cache = fal_nn.KVCache.empty(
        batch=2, capacity=12, heads_kv=module.heads_kv, head_dim=module.head_dim
    )
    if paged:  # pages of 3 tokens, in any order
        cache.k = cache.k.reshape(8, 3, module.heads_kv, module.head_dim)
        cache.v = cache.v.reshape(8, 3, module.heads_kv, module.head_dim)
        cache.block_table = torch.tensor([[5, 0, 7, 2], [1, 6, 3, 4]], dtype=torch.int32)
    with torch.no_grad():
        expected = module(x)
        parts = [module(x[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert cache.seqlens.tolist() == [12, 12]
    with torch.no_grad(), pytest.raises(ArgumentError, match=r"nn\.Attention: "):
        module(x[:, :1], cache=cache)  # it is full


def test_cross_attention_with_lengths_and_bias() -> None:
    torch.manual_seed(0)
    module = fal_nn.Attention(E, H, dim_context=20)
    x, context = torch.randn(2, 5, E), torch.randn(2, 9, 20)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    bias = torch.randn(H, 5, 9)
    out = module(x, context, seqlens=lengths, bias=bias)
    for b, n in enumerate(lengths.tolist()):
        expected = definition(module, x[b], context=context[b, :n], bias=bias[..., :n])
        torch.testing.assert_close(out[b], expected)


def test_attention_refuses_what_it_cannot_do() -> None:
    module = make_module("llama")
    x = torch.zeros(2, 3, E)
    cache = fal_nn.KVCache.empty(batch=2, capacity=4, heads_kv=2, head_dim=8)
    with pytest.raises(ArgumentError, match="a cache has no gradient"):
        module(x, cache=cache)
    with pytest.raises(ArgumentError, match="seqlens and cache do not go together"):
        module(x, cache=cache, seqlens=torch.tensor([1, 1], dtype=torch.int32))
    with pytest.raises(ArgumentError, match="x has shape"):
        module(x[0])
    with pytest.raises(ArgumentError, match="a context has no positions"):
        module(x, x)
    with pytest.raises(ArgumentError, match="not a multiple of heads_kv 3"):
        fal_nn.Attention(E, H, heads_kv=3)
    with pytest.raises(ArgumentError, match="rotary_dim is 3"):
        fal_nn.Attention(E, H, rotary_dim=3)


def test_the_names_are_at_the_top_level_too() -> None:
    assert flashattn_lite.nn is fal_nn


def test_multihead_attention_compiles_without_a_graph_break() -> None:
    _, ours = pair(batch_first=True)
    x, hidden = torch.randn(2, 5, E), torch.arange(5) >= torch.tensor([[3], [5]])

    def forward(x: Tensor, hidden: Tensor) -> Tensor:
        return ours(x, x, x, key_padding_mask=hidden, need_weights=False)[0]

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, hidden), forward(x, hidden))
