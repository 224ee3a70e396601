"""csrc/core's brute-force checks under AddressSanitizer and UndefinedBehaviorSanitizer."""

import re
import subprocess
from pathlib import Path

import pytest
from native.build import build_program

FLAGS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    source = Path(__file__).parent / "native/core_main.cpp"
    program = build_program("core_sanitized", [source], FLAGS)
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def test_the_core_is_clean() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    # Far fewer would mean that a loop no longer runs.
    assert int(re.fullmatch(r"(\d+) checks hold\n", done.stdout)[1]) > 1_000_000


@pytest.mark.parametrize(
    ("planted", "report"),
    [("signed-overflow", "signed integer overflow"), ("read-past-end", "heap-buffer-overflow")],
)
def test_the_sanitizers_are_on(planted: str, report: str) -> None:
    done = run(planted)
    assert done.returncode != 0
    assert report in done.stderr
