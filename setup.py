"""Builds flashattn_lite/_C.so: one shared library with no Python and no torch headers in it.

It binds to torch's stable C interface when it is loaded, so one py3-none wheel serves every Python
>= 3.10 and every torch >= 2.10, and building needs neither torch nor Python headers.

Environment:
  FAL_CUDA=auto|0|1     compile the CUDA kernels if nvcc is found (auto), never, or insist on it
  FAL_CUDA_ARCHS        "80;90a" by default; the highest plain number gives PTX for later GPUs too
  NVCC, CUDA_HOME, CXX  where the compilers are
  MAX_JOBS              parallel compilations
"""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import ninja
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
CXX_FLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -g0 -fno-math-errno "
    "-Wall -Wextra -Wno-unknown-pragmas"
)

# Flags of files whose stem ends so; compiled only on that processor family.
X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")
AVX2_FLAGS = "-mavx2 -mfma -mf16c"
AVX512_FLAGS = AVX2_FLAGS + " -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
# Of those, what older compilers lack: their files are left out, and the library says so.
OPTIONAL_ISAS = {"_amx": "FAL_WITHOUT_AMX", "_avx512_bf16": "FAL_WITHOUT_AVX512_BF16"}
ISA_FLAGS = {
    "_avx2": (X86, AVX2_FLAGS),
    "_avx512": (X86, AVX512_FLAGS),
    "_avx512_bf16": (X86, AVX512_FLAGS + " -mavx512bf16"),
    "_amx": (X86, AVX512_FLAGS + " -mavx512bf16 -mamx-tile -mamx-bf16"),
    "_neon": (ARM, ""),
}


def find_nvcc() -> str | None:
    """The nvcc to use, or None for a CPU-only build."""
    mode = os.environ.get("FAL_CUDA", "auto").lower()
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"FAL_CUDA is {mode!r}; it must be auto, 0 or 1")
    if mode == "0":
        return None
    homes = [
        Path(os.environ[name]) / "bin/nvcc"
        for name in ("CUDA_HOME", "CUDA_PATH")
        if name in os.environ
    ]
    for candidate in (
        os.environ.get("NVCC"),
        *homes,
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ):
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    if mode == "1":
        raise SystemExit(
            "FAL_CUDA=1 but no nvcc was found; set NVCC or CUDA_HOME, or use FAL_CUDA=0"
        )
    return None


