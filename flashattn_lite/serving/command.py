"""``flashattn-lite generate`` and ``flashattn-lite serve``: their options, and what they do."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashattn_lite.serving._extras import require

if TYPE_CHECKING:
    from flashattn_lite.serving.engine import Engine, EngineConfig
    from flashattn_lite.serving.tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "tiny"
EMBEDDED_NAME = "flashattn-lite-tiny"
SERVER_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
DEFAULTS = {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
MODEL_PACKAGES = ("tokenizers", "safetensors")


def add_parsers(commands: Any) -> None:
    """Adds `generate` and `serve`."""
    generate = commands.add_parser(
        "generate",
        help="continue a text with a small model that is in the package, or with your own",
        description="Continues a text, token by token as the model makes them.",
    )
    generate.add_argument("text", help="what to continue; - reads it from the standard input")
    _add_model(generate)
    generate.add_argument("--max-tokens", type=_count, default=128, metavar="N")
    sampling = generate.add_argument_group(
        "sampling", "default: the model's generation_config.json, else what is said here"
    )
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (0.7)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="(0.95)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="0 keeps all tokens (0)")
    sampling.add_argument("--min-p", type=float, metavar="P", help="(0)")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="(1, which is off)")
    generate.add_argument("--seed", type=int, help="the same seed gives the same text")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated"
    )
    generate.add_argument(
        "--chat", action="store_true", help="the text is a user's message for the chat template"
    )
    generate.add_argument(
        "--ignore-eos", action="store_true", help="go on to --max-tokens whatever the model says"
    )
    generate.add_argument("--quiet", action="store_true", help="no line about the speed")
    generate.set_defaults(run=_generate)

    serve = commands.add_parser(
        "serve",
        help="an HTTP server with the OpenAI API's routes",
        description="An HTTP server: /v1/completions, /v1/chat/completions, /v1/models, /health, "
        "/metrics. It has no authentication of its own: for other hosts, put a proxy before it.",
    )
    _add_model(serve)
    serve.add_argument("--name", help="the model's name to clients (default: the folder's)")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=_port, default=8000, help="0: any that is free")
    serve.add_argument(
        "--max-body", type=_count, default=1 << 20, metavar="BYTES", help="of a request's body"
    )
    serve.add_argument(
        "--max-tokens", type=_count, default=4096, metavar="N", help="that a request may ask for"
    )
    serve.add_argument(
        "--max-open", type=_count, default=1024, metavar="N", help="choices in flight at once"
    )
    serve.add_argument(
        "--drain",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds for open requests at the end",
    )
    engine = serve.add_argument_group("engine")
    engine.add_argument("--num-pages", type=_count, metavar="N", help="pages of the KV pool")
    engine.add_argument("--page-size", type=_count, metavar="N", help="tokens of a page")
    engine.add_argument("--max-running", type=_count, metavar="N", help="requests in a batch")
    engine.add_argument("--max-step-tokens", type=_count, metavar="N", help="tokens of a step")
    engine.add_argument("--max-context", type=_count, metavar="N", help="tokens of a request")
    engine.add_argument("--no-prefix-cache", action="store_true")
    engine.add_argument(
        "--reproducible",
        action="store_true",
        help="the same request gets the same tokens whatever shares the batch, to the bit (CPU)",
    )
    serve.set_defaults(run=_serve)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a Hugging Face folder with config.json, safetensors and tokenizer.json (default: the "
        "small model in the package, which writes Python)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: config.json's; float32 for the model in the package",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8",),
        help="int8 weights, bfloat16 between them; faster for one request at a time, on the CPU "
        "(needs torchao)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="CPU threads (default: torch's)"
    )


def _count(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _port(text: str) -> int:
    if not (text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


class _UsageError(Exception):
    """What is wrong with the command, in a sentence."""


def load(known: argparse.Namespace) -> tuple[Any, Tokenizer]:
    """The model and the tokenizer that the options name.

    Raises:
        _UsageError: they cannot be had.
    """
    import torch

    from flashattn_lite.serving import load_model, load_tokenizer

    _check_device(known.device)
    if known.threads is not None:
        torch.set_num_threads(known.threads)
    folder = known.model or EMBEDDED
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(known.dtype)
    if known.quantize is not None and known.dtype == "auto":
        dtype = torch.bfloat16
    elif known.model is None and known.dtype == "auto" and known.device == "cpu":
        dtype = torch.float32  # so small a model gains nothing from bfloat16 on the CPU
    try:
        model = load_model(folder, dtype=dtype, device=known.device, quantize=known.quantize)
        return model, load_tokenizer(folder)
    except ImportError as error:  # says what to install
        raise _UsageError(str(error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise _UsageError(f"--model {folder}: {error}") from error


def _check_device(name: str) -> None:
    import torch

    from flashattn_lite.bench.machine import why_no_cuda

    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise _UsageError(f"--device {name}: it must be cpu, cuda, cuda:1 ...")
    reason = why_no_cuda() if kind == "cuda" else None
    if reason is not None:
        raise _UsageError(f"--device {name}: {reason}")


def missing_package(names: tuple[str, ...]) -> str | None:
    """The sentence that names the first package that is not installed."""
    for name in names:
        try:
            require(name)
        except ImportError as error:
            return str(error)
    return None


def _stop(command: str, message: object) -> int:
    print(f"flashattn-lite {command}: {message}", file=sys.stderr)
    return 2


# ---- generate ------------------------------------------------------------------------------------


def _generate(known: argparse.Namespace) -> int:
    missing = missing_package(MODEL_PACKAGES)
    if missing is not None:
        return _stop("generate", missing)
    from flashattn_lite.serving import Engine, RequestError, SamplingParams

    try:
        params = SamplingParams(
            max_tokens=known.max_tokens,
            **_sampling(known),
            seed=known.seed,
            stop=known.stop,
            ignore_eos=known.ignore_eos,
        )
        model, tokenizer = load(known)
        text = sys.stdin.read() if known.text == "-" else known.text
        if known.chat:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        prompt = tokenizer.encode(text, add_special_tokens=not known.chat)
        engine = Engine(model, tokenizer, one_request())
        engine.submit(prompt, params)
    except (RequestError, _UsageError, json.JSONDecodeError) as error:
        return _stop("generate", error)
    if not known.chat:
        from flashattn_lite.bench import tables

        print(tables.paint(text, tables.BOLD), end="", flush=True)
    return stream(engine, quiet=known.quiet)


def _sampling(known: argparse.Namespace) -> dict[str, Any]:
    """How to sample: the options, else the model's generation_config.json, else DEFAULTS."""
    path = (known.model or EMBEDDED) / "generation_config.json"
    recommended = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    found = {}
    for name, default in DEFAULTS.items():
        values = (getattr(known, name), recommended.get(name), default)
        found[name] = next(value for value in values if value is not None)
    return found


