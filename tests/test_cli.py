"""The command line: what it prints, what it refuses, what it exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashattn_lite
from flashattn_lite import _ops, demo
from flashattn_lite.bench import ceilings, command, isa, machine
from flashattn_lite.cli import main
from flashattn_lite.testing import Case


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_info_tells_what_is_active(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"flashattn_lite {flashattn_lite.__version__}" in text
    assert f"in use: {_ops.cpu_isa()}" in text
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["library"]["build"] == json.loads(_ops.build_info())
    assert facts["torch"]["version"] == torch.__version__
    assert facts["cpu"]["threads"] == len(machine.usable_processors())


def test_info_says_which_gpus_the_kernels_are_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = json.loads(_ops.build_info()) | {"cuda": {"architectures": "80,90a,compute_80"}}
    monkeypatch.setattr(_ops, "build_info", lambda: json.dumps(build))
    assert main(["info"]) == 0
    said = "CUDA     kernels for sm_80, sm_90a, compute_80 (PTX, for later GPUs); "
    assert said in capsys.readouterr().out


def test_the_module_is_the_command(tmp_path: Path) -> None:
    root = Path(flashattn_lite.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "flashattn_lite", "--version"],
        **{"capture_output": True, "text": True, "cwd": tmp_path, "check": True},
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == f"flashattn_lite {flashattn_lite.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["bench", "nothing"], "no suite nothing; suites: forward, training"),
        (["bench", "--threads", "0"], "'0' is not a list of numbers of threads like 1,2"),
        (["bench", "--threads", "1,x"], "'1,x' is not a list of numbers of threads"),
        (["bench", "--dtype", "fp8"], "'fp8': dtypes are fp32, bf16, fp16"),
        (["bench", "--budget", "-1"], "'-1' is not a number of seconds"),
        (["bench", "--isa", "mmx"], "invalid choice: 'mmx'"),
        (["bench", "--quick", "--full"], "not allowed with argument"),
        (["bench", "compare", "a.json"], "compare takes two files"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--threads", "4096"], "--threads 4096: this process may use"),
        (["bench", "--competitors", "nobody"], "--competitors has nobody; known: standard"),
        (["bench", "report", "none.json"], "none.json: No such file or directory"),
        (["bench", "compare", "a.json", "b.json"], "a.json: No such file or directory"),
        (["bench", "scaling", "--threads", "1", "--no-json"], "nothing to measure"),
        (["bench", "--json", "/dev/null/r.json"], "--json /dev/null/r.json: "),
    ],
)
def test_wrong_values_exit_with_2_and_say_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert f"flashattn-lite bench: {message}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["info"], ["bench", "--help"]], ids=" ".join)
def test_output_that_nobody_takes_ends_the_program_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Into `| head`, onto a full disk, or with stdout closed; nothing is left for the end."""
    read, write = os.pipe()
    os.close(read)
    for stream, status, said in (
        (os.fdopen(write, "w"), 141, ""),
        (
            os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"),
            1,
            "flashattn-lite: No space left on device\n",
        ),
        (None, 0, ""),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        try:
            assert main(words) == status
        except SystemExit as stop:  # argparse's own end, after --help
            assert (stop.code, status) == (0, 0)
        if stream is not None:
            stream.close()  # flushes
        assert capsys.readouterr().err == said


def test_a_folder_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    results = next((Path(__file__).parents[1] / "bench/results").glob("*-io.json"))
    assert main(["bench", "report", str(results), "--output", "/dev/null/docs"]) == 1
    assert capsys.readouterr().err == "flashattn-lite: /dev/null/docs: Not a directory\n"


def test_bench_prints_tables_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    words = ["bench", "forward", "--quick", "--threads", "1", "--dtype", "fp16", "--budget", "0"]
    assert main([*words, "--json", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("FMA fp32, 1 thread", "absent   ", "4x16x128x64 causal", "Aims", "Losses: "):
        assert part in text
    data = json.loads(path.read_text())
    assert data["command"] == f"flashattn-lite {' '.join(words)}"  # no path of this machine
    assert data["facts"]["torch"]["version"] == torch.__version__
    assert {row["case"]["dtype"] for row in data["rows"]} == {"fp16"}
    assert all(len(s["wall"]) >= 3 for row in data["rows"] for s in row["samples"].values())
    assert main(["bench", "compare", str(path), str(path)]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out


def test_an_inexact_row_makes_the_exit_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashattn_lite.bench import exactness

    monkeypatch.setattr(ceilings, "measure", lambda *_: {})
    monkeypatch.setattr(exactness, "error_budget", lambda *_, **__: 0.0)
    words = ["bench", "overhead", "--quick", "--dtype", "fp16", "--no-json"]
    assert main(words) == 1
    assert "flashattn_lite is inexact: out uses" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashattn_lite.bench import runner

    monkeypatch.setattr(ceilings, "measure", lambda *_: {})
    measure, path = runner.measure, tmp_path / "r.json"

    def one_then_stop(case: object, settings: object) -> object:
        if path.with_suffix(".mark").exists():
            raise KeyboardInterrupt
        path.with_suffix(".mark").touch()
        return measure(case, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "measure", one_then_stop)
    words = ["bench", "overhead", "--quick", "--dtype", "fp16", "--json", str(path)]
    assert main(words) == 130
    assert "interrupted: these are the rows" in capsys.readouterr().err
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_a_lesser_instruction_set_restarts_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    class RestartError(Exception):
        pass

    def restart(name: str, arguments: list[str]) -> None:
        raise RestartError(name, *arguments)

    monkeypatch.setattr(isa, "restart", restart)
    monkeypatch.delenv("FAL_CPU_ISA", raising=False)
    if "baseline" not in json.loads(_ops.build_info())["cpu"]["isas"]:
        pytest.skip("this processor has one instruction set only")
    with pytest.raises(RestartError, match="'baseline', 'bench', '--isa', 'baseline'"):
        main(["bench", "--isa", "baseline"])


def test_results_lie_in_the_checkout_or_in_the_current_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from test_bench import results_of

    results = results_of()
    monkeypatch.setattr(machine, "checkout", lambda: Path("/src"))
    assert command.default_path(results, ["forward"]) == Path(
        "/src/bench/results/a-avx2-forward-quick.json"
    )
    monkeypatch.setattr(machine, "checkout", lambda: None)
    path = command.default_path(results, ["forward"])
    assert path == Path("flashattn-lite-bench-a-avx2-forward-quick.json")


# ---- demo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", demo.FEATURES, ids=str)
def test_the_demo_measures_both_sides_of_every_feature(feature: Case) -> None:
    for error in demo.errors(feature):
        assert error.exact, error
        assert 0 < error.pytorch < 100 * error.allowed, error  # PyTorch computes the same thing


def test_the_demo_fails_when_a_result_is_inexact(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = demo.Error(ours=1.0, pytorch=1e-3, allowed=1e-2)
    monkeypatch.setattr(demo, "errors", lambda feature: (wrong, wrong))
    one = demo.speed_cases()[:1]
    monkeypatch.setattr(demo, "speed_cases", lambda: one)
    assert demo.main() == 1
    text = capsys.readouterr().out
    assert "INEXACT: " in text and "  causal, bf16\n" in text
