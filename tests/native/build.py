"""Compiles the native test modules and programs: only what changed, into tests/native/build/.

An output is current when the command that made it, the compiler and every file that it was made
from are what they were. Concurrent builds are safe: a file appears whole or not at all.
"""

import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pybind11

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(__file__).resolve().parent / "build"
CXX = os.environ.get("CXX", "g++")
CXX_FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT}"]
MODULE_FLAGS = [
    "-fPIC",
    "-fvisibility=hidden",
    f"-isystem{pybind11.get_include()}",
    f"-isystem{sysconfig.get_path('include')}",
]


@functools.cache
def compiler_version(compiler: str) -> str:
    command = [*shlex.split(compiler), "-v"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def dependencies(depfile: Path) -> list[Path]:
    """The files that a compilation read, from gcc's -MD output."""
    text = depfile.read_text().replace("\\\n", " ")
    return [Path(name) for name in text.split(":", 1)[1].split()]


def is_current(output: Path, stamp: str, inputs: Sequence[Path]) -> bool:
    recorded = output.with_suffix(output.suffix + ".stamp")
    if not (output.exists() and recorded.exists() and recorded.read_text() == stamp):
        return False
    made = output.stat().st_mtime_ns
    return all(path.exists() and path.stat().st_mtime_ns < made for path in inputs)


def make(output: Path, command: Sequence[str], inputs: Sequence[Path], depfile: bool) -> Path:
    """Runs `command -o output` unless the output is current."""
    stamp = f"{compiler_version(CXX)}\n{shlex.join(command)}\n"
    record = output.with_suffix(output.suffix + ".d")
    known = dependencies(record) if depfile and record.exists() else list(inputs)
    if (record.exists() or not depfile) and is_current(output, stamp, known):
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{os.getpid()}")
    temporary_record = record.with_name(f"{record.name}.{os.getpid()}")
    extra = ["-MD", "-MF", str(temporary_record)] if depfile else []
    run([*command, *extra, "-o", str(temporary)])
    if depfile:
        temporary_record.replace(record)
    temporary.replace(output)
    output.with_suffix(output.suffix + ".stamp").write_text(stamp)
    return output


def build_object(source: Path, compile_flags: Sequence[str]) -> Path:
    """Compiles one file; no two builds with different flags share an object."""
    command = [*shlex.split(CXX), *compile_flags, "-c", str(source.resolve())]
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
    return make(BUILD / f"{source.stem}-{key}.o", command, [source], depfile=True)


def side_by_side(compile_one: Callable[[T], Path], what: Iterable[T]) -> list[Path]:
    """The objects of several files, as many compilations at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, what))


def build(
    output: Path, sources: Sequence[Path], compile_flags: Sequence[str], link_flags: Sequence[str]
) -> Path:
    """Compiles each source and links them."""
    objects = side_by_side(lambda source: build_object(source, compile_flags), sources)
    command = [*shlex.split(CXX), *link_flags, *map(str, objects)]
    return make(output, command, objects, depfile=False)


def link_program(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    """Links objects that were compiled with flags of their own, and returns the program's path."""
    command = [*shlex.split(CXX), *flags, *map(str, objects)]
    return make(BUILD / name, command, objects, depfile=False)


def build_extension(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """Builds the pybind11 module `name` (its PYBIND11_MODULE name) and returns its path.

    Args:
        name: the module's name.
        sources: the C++ files; includes are relative to the repository's root.
        flags: compiler flags beside CXX_FLAGS, given to the linker too. Default -O2.
    """
    output = BUILD / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    flags = ["-O2", *flags]
    return build(output, sources, [*CXX_FLAGS, *MODULE_FLAGS, *flags], ["-shared", *flags])


def load(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> ModuleType:
    """Builds the pybind11 module `name` if needed and imports it."""
    path = build_extension(name, sources, flags)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_program(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """Builds an executable and returns its path."""
    flags = ["-O1", *flags]
    return build(BUILD / name, sources, [*CXX_FLAGS, *flags], flags)
