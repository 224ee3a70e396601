"""Trains the small Llama-architecture model that the package carries, on this library's attention.

python examples/train_tiny.py [--out DIR] [--steps 1800] [--plot docs/images/train_tiny.svg]

Text: the Python standard library of the interpreter that runs this (PSF licence), without its
tests. One file in twenty is held out by a hash of its name. Documents are cut into sequences of at
most 1024 tokens, packed one after the other, and attended to by `flash_attn_varlen_func`, forward
and backward. Matrices learn by Muon (Jordan et al., 2024), the rest by AdamW. The result is a
Hugging Face folder: transformers loads it as a LlamaForCausalLM.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from flashattn_lite import flash_attn_varlen_func
from flashattn_lite.bench.progress import Progress
from flashattn_lite.layers.rotary import apply_rotary_emb_torch

ROOT = Path(__file__).resolve().parents[1]
END = "<|endoftext|>"  # stands before each document, and ends generation
# Not text that anyone wrote: tests' data, character tables, what the build left of its machine.
SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__",
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for line in message['content'].split('\\n') %}"
    "# {{ line }}\n{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """The model's sizes; head_dim 64 is what CPU and GPU kernels like best."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    heads_kv: int = 2
    intermediate: int = 512
    longest: int = 1024  # tokens of a sequence
    theta: float = 10000.0
    eps: float = 1e-5


# ---- text ----------------------------------------------------------------------------------------


def documents(limit: int | None) -> tuple[list[str], list[str]]:
    """(training, held-out) texts of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py"))[:limit]:
        name = path.relative_to(root)
        if SKIPPED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        if name.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            held = hashlib.sha256(name.as_posix().encode()).digest()[0] < 256 // 20
            (held_out if held else training).append(text)
    if not held_out:  # of few files, as in a quick trial
        held_out.append(training.pop())
    return training, held_out


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE: every text has tokens, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@dataclass
class Corpus:
    """Documents as tokens, each with END before it."""

    documents: list[Tensor]
    bytes: int

    @classmethod
    def of(cls, texts: list[str], tokenizer: Tokenizer) -> Corpus:
        end = tokenizer.token_to_id(END)
        encoded = [torch.tensor([end, *e.ids]) for e in tokenizer.encode_batch(texts)]
        return cls(encoded, sum(len(text.encode()) for text in texts))

    @property
    def tokens(self) -> int:
        return sum(d.numel() for d in self.documents)

    def sequences(self, longest: int, generator: torch.Generator | None) -> list[Tensor]:
        """Documents cut into pieces of at most longest + 1 tokens (the last one is only a target).

        With a generator the first cut of each document, and the order, are random.
        """
        pieces = []
        for document in self.documents:
            begin = 0
            while begin < document.numel() - 1:
                size = longest
                if generator is not None and begin == 0 and document.numel() > longest:
                    size = int(torch.randint(longest // 4, longest + 1, (), generator=generator))
                pieces.append(document[begin : begin + size + 1])
                begin += size
        if generator is not None:
            order = torch.randperm(len(pieces), generator=generator).tolist()
            pieces = [pieces[i] for i in order]
        return pieces


@dataclass
class Batch:
    """Sequences one after the other: tokens and targets (total), cu_seqlens (sequences + 1)."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    longest: int

    @classmethod
    def pack(cls, sequences: list[Tensor]) -> Batch:
        lengths = [s.numel() - 1 for s in sequences]
        return cls(
            tokens=torch.cat([s[:-1] for s in sequences]),
            targets=torch.cat([s[1:] for s in sequences]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            longest=max(lengths),
        )


def batches(sequences: Iterator[Tensor] | list[Tensor], size: int) -> Iterator[Batch]:
    """Packs of at least `size` tokens; the last one may be smaller."""
    pending: list[Tensor] = []
    for sequence in sequences:
        pending.append(sequence)
        if sum(s.numel() - 1 for s in pending) >= size:
            yield Batch.pack(pending)
            pending = []
    if pending:
        yield Batch.pack(pending)


def endless(corpus: Corpus, longest: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from corpus.sequences(longest, generator)


# ---- model: the names are those of LlamaForCausalLM's state --------------------------------------


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.hidden // shape.heads
        rows_kv = shape.heads_kv * self.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, rows_kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, rows_kv, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> Tensor:
        """x (total, hidden); cos and sin (total, head_dim / 2)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))  # (total, heads, head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (apply_rotary_emb_torch(t[None], cos, sin)[0] for t in (q, k))
        ends = batch.cu_seqlens
        out = flash_attn_varlen_func(q, k, v, ends, ends, batch.longest, batch.longest, causal=True)
        return self.o_proj(out.flatten(-2))


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), batch, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, shape.eps)


class Llama(nn.Module):
    """Input and output embeddings are one matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Decoder(shape)
        head_dim = shape.hidden // shape.heads
        frequency = shape.theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        angle = torch.outer(torch.arange(shape.longest).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                inputs = shape.hidden if "embed" in name else parameter.shape[1]
                # What adds to the residual stream starts at nothing.
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.0 if adds else 0.5 * inputs**-0.5)

    def forward(self, batch: Batch) -> Tensor:
        """The logits (total, vocab)."""
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]
        x = self.model.embed_tokens(batch.tokens)
        for layer in self.model.layers:
            x = layer(x, batch, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


# ---- training ------------------------------------------------------------------------------------


def optimizers(model: Llama) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each with its highest learning rate."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    return [
        (torch.optim.Muon(matrices, lr=0.012, weight_decay=0.1, momentum=0.95), 0.012),
        (torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0), 2e-3),
    ]


