"""The decoder against transformers, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashattn_lite.serving import SamplingParams, load_model
from flashattn_lite.serving.pool import PagePool
from flashattn_lite.serving.request import Request
from flashattn_lite.serving.runner import build_batch
from flashattn_lite.serving.scheduler import Chunk
from tests.serving_models import FAMILIES, save


def logits_in_chunks(model, tokens: list[int], sizes: list[int]) -> torch.Tensor:
    """The logits after each chunk, (chunks, vocab_size), out of a paged cache."""
    pool = model.new_pool(PagePool, 32, 8)
    sequence = pool.create()
    pool.extend([sequence], [len(tokens)])
    found, start = [], 0
    for size in sizes:
        request = Request("r", tokens[: start + size], start + size, SamplingParams())
        request.sequence = sequence
        found.append(model.forward(build_batch([Chunk(request, start, size)], pool), pool))
        start += size
    assert start == len(tokens)
    return torch.cat(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = save(tmp_path, name)
    ours = load_model(tmp_path)
    tokens = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    sizes = [1, 31, 1, 1, 20, 6]
    ends = [sum(sizes[: i + 1]) - 1 for i in range(len(sizes))]
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0, ends]
        exact = theirs.double()(torch.tensor([tokens])).logits[0, ends]
    found = logits_in_chunks(ours, tokens, sizes)
    # Both round in float32; ours may not be further from float64 than twice theirs and 4 ulps.
    scale = exact.abs().max().item()
    bound = 2 * (expected - exact).abs().max().item() + 4 * scale * 2**-23
    assert (found - exact).abs().max().item() <= bound
