"""A Llama-class decoder (random weights) in transformers on this library's attention.

pip install transformers
python examples/llama.py [--prompt 512] [--tokens 32] [--bf16]
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashattn_lite.integrations.transformers import register


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> bool:
    """Returns whether both attentions gave the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=1000, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16 if options.bf16 else torch.float32)
    prompt = torch.randint(3, 1000, (2, options.prompt))
    mask = torch.ones_like(prompt)
    mask[0, : options.prompt // 3] = 0  # two prompts of unequal lengths, padded on the left
    found = {}
    for name in ("sdpa", register()):
        model.set_attn_implementation(name)
        model(prompt, attention_mask=mask)  # warm up
        start = time.perf_counter()
        model(prompt, attention_mask=mask)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        found[name] = model.generate(
            prompt, attention_mask=mask, max_new_tokens=options.tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        token = (time.perf_counter() - start - prefill) / max(1, options.tokens - 1)
        print(f"{name:5s} prefill {prefill * 1e3:6.0f} ms, then {token * 1e3:5.1f} ms a token")
    same = torch.equal(*found.values())
    print("the same tokens" if same else "different tokens")
    return same


if __name__ == "__main__":
    main()
