"""Comparing fairly with a lesser processor: both sides are held to the same instruction set.

This library takes its instruction set from FAL_CPU_ISA; PyTorch's own kernels, oneDNN and MKL each
have a variable of their own. All are read when the libraries load, so the program starts itself
again with them set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

OURS = "FAL_CPU_ISA"
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


def environment(isa: str) -> dict[str, str]:
    """The variables that hold both sides to an instruction set.

    >>> environment("avx2")["ATEN_CPU_CAPABILITY"]
    'avx2'
    """
    if isa not in ENVIRONMENTS:
        raise ValueError(f"--isa is {isa!r}; it must be one of {', '.join(ENVIRONMENTS)}")
    return {**ENVIRONMENTS[isa], OURS: isa}


def is_set(isa: str, variables: Mapping[str, str] = os.environ) -> bool:
    return all(variables.get(name) == value for name, value in environment(isa).items())


def emulated() -> str | None:
    """The instruction set that both sides of this process are held to, or None."""
    return next((isa for isa in ENVIRONMENTS if is_set(isa)), None)


def restart(isa: str, arguments: Sequence[str]) -> NoReturn:
    """Runs ``python -m flashattn_lite`` with these arguments in this process's place."""
    command = [sys.executable, "-m", "flashattn_lite", *arguments]
    os.execve(sys.executable, command, {**os.environ, **environment(isa)})


def sentence(isa: str) -> str:
    """What the header says about it."""
    variables = " ".join(f"{name}={value}" for name, value in environment(isa).items())
    return f"both sides are held to {isa}: {variables}"
