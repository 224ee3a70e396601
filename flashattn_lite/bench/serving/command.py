"""``flashattn-lite bench serving``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flashattn_lite.bench import machine, tables
from flashattn_lite.bench.command import check_writable
from flashattn_lite.bench.progress import Progress
from flashattn_lite.bench.serving import (
    contenders,
    drive,
    drive_http,
    llama_cpp,
    measures,
    plots,
    workload,
)
from flashattn_lite.serving.command import EMBEDDED, MODEL_PACKAGES, missing_package

KIND = "flashattn_lite-bench-serving"
EPILOG = """\
load      (the default) requests arrive as they do in a trace (--trace) or at random (--rate),
          answered or not the ones before; latencies, throughput, goodput
compare   the same prompts through transformers: generate, in batches of 8, and generate_batch;
          and through llama.cpp where xllamacpp and gguf are installed
prefix    prompts that begin alike, with the prefix cache and without

A trace is a CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens. To replay an hour on a
small machine, keep one request of --every so many, multiply lengths by --token-scale, and divide
the times between arrivals by --speed.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(
        prog="flashattn-lite bench serving",
        description="Load on the serving loop, in this process.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("what", nargs="?", choices=("load", "compare", "prefix"), default="load")
    add("--model", metavar="DIR", help="a Hugging Face folder, or random-100m (default: embedded)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--quantize", choices=("int8",), help="ours with int8 weights, all in bfloat16")
    add("--threads", type=_count, metavar="N", help="CPU threads (default: torch's)")
    add(
        "--requests", type=_count, metavar="N", help="default: 64, or all of the trace; compare: 16"
    )
    add("--prompt", type=_count, default=64, metavar="N", help="tokens of a prompt, on average")
    add("--output", type=_count, default=64, metavar="N", help="tokens of an answer, on average")
    add("--rate", type=_positive, default=4.0, metavar="R", help="load: arrivals a second")
    add("--shared", type=_share, default=0.0, metavar="F", help="load: share of a prompt that is "
        "the same in all")  # fmt: skip
    add("--url", metavar="URL", help="load: a running server of this or any other make, with the "
        "OpenAI API's routes, instead of an engine in this process")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--rounds", type=_count, default=5, metavar="N", help="compare, prefix: timed rounds")
    trace = top.add_argument_group("trace")
    trace.add_argument("--trace", type=Path, metavar="CSV", help="replay it instead of --rate")
    trace.add_argument("--every", type=_count, default=1, metavar="K")
    trace.add_argument("--token-scale", type=_positive, default=1.0, metavar="F")
    trace.add_argument("--speed", type=_positive, default=1.0, metavar="F")
    limits = top.add_argument_group("limits for goodput")
    limits.add_argument("--ttft", type=_positive, default=1000.0, metavar="MS")
    limits.add_argument("--tpot", type=_positive, default=100.0, metavar="MS")
    engine = top.add_argument_group("engine")
    engine.add_argument("--num-pages", type=_count, metavar="N")
    engine.add_argument("--page-size", type=_count, metavar="N")
    engine.add_argument("--max-running", type=_count, metavar="N")
    engine.add_argument("--max-step-tokens", type=_count, metavar="N")
    engine.add_argument("--no-prefix-cache", action="store_true")
    add("--json", type=Path, metavar="PATH", help="write the results there")
    add("--plot", type=Path, metavar="PATH", help="load: draw the latencies into that SVG")
    return top


def main(arguments: Sequence[str]) -> int:
    """Runs it; returns the exit status."""
    options = parser()
    known = options.parse_args(arguments)
    if known.url is not None and known.what != "load":
        options.error(f"--url goes with load, not with {known.what}")
    missing = missing_package(MODEL_PACKAGES if known.url is None else ("httpx",))
    if missing is None and (known.what == "compare" or known.model == "random-100m"):
        try:
            import transformers  # noqa: F401
        except ImportError:
            missing = "this needs transformers; pip install transformers"
    if missing is not None:
        print(f"flashattn-lite bench serving: {missing}", file=sys.stderr)
        return 2
    if known.quantize is not None:
        known.dtype = "bf16"
    if known.threads is not None:
        torch.set_num_threads(known.threads)
    facts = machine.describe()
    try:
        for option, path in (("--json", known.json), ("--plot", known.plot)):
            if path is not None:
                check_writable(path, option)
        print("\n".join(machine.headline(facts)))
        with _folder(known) as folder:
            found = {"load": _load, "compare": _compare, "prefix": _prefix}[known.what](
                known, folder
            )
    except (ImportError, OSError, ValueError) as error:
        print(f"flashattn-lite bench serving: {error}", file=sys.stderr)
        return 2
    if known.json is not None:
        body = {
            **{"kind": KIND, "command": _command(arguments)},
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **{"facts": facts, "threads": torch.get_num_threads(), "what": known.what, **found},
        }
        known.json.write_text(json.dumps(body, indent=1) + "\n")
        print(f"\nresults: {known.json}")
    return 1 if found.get("failed") else 0


def _command(arguments: Sequence[str]) -> str:
    """As others can repeat it: without where its results go, other files by their names alone.

    >>> _command(["load", "--trace", "/data/a.csv", "--token-scale", "1/2", "--json", "/tmp/r"])
    'flashattn-lite bench serving load --trace a.csv --token-scale 1/2'
    """
    kept = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        if "--json" not in (before, word) and "--plot" not in (before, word):
            kept.append(Path(word).name if before in ("--trace", "--model") else word)
    return shlex.join(["flashattn-lite", "bench", "serving", *kept])


@contextlib.contextmanager
def _folder(known: argparse.Namespace) -> Iterator[Path]:
    """The model's; the one with random weights lasts as long as the run."""
    if known.model != "random-100m":
        yield EMBEDDED if known.model is None else Path(known.model)
        return
    with tempfile.TemporaryDirectory() as name:
        contenders.random_llama(Path(name), _dtype(known))
        yield Path(name)


def _dtype(known: argparse.Namespace) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[known.dtype]


def _engine(known: argparse.Namespace, model: Any, **options: Any) -> Any:
    from flashattn_lite.serving import Engine, EngineConfig

    for name in ("num_pages", "page_size", "max_running", "max_step_tokens"):
        if getattr(known, name) is not None:
            options.setdefault(name, getattr(known, name))
    options.setdefault("prefix_cache", not known.no_prefix_cache)
    return Engine(model, None, EngineConfig(**options))


# ---- load ----------------------------------------------------------------------------------------


def _load(known: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if known.url is not None:
        return _load_server(known, folder)
    from flashattn_lite.serving import load_model

    model = load_model(folder, dtype=_dtype(known), quantize=known.quantize)
    asks, source = _workload(known, model.config.max_context)
    prompts = workload.token_ids(
        asks, model.config.vocab_size, shared=known.shared, seed=known.seed
    )
    engine = _engine(known, model)
    with Progress(len(asks), "load") as progress:
        served = drive.play(engine, asks, prompts, report=_Report(progress, len(asks)))
    found = _judge(known, served, source)
    stats = engine.stats()
    leaked = stats["pages"] - stats["free_pages"]
    print(
        f"  {stats['steps']} steps, {stats['preemptions']} preemptions, "
        f"{stats['cached_prompt_tokens']} prompt tokens from the prefix cache"
    )
    if leaked:
        print(f"\nLEAK: {leaked} pages are not free afterwards")
    return {
        **found,
        **{"stats": stats, "failed": found["failed"] or bool(leaked)},
        "settings": {**asdict(engine.config), "dtype": known.dtype, "shared": known.shared},
    }


def _load_server(known: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Over HTTP; the model's folder says only which token ids there are."""
    url = known.url.rstrip("/").removesuffix("/v1")
    name, context = drive_http.served_model(url)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    asks, source = _workload(known, context or config["max_position_embeddings"])
    prompts = workload.token_ids(asks, config["vocab_size"], shared=known.shared, seed=known.seed)
    with Progress(len(asks), "load") as progress:
        report = _Report(progress, len(asks))
        served = drive_http.play_http(url, name, asks, prompts, report=report)
    return {**_judge(known, served, f"{source}, over HTTP"), "settings": {"shared": known.shared}}


class _Report:
    """Moves the progress bar when something has been answered."""

    def __init__(self, progress: Progress, count: int) -> None:
        self.progress, self.count, self.done = progress, count, 0

    def __call__(self, ended: int, open_: int) -> None:
        if ended > self.done or ended == 0:
            text = f"{ended} of {self.count} answered, {open_} open"
            self.progress.step(text, ended - self.done)
            self.done = ended


def _workload(known: argparse.Namespace, context: int) -> tuple[list[workload.Ask], str]:
    """The requests, and in words where they come from."""
    if known.trace is None:
        count = known.requests or 64
        asks = workload.poisson(count, known.rate, known.prompt, known.output, known.seed)
        asks = workload.Scale(longest=context).of(asks)
        return asks, f"Poisson arrivals, {known.rate:g} a second"
    scale = workload.Scale(known.every, known.token_scale, known.speed, context)
    asks = scale.of(workload.read_trace(known.trace))[: known.requests]
    return asks, (
        f"{known.trace.name}, 1 of {known.every} requests, tokens x {known.token_scale:g}, "
        f"{known.speed:g} times as fast"
    )


def _judge(known: argparse.Namespace, served: list[measures.Served], source: str) -> dict[str, Any]:
    """Prints and draws the measures."""
    limits = measures.Limits(known.ttft / 1e3, known.tpot / 1e3)
    summary = measures.summarise(served, limits)
    print(f"\n{source}\n")
    _show(summary)
    if known.plot is not None and plots.draw(served, known.plot, source):
        print(f"  plot: {known.plot}")
    return {
        **{"source": source, "summary": summary.as_json(), "failed": bool(summary.failures)},
    }


def _show(summary: measures.Summary) -> None:
    rows = [
        [name, *(f"{values[f'p{p}'] * 1e3:.1f} ms" for p in measures.PERCENTILES)]
        for name, values in (
            ("TTFT, time to the first token", summary.ttft_s),
            ("TPOT, mean time a token after it", summary.tpot_s),
            ("ITL, gaps between tokens", summary.itl_s),
        )
        if values
    ]
    print(tables.terminal(["", *(f"P{p}" for p in measures.PERCENTILES)], rows))
    limits = summary.limits
    answered = summary.requests - sum(summary.failures.values())
    print(
        f"\n  {answered} of {summary.requests} requests answered in {summary.duration_s:.1f} s: "
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.0f} tokens/s out, "
        f"{summary.prompt_tokens / summary.duration_s:.0f} in\n"
        f"  goodput {summary.goodput_per_s:.2f} requests/s: {summary.attainment:.1%} kept TTFT <= "
        f"{limits.ttft_s * 1e3:g} ms and TPOT <= {limits.tpot_s * 1e3:g} ms"
    )
    for reason, count in summary.failures.items():
        print(f"  {tables.paint(f'{count} failed', tables.RED)}: {reason}")


# ---- compare, prefix -----------------------------------------------------------------------------


def _compare(known: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from flashattn_lite.serving import load_model

    count, tokens = known.requests or 16, known.output
    dtype = _dtype(known)
    model = load_model(folder, dtype=dtype, quantize=known.quantize)
    asks = [workload.Ask(0.0, known.prompt, tokens)] * count
    prompts = workload.token_ids(asks, model.config.vocab_size, shared=0.0, seed=known.seed)
    runs = {
        contenders.OURS: contenders.engine_runs(
            _engine(known, model, prefix_cache=False), [prompts], tokens
        ),
        **contenders.contenders(folder, dtype, prompts, tokens),
    }
    with tempfile.TemporaryDirectory() as scratch:
        absent = llama_cpp.missing()
        if absent is None:
            runs[llama_cpp.NAME] = llama_cpp.runs(folder, dtype, prompts, tokens, Path(scratch))
        with Progress((known.rounds + 1) * len(runs), "compare") as progress:
            found = contenders.compare(runs, count * tokens, known.rounds, progress)
    print(f"\n{count} requests, {known.prompt} tokens in and {tokens} out, {known.dtype}, greedy\n")
    body = [
        [
            name,
            f"{found.rate(name):.0f}",
            "" if name == contenders.OURS else f"{found.ratio(name):.2f}x",
            f"{found.agree[name]:.1%}",
        ]
        for name in found.seconds
    ]
    print(tables.terminal(["", "tokens/s", "ours is faster", "tokens as ours"], body))
    for name, failure in found.failures.items():
        print(f"  {name} did not run: {failure}")
    if absent is not None:
        print(f"  absent: {llama_cpp.NAME}: {absent}")
    return {
        **{"seconds": found.seconds, "agree": found.agree, "failures": found.failures},
        "absent": {} if absent is None else {llama_cpp.NAME: absent},
        "ratios": {n: found.ratio(n) for n in found.seconds if n != contenders.OURS},
        "settings": {"requests": count, "prompt": known.prompt, "output": tokens,
                     "dtype": known.dtype},
    }  # fmt: skip


def _prefix(known: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prompts that begin alike (--shared, or 0.9 of them): with the prefix cache and without."""
    from flashattn_lite.serving import load_model

    count, tokens, shared = known.requests or 16, known.output, known.shared or 0.9
    model = load_model(folder, dtype=_dtype(known), quantize=known.quantize)
    asks = [workload.Ask(0.0, known.prompt, tokens)] * count
    prompts = [  # new ones each round: nothing is left of them in the cache
        workload.token_ids(asks, model.config.vocab_size, shared=shared, seed=known.seed + number)
        for number in range(known.rounds + 1)
    ]
    without = "without prefix cache"
    runs = {
        name: contenders.engine_runs(_engine(known, model, prefix_cache=cached), prompts, tokens)
        for name, cached in ((contenders.OURS, True), (without, False))
    }
    with Progress((known.rounds + 1) * len(runs), "prefix") as progress:
        found = contenders.compare(runs, count * tokens, known.rounds, progress)
    print(
        f"\n{count} requests, {known.prompt} tokens in, {shared:.0%} of them shared, {tokens} out, "
        f"{known.dtype}\n\n  with the prefix cache {found.ratio(without):.2f} times as fast; "
        f"{found.agree[without]:.1%} of the tokens are the same"
    )
    return {
        **{"seconds": found.seconds, "agree": found.agree, "ratio": found.ratio(without)},
        "settings": {"requests": count, "prompt": known.prompt, "output": tokens,
                     "shared": shared, "dtype": known.dtype},
        "failed": found.agree[without] < 1.0 and known.dtype == "fp32",
    }  # fmt: skip


# ---- option types --------------------------------------------------------------------------------


def _count(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _positive(text: str) -> float:
    """A number above 0, or a fraction such as 1/16.

    >>> _positive("1/16")
    0.0625
    """
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share in [0, 1)")
    return value
