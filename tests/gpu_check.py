"""Everything that needs an NVIDIA GPU, in the order of its worth, in less than eight minutes:

    make gpu-check                                        # all parts
    python tests/gpu_check.py conformance cases           # some of them
    python tests/gpu_check.py --out DIR                   # where summary.md and the JSON go

conformance  every PTX wrapper's result words against the emulator's recorded ones
cases        the whole case table and what only a device shows (tests/test_gpu.py), by several
             processes; one that a faulty kernel takes down is followed by another
             (tests/gpu_session.py)
decode       over contiguous and paged caches: bytes of K and V a second, as a share of what reads
             and copies reach in the same rounds, and the aim for it
bench        against PyTorch's backends in the same process, exactness checked first
sparse       the same of block masks against compiled flex_attention
sanitizer    compute-sanitizer's memcheck and racecheck over a part of the case table

It needs the built library, torch with CUDA, pytest and, for one part, compute-sanitizer; it
installs nothing and asks the network for nothing. Each part is a process of its own with a time
limit: what has run out of it is interrupted, so that it can write down what it has, and killed five
seconds later. Each has its line in summary.md; beside it are log.txt, with all that they printed,
and their JSON, written as they go. A part that failed or could not run makes the exit status 1, a
machine on which none can run makes it 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), str(ROOT / "tests")]
sys.path[:0] = PATHS

import gpu_session  # noqa: E402

# Seconds that each part may take, and to end in when they are over.
LIMITS = {
    **{"conformance": 40, "cases": 110, "decode": 40},
    **{"bench": 80, "sparse": 80, "sanitizer": 90},
}
GRACE = 5
# The project's options name plugins that a machine for checking may lack. A name for each test:
# what was interrupted says how far it came.
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-p", "no:cacheprovider"]
PYTEST += ["--tb=short"]
SHARES = 4  # processes that divide the cases
FAILURES = 15  # of the cases, named in the summary
LOG = "log.txt"
OURS = "flashattn_lite"  # among the benchmark's contenders
TEST_FILE = "tests/test_gpu.py"
SANITIZED = (
    "(test_case_table and (several_tiles-float16 or several_tiles-bfloat16 or "
    "varlen_with_empty-float16 or head_dim_255-float16 or seqused-float16 or leftpad-bfloat16)) "
    "or (test_decode_over_pages and page16)"
)


def run(command: list[str], seconds: float, log: Path, **variables: str) -> tuple[int, str]:
    """The command's exit status (124: out of time; whatever it started is killed with it) and its
    last line; all of it is appended to the log."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "PYTHONUNBUFFERED": "1"}
    with log.open("a") as stream:
        stream.write(f"==== {' '.join(command)}\n")
        stream.flush()
        begin = stream.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, **variables},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = 124
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return status, lines[-1] if lines else ""


def conformance(out: Path) -> tuple[bool, str]:
    """Compares the words of the device, in conformance.json, with the emulator's."""
    from native import conformance as words

    path = out / "conformance.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "native.conformance", "--device", str(path)]
    log = out / LOG
    status, last = run(command, LIMITS["conformance"], log)
    if status or not path.exists():
        return False, f"{last} (exit {status})"
    expected = {section.name: section for section in words.read()}
    actual = words.read(path)
    lines = [
        line
        for section in actual
        for line in words.differences(expected[section.name], section)[:5]
    ]
    with log.open("a") as stream:
        stream.writelines(f"{line}\n" for line in lines)
    if lines:
        return False, f"{len(lines)} differences from the emulator, the first: {lines[0]}"
    return True, f"{len(actual)} sections agree with the emulator"


