"""The decoder against transformers, family by family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flashattn_lite.serving import Engine, EngineConfig, SamplingParams, load_model
from flashattn_lite.serving.decode_graph import FixedBatch
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


def test_a_batch_of_fixed_size_gives_the_same_logits(tmp_path: Path) -> None:
    """What a CUDA graph would replay, without one: padded rows change nothing and write nothing."""
    save(tmp_path)
    model = load_model(tmp_path)
    pools = [model.new_pool(PagePool, 16, 8) for _ in range(2)]
    fixed = FixedBatch(8, 5, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for count in (5, 3):
        found = []
        lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
        for pool in pools:
            pool.k.copy_(torch.randn(pool.k.shape, generator=torch.Generator().manual_seed(1)))
            pool.v.copy_(torch.randn(pool.v.shape, generator=torch.Generator().manual_seed(2)))
            chunks = []
            for length in lengths:
                request = Request("r", [7] * length, 1, SamplingParams())
                request.sequence = pool.create()
                pool.extend([request.sequence], [length])
                chunks.append(Chunk(request, length - 1, 1))
            batch = build_batch(chunks, pool)
            assert batch.decodes
            if pool is pools[0]:
                found.append(model.forward(batch, pool))
            else:
                fixed.fill(batch)
                with torch.inference_mode():
                    found.append(model.forward(fixed.batch, pool)[:count])
            for chunk in chunks:
                pool.free(chunk.request.sequence)
        assert torch.equal(*found)
        assert torch.equal(pools[0].k, pools[1].k) and torch.equal(pools[0].v, pools[1].v)


def test_decode_tokens_attended_apart_give_the_same_logits(tmp_path: Path) -> None:
    """What CUDA does in steps of single tokens and chunks; a chunk of one stays with the latter."""
    save(tmp_path)
    model = load_model(tmp_path)
    pool = model.new_pool(PagePool, 32, 4)
    pool.k.copy_(torch.randn(pool.k.shape, generator=torch.Generator().manual_seed(1)))
    pool.v.copy_(torch.randn(pool.v.shape, generator=torch.Generator().manual_seed(2)))
    chunks = []
    for length, count in ((9, 1), (30, 1), (14, 6), (11, 1), (7, 7)):
        request = Request("r", [length] * length, length, SamplingParams())
        request.sequence = pool.create()
        pool.extend([request.sequence], [length])
        chunks.append(Chunk(request, length - count, count))
    for some, parts in ((chunks, [2, 14]), (chunks[:2], [2]), (chunks[2:], [14])):
        together, apart = (build_batch(some, pool, decodes_apart=on) for on in (False, True))
        assert [part.tokens for part in apart.attend] == parts
        assert [part.tokens for part in together.attend] == [sum(parts)]
        expected = model.forward(together, pool)
        torch.testing.assert_close(model.forward(apart, pool), expected, rtol=1e-4, atol=1e-5)


def test_cuda_graphs_need_cuda(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match="cuda_graphs: the model is on cpu; it must be on CUDA"):
        Engine(load_model(tmp_path), None, EngineConfig(cuda_graphs=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; it must be one of llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be silu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; it must be one of"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .* unquantised"),
        ({"num_hidden_layers": 3}, "the safetensors hold no tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "no use for 9 tensors of the safetensors, first model.layers.1"),
        ({"intermediate_size": 95}, r"shape \(96, 64\); config.json makes it \(95, 64\)"),
    ],
)
def test_what_is_not_computed_is_refused(
    changed: dict[str, object], message: str, tmp_path: Path
) -> None:
    save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changed), "utf-8")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*config\.json"):
        load_model(tmp_path)
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*model\.safetensors and no"):
        load_model(tmp_path)


def test_shards_load(tmp_path: Path) -> None:
    theirs = save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        expected = theirs(torch.tensor([[1, 2, 3]])).logits[0, -1:]
    found = logits_in_chunks(load_model(tmp_path), [1, 2, 3], [3])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reproducible_batches_give_the_same_bits(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """However a prompt is cut, and whether its last tokens are a prompt's or were generated."""
    save(tmp_path, name)
    model = load_model(tmp_path, dtype=dtype)
    tokens = torch.randint(0, 256, (75,), generator=torch.Generator().manual_seed(1)).tolist()

    def last(sizes: list[int]) -> torch.Tensor:
        pool = model.new_pool(PagePool, 32, 5)
        sequence = pool.create()
        pool.extend([sequence], [len(tokens)])
        start = 0
        for size in sizes:
            request = Request("r", tokens[: start + size], 70, SamplingParams())
            request.sequence = sequence
            batch = build_batch([Chunk(request, start, size)], pool, reproducible=True)
            logits = model.forward(batch, pool)
            start += size
        return logits

    expected = last([70, 1, 1, 1, 1, 1])
    for sizes in ([75], [16, 59], [48, 16, 11], [64, 1, 10], [32, 32, 6, 5]):
        assert torch.equal(last(sizes), expected), sizes
