"""Every PTX wrapper on the emulator: the committed words, which a GPU is compared with as well."""

import struct

import pytest
import torch
from native import conformance
from native.conformance import Section, differences

UNSET = 0xDEADBEEF


@pytest.fixture(scope="module")
def emulated() -> dict[str, Section]:
    return {s.name: s for s in conformance.emulated_sections()}


def test_the_emulator_reproduces_the_committed_words(emulated: dict[str, Section]) -> None:
    committed = conformance.read()
    assert [s.name for s in committed] == list(emulated)
    for section in committed:
        assert section.compare == emulated[section.name].compare
        assert differences(section, emulated[section.name]) == []


def test_every_word_was_written(emulated: dict[str, Section]) -> None:
    for section in emulated.values():
        assert UNSET not in section.words, section.name


def test_every_wrapper_is_covered(emulated: dict[str, Section]) -> None:
    """Each function of the two headers is called by the conformance kernels."""
    import re

    from native.emulated import CUDA

    kernels = "".join((CUDA / f"conformance{s}.cu").read_text() for s in ("", "_sm90"))
    for header in ("ptx.cuh", "ptx_sm90.cuh"):
        names = set(re.findall(r"^FAL_PTX .*?(\w+)\(", (CUDA / header).read_text(), re.M))
        missing = {n for n in names if f"ptx::{n}(" not in kernels and f"ptx::{n}<" not in kernels}
        # Register counts have no result, and change what the whole kernel may use.
        assert missing <= {"setmaxnreg_inc", "setmaxnreg_dec"}, header


def sm80_inputs() -> list[int]:
    """The 1024 words of the sm_80 kernel."""
    x, inputs = 1, []
    for _ in range(1024):
        x = (x * 1664525 + 1013904223) % 2**32
        inputs.append(x >> 3)
    return inputs