def cases(out: Path, tests: str = TEST_FILE) -> tuple[bool, str]:
    """Every test's outcome is in cases.jsonl."""
    path = out / "cases.jsonl"
    path.unlink(missing_ok=True)
    end = time.monotonic() + LIMITS["cases"]

    def share(number: int) -> str:
        """One process after the other, until one has come to the end of its tests."""
        log = out / f"cases{number}.txt"
        last, before = "", -1
        while time.monotonic() < end:
            lines = [line for line in gpu_session.read(path) if line["share"] == number]
            if any("finished" in line for line in lines) or len(lines) == before:
                break  # done, or a process that did nothing at all
            before = len(lines)
            status, last = run(
                [*PYTEST, "-p", "gpu_session", tests],
                end - time.monotonic(),
                log,
                GPU_SESSION_FILE=str(path),
                GPU_SESSION_SHARE=f"{number}/{SHARES}",
            )
            last = f"{last} (exit {status})"
        return last

    with ThreadPoolExecutor(SHARES) as pool:
        last = list(pool.map(share, range(SHARES)))
    with (out / LOG).open("a") as log:
        for number in range(SHARES):
            part = out / f"cases{number}.txt"
            if part.exists():
                log.write(part.read_text(errors="replace"))
                part.unlink()
    return outcomes(gpu_session.read(path), last)


def outcomes(lines: list[dict[str, Any]], last: list[str]) -> tuple[bool, str]:
    """What the lines of cases.jsonl come to."""
    tests = sum({line["share"]: line["tests"] for line in lines if "tests" in line}.values())
    final = {line["test"]: line for line in lines if "test" in line}
    counts = Counter(line["outcome"] for line in final.values())
    counts["never ended"] = counts.pop("begun", 0)
    counts["not run"] = tests - len(final)
    kinds = ("passed", "skipped", "failed", "never ended", "not run")
    text = ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])
    text = f"{text} of {tests} tests" if tests else f"no test ran; {last[0]}"
    bad = [line for line in final.values() if line["outcome"] in ("failed", "begun")]
    for line in bad[:FAILURES]:
        said = " ".join(line.get("message", "it never ended, or its process died").split())
        text += f"\n  - {line['test'].rpartition('::')[2]}: {said[:300]}"
    if len(bad) > FAILURES:
        text += f"\n  - and {len(bad) - FAILURES} more"
    return counts["passed"] > 0 and set(+counts) <= {"passed", "skipped"}, text


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or in a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    places = [
        Path(h) / d / "compute-sanitizer" for h in homes if h for d in ("bin", "compute-sanitizer")
    ]
    found = shutil.which("compute-sanitizer")
    return found or next((str(p) for p in places if os.access(p, os.X_OK)), None)


