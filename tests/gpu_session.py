"""A pytest plugin for what a faulty kernel does to a process: gpu_check.py runs the cases with it.

A kernel that faults takes the process's CUDA context with it, and every later test there fails for
its sake; one that never ends never gives the process back. So every test's outcome is written down
as it ends, a test that lost the context ends the process, one that takes too long is killed with
it, and the next process goes on behind them. Several processes may share the tests.

Environment:
  GPU_SESSION_FILE     where the outcomes go, a JSON object a line; what is in it is not run again
  GPU_SESSION_SHARE    "i/n": every n-th test from the i-th on
  GPU_SESSION_SECONDS  of one test, before it counts as one that never ends
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The tests in the order of their worth: the kernels that most calls run first, graphs last.
ORDER = (
    r"test_case_table\[.*float16-flash2",
    r"test_case_table\[.*flash2",
    r"test_many_tiles\[.*flash2",
    r"test_decode_over_pages",
    r"test_case_table_of_decode",
    r"test_many_tiles",
    r"test_case_table\[",
    r"test_kv_cache|test_trees",
    r"test_a_hidden_nan|test_dropout|test_deterministic|test_never_waits",
    r"test_.*block_masks",
    r"",
)
FILE = Path(os.environ.get("GPU_SESSION_FILE", os.devnull))
SHARE, SHARES = map(int, os.environ.get("GPU_SESSION_SHARE", "0/1").split("/"))
SECONDS = float(os.environ.get("GPU_SESSION_SECONDS", "45"))
# pytest redirects the descriptor 2 while tests run; a watchdog's traceback belongs in the log.
STDERR = os.fdopen(os.dup(2), "w")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of an outcome file; of one that was cut off, as far as it goes."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def note(**what: Any) -> None:
    """One line, in one write: other processes append to the same file."""
    with FILE.open("ab", buffering=0) as file:
        file.write(json.dumps({"share": SHARE, **what}).encode() + b"\n")


def lost_context() -> str:
    """What the device says after a test; empty when all is well."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def worth(item: pytest.Item) -> int:
        return next(i for i, pattern in enumerate(ORDER) if re.search(pattern, item.name))

    items[:] = sorted(items, key=worth)[SHARE::SHARES]
    note(tests=len(items))
    done = {line["test"] for line in read(FILE) if "test" in line}
    left = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = left


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.outcome != "passed" and not hasattr(item, "gpu_outcome"):
        message = call.excinfo.exconly() if call.excinfo is not None else ""
        item.gpu_outcome = (report.outcome, message[:600])  # type: ignore[attr-defined]
    return report  # type: ignore[return-value]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    note(test=item.nodeid, outcome="begun")
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=STDERR)
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    outcome, message = getattr(item, "gpu_outcome", ("passed", ""))
    if lost := lost_context():
        outcome, message = "failed", f"{message} [the CUDA context is lost: {lost}]".strip()
        item.session.shouldstop = "the CUDA context is lost"
    note(test=item.nodeid, outcome=outcome, message=message)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.shouldstop:
        note(finished=True)
