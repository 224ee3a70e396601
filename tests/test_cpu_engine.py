"""The CPU engine, compiled without torch: every case on every instruction set of this machine.

native/cpu_engine.cpp holds the checks (values against double precision, guard pages, NaN in memory
that is not visible, 1, 2 and 3 threads bit for bit); these tests build it, run it and read its
verdict.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from native import build

ENGINE = build.ROOT / "csrc/cpu"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX2, *AVX512, "-mavx512bf16"]
ISA_FLAGS: dict[str, list[str]] = (
    {
        "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
        "avx512_bf16": AVX512_BF16,
        "avx512": AVX2 + AVX512,
        "avx2": AVX2,
        "baseline": [],
    }
    if platform.machine() == "x86_64"
    else {"neon": []}
)
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_file(source: Path, flags: Sequence[str]) -> Path:
    return build.build_object(source, [*build.CXX_FLAGS, "-fvisibility=hidden", *flags])


def engine_objects(flags: Sequence[str], amx_flags: Sequence[str] = ()) -> dict[str, Path]:
    """An object for each instruction set, and the others; amx_flags are for those of AMX alone."""
    of_amx = [*flags, *amx_flags]
    files = {isa: (f"attention_{isa}", [*flags, *own]) for isa, own in ISA_FLAGS.items()}
    files |= {name: (name, flags) for name in ("engine", "parallel")}
    files |= {"amx_support": ("amx_support", of_amx)}
    if "amx" in ISA_FLAGS:
        files["amx"] = ("attention_amx", [*of_amx, *ISA_FLAGS["amx"]])
    objects = build.side_by_side(
        lambda file: compile_file(ENGINE / f"{file[0]}.cpp", file[1]), files.values()
    )
    return dict(zip(files, objects, strict=True))


def program(name: str, flags: Sequence[str], amx_flags: Sequence[str] = ()) -> Path:
    # The reference needs no sanitizer, and would be slow with it.
    main = compile_file(build.ROOT / "tests/native/cpu_engine.cpp", ["-O2"])
    objects = engine_objects(flags, amx_flags).values()
    return build.link_program(name, [main, *objects], [*flags, "-pthread"])


def run(path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [path, *arguments], capture_output=True, text=True, env=os.environ | environment
    )


def available_isas() -> list[str]:
    listing = run(program("cpu_engine", ["-O3"]), "--isas")
    return listing.stdout.split()


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_every_case(isa: str) -> None:
    if isa not in available_isas():
        pytest.skip(f"this processor has no {isa}")
    done = run(program("cpu_engine", ["-O3"]), isa)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.search(rf"^{isa} \| (\d+) cases, 0 failures$", done.stdout, re.MULTILINE)
    # Far fewer would mean that the case table no longer runs.
    assert ran and int(ran[1]) >= 150, done.stdout


@pytest.mark.skipif("amx" not in ISA_FLAGS, reason="x86-64 instructions")
def test_amx_with_its_tile_instructions_in_software() -> None:
    """The AMX kernels where there is no AMX: all but the four instructions themselves."""
    if "avx512_bf16" not in available_isas():
        pytest.skip("this processor has no AVX-512 BF16, which the AMX kernels use beside tiles")
    tiles = build.ROOT / "tests/native/amx_tiles.h"
    path = program("cpu_engine_amx_tiles", ["-O3"], [f'-DFAL_AMX_TILES="{tiles}"'])
    done = run(path, "amx")
    ran = re.search(r"^amx \| (\d+) cases, 0 failures$", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and ran and int(ran[1]) >= 150, done.stdout + done.stderr


def test_every_case_under_sanitizers() -> None:
    done = run(program("cpu_engine_sanitized", ["-O1", *SANITIZERS]), "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_offsets_past_two_to_the_31() -> None:
    done = run(program("cpu_engine", ["-O3"]), "--big-strides")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "big strides: 0 failures\n"


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_an_isa_leaves_nothing_to_merge(isa: str) -> None:
    # A weak function symbol could replace another object's copy, and run on every machine.
    symbols = subprocess.run(
        ["nm", "-C", engine_objects(["-O3"])[isa]], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    weak = [line for line in symbols if line.split()[-2:-1] and re.search(r" [WVu] ", line)]
    assert [line for line in weak if "DW.ref.__gxx_personality_v0" not in line] == []
    assert any(re.search(rf" [RD] fal::cpu::kernels_{isa}$", line) for line in symbols)


def instructions(isa: str) -> str:
    command = ["objdump", "-d", "--no-show-raw-insn", engine_objects(["-O3"])[isa]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instructions")
def test_each_isa_uses_its_registers_and_no_others() -> None:
    assert len(re.findall(r"vfmadd\w+ps .*%zmm", instructions("avx512"))) > 100
    assert len(re.findall(r"vdpbf16ps .*%zmm", instructions("avx512_bf16"))) > 100
    avx2 = instructions("avx2")
    assert len(re.findall(r"vfmadd\w+ps .*%ymm", avx2)) > 100
    assert "%zmm" not in avx2
    assert "%ymm" not in instructions("baseline")


CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason=f"needs {CROSS} and {EMULATOR}"
)
def test_neon_under_an_emulator() -> None:
    objects = []
    for source, level in (
        ("csrc/cpu/attention_neon.cpp", "-O3"),
        ("csrc/cpu/engine.cpp", "-O3"),
        ("csrc/cpu/parallel.cpp", "-O3"),
        ("tests/native/cpu_engine.cpp", "-O2"),
    ):
        path = build.ROOT / source
        output = build.BUILD / f"{path.stem}-aarch64.o"
        command = [CROSS, *build.CXX_FLAGS, "-fvisibility=hidden", level, "-c", str(path)]
        objects.append(build.make(output, command, [path], depfile=True))
    link = [CROSS, "-static", "-pthread", *map(str, objects)]
    engine = build.make(build.BUILD / "cpu_engine-aarch64", link, objects, depfile=False)
    # All cases take minutes here; these pass through every file of the engine.
    for case in ("causal", "everything", "varlen_everything", "paged_5", "nan_value_window"):
        done = subprocess.run([EMULATOR, engine, "neon", case], capture_output=True, text=True)
        assert done.stdout == "neon | 3 cases, 0 failures\n", done.stdout + done.stderr


def test_the_environment_selects_the_isa() -> None:
    path = program("cpu_engine", ["-O3"])
    for isa in available_isas():
        assert run(path, "--active", FAL_CPU_ISA=isa).stdout.strip() == isa
    assert run(path, "--active", FAL_CPU_ISA="none").stdout.strip() == available_isas()[0]
