"""The serving loop in a program of your own: requests that share a prompt, answered together.

python examples/serving.py [--tokens 48] [--model DIR]

In a reproducible engine each answer is as if its request had been alone, to the bit.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from flashattn_lite.serving import Engine, EngineConfig, SamplingParams, load_model, load_tokenizer
from flashattn_lite.serving.command import EMBEDDED

PREFIX = '"""Reads and writes small files."""\n\nimport os\nimport re\n\n\n'
STARTS = ("def read(path):\n", "def write(path, text):\n", "class File:\n", "def main():\n")


def main(arguments: list[str] | None = None) -> bool:
    """Returns whether every answer is the one that its request gets alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.model, dtype=torch.float32), load_tokenizer(options.model)
    engine = Engine(model, tokenizer, EngineConfig(reproducible=True))
    params = [
        SamplingParams(max_tokens=options.tokens, temperature=0.7, seed=seed)
        for seed in range(len(STARTS))
    ]

    begin = time.perf_counter()
    texts: dict[str, str] = {}
    for start, sampling in zip(STARTS, params, strict=True):
        texts[engine.submit(PREFIX + start, sampling, request_id=start)] = start
    while engine.has_work():  # an output for each running request and step
        for output in engine.step():
            texts[output.request_id] += output.text
    spent = time.perf_counter() - begin

    for text in texts.values():
        print(text.rstrip() + "\n")
    stats = engine.stats()
    print(
        f"{stats['generated_tokens']} tokens in {stats['steps']} steps and {spent:.2f} s; "
        f"{stats['free_pages']} of {stats['pages']} pages are free"
    )
    config = EngineConfig(max_running=1, prefix_cache=False, reproducible=True)
    alone = Engine(model, tokenizer, config)
    prompts = [PREFIX + start for start in STARTS]
    expected = [c.text for c in alone.generate(prompts, params)]
    same = [texts[start] == start + text for start, text in zip(STARTS, expected, strict=True)]
    print("the same as alone" if all(same) else "not the same as alone")
    return all(same) and stats["free_pages"] == stats["pages"]


if __name__ == "__main__":
    main()