def sanitizer(out: Path) -> tuple[bool, str]:
    """Only this library's kernels are instrumented; every tensor is an allocation of its own."""
    program = find_sanitizer()
    if program is None:
        raise RuntimeError("compute-sanitizer is neither on PATH nor in a CUDA toolkit")
    results = []
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        command += ["--kernel-name", "kns=fal4cuda", *PYTEST, TEST_FILE]
        command += ["-k", SANITIZED]
        seconds = LIMITS["sanitizer"] // 2
        status, last = run(command, seconds, out / LOG, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        results.append((status == 0, f"{tool}: {last} (exit {status})"))
    return all(good for good, _ in results), "; ".join(text for _, text in results)


def decode(out: Path) -> tuple[bool, str]:
    """Batches of 64 caches of 8192 tokens, 2.1 GB of K and V in bfloat16, and smaller ones."""
    return measured(out, "decode", ["paged", "decode"], "unquantised,contiguous,sdpa", cache_table)


def bench(out: Path) -> tuple[bool, str]:
    """In bfloat16; `python -m flashattn_lite bench --device cuda` has every suite, dtype and
    contender."""
    suites = ["forward", "training"]
    return measured(out, "bench", suites, "sdpa_flash,sdpa_cudnn", bench_table)


def sparse(out: Path) -> tuple[bool, str]:
    return measured(out, "sparse", ["sparse"], "flex,sdpa_dense", bench_table)


def measured(
    out: Path, part: str, suites: list[str], competitors: str, table: Callable[[Path], list[str]]
) -> tuple[bool, str]:
    path = out / f"{part}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "flashattn_lite", "bench", *suites, "--device", "cuda"]
    command += ["--quick", "--dtype", "bf16", "--competitors", competitors, "--json", str(path)]
    status, last = run(command, LIMITS[part], out / LOG)
    text = f"{last} (exit {status})"
    if path.exists():
        text += f"; rows in {path.name}\n\n" + "\n".join(table(path)) + "\n"
    return status == 0 and path.exists(), text


def bench_table(path: Path) -> list[str]:
    """The run's figures in Markdown: our rate, and every contender's time over ours. Backward is
    what a training step takes beyond the forward pass over the same shape."""
    from flashattn_lite.bench.results import Results

    rows = {row.case: row for row in Results.load(path).rows if row.failure is None}
    lines = []  # (what, floating-point operations, seconds by contender)
    for case, row in rows.items():
        seconds = {name: samples.median() for name, samples in row.samples.items()}
        lines.append((f"{case.suite} {case.short()}", case.flops(), seconds))
        forward = rows.get(dataclasses.replace(case, suite="forward", backward=False))
        if case.backward and forward is not None:
            before = {name: samples.median() for name, samples in forward.samples.items()}
            beyond = {name: t - before[name] for name, t in seconds.items() if name in before}
            lines.append((f"backward {case.short()}", case.flops() - forward.case.flops(), beyond))
    names = list(dict.fromkeys(n for *_, seconds in lines for n in seconds if n != OURS))
    table = [f"| | TFLOP/s | {' | '.join(f'vs {name}' for name in names)} |"]
    table.append("|---|" + "---:|" * (1 + len(names)))
    for what, flops, seconds in lines:
        ratios = (f"{seconds[n] / seconds[OURS]:.2f}" if n in seconds else "" for n in names)
        rate = f"{flops / seconds[OURS] / 1e12:.0f}"
        table.append(f"| {' | '.join([what, rate, *ratios])} |")
    return table


def cache_table(path: Path) -> list[str]:
    """The run's ceilings, rows and aims in Markdown."""
    from flashattn_lite.bench import ceilings, present, tables
    from flashattn_lite.bench.results import Results

    results = Results.load(path)
    rates = "; ".join(f"{n}: {ceilings.units(n, rate)}" for n, rate in results.ceilings.items())
    lines = [f"ceilings: {rates}", ""]
    for suite in results.suites():
        lines += [tables.markdown(*present.suite_table(suite, results), left=2), ""]
    headers, body = present.group_table(results.rows, results.clock)
    return [*lines, tables.markdown(headers, body)] if body else lines[:-1]


PARTS: dict[str, Callable[[Path], tuple[bool, str]]] = {
    "conformance": conformance,
    "cases": cases,
    "decode": decode,
    "bench": bench,
    "sparse": sparse,
    "sanitizer": sanitizer,
}


def cannot_run() -> str | None:
    """Why nothing can run on this machine, and what would help."""
    import torch

    from flashattn_lite import _ops

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one that is built with it"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU: run it where `nvidia-smi` lists one"
    if json.loads(_ops.build_info())["cuda"] is None:
        return (
            "flashattn_lite is built without CUDA kernels: build it with nvcc on PATH "
            "(FAL_CUDA=1 python setup.py build_ext --inplace)"
        )
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu-check")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    if reason := cannot_run():
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    import torch

    # A shell that starts this in the background has interrupts ignored, which parts would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / LOG).unlink(missing_ok=True)
    device = torch.cuda.get_device_properties(0)
    summary = [f"# gpu-check on {device.name}, torch {torch.__version__}", ""]
    failed = False
    for name in arguments.parts or PARTS:
        start = time.monotonic()
        try:
            good, text = PARTS[name](arguments.out.resolve())
            verdict = "ok" if good else "FAILED"
        except Exception as error:
            verdict, text = "could not run", f"{type(error).__name__}: {error}"
        failed |= verdict != "ok"
        line = f"- **{name}**: {verdict} in {time.monotonic() - start:.0f} s: {text}"
        summary.append(line)
        print(line, flush=True)
        (arguments.out / "summary.md").write_text("\n".join(summary) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
