"""int8 weights: the products, the model that has them, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashattn_lite.cli import main
from flashattn_lite.serving import Engine, EngineConfig, SamplingParams, load_model
from flashattn_lite.serving.int8_linear import Int8Linear
from tests.serving_models import save


def dequantised(product: Int8Linear) -> Tensor:
    """The weights that the product stands for, float64 (out_features, in_features)."""
    return product._values.double() * product._factors.double()[:, None]


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (31, 96), (5, 24), (40, 7), (1, 32)])
def test_a_product_is_that_of_the_dequantised_weights(rows: int, columns: int) -> None:
    weight, bias = torch.randn(rows, columns).bfloat16(), torch.randn(rows).bfloat16()
    product = Int8Linear(weight, bias)
    assert product._values.dtype == torch.int8 and product._values.shape == weight.shape
    held = dequantised(product)
    # An element is off by half a step; the step itself is rounded to bfloat16, of 127 steps.
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert ((held - weight.double()).abs() <= (0.5 + 127 * 2**-8) * step).all()
    for count in (1, 2, 8, 9, 40):
        x = torch.randn(count, columns).bfloat16()
        exact = x.double() @ held.T + bias.double()
        # Sums, factors, the scaled sum and the bias are rounded to bfloat16 once each.
        size = x.double().abs() @ held.abs().T + bias.double().abs()
        error = (product(x).double() - exact).abs()
        assert (error <= 4 * 2**-8 * size).all(), count


def test_a_model_with_int8_weights(tmp_path: Path) -> None:
    save(tmp_path, "llama_tied")
    ours = load_model(tmp_path, dtype=torch.bfloat16, quantize="int8")
    plain = load_model(tmp_path, dtype=torch.bfloat16)
    products = [p for at in ours.layers for p in (at.qkv, at.out, at.gate_up, at.down)]
    assert all(isinstance(p, Int8Linear) for p in (*products, ours.head))
    assert ours.embedding.dtype == torch.bfloat16
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    prompts = [[i] * (3 + i) for i in range(1, 12)]
    together, other = (Engine(m).generate(prompts, params) for m in (ours, plain))
    for a, b in zip(together, other, strict=True):
        assert len(a.token_ids) == 12 and a.logprobs is not None and b.logprobs is not None
        if a.token_ids[0] == b.token_ids[0]:  # after another token the two go their own ways
            assert a.logprobs[0].logprob == pytest.approx(b.logprobs[0].logprob, abs=0.3)
    agree = sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(together, other, strict=True))
    assert agree >= 9
    with pytest.raises(ValueError, match="reproducible: on this machine a product with"):
        Engine(ours, None, EngineConfig(reproducible=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize is 'int4'; it must be 'int8' or None"),
        (
            {"quantize": "int8", "dtype": torch.float32},
            r"quantize is 'int8' with torch.float32 on cpu; int8 weights are multiplied in "
            "torch.bfloat16 on the CPU",
        ),
    ],
)
def test_what_int8_weights_cannot_do(tmp_path: Path, options: dict, message: str) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, **options)


def test_torchao_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    words = "serving needs torchao; pip install 'flashattn-lite[int8]'"
    with pytest.raises(ImportError) as missing:
        Int8Linear(torch.ones(4, 32, dtype=torch.bfloat16))
    assert str(missing.value) == words
    assert main(["generate", "import os", "--quantize", "int8"]) == 2
    assert words in capsys.readouterr().err


def test_the_command_generates_with_int8_weights(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "def read(path):", "--max-tokens", "9", "--temperature", "0"]
    assert main([*words, "--quantize", "int8", "--ignore-eos"]) == 0
    said = capsys.readouterr()
    assert len(said.out) > len(words[1]) + 9 and "9 written" in said.err
    assert "torchao" not in said.err  # nor what its import has to say
