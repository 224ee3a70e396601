"""The sampler against transformers' own processors and against the distribution it must draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashattn_lite.serving import SamplingParams
from flashattn_lite.serving.request import Request
from flashattn_lite.serving.sampler import Sampler, philox, uniform


def request(
    place: int = 0, seed: int = 0, tokens: tuple[int, ...] = (1,), **params: Any
) -> Request:
    made = Request("r", list(tokens), len(tokens), SamplingParams(**params), seed)
    made.tokens += [0] * place
    return made


def test_philox_equals_the_papers_vectors() -> None:
    """Random123's known answers for Philox4x32-10."""
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_is_uniform_and_takes_any_seed() -> None:
    numbers = torch.tensor([uniform(seed, p) for seed in (0, 2**64 - 1, -5) for p in range(2000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 10, 0, 1)
    assert (counts - 600).abs().max() < 5 * 600**0.5
    assert len(set(numbers.tolist())) > 5990


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.6, "min_p": 0.2},
    {"top_p": 0.9999},
    {"temperature": 0.3, "top_p": 0.9},
    {"temperature": 5.0, "min_p": 0.01},
    {"repetition_penalty": 1.5, "top_k": 8},
    {"repetition_penalty": 0.7},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [40, 700])
def test_draws_follow_transformers_distribution(options: dict[str, Any], vocabulary: int) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    seen = (1, 2, 3, 30)
    processors: list[Any] = [
        RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0)),
        TemperatureLogitsWarper(options.get("temperature", 1.0)),
    ]
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    scores = LogitsProcessorList(processors)(torch.tensor([seen]), logits[None].clone())
    expected = torch.softmax(scores[0], -1)

    draws = 4000
    rows = [request(0, seed, seen, **options) for seed in range(draws)]
    tokens, _ = Sampler().sample(logits.expand(draws, -1).clone(), rows)
    counts = torch.bincount(torch.tensor(tokens), minlength=vocabulary)
    assert counts[expected == 0].sum() == 0
    sigma = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 5 * sigma + 3).all()


def test_a_draw_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 300)
    rows = [
        request(i, i * 7, temperature=t, top_k=k, top_p=p)
        for i, (t, k, p) in enumerate(
            [(1, 0, 1), (0, 0, 1), (0.5, 9, 1), (2, 0, 0.5)] * 2 + [(1, 0, 1)]
        )
    ]
    together, _ = Sampler().sample(logits.clone(), rows)
    alone = [Sampler().sample(logits[i : i + 1].clone(), [r])[0][0] for i, r in enumerate(rows)]
    assert together == alone
    backwards, _ = Sampler().sample(logits.flip(0), rows[::-1])
    assert backwards[::-1] == together
    # Another place in the output is another draw.
    later = [request(r.generated + 1, r.seed, temperature=5.0) for r in rows]
    first = [request(r.generated, r.seed, temperature=5.0) for r in rows]
    assert Sampler().sample(logits.clone(), later)[0] != Sampler().sample(logits.clone(), first)[0]


def test_penalties_of_openai() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    asked = request(0, temperature=0, presence_penalty=0.05, frequency_penalty=0.02)
    asked.tokens += [0, 0]  # twice: 0.05 + 2 * 0.02 = 0.09 off, still the best
    assert Sampler().sample(logits.clone(), [asked])[0] == [0]
    asked.tokens += [0]
    assert Sampler().sample(logits.clone(), [asked])[0] == [1]


def test_logprobs_are_those_before_penalties_and_temperature() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    asked = request(0, temperature=0, logprobs=2, repetition_penalty=5.0, tokens=(0,))
    tokens, (found,) = Sampler().sample(logits.clone(), [asked])
    expected = torch.log_softmax(logits[0], -1).tolist()
    assert tokens == [1] and found is not None
    assert found.logprob == pytest.approx(expected[1])
    assert [i for i, _ in found.top] == [0, 1]
    assert [p for _, p in found.top] == pytest.approx(expected[:2])


def test_extremes() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [-float("inf"), 0.0, -float("inf")]])
    rows = [request(0, s, temperature=1e-30 if s else 1e30) for s in (1, 0)]
    tokens, _ = Sampler().sample(logits.clone(), rows)
    assert tokens == [0, 1]
    broken = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [1.0, 2.0]])
    rows = [request(temperature=0), request(top_p=0.5), request(temperature=0)]
    assert Sampler().sample(broken, rows)[0] == [None, None, 1]
