"""Builds test modules in which CUDA kernels run on the SIMT emulator (csrc/simt).

    module = load("gemm", sources=[NATIVE / "gemm_binding.cpp"], kernels=[CUDA / "gemm.cu"])

Kernels and whatever launches them go under `kernels`; the pybind11 side, which includes
simt_binding.h, under `sources`.
"""

import hashlib
import importlib.util
import os
import shlex
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from native.build import BUILD, CXX, CXX_FLAGS, MODULE_FLAGS, ROOT, make

NATIVE = ROOT / "tests" / "native"
CUDA = ROOT / "csrc" / "cuda"
SIMT = ROOT / "csrc" / "simt"

# -g1: the line tables that turn addresses into file:line. No contraction: the same bits everywhere.
SHARED_FLAGS = ["-g1", "-ffp-contract=off", *MODULE_FLAGS]
# The emulator itself, never instrumented.
RUNTIME_FLAGS = ["-O3", "-march=native"]
# -fsanitize=thread puts a hook call before each memory access (csrc/simt/tsan_hooks.cpp; the
# sanitiser's own library is not linked); variables without an initialiser hold a known pattern;
# equal code in different branches is not merged, which would move call sites and hide divergence.
KERNEL_FLAGS = [
    "-O2",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-ftrivial-auto-var-init=pattern",
    "-fno-crossjumping",
    "-fno-tree-tail-merge",
    "-fno-code-hoisting",
    "-fno-tree-pre",
    "-fno-ipa-icf",
    "-Wno-unused-parameter",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-tsan",
]


def compile_object(source: Path, flags: Sequence[str]) -> Path:
    key = hashlib.sha256("\0".join([CXX, str(source), *flags]).encode()).hexdigest()[:12]
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    command = [*shlex.split(CXX), *CXX_FLAGS, *flags, *language, "-c", str(source)]
    return make(BUILD / f"{source.stem}-{key}.o", command, [source], depfile=True)


def build_module(
    name: str,
    sources: Sequence[Path],
    kernels: Sequence[Path],
    *,
    flags: Sequence[str] = (),
    kernel_flags: Sequence[str] = (),
) -> Path:
    """Builds the pybind11 module `name` with the emulator linked in and returns its path.

    Args:
        name: the PYBIND11_MODULE's name.
        sources: C++ files compiled plainly at -O2.
        kernels: .cu files with kernels and their launchers.
        flags: extra compiler flags for `sources`.
        kernel_flags: extra compiler flags for `kernels`.
    """
    jobs = [(s, [*SHARED_FLAGS, "-O2", *flags]) for s in map(Path, sources)]
    jobs += [(k, [*SHARED_FLAGS, *KERNEL_FLAGS, *kernel_flags]) for k in map(Path, kernels)]
    jobs += [(s, [*SHARED_FLAGS, *RUNTIME_FLAGS]) for s in sorted(SIMT.glob("*.cpp"))]
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        objects = list(pool.map(lambda job: compile_object(*job), jobs))
    output = BUILD / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    link = [CXX, "-shared", "-pthread", "-Wl,-Bsymbolic", *map(str, objects)]
    return make(output, link, objects, depfile=False)


def load(
    name: str,
    sources: Sequence[Path],
    kernels: Sequence[Path],
    *,
    flags: Sequence[str] = (),
    kernel_flags: Sequence[str] = (),
) -> ModuleType:
    """Builds the module if needed and imports it."""
    path = build_module(name, sources, kernels, flags=flags, kernel_flags=kernel_flags)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
