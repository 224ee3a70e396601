"""``flashattn-lite bench``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from flashattn_lite.bench import ceilings, isa, machine, present, runner
from flashattn_lite.bench.cases import DTYPES
from flashattn_lite.bench.progress import Progress
from flashattn_lite.bench.results import Results, ResultsError
from flashattn_lite.bench.suites import SUITES, Plan, cases_of
from flashattn_lite.bench.timing import Rounds

SAVE_EVERY_S = 2.0  # a long run's file is large

EPILOG = """\
suites: forward, training (forward and backward), masks (window, ragged batches, bias, ALiBi,
grouped heads), overhead (tiny calls), memory (peak, in child processes), scaling (one thread
to several), decode (one query over a KV cache: plain, quantised, ragged), paged (over pages),
papers (the FlashAttention papers' figures, against standard attention), io (bytes through memory
by the papers' loops, and the rate at which they move), sparse (over the share of listed blocks).

also:
  flashattn-lite bench report [FILE ...]   tables and plots from results
  flashattn-lite bench compare A B         what became slower or faster
  flashattn-lite bench serving             load on the serving loop; it has options of its own

Exactness against float64 is checked before any time is taken; an inexact row is not timed and makes
the exit status 1. Every contender runs once per round, in turn; ratios are medians over the rounds.
"""


def add_parser(commands: Any) -> None:
    """Adds `bench`."""
    bench = commands.add_parser(
        "bench",
        help="speed and memory against PyTorch on this machine",
        description="Speed and memory against PyTorch on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument(
        "suites", nargs="*", metavar="suite", help=f"{', '.join(SUITES)}; report; compare"
    )
    size = bench.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        dest="size",
        action="store_const",
        const="quick",
        help="a few shapes of every suite, about two minutes on two cores",
    )
    size.add_argument(
        "--full", dest="size", action="store_const", const="full", help="every shape: hours"
    )
    bench.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda where torch and this build have it, else cpu",
    )
    bench.add_argument(
        "--threads",
        type=_threads,
        metavar="N[,N]",
        help="CPU threads to measure with (default: 1,2 as far as there are cores)",
    )
    bench.add_argument(
        "--dtype",
        type=_dtypes,
        default=tuple(DTYPES),
        metavar="NAME[,NAME]",
        help="fp32, bf16, fp16 (default: all)",
    )
    bench.add_argument(
        "--isa",
        choices=tuple(isa.ENVIRONMENTS),
        help="hold both sides to a lesser instruction set of this CPU",
    )
    bench.add_argument(
        "--competitors",
        type=_words,
        metavar="NAME[,NAME]",
        help="who takes part (default: all found here); the first is the baseline",
    )
    bench.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: judge one-thread rows by CPU time (on a busy machine)",
    )
    bench.add_argument(
        "--budget",
        type=_seconds,
        metavar="S",
        help="seconds of measuring per row (default: 0.4; 0.1 with --quick)",
    )
    bench.add_argument(
        "--warm-l2",
        action="store_true",
        help="CUDA: do not overwrite the L2 cache before each call",
    )
    bench.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="where the results go (default: bench/results/ in a checkout, else here)",
    )
    bench.add_argument("--no-json", action="store_true", help="write no file")
    bench.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="report: where performance.md and the plots go (default: docs/ in a "
        "checkout, else here)",
    )
    bench.set_defaults(run=run, bench=bench)


def run(known: argparse.Namespace) -> int:
    """`bench ...`, with the parsed options."""
    from flashattn_lite.bench import compare, report

    try:
        if known.suites[:1] == ["report"]:
            return report.main([Path(p) for p in known.suites[1:]], known.output)
        if known.suites[:1] == ["compare"]:
            if len(known.suites) != 3:
                known.bench.error("compare takes two files: compare A.json B.json")
            return compare.main(Path(known.suites[1]), Path(known.suites[2]))
        unknown = [s for s in known.suites if s not in SUITES]
        if unknown:
            known.bench.error(
                f"no suite {', '.join(unknown)}; suites: {', '.join(SUITES)}; also: report, compare"
            )
        return _measure(known)
    except (ResultsError, ValueError) as error:
        print(f"flashattn-lite bench: {error}", file=sys.stderr)
        return 2


def _measure(known: argparse.Namespace) -> int:
    device = _device(known.device)
    if known.isa and not isa.is_set(known.isa):
        available = machine.installed()["build"]["cpu"]["isas"]
        if known.isa not in available:
            raise ValueError(
                f"--isa {known.isa}: this build runs {', '.join(available)} on this processor"
            )
        sys.stdout.flush()
        isa.restart(known.isa, known.arguments)
    present_names, absent = runner.choose(device, known.competitors)
    size = known.size or "default"
    plan = Plan(
        size=size,
        dtypes=known.dtype,
        threads=_usable(known.threads) if device == "cpu" else (1,),
        device=device,
    )
    budget = known.budget if known.budget is not None else 0.1 if size == "quick" else 0.4
    settings = runner.Settings(
        rounds=Rounds(budget_s=budget, at_least=3 if size == "quick" else 5),
        competitors=tuple(present_names),
        clock=known.clock,
        cold_l2=not known.warm_l2,
    )
    results = Results(
        command=_without_paths(known.arguments),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        facts=machine.describe(),
        settings={
            **{"size": size, "device": device, "threads": list(plan.threads)},
            **{"clock": known.clock, "isa": isa.emulated(), "budget_s": budget},
            **{"competitors": present_names, "cold_l2": settings.cold_l2},
        },
        absent=absent,
    )
    suites = list(dict.fromkeys(known.suites)) or list(SUITES)
    path = None if known.no_json else known.json or default_path(results, suites)
    if path is not None:
        check_writable(path, "--json", "--no-json")
    interrupted = measure(results, plan, settings, suites, path)
    if path is not None and results.rows:
        results.save(path)
        print(f"\nresults: {path}")
    if interrupted:
        until = "these are the rows measured" if results.rows else "no row was measured"
        print(f"interrupted: {until} until then", file=sys.stderr)
        return 130
    return 1 if results.failures else 0


def measure(
    results: Results,
    plan: Plan,
    settings: runner.Settings,
    suites: list[str],
    path: Path | None = None,
) -> bool:
    """Runs the suites and prints their tables; True if the user stopped it on the way. What has
    been measured goes to ``path`` every few seconds: a run that is killed leaves it behind."""
    cases = {suite: cases_of(suite, plan) for suite in suites}
    flat = [case for some in cases.values() for case in some]
    if not flat:
        raise ValueError("nothing to measure: no suite has a case with these options")
    clock = runner.clock_for(flat[0], settings)
    ceilings_cost = 1.5 * len(plan.threads)
    total = ceilings_cost + sum(runner.cost(case, settings) for case in flat)
    interrupted, saved = False, 0.0
    with Progress(total) as progress:
        try:
            progress.step("how fast this machine can go", ceilings_cost)
            results.ceilings = ceilings.measure(plan.device, plan.threads, clock)
            for case in flat:
                what = f"{case.suite}: {case.dtype}, {case.label()}"
                progress.step(what, runner.cost(case, settings))
                results.rows.append(runner.measure(case, settings))
                if path is not None and time.monotonic() - saved >= SAVE_EVERY_S:
                    results.save(path)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            interrupted = True
    if results.rows:
        print("\n".join(present.header(results)))
        present.show(results)
    return interrupted


def check_writable(path: Path, option: str, instead: str = "") -> None:
    """Before the measuring rather than after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        remedy = "say where to write" + (f", or {instead}" if instead else "")
        raise ValueError(f"{option} {path}: {error.strerror}; {remedy}") from None


def default_path(results: Results, suites: list[str]) -> Path:
    """bench/results/<processor>-<what was run>.json in a checkout, else in the current folder."""
    facts, settings = results.facts, results.settings
    on_gpu = settings["device"] == "cuda"
    model = facts["gpus"][0]["name"] if on_gpu else facts["cpu"]["model"]
    model = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", model)
    parts = [model, *([] if on_gpu else [facts["library"]["build"]["cpu"]["active"]])]
    parts += suites if len(suites) < len(SUITES) else []
    parts += [] if settings["size"] == "default" else [settings["size"]]
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
    root = machine.checkout()
    if root is not None:
        return root / "bench" / "results" / f"{name}.json"
    return Path(f"flashattn-lite-bench-{name}.json")


def _without_paths(arguments: list[str]) -> str:
    """The command as others can repeat it: without where its results go.

    >>> _without_paths(["bench", "--json", "/home/me/r.json", "--quick"])
    'flashattn-lite bench --quick'
    """
    kept = [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if before != "--json" and word not in ("--json", "--no-json")
    ]
    return shlex.join(["flashattn-lite", *(w for w in kept if not w.startswith("--json="))])


def _device(wanted: str) -> str:
    reason = machine.why_no_cuda() if wanted != "cpu" else None
    if wanted == "cuda" and reason is not None:
        raise ValueError(f"--device cuda: {reason}")
    return "cuda" if wanted != "cpu" and reason is None else "cpu"


def _usable(wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    cores = machine.cpu().cores
    if wanted is None:
        return tuple(n for n in (1, 2) if n <= cores) or (1,)
    most = len(machine.usable_processors())
    if max(wanted) > most:
        raise ValueError(f"--threads {max(wanted)}: this process may use {most} processors")
    return wanted


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _threads(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in _words(text) if word.isdigit())
    if len(numbers) != len(_words(text)) or not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of threads like 1,2")
    return tuple(sorted(set(numbers)))


def _dtypes(text: str) -> tuple[str, ...]:
    names = _words(text)
    if not names or any(name not in DTYPES for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}: dtypes are {', '.join(DTYPES)}")
    return tuple(name for name in DTYPES if name in names)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value
