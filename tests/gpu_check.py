"""Everything that needs an NVIDIA GPU, in the order of its worth, in less than eight minutes:

    make gpu-check                                        # all parts
    python tests/gpu_check.py conformance cases           # some of them
    python tests/gpu_check.py --out DIR                   # where summary.md and the JSON go

conformance  every PTX wrapper's result words against the emulator's recorded ones
cases        the whole case table and what only a device shows (tests/test_gpu.py)
sanitizer    compute-sanitizer's memcheck and racecheck over a part of the case table
decode       bytes of K and V a second against the measured bandwidth (tests/gpu_decode.py)
bench        against PyTorch's backends in the same process, exactness checked first

It needs the built library and installs nothing. Each part has its own time limit and its own line
in the summary; one that failed or could not run makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Seconds that each part may take.
LIMITS = {"conformance": 60, "cases": 170, "sanitizer": 110, "decode": 60, "bench": 130}
SANITIZED_CASES = (
    "several_tiles-float16 or several_tiles-bfloat16 or varlen_with_empty-float16 or "
    "head_dim_255-float16 or seqused-float16 or leftpad-bfloat16"
)


def run(command: list[str], seconds: int, log: Path) -> tuple[int, str]:
    """The command's exit status (124: out of time) and its last line; the log gets all of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = 124
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return status, lines[-1] if lines else ""


def conformance(out: Path) -> tuple[bool, str]:
    """Compares words; writes those of the device to conformance.json."""
    import torch
    from native import conformance as words

    from flashattn_lite import _ops

    expected = {section.name: section for section in words.read()}
    major, minor = torch.cuda.get_device_capability()
    actual = []
    for sm90 in (False, True) if (major, minor) == (9, 0) else (False,):
        sections = _ops.ptx_conformance_sections(sm90)
        actual += words.collect(sections, lambda _capacity, flag=sm90: _device_words(flag))
    words.write(out / "conformance.json", actual)
    lines = [
        line
        for section in actual
        for line in words.differences(expected[section.name], section)[:5]
    ]
    (out / "conformance.log").write_text("\n".join(lines) + "\n")
    if lines:
        return False, f"{len(lines)} differences from the emulator, the first: {lines[0]}"
    return True, f"{len(actual)} sections agree with the emulator on sm_{major}{minor}"


def _device_words(sm90: bool) -> list[int]:
    from flashattn_lite import _ops

    return [int(word) & 0xFFFFFFFF for word in _ops.ptx_conformance(sm90).tolist()]


def cases(out: Path) -> tuple[bool, str]:
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider"]
    status, last = run([*command, "--tb=short"], LIMITS["cases"], out / "cases.log")
    return status == 0, f"{last} (exit {status})"


def sanitizer(out: Path) -> tuple[bool, str]:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise RuntimeError("compute-sanitizer is not on PATH")
    results = []
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
        command += ["tests/test_gpu.py", "-q", "-p", "no:cacheprovider", "-k"]
        decode = "(test_decode_over_pages and page16)"
        command += [f"(test_case_table and ({SANITIZED_CASES})) or {decode}"]
        status, last = run(command, LIMITS["sanitizer"] // 2, out / f"{tool}.log")
        results.append((status == 0, f"{tool}: {last} (exit {status})"))
    return all(good for good, _ in results), "; ".join(text for _, text in results)


def decode(out: Path) -> tuple[bool, str]:
    path = out / "decode.json"
    command = [sys.executable, "tests/gpu_decode.py", "--json", str(path)]
    status, last = run(command, LIMITS["decode"], out / "decode.log")
    return status == 0 and path.exists(), f"{last} (exit {status}); rows in {path.name}"


def bench(out: Path) -> tuple[bool, str]:
    path = out / "bench.json"
    command = [sys.executable, "-m", "flashattn_lite", "bench", "forward", "training"]
    command += ["--device", "cuda", "--quick", "--json", str(path)]
    status, last = run(command, LIMITS["bench"], out / "bench.log")
    return status == 0 and path.exists(), f"{last} (exit {status}); rows in {path.name}"


PARTS: dict[str, Callable[[Path], tuple[bool, str]]] = {
    "conformance": conformance,
    "cases": cases,
    "sanitizer": sanitizer,
    "decode": decode,
    "bench": bench,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu-check")
    arguments = parser.parse_args()
    import torch

    from flashattn_lite import _ops

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no NVIDIA GPU on this machine", file=sys.stderr)
        return 2
    if json.loads(_ops.build_info())["cuda"] is None:
        print("gpu-check: the library was built without CUDA kernels", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_properties(0)
    summary = [f"# gpu-check on {device.name}, torch {torch.__version__}", ""]
    failed = False
    for name in arguments.parts or PARTS:
        start = time.monotonic()
        try:
            good, text = PARTS[name](arguments.out)
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
