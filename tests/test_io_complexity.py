"""FlashAttention's IO complexity, reproduced: the bytes that kernels move through device memory, as
the emulator counts them, are those that the papers' loops predict."""

import re

import io_complexity
import pytest
import torch
from io_complexity import Run

from flashattn_lite import reference, testing
from flashattn_lite.bench import io_model

RUNS = [
    Run(which, seqlen, causal, tile)
    for which in io_complexity.NAMES
    for seqlen in (256, 512, 1024)
    for causal in (False, True)
    for tile in (io_complexity.TILES if which != "standard" else (io_complexity.LIBRARY_TILE,))
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_traffic_is_what_the_loops_predict(run: Run) -> None:
    count, expected = io_complexity.attention(run)[2], io_complexity.predict(run)
    assert count.read == pytest.approx(expected.read, rel=0.01)
    assert count.written == pytest.approx(expected.written, rel=0.01)


@pytest.mark.parametrize("which", io_complexity.NAMES)
@pytest.mark.parametrize("causal", (False, True))
def test_what_is_counted_computes_attention(which: str, causal: bool) -> None:
    q, k, v = io_complexity.inputs(256)
    for tile in io_complexity.TILES:
        out, lse, _ = io_complexity.attention(Run(which, 256, causal, tile), check=True)
        truth = reference.attention(q, k, v, causal=causal)
        low = reference.attention(q, k, v, causal=causal, precision=torch.bfloat16)
        testing.check_within_budget("out", out, truth[0], low[0])
        testing.check_within_budget("lse", lse, truth[1], low[1])


def test_growth() -> None:
    """Standard attention moves Theta(N d + N^2) bytes; the others Theta(N^2 d^2 / M), which halves
    when the on-chip tile doubles, up to what does not depend on it."""

    def total(which: str, seqlen: int, tile: int = 128) -> int:
        return io_complexity.attention(Run(which, seqlen, False, tile))[2].total

    for which in io_complexity.NAMES:
        assert total(which, 1024) / total(which, 512) == pytest.approx(4, rel=0.2)
    for which in ("flash1", "flash2"):
        assert total(which, 1024, 64) / total(which, 1024, 128) == pytest.approx(2, rel=0.2)
    assert total("standard", 1024) > 2 * total("flash1", 1024) > 4 * total("flash2", 1024)


def test_the_model_has_the_kernels_tiles() -> None:
    def constant(file: str, name: str) -> int:
        text = (io_complexity.ROOT / "csrc" / file).read_text()
        found = re.search(rf"constexpr int {name} =(?: kHeadDim <= 128 \?)? (\d+)", text)
        assert found is not None, f"{file} has no {name}"
        return int(found[1])

    assert constant("cpu/tile_gemm.h", "kTileRows") == io_model.CPU_ROWS
    assert constant("cpu/amx_forward.h", "kAmxMaxTileRows") == io_model.AMX_ROWS
    assert constant("cuda/flash1_forward.cuh", "kTileM") == io_model.FLASH1_ROWS
    assert constant("cuda/flash1_forward.cuh", "kTileN") == io_model.FLASH1_KEYS
    assert constant("cuda/flash2_forward.cuh", "kTileM") == io_model.FLASH2_ROWS
