"""Peak memory of one call beyond its inputs, each measured in a process of its own.

A child builds the inputs, warms the libraries up on a tiny case, resets the kernel's high-water
mark (/proc/self/clear_refs) and runs the case once. What is counted is the resident memory that the
call added at its highest: output, gradients and scratch. On CUDA torch's allocator says it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.contenders import COMPETITORS, OURS, ours
from flashattn_lite.bench.inputs import Inputs

# Each allocation of some size is mapped by itself, so that what was freed is not resident.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MeasurementError(Exception):
    """A child that did not give a figure; the message is the end of what it said."""


def measure(case: Case, contender: str) -> int:
    """Bytes that the contender's call adds at its peak."""
    command = [sys.executable, "-m", __name__, json.dumps(case.as_json()), contender]
    child = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    if child.returncode != 0:
        said = (child.stderr.strip() or f"exit status {child.returncode}").splitlines()
        raise MeasurementError(said[-1])
    return int(child.stdout)


def peak_of_call(case: Case, contender: str) -> int:
    """The measurement itself, in this process."""
    build = ours if contender == OURS else COMPETITORS[contender].build
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    small = replace(case, seqlen=64)
    build(small, Inputs(small)).run()
    inputs = Inputs(case)
    entry = build(case, inputs)
    del inputs
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        entry.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident()
    with contextlib.suppress(OSError):  # else the mark may also be that of building the inputs
        CLEAR.write_text("5")
    entry.run()
    return max(0, high_water_mark() - before)


def resident() -> int:
    """Bytes resident now."""
    return _status("VmRSS") or high_water_mark()


def high_water_mark() -> int:
    """Bytes resident at most since the start or the last reset."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or kib * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    kib = next((line.split()[1] for line in lines if line.startswith(field + ":")), "0")
    return int(kib) * 1024


if __name__ == "__main__":
    print(peak_of_call(Case.from_json(json.loads(sys.argv[1])), sys.argv[2]))