def learning_rate(step: int, steps: int) -> float:
    """As a share of the highest: up over 2 % of the steps, then straight down to 2 %."""
    warm = max(1, steps // 50)
    return min((step + 1) / warm, 0.02 + 0.98 * (steps - step) / steps)


@torch.no_grad()
def evaluate(model: Llama, pieces: list[Tensor], dtype: torch.dtype) -> float:
    """Nats a token."""
    total, count = 0.0, 0
    for batch in batches(pieces, 4096):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(batch)
        total += F.cross_entropy(logits.float(), batch.targets, reduction="sum").item()
        count += batch.targets.numel()
    return total / count


@dataclass
class Log:
    """(step, nats a token): every step of training, some of the held-out text."""

    training: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


def train(
    model: Llama, training: Corpus, held_out: Corpus, options: argparse.Namespace, shape: Shape
) -> Log:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    generator = torch.Generator().manual_seed(options.seed)
    source = batches(endless(training, shape.longest, generator), options.tokens)
    # A fixed sample of the held-out text while training; all of it at the end.
    sample = held_out.sequences(shape.longest, torch.Generator().manual_seed(1))[:12]
    groups, log = optimizers(model), Log()
    checkpoint = max(1, options.steps // 10)
    with Progress(options.steps, "training") as progress:
        text = "starting"
        for step in range(options.steps):
            progress.step(text, 1.0)
            batch = next(source)
            for optimizer, highest in groups:
                for group in optimizer.param_groups:
                    group["lr"] = highest * learning_rate(step, options.steps)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), batch.targets)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, _ in groups:
                optimizer.step()
            log.training.append((step, loss.item()))
            text = f"step {step + 1} of {options.steps}, loss {loss.item():.3f}"
            if (step + 1) % checkpoint == 0:
                log.held_out.append((step, evaluate(model, sample, dtype)))
                save_weights(model, options.out)
                print(f"{text}, held-out {log.held_out[-1][1]:.3f}", flush=True)
    return log


# ---- the folder ----------------------------------------------------------------------------------