def cudart_directory(nvcc: str) -> str:
    """Where nvcc itself looks for libcudart_static.a (it may be a wrapper script, so ask it)."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull]
    output = subprocess.run(command, capture_output=True, text=True).stderr
    top = next(
        line.split("=", 1)[1].strip() for line in output.splitlines() if line.startswith("#$ TOP=")
    )
    for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (Path(top) / name / "libcudart_static.a").exists():
            return str(Path(top) / name)
    raise SystemExit(f"libcudart_static.a was not found under {top}")


def cuda_architectures() -> list[str]:
    return os.environ.get("FAL_CUDA_ARCHS", "80;90a").replace(",", ";").split(";")


def ptx_of(architectures: list[str]) -> str | None:
    """The newest portable one: its PTX is compiled for later GPUs by the driver."""
    return max((a for a in architectures if a.isdigit()), key=int, default=None)


def gencode(architectures: list[str]) -> str:
    """SASS for each architecture, and PTX of the newest portable one."""
    flags = [f"-gencode arch=compute_{a},code=sm_{a}" for a in architectures]
    if portable := ptx_of(architectures):
        flags.append(f"-gencode arch=compute_{portable},code=compute_{portable}")
    return " ".join(flags)


def omitted_isas() -> list[str]:
    """The keys of OPTIONAL_ISAS whose flags the compiler does not take (g++ < 10 or < 11)."""
    if platform.machine().lower() not in X86:
        return []
    omitted = []
    for suffix in OPTIONAL_ISAS:
        flags = ISA_FLAGS[suffix][1]
        command = [*shlex.split(CXX), *flags.split(), "-x", "c++", "-c", os.devnull]
        if subprocess.run([*command, "-o", os.devnull], capture_output=True).returncode:
            print(f"{CXX} does not take {flags.split()[-1]}: building without {suffix[1:]}")
            omitted.append(suffix)
    return omitted


class NinjaFile:
    """build.ninja of the library: which files, with which flags.

    Paths are relative to ROOT, where ninja runs: the library then holds no path of the machine that
    built it (__FILE__), and a checkout in a folder with a space in its name builds too.
    """

    def __init__(self, build: Path, library: Path, nvcc: str | None) -> None:
        self.build = Path(os.path.relpath(build, ROOT))
        self.output = os.path.relpath(library, ROOT)
        self.nvcc = nvcc
        self.omitted = omitted_isas()
        self.lines = [
            f"builddir = {self.build}",
            "rule cxx",
            f"  command = {CXX} {CXX_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
            "rule nvcc",
            f"  command = {nvcc} -O3 -std=c++17 -ccbin {shlex.split(CXX)[0]} $flags "
            "-MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
            "rule stub",
            f"  command = {CXX} -shared -x c++ {os.devnull} -Wl,-soname,$soname -o $out",
            "rule link",
            f"  command = {CXX} -shared -s -o $out $in $flags",
            "  description = $out",
        ]

    def text(self) -> str:
        objects = [*self.cpp_objects(), *self.cuda_objects()]
        # Stubs put libtorch into DT_NEEDED; `import torch` has loaded the real one by then.
        stubs = [self.build / "libtorch.so", self.build / "libtorch_cpu.so"]
        for stub in stubs:
            self.lines += [f"build {stub}: stub", f"  soname = {stub.name}"]
        # Nothing is exported: static initialisers register the operators.
        exports = self.build / "exports.map"
        if not (ROOT / exports).exists():
            (ROOT / exports).write_text("{ local: *; };\n")
        flags = (
            f"-L{self.build} -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed "
            f"-Wl,--version-script={exports}"
        )
        if self.nvcc:
            flags += f" -L{cudart_directory(self.nvcc)} -lcudart_static -lpthread -ldl -lrt"
        self.lines += [
            f"build {self.output}: link {' '.join(objects)} | {stubs[0]} {stubs[1]} {exports}",
            f"  flags = {flags}",
            f"default {self.output}",
        ]
        return "\n".join(self.lines) + "\n"

    def object(self, rule: str, source: Path, flags: str) -> str:
        source = source.relative_to(ROOT)
        path = self.build / (str(source).replace(os.sep, ".") + ".o")
        self.lines += [f"build {path}: {rule} {source}", f"  flags = {flags}"]
        return str(path)

    def cpp_objects(self) -> list[str]:
        objects = []
        sources = [
            s for d in ("core", "cpu", "torch") for s in sorted(ROOT.glob(f"csrc/{d}/*.cpp"))
        ]
        for source in sources:
            machines, isa_flags = next(
                (v for suffix, v in ISA_FLAGS.items() if source.stem.endswith(suffix)), (None, "")
            )
            if machines and platform.machine().lower() not in machines:
                continue
            if source.stem.endswith(tuple(self.omitted)):
                continue
            defines = ["FAL_WITH_CUDA"] if self.nvcc else []
            if source.stem == "engine":
                defines += [OPTIONAL_ISAS[suffix] for suffix in self.omitted]
            flags = " ".join([isa_flags, *(f"-D{define}" for define in defines)])
            objects.append(self.object("cxx", source, flags))
        return objects

    def cuda_objects(self) -> list[str]:
        if not self.nvcc:
            return []
        architectures = cuda_architectures()
        common = (
            "-Xcompiler -fPIC,-fvisibility=hidden -Xfatbin -compress-all -Xptxas -warn-spills "
            f"-DFAL_CUDA_ARCHITECTURES={'_'.join(architectures)}"
        )
        objects = []
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
            # Files that need wgmma or TMA are for sm_90a alone.
            wanted = (
                [a for a in architectures if a.startswith("90")]
                if source.stem.endswith("_sm90")
                else architectures
            )
            flags = f"{common} {gencode(wanted)}"
            if source.stem == "device_info" and (portable := ptx_of(architectures)):
                flags += f" -DFAL_CUDA_PTX={portable}"
            if wanted:
                objects.append(self.object("nvcc", source, flags))
        return objects


class BuildNative(build_ext):
    """Compiles the library with ninja; only what changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # no Python version or platform in the name

    def build_extension(self, ext: Extension) -> None:
        if shutil.which(shlex.split(CXX)[0]) is None:
            raise SystemExit(
                f"there is no {CXX} on PATH: install g++ (apt-get install g++), or name another "
                "C++17 compiler in CXX"
            )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not (jobs.isdigit() and int(jobs)):
            raise SystemExit(f"MAX_JOBS is {jobs!r}; it must be a whole number above 0")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        ninja_file = build / "build.ninja"
        ninja_file.write_text(NinjaFile(build, library, find_nvcc()).text())
        program = Path(ninja.BIN_DIR) / "ninja"
        if subprocess.run([program, "-f", ninja_file, "-j", jobs], cwd=ROOT).returncode:
            raise SystemExit("compiling failed: what the compiler said is above")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("flashattn_lite._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
