"""What ptxas says about each CUDA kernel, without a GPU: registers, spills, and the SASS itself.

    python tests/native/ptxas.py     writes tests/data/ptxas_sm80.json and ptxas_sm90a.json

The tables are committed; tests/test_cuda_static.py compares a fresh compilation with them. bfloat16
stands for both element types: float16 kernels differ in one opcode.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
BUILD = Path(__file__).resolve().parent / "build"
ARCHITECTURES = ("80", "90a")
FLAGS = ("-O3", "-std=c++17", "-Xptxas", "-v", "-DFAL_CUDA_ARCHITECTURES=static_check")

# {kernel: {"registers": n, "spill_stores": bytes, "spill_loads": bytes, "stack": bytes}}
Report = dict[str, dict[str, int]]


def table(architecture: str) -> Path:
    return ROOT / "tests" / "data" / f"ptxas_sm{architecture}.json"


@functools.cache
def find_nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc")


@functools.cache
def find_nvdisasm() -> str | None:
    """On PATH, beside nvcc, or in the wheel nvidia-cuda-nvdisasm or triton."""
    places = [
        Path(root) / "nvidia" / name / "bin" / "nvdisasm"
        for root in (*site.getsitepackages(), site.getusersitepackages())
        for name in ("cu13", "cuda_nvdisasm")
    ]
    places += [
        Path(root) / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm"
        for root in site.getsitepackages()
    ]
    if nvcc := find_nvcc():
        places.append(Path(nvcc).resolve().parent / "nvdisasm")
    found = shutil.which("nvdisasm")
    return found or next((str(p) for p in places if os.access(p, os.X_OK)), None)


def sources() -> list[Path]:
    """The files whose kernels have tensor cores in them."""
    return sorted([*CUDA.glob("flash*_bf16.cu"), *CUDA.glob("decode_bf16.cu")])


def demangle(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def short_name(name: str) -> str:
    """flash2_forward_kernel<128, NoScoreMod, ContiguousKv>: what tells kernels apart. Tiles go
    without saying unless they are listed."""
    name = re.sub(r"\(.*\)$", "", name.removeprefix("void "))
    name = name.replace(", fal::cuda::BandTiles", "")
    name = re.sub(r"fal::cuda::|fal::|__nv_bfloat16, |<__nv_bfloat16>", "", name)
    return re.sub(r"(\w+)<\w+Config<(.*)> ?>$", r"\1<\2>", name).replace(" >", ">")


def _compile(source: Path, architecture: str) -> tuple[Path, str]:
    """The cubin and ptxas' report, kept until a source or a flag changes."""
    nvcc = find_nvcc()
    assert nvcc
    inputs = sorted([*CUDA.glob("*.*"), *(ROOT / "csrc" / "core").glob("*.h")])
    key = hashlib.sha256(repr((FLAGS, architecture, source.name)).encode())
    for path in inputs:
        if path.suffix != ".cu" or path == source:
            key.update(path.read_bytes())
    stem = BUILD / f"{source.stem}-sm{architecture}-{key.hexdigest()[:12]}"
    cubin, report = stem.with_suffix(".cubin"), stem.with_suffix(".txt")
    if not (cubin.exists() and report.exists()):
        BUILD.mkdir(exist_ok=True)
        temporary = stem.with_suffix(f".{os.getpid()}.cubin")
        done = subprocess.run(
            [nvcc, *FLAGS, f"-arch=sm_{architecture}", "-cubin", "-o", temporary, source],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stdout}{done.stderr}")
        report.write_text(done.stdout + done.stderr)
        temporary.replace(cubin)
    return cubin, report.read_text()


@functools.cache
def compile_all(architecture: str) -> dict[Path, tuple[Path, str]]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(lambda source: _compile(source, architecture), sources())
        return dict(zip(sources(), results, strict=True))


def report(architecture: str) -> Report:
    """Of every kernel, what ptxas -v printed."""
    text = "\n".join(text for _, text in compile_all(architecture).values())
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?\n.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    names = [short_name(name) for name in demangle([f[0] for f in found])]
    keys = ("stack", "spill_stores", "spill_loads", "registers")
    return {
        name: dict(zip(keys, map(int, values), strict=True))
        for name, (_, *values) in sorted(zip(names, found, strict=True))
    }


@functools.cache
def sass(architecture: str) -> dict[str, str]:
    """The machine code of every kernel, as text. Needs nvdisasm."""
    nvdisasm = find_nvdisasm()
    assert nvdisasm
    result = {}
    for cubin, _ in compile_all(architecture).values():
        done = subprocess.run([nvdisasm, cubin], capture_output=True, text=True, check=True)
        parts = re.split(r"^//-+ ([.\w]+) +-+$", done.stdout, flags=re.MULTILINE)[1:]
        code = {n.removeprefix(".text."): c for n, c in zip(parts[::2], parts[1::2], strict=True)}
        names = [n for n, c in code.items() if f".text.{n}:" in c]
        result |= {short_name(d): code[n] for n, d in zip(names, demangle(names), strict=True)}
    return result


def main() -> None:
    for architecture in ARCHITECTURES:
        kernels = report(architecture)
        table(architecture).write_text(json.dumps(kernels, indent=1) + "\n")
        families = Counter(name.partition("_kernel<")[0] for name in kernels)
        counts = ", ".join(f"{count} {family}" for family, count in families.items())
        print(f"{table(architecture)}: of each element type {counts}")


if __name__ == "__main__":
    sys.exit(main())
