"""gpu-check's own logic, without a GPU: what it says of a machine that cannot run it, how it
compares words, what becomes of a part that fails, hangs or cannot run."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import gpu_session
import pytest
import torch
from native import conformance

from flashattn_lite import _ops
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.results import Results, Row
from flashattn_lite.bench.suites import Plan, cases_of
from flashattn_lite.bench.timing import Ratio, Samples


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that looks as if it had an H100."""
    monkeypatch.setattr(gpu_check, "cannot_run", lambda: None)
    properties = SimpleNamespace(name="an H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.parametrize(
    "version,available,kernels,reason",
    [
        (None, False, '{"cuda": "80"}', "is built without CUDA; install one"),
        ("13.0", False, '{"cuda": "80"}', "torch sees no NVIDIA GPU: run it where `nvidia-smi`"),
        ("13.0", True, '{"cuda": null}', "built without CUDA kernels: build it with nvcc on PATH"),
        ("13.0", True, '{"cuda": "80"}', None),
    ],
)
def test_says_why_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    available: bool,
    kernels: str,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(_ops, "build_info", lambda: kernels)
    said = gpu_check.cannot_run()
    assert said is reason is None or (said and reason and reason in said)


@pytest.mark.usefixtures("gpu")
def test_a_part_that_fails_or_raises_is_a_line_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raises(_out: Path) -> tuple[bool, str]:
        raise RuntimeError("compute-sanitizer is missing")

    parts = {"first": lambda _: (False, "3 differences"), "second": raises}
    parts["third"] = lambda _: (True, "all of it")
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert gpu_check.main(["--out", str(tmp_path / "results")]) == 1
    lines = (tmp_path / "results" / "summary.md").read_text().splitlines()
    assert lines[0] == f"# gpu-check on an H100, torch {torch.__version__}"
    assert lines[2:] == [
        "- **first**: FAILED in 0 s: 3 differences",
        "- **second**: could not run in 0 s: RuntimeError: compute-sanitizer is missing",
        "- **third**: ok in 0 s: all of it",
    ]
    assert gpu_check.main(["third", "--out", str(tmp_path)]) == 0


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("flipped", [False, True])
def test_conformance_compares_every_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flipped: bool
) -> None:
    sections = conformance.read()
    exact = next(i for i, s in enumerate(sections) if s.compare == "exact")
    halves = {False: sections[:10], True: sections[10:]}
    assert exact < 10

    def words(sm90: bool) -> list[int]:
        values = [list(s.words) for s in halves[sm90]]
        if flipped and not sm90:
            values[exact][5] ^= 1
        return [w for part in values for w in part]

    def described(sm90: bool) -> str:
        return "\n".join(f"{s.name} {len(s.words)} {s.compare}" for s in halves[sm90])

    def run(command: list[str], _seconds: int, log: Path, **_variables: str) -> tuple[int, str]:
        log.write_text("")
        conformance.write(Path(command[-1]), conformance.device_sections())
        return 0, ""

    monkeypatch.setattr(conformance, "device_words", words)
    monkeypatch.setattr(conformance, "described", described)
    monkeypatch.setattr(gpu_check, "run", run)
    good, text = gpu_check.conformance(tmp_path)
    assert good is not flipped
    if flipped:
        assert f"1 differences from the emulator, the first: {sections[exact].name} word 5" in text
    else:
        assert text == f"{len(sections)} sections agree with the emulator"
        assert conformance.read(tmp_path / "conformance.json") == sections


def test_the_operators_behind_it_exist() -> None:
    """What they describe is what is recorded; the words themselves need a device."""
    if json.loads(_ops.build_info())["cuda"] is None:
        with pytest.raises(RuntimeError, match="this build has no CUDA kernels"):
            conformance.described(False)
        return
    described = "".join(conformance.described(sm90) for sm90 in (False, True)).splitlines()
    assert described == [f"{s.name} {len(s.words)} {s.compare}" for s in conformance.read()]
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"ptx_conformance: CUDA error \d+"):
            conformance.device_words(False)


