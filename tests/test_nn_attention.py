"""nn.Attention against its definition; transformers' layers are test_transformers' business."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import flashattn_lite
from flashattn_lite import ArgumentError
from flashattn_lite import nn as fal_nn
from flashattn_lite.testing import check_within_budget

E, H = 32, 4


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


def test_dropout_is_for_training_only_and_follows_the_seed() -> None:
    module, x = fal_nn.Attention(E, H, dropout=0.5), torch.randn(2, 9, E)
    plain = fal_nn.Attention(E, H)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x), plain(x))
    module.train()
    first, again, other = ((torch.manual_seed(s), module(x))[1] for s in (1, 1, 2))
    assert torch.equal(first, again) and not first.isclose(other).all()
    assert not first.isclose(plain(x)).all()


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
    with pytest.raises(ArgumentError, match="dim is -1; it must be at least 1"):
        fal_nn.Attention(-1, H)
    with pytest.raises(TypeError, match=r"heads is 2.5; it must be an int"):
        fal_nn.Attention(E, 2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="causal is 'yes'; it must be a bool"):
        fal_nn.Attention(E, H, causal="yes")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"dropout is 1.0; it must be in \[0, 1\)"):
        fal_nn.Attention(E, H, dropout=1.0)
    with pytest.raises(ArgumentError, match="x has 5 features; it must have 32"):
        module(torch.zeros(2, 3, 5))
    with pytest.raises(ArgumentError, match=r"position_ids has shape \(2,\); it must be \(2, 3\)"):
        module(x, position_ids=torch.zeros(2))
    for name, value in (
        *(("norm_eps", "x"), ("norm_eps", -1.0), ("rotary_base", 0), ("softcap", float("nan"))),
        *(("softmax_scale", "x"), ("window", 3), ("window", (-2, 0)), ("out_bias", "no")),
    ):
        with pytest.raises((TypeError, ArgumentError), match=f"{name} is .*; (it|a side) must be"):
            fal_nn.Attention(E, H, **{name: value})
    with torch.no_grad():
        with pytest.raises(TypeError, match="cache is 3; it must be a KVCache"):
            module(x, cache=3)
        with pytest.raises(ArgumentError, match=r"cache\.k has shape"):
            module(x, cache=fal_nn.KVCache.empty(batch=2, capacity=4, heads_kv=3, head_dim=8))
        with pytest.raises(ArgumentError, match=r"position_ids is torch\.bool; it must be int64"):
            module(x, position_ids=torch.ones(2, 3, dtype=torch.bool))
        with pytest.raises(ArgumentError, match=r"seqlens\[1\] is 9; it must be 0 to 3"):
            module(x, seqlens=torch.tensor([1, 9], dtype=torch.int32))
    with pytest.raises(ArgumentError, match="capacity is -1; it must be 0 to"):
        fal_nn.KVCache.empty(batch=2, capacity=-1, heads_kv=2, head_dim=8)
    with pytest.raises(TypeError, match=r"seqlens is 3; it must be a torch.Tensor"):
        module(x, seqlens=3)


def test_the_names_are_at_the_top_level_too() -> None:
    assert flashattn_lite.nn is fal_nn
