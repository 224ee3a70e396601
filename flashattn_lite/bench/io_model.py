"""Bytes of device memory that forward attention moves, by the loops that the papers give.

Nothing is taken to stay in a cache from one tile to the next. tests/io_complexity.py counts the
same loops' bytes on the emulator, and finds them within 1 % of these (docs/io_complexity.md).
FlashAttention: Dao et al., 2022 (arXiv:2205.14135), algorithm 1 and theorem 2; FlashAttention-2:
Dao, 2023 (arXiv:2307.08691), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashattn_lite.bench.cases import Case

FLOAT = 4  # bytes of the softmax's state and of FlashAttention's unfinished O
# Tiles of standard attention's two products, and of the library's kernels: csrc/cpu/tile_gemm.h,
# csrc/cpu/amx_forward.h, csrc/cuda/flash1_forward.cuh, csrc/cuda/flash2_forward.cuh.
STANDARD_TILE = 128
CPU_ROWS, AMX_ROWS = 192, 512
FLASH1_ROWS, FLASH1_KEYS = 64, 128
FLASH2_ROWS = 128


@dataclass(frozen=True)
class Bytes:
    """Of one head."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def standard(seqlen: int, head_dim: int, element: int, *, tile: int = STANDARD_TILE) -> Bytes:
    """S = Q K^T, P = softmax(S), O = P V, a kernel each: N^2 elements four times, masked or not;
    Q, K and V once per tile of the other side, as a matrix product in tiles reads them.

    >>> standard(1024, 64, 2).written == 2 * 1024 * 1024 * 2 + 1024 * (64 * 2 + 4)
    True
    """
    n, row = seqlen, head_dim * element
    return Bytes(
        read=3 * -(-n // tile) * n * row + 2 * n * n * element,
        written=2 * n * n * element + n * row + n * FLOAT,
    )


def flash1(
    seqlen: int, head_dim: int, element: int, *, causal: bool, rows: int, keys: int
) -> Bytes:
    """FlashAttention: K and V once. For every (tile of keys, tile of rows) that sees it: Q; and O,
    m and l, except that the first visit reads none of them and the last writes `out` and LSE."""
    n, row, state = seqlen, head_dim * element, head_dim * FLOAT + 2 * FLOAT
    read, written = 2 * n * row, 0
    for begin in range(0, n, rows):
        count = min(rows, n - begin)
        visits = -(-(min(n, begin + count) if causal else n) // keys)
        read += count * (visits * row + (visits - 1) * state)
        written += count * ((visits - 1) * state + row + FLOAT)
    return Bytes(read, written)


def flash2(seqlen: int, head_dim: int, element: int, *, causal: bool, rows: int) -> Bytes:
    """FlashAttention-2: Q once, O and LSE once; K and V as far as they are seen, for every tile of
    rows."""
    n, row = seqlen, head_dim * element
    ends = (min(n, begin + rows) for begin in range(0, n, rows))
    keys = sum(end if causal else n for end in ends)
    return Bytes(read=n * row + 2 * keys * row, written=n * row + n * FLOAT)


def bytes_of(case: Case, contender: str, isa: str) -> int | None:
    """All heads' bytes of a dense or causal case; None for a contender whose loop is its own.

    Args:
        contender: "standard", "flash1", or this library.
        isa: the CPU's instruction set in use, on which its tiles depend.
    """
    shape = (case.seqlen, case.head_dim, case.torch_dtype.itemsize)
    if contender == "standard":
        found = standard(*shape)
    elif contender == "flash1":
        found = flash1(*shape, causal=case.causal, rows=FLASH1_ROWS, keys=FLASH1_KEYS)
    elif contender == "flashattn_lite":
        found = flash2(*shape, causal=case.causal, rows=_rows(case, isa))
    else:
        return None
    return found.total * case.batch * case.heads


def _rows(case: Case, isa: str) -> int:
    """Query rows of our tiles; on the CPU as even as possible, in sixteens."""
    if case.device != "cpu":
        return FLASH2_ROWS
    most = AMX_ROWS if isa == "amx" and case.dtype == "bf16" else CPU_ROWS
    tiles = -(-case.seqlen // most)
    return -(-case.seqlen // (16 * tiles)) * 16