def test_conformance_without_a_device_says_so(tmp_path: Path) -> None:
    """The part is a process of its own, which fails here, with a sentence in the summary."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make gpu-check runs the part")
    good, text = gpu_check.conformance(tmp_path)
    assert not good and "CUDA" in text and text.endswith("(exit 1)"), text


def test_all_parts_end_within_eight_minutes() -> None:
    processes = len(gpu_check.LIMITS) + 1  # the sanitizer's part has two
    assert list(gpu_check.LIMITS) == list(gpu_check.PARTS)
    assert sum(gpu_check.LIMITS.values()) + processes * gpu_check.GRACE <= 480


def test_what_runs_out_of_time_can_write_down_what_it_has(tmp_path: Path) -> None:
    script = (
        "import time\n"
        "try: print('begun'); time.sleep(60)\n"
        "except KeyboardInterrupt: open('kept', 'w').write('rows'); print('kept')"
    )
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{script}"]
    assert gpu_check.run(command, 3, tmp_path / "log") == (124, "kept")
    assert (tmp_path / "kept").read_text() == "rows"


def test_the_bench_tables_figures(tmp_path: Path) -> None:
    """Rates and ratios of one shape; backward is the training step less the forward pass."""
    shape = {"dtype": "bf16", "head_dim": 128, "seqlen": 16384, "heads": 16, "device": "cuda"}
    forward = Case(suite="forward", **shape)
    training = Case(suite="training", backward=True, **shape)
    seconds = {
        forward: {"flashattn_lite": 6e-3, "sdpa_flash": 6.6e-3, "flash1": 12e-3},
        training: {"flashattn_lite": 24e-3, "sdpa_flash": 24.6e-3},
    }
    results = Results("", "", {}, {})
    for case, times in seconds.items():
        samples = {name: Samples(wall=[t]) for name, t in times.items()}
        results.rows.append(Row(case, samples=samples))
    results.save(tmp_path / "bench.json")
    name = forward.short()
    assert gpu_check.bench_table(tmp_path / "bench.json") == [
        "| | TFLOP/s | vs sdpa_flash | vs flash1 |",
        "|---|---:|---:|---:|",
        f"| forward {name} | 367 | 1.10 | 2.00 |",
        f"| training {name} | 321 | 1.02 |  |",
        f"| backward {name} | 305 | 1.00 |  |",
    ]


def test_the_decode_tables_say_the_ceilings_the_shares_and_the_aim(tmp_path: Path) -> None:
    plan = Plan("quick", dtypes=("bf16",), device="cuda")
    case = next(c for c in cases_of("paged", plan) if c.page_size == 64)
    samples = {name: Samples([1e-3]) for name in ("flashattn_lite", "contiguous")}
    ratios = {"contiguous": Ratio(1.0, 1.0, 1.0)}
    row = Row(case, samples, "flashattn_lite", "contiguous", ratios, peak=0.75)
    results = Results("", "", {}, {}, ceilings={"read": 2.9e12, "copy": 2.7e12}, rows=[row])
    results.save(tmp_path / "decode.json")
    lines = "\n".join(gpu_check.cache_table(tmp_path / "decode.json")).splitlines()
    ceilings, _, _, _, cells, *_, aim = lines
    assert ceilings == "ceilings: read: 2.9 TB/s; copy: 2.7 TB/s"
    assert cells.startswith(
        f"| {case.short()} | bf16 | 1.00 ms | 1.00 ms | 1.00 | 1.00-1.00 | 75% |"
    )
    assert f" {case.cache_bytes() / 1e6:.1f} |" in cells  # GB/s: in a millisecond
    assert aim == (
        "| paged: least share of the read rate, bf16, batch 64, 8192 keys, pages of 16 and 64 |  "
        "| 75% |  | 80% | missed |"
    )


def test_what_runs_out_of_time_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(60); open('late', 'w')"
    script = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"print('begun'); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    start = time.monotonic()
    status, last = gpu_check.run([sys.executable, "-c", script], 3, tmp_path / "log")
    assert (status, last) == (124, "begun")
    assert time.monotonic() - start < 30


FAULTY = """
import os, time
import gpu_session