def save_weights(model: Llama, folder: Path) -> None:
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_configs(tokenizer: Tokenizer, shape: Shape, folder: Path) -> None:
    end = tokenizer.token_to_id(END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads_kv,
        "head_dim": shape.hidden // shape.heads,
        "max_position_embeddings": shape.longest,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "bfloat16",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": shape.longest,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {
        **{"bos_token_id": end, "eos_token_id": end, "do_sample": True, "temperature": 0.7},
        **{"top_p": 0.95, "repetition_penalty": 1.1},  # a model so small repeats itself
    }
    for name, content in (
        ("config", config),
        ("tokenizer_config", tokenizer_config),
        ("generation_config", generation),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def card(facts: dict[str, Any]) -> str:
    """The model card, from what was measured."""
    template = Path(__file__).with_name("train_tiny_card.md").read_text("utf-8")
    return template.format(
        **facts,
        millions=facts["parameters"] / 1e6,
        epochs=facts["steps"] * facts["step_tokens"] / facts["training_tokens"],
    )


def plot(log: Log, path: Path, facts: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("svg")
    plt.rcParams["svg.hashsalt"] = "flashattn_lite"  # the same data gives the same file
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps, losses = zip(*log.training, strict=True)
    width = max(1, len(losses) // 100)
    means = [sum(losses[i : i + width]) / len(losses[i : i + width]) for i in steps[::width]]
    axes.plot(steps[::width], means, label=f"training, means of {width} steps")
    axes.plot(*zip(*log.held_out, strict=True), "o-", label="held-out sample")
    axes.axhline(
        facts["nats"], color="black", linewidth=0.8, label="all held-out files, at the end"
    )
    axes.set_ylim(bottom=min(*losses[-width:], facts["nats"]) - 0.2, top=6.5)
    axes.set_xlabel(f"step of about {facts['step_tokens']} tokens")
    axes.set_ylabel("nats a token")
    axes.set_title("examples/train_tiny.py on CPython's standard library")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Returns what was measured; the folder then holds it too, as training.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=ROOT / "flashattn_lite/serving/tiny")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--tokens", type=int, default=4096, help="at least so many a step")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw the loss into this SVG")
    parser.add_argument("--files", type=int, help="only the first so many files: a quick trial")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--vocab", type=int, default=Shape.vocab)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()

    texts, held_texts = documents(options.files)
    tokenizer = train_tokenizer(texts, options.vocab)
    shape = Shape(
        vocab=tokenizer.get_vocab_size(), hidden=options.hidden, layers=options.layers,
        intermediate=2 * options.hidden,
    )  # fmt: skip
    training, held_out = Corpus.of(texts, tokenizer), Corpus.of(held_texts, tokenizer)
    model = Llama(shape)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(texts)} files, {training.tokens} tokens of {training.bytes / training.tokens:.2f} "
        f"bytes; {len(held_texts)} files held out; {parameters} parameters",
        flush=True,
    )
    save_configs(tokenizer, shape, options.out)
    log = train(model, training, held_out, options, shape)

    for parameter in model.parameters():  # what is measured is what is saved
        parameter.data = parameter.data.to(torch.bfloat16).float()
    nats = evaluate(model, held_out.sequences(shape.longest, None), torch.float32)
    predicted = held_out.tokens - len(held_out.documents)
    facts = {
        "command": f"python examples/train_tiny.py --steps {options.steps}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": parameters,
        "training_files": len(texts),
        "training_tokens": training.tokens,
        "held_out_files": len(held_texts),
        "held_out_tokens": held_out.tokens,
        "steps": options.steps,
        "step_tokens": options.tokens,
        "nats": nats,
        "perplexity": math.exp(nats),
        "bits_per_byte": nats * predicted / held_out.bytes / math.log(2),
        "minutes": (time.perf_counter() - begin) / 60,
        "core_minutes": time.process_time() / 60,
        "training_loss": [round(loss, 4) for _, loss in log.training],
        "held_out_loss": log.held_out,
    }
    (options.out / "training.json").write_text(json.dumps(facts) + "\n")
    (options.out / "README.md").write_text(card(facts))
    if options.plot is not None:
        plot(log, options.plot, facts)
    print(
        f"held-out perplexity {facts['perplexity']:.2f} a token, "
        f"{facts['bits_per_byte']:.3f} bits a byte; {facts['minutes']:.1f} minutes, "
        f"{facts['core_minutes']:.1f} of a core's"
    )
    return facts


if __name__ == "__main__":
    main()