def one_request() -> EngineConfig:
    """Sizes for one request at a time."""
    from flashattn_lite.serving import EngineConfig

    return EngineConfig(max_running=1, prefix_cache=False)


def stream(engine: Engine, *, quiet: bool = False) -> int:
    """Prints an engine's only request as it comes; 1 when it ended with an error."""
    begin = time.perf_counter()
    first = last = begin
    count = prompt = 0
    while engine.has_work():
        for output in engine.step():
            last = time.perf_counter()
            if count == 0 and output.token_ids:
                first = last
            count, prompt = output.completion_tokens, output.prompt_tokens
            print(output.text, end="", flush=True)
            if output.finish_reason == "error":
                print(f"\nflashattn-lite generate: {output.error}", file=sys.stderr)
                return 1
    print(flush=True)
    if not quiet:
        speed = f", {(count - 1) / (last - first):.0f} tokens/s" if count > 1 else ""
        print(
            f"[{prompt} tokens read, {count} written; the first after "
            f"{(first - begin) * 1e3:.0f} ms{speed}]",
            file=sys.stderr,
        )
    return 0


# ---- serve ---------------------------------------------------------------------------------------


def _serve(known: argparse.Namespace) -> int:
    missing = missing_package(MODEL_PACKAGES + SERVER_PACKAGES)
    if missing is not None:
        return _stop("serve", missing)
    from flashattn_lite.serving import Engine, EngineConfig
    from flashattn_lite.serving.server import Limits, create_app, run

    sizes = {
        name: getattr(known, name)
        for name in ("num_pages", "page_size", "max_running", "max_step_tokens", "max_context")
        if getattr(known, name) is not None
    }
    try:
        model, tokenizer = load(known)
        config = EngineConfig(
            **sizes, prefix_cache=not known.no_prefix_cache, reproducible=known.reproducible
        )
        engine = Engine(model, tokenizer, config)
    except (_UsageError, ValueError) as error:
        return _stop("serve", error)
    name = known.name or (EMBEDDED_NAME if known.model is None else known.model.resolve().name)
    app = create_app(
        *(engine, tokenizer),
        model=name,
        context=engine.max_tokens,
        limits=Limits(body=known.max_body, tokens=known.max_tokens, open=known.max_open),
    )
    print(
        f"model {name}, context {engine.max_tokens} tokens, process {os.getpid()}", file=sys.stderr
    )
    run(app, host=known.host, port=known.port, drain_s=known.drain)
    return 0
