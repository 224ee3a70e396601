"""The same prompts through the engine and through transformers, in one process, in turn.

Weights and token ids are equal, decoding is greedy, every request writes the same number of tokens,
and attention is the library's own here and SDPA there. What was generated is compared before time
is taken.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flashattn_lite.bench.progress import Progress

if TYPE_CHECKING:
    from flashattn_lite.serving import Engine

__all__ = ["OURS", "Comparison", "compare", "contenders", "engine_runs", "random_llama"]

OURS = "flashattn_lite"
Prompts = Sequence[Sequence[int]]
Run = Callable[[], list[list[int]]]  # the generated token ids of each prompt


def random_llama(folder: Path, dtype: torch.dtype) -> None:
    """Writes a Llama of 101 million parameters with random weights: for speed alone."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=16384, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)


def engine_runs(engine: Engine, rounds: Sequence[Prompts], tokens: int) -> Run:
    """A round's prompts all at once through the engine, the next round's in the next call."""
    from flashattn_lite.serving import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    turn = itertools.cycle(rounds)
    return lambda: [c.token_ids for c in engine.generate(next(turn), params)]


def contenders(folder: Path, dtype: torch.dtype, prompts: Prompts, tokens: int) -> dict[str, Run]:
    """transformers' three ways; prompts of one length, so that no batch has padding.

    generate alone takes one prompt after the other, static batches eight at a time. generate_batch
    gets a cache of the size that the prompts need and keeps its manager: left to itself it takes
    most of the machine's memory in every call, which costs it seconds.
    """
    transformers: Any = importlib.import_module("transformers")

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)

    def load(attention: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        ).eval()

    model, batching = load("sdpa"), load("sdpa")
    greedy = transformers.GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=None, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    plain = transformers.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    page_size = 32
    pages = len(prompts) * -(-(len(prompts[0]) + tokens) // page_size) + 1
    sizes = transformers.ContinuousBatchingConfig(
        page_size=page_size, num_blocks=pages, max_batch_tokens=max(512, len(prompts))
    )
    model.generation_config = plain
    batching.generation_config = greedy

    def generate(batch: int) -> list[list[int]]:
        found = []
        for begin in range(0, len(prompts), batch):
            inputs = torch.tensor(prompts[begin : begin + batch])
            out = model.generate(inputs, attention_mask=torch.ones_like(inputs))
            found += out[:, inputs.shape[1] :].tolist()
        return found

    def generate_batch() -> list[list[int]]:
        results = batching.generate_batch(
            [list(p) for p in prompts],
            generation_config=greedy,
            continuous_batching_config=sizes,
            persistent_manager=True,
            progress_bar=False,
        )
        by_number = sorted(results.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        return [result.generated_tokens for _, result in by_number]

    return {
        "generate, batch 1": lambda: generate(1),
        "generate, batch 8": lambda: generate(8),
        "generate_batch": generate_batch,
    }


@dataclass
class Comparison:
    """Seconds of each round by contender, and how many tokens agree with ours."""

    tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    agree: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        """Tokens a second, the median round's."""
        return self.tokens / statistics.median(self.seconds[name])

    def ratio(self, name: str) -> float:
        """How many times as fast ours is: the median of the rounds' ratios."""
        pairs = zip(self.seconds[name], self.seconds[OURS], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def compare(runs: dict[str, Run], tokens: int, rounds: int, progress: Progress) -> Comparison:
    """Every contender once a round, in turn, after one untimed round that compares the tokens.

    Args:
        runs: OURS among them.
        tokens: that a run generates in all.
        rounds: timed ones.
    """
    found = Comparison(tokens)
    first: dict[str, list[list[int]]] = {}
    for name, run in runs.items():
        progress.step(f"{name}: what it generates", 1.0)
        try:
            first[name] = run()
        except Exception as error:  # a contender that cannot run is named, not hidden
            found.failures[name] = f"{type(error).__name__}: {error}"
    if OURS in found.failures:
        raise RuntimeError(found.failures[OURS])
    ours = first[OURS]
    for name, theirs in first.items():
        pairs = [
            a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
        ]
        found.agree[name] = sum(pairs) / len(pairs)
        found.seconds[name] = []
    for number in range(rounds):
        for name in first:
            progress.step(f"round {number + 1}: {name}", 1.0)
            begin = time.perf_counter()
            runs[name]()
            found.seconds[name].append(time.perf_counter() - begin)
    return found
