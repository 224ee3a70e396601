"""int8 weights against this library's packed float ones: matrix products, and whole decoding.

    pip install torchao
    OMP_NUM_THREADS=1 python bench/int8_weights.py [--model random-100m] [--rows 1,2,4,16]

First all products of a step of so many tokens, then `flashattn_lite.serving` generating for so many
requests at once. Everything runs in turn, round after round, by CPU time; the last column is the
median of the rounds' ratios, bfloat16's packed weights over each.

`int8` is what `quantize="int8"` runs: weights by torchao, the product by torch's int8 kernel up to
8 rows. `torchao` is the same weights multiplied as torchao does it without a compiler, `dynamic`
torchao with quantised activations; `torch` is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashattn_lite.bench import machine
from flashattn_lite.bench.serving.contenders import engine_runs, random_llama
from flashattn_lite.bench.timing import Contender, CpuClock, Rounds, Run, interleave, ratio
from flashattn_lite.serving import Engine, EngineConfig, load_model
from flashattn_lite.serving.command import EMBEDDED
from flashattn_lite.serving.int8_linear import Int8Linear
from flashattn_lite.serving.linear import Linear
from flashattn_lite.serving.model_config import ModelConfig

Product = Callable[[Tensor], Tensor]
BASELINE = "bf16, packed"
PROMPT = 32  # tokens, of the requests that are decoded


def shapes(c: ModelConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of every product of a step, layer by layer."""
    layer = [
        ((c.heads_q + 2 * c.heads_k) * c.head_dim, c.hidden_size),
        (c.hidden_size, c.heads_q * c.head_dim),
        (2 * c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.intermediate_size),
    ]
    return [*layer * c.num_layers, (c.vocab_size, c.hidden_size)]


def plain(weight: Tensor) -> Product:
    return lambda x: nn.functional.linear(x, weight)


def torchao(weight: Tensor, config: Any) -> Product:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    importlib.import_module("torchao.quantization").quantize_(linear, config)
    return linear


def products(c: ModelConfig) -> dict[str, list[Product]]:
    """Of a step by contender, each with weights of its own, as a model's are."""
    quantization: Any = importlib.import_module("torchao.quantization")
    only = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    dynamic = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator) * 0.02 for s in shapes(c)]
    low = [w.bfloat16() for w in weights]
    return {
        BASELINE: [Linear(w) for w in low],
        "int8": [Int8Linear(w) for w in low],
        "fp32, packed": [Linear(w) for w in weights],
        "bf16, torch": [plain(w) for w in low],
        "fp32, torch": [plain(w) for w in weights],
        "torchao": [torchao(w, only) for w in low],
        "torchao, dynamic": [torchao(w, dynamic) for w in low],
    }


def step(some: list[Product], rows: int, dtype: torch.dtype, c: ModelConfig) -> Run:
    inputs = {n: torch.randn(rows, n).to(dtype) for n in {n for _, n in shapes(c)}}
    pairs = [(p, inputs[n]) for p, (_, n) in zip(some, shapes(c), strict=True)]

    @torch.inference_mode()
    def run() -> None:
        for product, x in pairs:
            product(x)

    return run


def decoding(folder: Path, requests: int, tokens: int) -> dict[str, Run]:
    """Generating so many tokens for each request, all at once."""
    models = {
        BASELINE: load_model(folder, dtype=torch.bfloat16),
        "int8": load_model(folder, dtype=torch.bfloat16, quantize="int8"),
        "fp32, packed": load_model(folder, dtype=torch.float32),
    }
    prompts = torch.randint(1, 4000, (requests, PROMPT)).tolist()
    config = EngineConfig(prefix_cache=False)
    return {
        name: engine_runs(Engine(model, None, config), [prompts], tokens)
        for name, model in models.items()
    }


def show(title: str, unit: str, runs: dict[str, Run], seconds: float) -> None:
    rounds = Rounds(budget_s=seconds, at_least=3, min_sample_s=0.0)
    samples = interleave({n: Contender(r) for n, r in runs.items()}, CpuClock(), rounds)
    for name, found in samples.items():
        faster = ratio(samples[BASELINE].cpu, found.cpu).median
        print(f"| {title} | {name} | {found.median('cpu') * 1e3:.2f} {unit} | {faster:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a Hugging Face folder, or random-100m (default: embedded)")
    parser.add_argument("--rows", default="1,2,4,16", help="tokens of a step, requests at once")
    parser.add_argument("--tokens", type=int, default=16, help="that each request generates")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each table row")
    options = parser.parse_args()
    print("\n".join(machine.headline(machine.describe())))
    Int8Linear(torch.eye(32, dtype=torch.bfloat16))  # says what is missing, before anything else
    version = importlib.import_module("torchao").__version__
    print(f"torchao  {version}; {torch.get_num_threads()} threads, CPU time\n")
    print("| | weights | time | bf16, packed / this |\n|---|---|--:|--:|")
    counts = [int(word) for word in options.rows.split(",")]
    with tempfile.TemporaryDirectory() as name:
        if options.model == "random-100m":
            random_llama(Path(name), torch.float32)
        folder = Path(name if options.model == "random-100m" else options.model or EMBEDDED)
        config = ModelConfig.load(folder)
        everyone = products(config)
        for rows in counts:
            runs = {
                n: step(p, rows, torch.float32 if "fp32" in n else torch.bfloat16, config)
                for n, p in everyone.items()
            }
            show(f"products of {rows} tokens", "ms", runs, options.seconds)
        del everyone
        for requests in counts:
            runs = decoding(folder, requests, options.tokens)
            show(f"{requests} requests, {options.tokens} tokens", "ms", runs, options.seconds)


if __name__ == "__main__":
    main()