def test_passes(): pass
def test_fails(): assert 1 == 2, "a number"
def test_hangs(): time.sleep(60)
def test_dies(): os._exit(7)
def test_faults():
    gpu_session.lost_context = lambda: "an illegal memory access"
    raise RuntimeError("a kernel faulted")
def test_comes_last(): pass
"""


def test_the_cases_go_on_behind_a_kernel_that_takes_its_process_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "test_faulty.py").write_text(FAULTY)
    monkeypatch.setattr(gpu_check, "SHARES", 2)
    monkeypatch.setenv("GPU_SESSION_SECONDS", "2")
    good, text = gpu_check.cases(tmp_path, str(tmp_path / "test_faulty.py"))
    first, *rest = text.splitlines()
    assert not good and first == "2 passed, 2 failed, 2 never ended of 6 tests"
    assert sorted(rest) == [
        "  - test_dies: it never ended, or its process died",
        "  - test_fails: AssertionError: a number assert 1 == 2",
        "  - test_faults: RuntimeError: a kernel faulted "
        "[the CUDA context is lost: an illegal memory access]",
        "  - test_hangs: it never ended, or its process died",
    ]
    log = (tmp_path / "log.txt").read_text()
    assert "Timeout (0:00:02)!" in log and 'raise RuntimeError("a kernel faulted")' in log
    assert sorted(p.name for p in tmp_path.glob("*.*")) == [
        *("cases.jsonl", "log.txt", "test_faulty.py")
    ]


def test_cases_that_cannot_begin_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "SHARES", 1)
    good, text = gpu_check.cases(tmp_path, str(tmp_path / "test_missing.py"))
    assert not good and text.startswith("no test ran; ERROR: file or directory not found"), text


def test_the_cases_are_divided_in_the_order_of_their_worth(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = [
        *("test_runs_in_a_graph", "test_case_table[a-float32-flash1]", "test_block_masks[b]"),
        *("test_case_table[a-float32-flash2]", "test_case_table[a-bfloat16-flash2]"),
        *("test_case_table_of_decode[a]", "test_case_table[b-float16-flash2]"),
    ]
    monkeypatch.setattr(gpu_session, "FILE", tmp_path / "outcomes")
    monkeypatch.setattr(gpu_session, "SHARES", 2)
    deselected: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    shares = []
    for share in range(2):
        monkeypatch.setattr(gpu_session, "SHARE", share)
        items: list[Any] = [SimpleNamespace(name=name, nodeid=name) for name in names]
        gpu_session.note(test=names[3], outcome="begun")  # is not run again
        gpu_session.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)  # type: ignore[arg-type]
        shares.append([item.name for item in items])
    assert shares == [[names[4], names[1], names[0]], [names[6], names[5], names[2]]]
    assert [item.name for item in deselected] == [names[3]]
    lines = gpu_session.read(tmp_path / "outcomes")
    assert {line["share"]: line["tests"] for line in lines if "tests" in line} == {0: 4, 1: 3}


def test_pytest_runs_without_the_projects_plugins(tmp_path: Path) -> None:
    """pytest-timeout and pytest-xdist may be missing: no option of theirs stops it."""
    command = [*gpu_check.PYTEST, "-p", "no:timeout", "-p", "no:xdist", "--co", gpu_check.TEST_FILE]
    status, last = gpu_check.run(command, 120, tmp_path / "log")
    assert status == 0, last
    selected = [*command, "-k", gpu_check.SANITIZED]
    status, last = gpu_check.run(selected, 120, tmp_path / "log")
    assert status == 0 and " 24/" in last, last
