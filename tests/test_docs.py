"""README and docs say what is true: commands exist with their options, links lead somewhere, and
the README's example runs and its table is the benchmark's."""

import platform
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from flashattn_lite import cli
from flashattn_lite.bench.cases import DTYPES
from flashattn_lite.bench.serving import command as bench_serving
from flashattn_lite.bench.suites import SUITES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# Rows of the README's table: what docs/performance.md calls their groups.
SPEED = {
    "forward, dense": [f"forward: {dtype} dense" for dtype in DTYPES],
    "forward, causal": [f"forward: {dtype} causal" for dtype in DTYPES],
    "forward + backward, dense": [f"training: {dtype} dense" for dtype in DTYPES],
    "forward + backward, causal": [f"training: {dtype} causal" for dtype in DTYPES],
    "one token over 4096 keys, 4 query heads to a K/V head": [
        f"decode: {dtype}, 4 query heads to a K/V head" for dtype in DTYPES
    ],
    "window of 128 at length 4096, against a mask": ["masks: window 128 at 4096, against a mask"],
    "12.5 % of the blocks at length 4096, against a mask": [
        "sparse: 12.5 % of the blocks, against a boolean mask"
    ],
    "20 ragged sequences, against padding": ["masks: 20 ragged sequences, against padding"],
    "calls of 1 to 16 tokens": ["overhead: small calls, forward"],
    "the same, forward + backward": ["overhead: small calls, forward + backward"],
}


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    lines = (line for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def commands(page: Path) -> list[list[str]]:
    """The words of each command, in blocks and in the text, that runs something of ours."""
    text = page.read_text()
    blocks = [block.replace("\\\n", " ") for _, block in BLOCK.findall(text)]
    lines = [line for block in blocks for line in block.splitlines()]
    found = []
    for line in [*lines, *INLINE.findall(BLOCK.sub("", text))]:
        line = re.sub(r"^(time )?([A-Z_]+=\S+ )*", "", " ".join(line.split()))
        line = line.replace("python -m flashattn_lite", "flashattn-lite")
        line = line.replace("python -m pytest", "pytest")
        if re.match(r"(flashattn-lite|python|pytest|make) [^=]", line):
            found.append(shlex.split(line, comments=True))
    return found


def complaint(words: list[str]) -> str | None:
    """What is wrong with a command, if anything."""
    program, *rest = words
    if program == "make":
        return next((f"no target {w}" for w in rest if "=" not in w and w not in TARGETS), None)
    if program == "flashattn-lite":
        return _complaint_of_ours(rest)
    if rest[0] == "-m":  # a module of Python's own
        return None
    files = [w for w in rest if w.endswith(".py")]
    missing = [f for f in files if not (ROOT / f).is_file()]
    source = "".join((ROOT / f).read_text() for f in files if f not in missing)
    missing += [w for w in rest if w.startswith("--") and f'"{w.split("=")[0]}"' not in source]
    return f"there is no {', '.join(missing)}" if missing else None


def _complaint_of_ours(words: list[str]) -> str | None:
    if len(words) == 1:  # a command's name, as text mentions it
        words = [*words, "--help"]
    try:
        if words[:2] == ["bench", "serving"]:
            bench_serving.parser().parse_args(words[2:])
            return None
        suites = getattr(cli.parser().parse_args(words), "suites", [])
    except SystemExit as stop:
        return "the program does not take that" if stop.code else None
    known = suites[:1] in (["report"], ["compare"]) or set(suites) <= set(SUITES)
    return None if known else f"not suites: {suites}"


@each_page
def test_commands_exist_with_their_options(page: Path) -> None:
    assert [(words, why) for words in commands(page) if (why := complaint(words))] == []


def test_mistakes_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 60
    for mistake in (
        "flashattn-lite bench forwards",
        "flashattn-lite bench --quik",
        "flashattn-lite bench serving --trase x",
        "python bench/none.py",
        "python bench/models.py --onli llama",
        "make nothing",
    ):
        assert complaint(mistake.split()), mistake


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", page.read_text())
    assert [w for w in links if ":" not in w and not (page.parent / w).exists()] == []


def test_what_the_design_says_where_to_find_is_there() -> None:
    text = (ROOT / "docs/design.md").read_text().split("\n## Where to find it\n", 1)[1]
    places = INLINE.findall("\n".join("|".join(c) for c in rows(text.split("\n## ", 1)[0])[2:]))
    assert len(places) > 80
    for place in places:
        file, _, name = place.partition(":")
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), place


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instructions")
@pytest.mark.parametrize("program", ["instructions", "reads"])
def test_the_programs_behind_the_numbers_compile(program: str) -> None:
    source = ROOT / "bench/micro" / f"{program}.cpp"
    flags = ["-std=c++17", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi", f"-I{ROOT}"]
    subprocess.run(["g++", "-fsyntax-only", *flags, source], check=True)


def test_the_example_of_the_readme_runs() -> None:
    example = next(t for kind, t in BLOCK.findall((ROOT / "README.md").read_text()) if kind)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["q"].grad.shape == names["q"].shape  # type: ignore[attr-defined]


def test_the_table_of_the_readme_is_the_benchmarks() -> None:
    command = "flashattn-lite bench --quick --threads 1 --clock cpu"
    report = (ROOT / "docs/performance.md").read_text().split(f"\n{command}\n", 1)[1]
    groups = rows(report.split("\nRows in which", 1)[0])[2:]
    aims = {cells[0]: (float(cells[2]), float(cells[3])) for cells in groups if cells[1]}
    readme = (ROOT / "README.md").read_text()
    assert f"`{command}`" in readme
    table = {
        cells[0].removeprefix("**losses**: "): [cell for cell in cells[1:] if cell]
        for cells in rows(readme)
    }
    for name, of_the_row in SPEED.items():
        for cell, group in zip(table[name], of_the_row, strict=True):
            for number, measured in zip(cell.split(", least "), aims[group], strict=False):
                last_place = 10.0 ** -len(number.partition(".")[2])
                assert float(number) == pytest.approx(measured, abs=0.51 * last_place), (name, cell)
