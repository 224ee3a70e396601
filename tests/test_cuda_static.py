"""The CUDA kernels as nvcc compiles them: no worse than the committed tables, and made of the
instructions meant. Needs nvcc (and, for the second, nvdisasm); no GPU."""

import json
import re

import pytest
from native import ptxas, sass

needs_nvcc = pytest.mark.skipif(
    ptxas.find_nvcc() is None, reason="nvcc is not installed: the kernels cannot be compiled here"
)
needs_nvdisasm = pytest.mark.skipif(
    ptxas.find_nvdisasm() is None,
    reason="nvdisasm is not installed (pip install nvidia-cuda-nvdisasm): SASS cannot be read",
)
pytestmark = [needs_nvcc, pytest.mark.parametrize("architecture", ptxas.ARCHITECTURES)]


def test_no_worse_than_recorded(architecture: str) -> None:
    """After a change that is meant, write the tables anew: python tests/native/ptxas.py"""
    recorded = json.loads(ptxas.table(architecture).read_text())
    actual = ptxas.report(architecture)
    assert actual.keys() == recorded.keys(), "a kernel came or went: python tests/native/ptxas.py"
    for name, now in actual.items():
        for what, value in now.items():
            assert value <= recorded[name][what], f"{name}: {what} is {value}, was {recorded[name]}"


def test_no_spills_below_head_dim_256(architecture: str) -> None:
    """Nor in decode at any."""
    kernels = ptxas.report(architecture)
    checked = [n for n in kernels if re.search(r"flash[12]\w*<(64|128|192),|decode_", n)]
    assert len(checked) >= 38 + 10
    for name in checked:
        assert kernels[name]["spill_stores"] == kernels[name]["spill_loads"] == 0, name


@needs_nvdisasm
def test_kernels_use_the_instructions_meant(architecture: str) -> None:
    """Tensor cores fed by ldmatrix from asynchronously copied tiles; vector reductions on sm_90."""
    for name, code in ptxas.sass(architecture).items():
        # Keys of one byte are loaded 16 dims a lane and widened; values come by ldmatrix.
        keys = (
            (r"LDS\.128", "PRMT", "H(FMA|ADD)2") if "Quantised" in name else (r"LDSM\.16\.M88\.4",)
        )
        for instruction in (r"HMMA\.16816\.F32\.BF16", r"LDSM\.16\.MT88\.4", *keys):
            assert re.search(instruction, code), f"{name} has no {instruction}"
        assert re.search(r"LDGSTS\.E\.BYPASS[.\w]*\.128", code), f"{name} has no 16-byte cp.async"
        assert "LDGSTS.E.BYPASS.128.ZFILL" not in code, f"{name} computes cp.async source sizes"
        if name.startswith("flash2_backward_kernel") and architecture.startswith("90"):
            reductions = re.findall(r"RED\S*ADD\.F32\S*", code)
            assert reductions and all("F32x4" in r for r in reductions), (name, reductions)


@needs_nvdisasm
def test_copies_and_reads_keep_to_their_sides_of_the_barriers(architecture: str) -> None:
    """On every path of the machine code: what asm wrappers without a memory clobber would lose."""
    for name, code in ptxas.sass(architecture).items():
        # Decode's warps share nothing in their loop: each waits for its own lanes alone.
        warps = name.startswith("decode")
        barrier = sass.WARP_BARRIER if warps else sass.BLOCK_BARRIER
        assert list(sass.copy_violations(code, barrier)) == [], name


@needs_nvdisasm
@pytest.mark.parametrize(
    "removed,violation",
    [
        (r"BAR\.SYNC", "ldmatrix follows a wait with no barrier"),
        (r"BAR\.SYNC", "a copy follows ldmatrix with no barrier"),
        ("LDGDEPBAR", "a wait while copies are in no group"),
    ],
)
def test_what_is_taken_away_from_the_code_shows(
    architecture: str, removed: str, violation: str
) -> None:
    kernels = ptxas.sass(architecture)
    for name in (
        "flash1_forward_kernel<64, NoScoreMod>",
        "flash2_forward_kernel<128, NoScoreMod, ContiguousKv>",
        "flash2_backward_kernel<64, NoScoreMod, true>",
    ):
        code = re.sub(rf"\b{removed}[^;]*;", "NOP ;", kernels[name])
        found = list(sass.copy_violations(code, sass.BLOCK_BARRIER))
        assert any(violation in line for line in found), name
