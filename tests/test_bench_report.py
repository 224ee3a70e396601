"""What the benchmark prints and draws: pages, plots, tables, progress."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_bench import SMALL, results_of, row_of

from flashattn_lite.bench import report, tables
from flashattn_lite.bench.progress import Progress
from flashattn_lite.bench.results import Row
from flashattn_lite.bench.timing import Samples


def test_report_has_every_table_and_its_command(tmp_path: Path) -> None:
    rows = [row_of(replace(SMALL, seqlen=n), f) for n, f in ((128, 0.8), (256, 1.3))]
    for n in (1024, 2048):
        rows.append(row_of(replace(SMALL, suite="memory", seqlen=n), 2.0))
    results_of(*rows, Row(SMALL, failure="it broke")).save(tmp_path / "a-cpu.json")
    assert report.main([tmp_path / "a-cpu.json"], tmp_path / "docs") == 0
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert "## A CPU, avx2" in text
    assert "`flashattn-lite bench forward --quick`" in text
    assert "`flashattn-lite bench memory --quick`" in text
    assert "| forward: fp32 dense | 2 | 1.02 | 0.80 | 1.05 | missed |" in text
    assert "Rows in which the baseline is better: 1 of 4." in text
    assert "FAILED: 2x2 heads, length 40, head dim 16, dense, fp32: it broke" in text
    assert "absent   flex: why" in text


def test_papers_page_answers_what_the_rows_answer(tmp_path: Path) -> None:
    rows = []
    for n, standard in ((128, 2.0), (256, 8.0)):
        row = row_of(replace(SMALL, suite="papers", backward=True, seqlen=n), standard)
        row.ratios["standard"] = row.ratios.pop(row.baseline)
        row.samples["standard"] = row.samples.pop(row.baseline)
        row.baseline = "standard"
        rows.append(row)
    results_of(*rows).save(tmp_path / "a-cpu.json")
    assert report.main([tmp_path / "a-cpu.json"], tmp_path) == 0
    text = (tmp_path / "papers.md").read_text()
    assert "| 2.0-8.0x, geometric mean 4.0x | A CPU, avx2 |" in text
    assert text.count("| not measured yet | an NVIDIA GPU |") == 2  # FlashAttention (1)'s engine
    assert "| 2x2x256x16 dense | fp32 |" in text
    assert "2x2x256x16" not in (tmp_path / "performance.md").read_text()


def test_papers_page_answers_for_block_masks(tmp_path: Path) -> None:
    """Shares of the time of a full block mask in the same run, of each dtype and direction."""
    rows = []
    for backward, times in ((False, (0.26, 1.0)), (True, (0.5, 2.0))):
        for density, seconds in zip((0.25, 1.0), times, strict=True):
            case = replace(SMALL, suite="sparse", seqlen=256, block_density=density)
            row = row_of(replace(case, backward=backward), 2.0)
            row.samples[row.ours] = Samples([9.0], [seconds])
            rows.append(row)
    results_of(*rows).save(tmp_path / "a-cpu.json")
    results_of(rows[0]).save(tmp_path / "b-cpu.json")  # without a full mask: no answer
    paths = [tmp_path / "a-cpu.json", tmp_path / "b-cpu.json"]
    assert report.main(paths, tmp_path) == 0
    text = (tmp_path / "papers.md").read_text()
    assert text.count("| 25.0%-26.0% of the time with 25.0% of the blocks | A CPU, avx2 |") == 1


def test_report_draws_the_same_plots_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row_of(replace(SMALL, seqlen=n), f) for n, f in ((128, 0.8), (256, 1.3))]
    results_of(*rows).save(tmp_path / "a.json")
    plots = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert report.main([tmp_path / "a.json"], folder) == 0
        assert "(performance/a-forward.svg)" in (folder / "performance.md").read_text()
        plots.append((folder / "performance" / "a-forward.svg").read_bytes())
    assert plots[0] == plots[1]


def test_report_draws_and_states_the_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = []
    for n in (128, 256):
        row = row_of(replace(SMALL, suite="io", seqlen=n), 2.0)
        row.ratios, row.baseline = {"standard": row.ratios["sdpa"]}, "standard"
        row.samples |= {"standard": row.samples.pop("sdpa"), "read": Samples([0.01], [0.01])}
        row.moved = {"flashattn_lite": n, "standard": n * n}
        rows.append(row)
    results_of(*rows).save(tmp_path / "a.json")
    assert report.main([tmp_path / "a.json"], tmp_path) == 0
    assert "(performance/a-io.svg)" in (tmp_path / "performance.md").read_text()
    assert (
        "| 256.0x fewer at length 256, by the loop that runs |"
        in (tmp_path / "papers.md").read_text()
    )


def test_tables_align_and_strip_their_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    lines = tables.terminal(["case", "ratio"], [["dense", "+1.20"], ["x", "!10.00"]]).splitlines()
    assert lines[0] == "  case   ratio" and lines[2:] == ["  dense   1.20", "  x      10.00"]


def test_progress_reports_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "QUIET_S", 0.0)
    with Progress(4.0, "work") as progress:
        progress.step("first", 1.0)
        progress.step("second", 3.0)
    lines = capsys.readouterr().err.splitlines()
    assert "  0%" in lines[0] and "work: first" in lines[0]
    assert " 25%" in lines[1] and "left" in lines[1] and "work: second" in lines[1]
