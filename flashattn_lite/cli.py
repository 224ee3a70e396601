"""The command line: ``flashattn-lite info | demo | bench | generate | serve``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from flashattn_lite import __version__


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from flashattn_lite.bench import command as bench
    from flashattn_lite.serving import command as serving

    top = argparse.ArgumentParser(
        prog="flashattn-lite", description="Exact attention for CPU and GPU."
    )
    top.add_argument("--version", action="version", version=f"flashattn_lite {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="what was built, and what of it this machine can use")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo", help="exactness, speed and a served model, in less than three minutes"
    )
    demo.set_defaults(run=_demo)

    bench.add_parser(commands)
    serving.add_parsers(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:  # the shell closed it (`>&-`)
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()  # what cannot be written fails here, not at the interpreter's end
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has gone, as in `| head`
        _drop_output()
        return 141
    except OSError as error:  # a full disk, a folder that nobody may write to
        where = f"{error.filename}: " if error.filename else ""
        print(f"flashattn-lite: {where}{error.strerror or error}", file=sys.stderr)
        _drop_output()
        return 1


def _run(words: list[str]) -> int:
    if words[:2] == ["bench", "serving"]:  # has options of its own
        from flashattn_lite.bench.serving import command as bench_serving

        return bench_serving.main(words[2:])
    known = parser().parse_args(words)
    known.arguments = words
    return int(known.run(known))


def _drop_output() -> None:
    """What stdout has buffered and cannot write goes nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _info(known: argparse.Namespace) -> int:
    from flashattn_lite.bench import isa, machine

    facts = machine.describe()
    facts["emulated_isa"] = isa.emulated()
    if known.json:
        print(json.dumps(facts, indent=1))
        return 0
    print("\n".join(machine.headline(facts)))
    build = facts["library"]["build"]
    if build["cpu"]["omitted"]:
        print(
            f"         without {', '.join(build['cpu']['omitted'])}: the compiler that built it "
            "does not know them; a newer one (g++ 11) makes bfloat16 faster where the CPU has them"
        )
    cuda = build["cuda"]
    names = [
        f"{name} (PTX, for later GPUs)" if name.startswith("compute") else f"sm_{name}"
        for name in (cuda["architectures"].split(",") if cuda else ())
    ]
    architectures = ", ".join(names) or "none (built without nvcc)"
    print(
        f"CUDA     kernels for {architectures}; PyTorch's CUDA: {facts['torch']['cuda'] or 'none'}"
    )
    engines = build["engines"] if cuda else ["cpu"]
    print(f"engines  {', '.join(engines)}")
    print(f"Python   {facts['python']}, {facts['system']}, {facts['torch']['pool']}")
    if facts["emulated_isa"]:
        print(f"NOTE     {isa.sentence(facts['emulated_isa'])}")
    return 0


def _demo(known: argparse.Namespace) -> int:
    from flashattn_lite.demo import main

    return main()