def test_ldmatrix_by_definition(emulated: dict[str, Section]) -> None:
    """PTX ISA, ldmatrix: lane 8i + j points at row j of matrix i; lane l gets elements 2 (l % 4)
    and the next of row l / 4, or, transposed, of column l / 4."""
    tile = sm80_inputs()[:512]
    tile[(3 * 32 + 7) * 4 : (3 * 32 + 8) * 4] = [0] * 4  # the copy that was not valid
    halves = torch.tensor([(w >> shift) & 0xFFFF for w in tile for shift in (0, 16)]).view(128, 8)

    def dealt(rows: list[int], transposed: bool) -> list[list[int]]:
        matrices = halves[rows].view(-1, 8, 8)
        matrices = matrices.transpose(1, 2) if transposed else matrices
        low, high = matrices[..., 0::2], matrices[..., 1::2]
        return (low | high << 16).reshape(len(rows) // 8, 32).tolist()

    lanes = range(32)
    for name, rows, transposed in (
        ("ldmatrix_x4", list(lanes), False),
        ("ldmatrix_x4_trans", [lane ^ 5 for lane in lanes], True),
        ("ldmatrix_x2", [64 + (lane ^ 3) for lane in range(16)], False),
        ("ldmatrix_x2_trans", [32 + lane for lane in range(16)], True),
    ):
        words = torch.tensor(emulated[name].words).view(-1, 32).tolist()
        assert words == dealt(rows, transposed), name


@pytest.mark.parametrize("name", ["mma_m16n8k16_bf16", "mma_m16n8k16_f16"])
def test_mma_by_definition(emulated: dict[str, Section], name: str) -> None:
    """PTX ISA, matrix fragments for mma.m16n8k16."""
    inputs = sm80_inputs()
    a, b = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, 8, dtype=torch.float64)
    d = torch.zeros(16, 8, dtype=torch.float64)
    got = torch.zeros_like(d)
    for lane in range(32):
        group, pair = lane // 4, lane % 4 * 2
        x = [(inputs[lane * 12 + i] % 128 - 64) / 32 for i in range(12)]
        for i in range(8):  # a0 a1 of (group, pair), a2 a3 of (group + 8, pair), then 8 columns on
            a[group + i // 2 % 2 * 8, pair + i % 2 + i // 4 * 8] = x[i]
        for i in range(4):
            b[pair + i % 2 + i // 2 * 8, group] = x[8 + i]
        for i, value in enumerate((float(lane), 0.5, -2.0, 0.0)):
            at = group + i // 2 * 8, pair + i % 2
            d[at] = value
            got[at] = as_float(emulated[name].words[i * 32 + lane])
    assert torch.equal(got, a @ b + d)


def test_shuffles_by_definition(emulated: dict[str, Section]) -> None:
    inputs = sm80_inputs()[:32]
    rows = torch.tensor(emulated["shuffles"].words).view(6, 32).tolist()
    lanes = range(32)
    assert rows[0] == [inputs[(i + 9) % 32] for i in lanes]
    assert rows[1] == [inputs[i // 8 * 8 + 5] for i in lanes]
    assert rows[2] == [inputs[i ^ 5] for i in lanes]
    # lane ^ 12 is never in the lane's segment of 8, but may be in an earlier one, which is read.
    assert rows[3] == [inputs[min(i, i ^ 12)] for i in lanes]
    assert rows[4] == [inputs[i + 3] if i % 16 < 13 else inputs[i] for i in lanes]
    assert rows[5] == [inputs[i - 7] if i >= 7 else inputs[i] for i in lanes]


def as_float(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


def test_ex2_edges(emulated: dict[str, Section]) -> None:
    rows = torch.tensor(emulated["ex2_edges"].words).view(4, 32).tolist()
    inf = as_float(0x7F800000)
    for row, value in zip(rows, (0.0, 1.0, inf, 0.0), strict=True):
        assert {as_float(w) for w in row} == {value}


def matrices(seed_shift: int) -> torch.Tensor:
    """The (128, 64) inputs of the sm_90 kernel."""
    values, x = [], 7
    for _ in range(128 * 64):
        x = (x * 1664525 + 1013904223) % 2**32
        values.append((-2.0, -1.0, 0.0, 1.0, 2.0, 3.0)[(x >> seed_shift) % 6])
    return torch.tensor(values, dtype=torch.float64).view(128, 64)


@pytest.mark.parametrize(
    "name,columns,shift,a_transposed,b_rows,b_transposed",
    [
        ("wgmma_m64n64k16_ss_bf16", 64, 16, False, slice(64, 128), False),
        ("wgmma_m64n64k16_ss_bf16_transposed_b", 64, 16, False, slice(64, 128), True),
        ("wgmma_m64n64k16_ss_bf16_transposed_a", 64, 16, True, slice(64, 128), False),
        ("wgmma_m64n64k16_rs_bf16", 64, 16, False, slice(64, 128), False),
        ("wgmma_m64n128k16_ss_bf16", 128, 16, False, slice(0, 128), False),
        ("wgmma_m64n64k16_ss_f16", 64, 10, False, slice(64, 128), False),
        ("wgmma_m64n64k16_rs_f16", 64, 10, False, slice(64, 128), True),
        ("wgmma_m64n128k16_rs_f16", 128, 10, False, slice(0, 128), False),
    ],
)
def test_wgmma_is_a_matrix_product(
    emulated: dict[str, Section],
    name: str,
    columns: int,
    shift: int,
    a_transposed: bool,
    b_rows: slice,
    b_transposed: bool,
) -> None:
    tile = matrices(shift)
    a = tile[:64].t() if a_transposed else tile[:64]
    b = tile[b_rows] if b_transposed else tile[b_rows].t()
    words = torch.tensor([as_float(w) for w in emulated[name].words], dtype=torch.float64)
    registers = words.view(columns // 2, 128)  # [register, thread]
    result = torch.empty(64, columns, dtype=torch.float64)
    for i in range(columns // 2):
        for thread in range(128):
            warp, lane = thread // 32, thread % 32
            row = warp * 16 + lane // 4 + i // 2 % 2 * 8
            result[row, i // 4 * 8 + lane % 4 * 2 + i % 2] = registers[i, thread]
    assert torch.equal(result, a @ b)


def test_differences_respect_the_bound() -> None:
    one, next_ = 0x3F800000, 0x3F800001
    exact = Section("x", "exact", (one,))
    assert differences(exact, Section("x", "exact", (next_,))) == [
        "x word 0: expected 3f800000, got 3f800001"
    ]
    near = Section("x", "ulp 2", (one,))
    assert differences(near, Section("x", "ulp 2", (next_,))) == []
    assert len(differences(near, Section("x", "ulp 2", (one + 3,)))) == 1
    close = Section("x", "abs 0.001", (one,))
    assert differences(close, Section("x", "abs 0.001", (one + 1000,))) == []
    assert len(differences(close, Section("x", "abs 0.001", (0x3F810000,)))) == 1
