"""Checks a built wheel: what it is called, what it holds, and what its library needs to load.

    python check_wheel.py dist/flashattn_lite-0.1.0-py3-none-linux_x86_64.whl

Needs nothing but the standard library, nm and readelf. Prints one line, or every complaint and exit
status 1.
"""

import argparse
import email.message
import email.parser
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = ROOT / "tests/data/torch_2_10_exports.txt"
# Null where torch lacks them, and looked at before they are called (csrc/torch/stable_abi.h).
WEAK_TORCH_SYMBOLS = {
    "aoti_torch_get_current_cuda_stream",
    "torch_exception_get_what_without_backtrace",
}
WEAK_LINKER_SYMBOLS = {
    "__cxa_finalize",
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
}
# What a plain Linux with torch has.
SYSTEM_LIBRARIES = (
    r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+"
)
TORCH_LIBRARIES = r"libtorch(_cpu)?\.so"
PACKAGE_FILES = (
    r"flashattn_lite/([a-z]\w*/)*(\w+\.py|_C\.so|py\.typed)"
    r"|flashattn_lite/serving/tiny/(\w+\.json|model\.safetensors|README\.md)"
)
MAX_BYTES = 50 * 1000 * 1000


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def torch_exports() -> set[str]:
    """The C functions that torch 2.10's libtorch_cpu.so exports."""
    lines = EXPORTS.read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def printable_strings(data: bytes) -> list[str]:
    return [match.decode("ascii") for match in re.findall(rb"[\x20-\x7e]{6,}", data)]


def build_paths(data: bytes) -> list[str]:
    """Absolute paths of the machine that built the library."""
    source = r"(?<![\w.$%*-])/(?:[\w.+-]+/)+[\w.+-]+\.(?:cpp|cc|cxx|c|h|hpp|cu|cuh|inl|ii|o|a)\b"
    places = (
        re.escape(str(ROOT)) + r"(?![\w-])|(?<![\w.])/(?:home|root|tmp|build|work|usr/local)/\w"
    )
    return [s for s in printable_strings(data) if re.search(f"{source}|{places}", s)]


def library_complaints(library: Path) -> list[str]:
    """What is wrong with the shared library, one sentence each."""
    complaints = []
    defined = output("nm", "-D", "--defined-only", str(library)).split("\n")
    exported = sorted(line.split()[-1] for line in defined if line)
    if exported:
        complaints.append(f"the library exports {', '.join(exported[:5])}; it must export nothing")

    known = torch_exports()
    for line in output("nm", "-D", "--undefined-only", str(library)).splitlines():
        kind, name = line.split()[-2:]
        if "@" in name:  # versioned: glibc, libstdc++ or libgcc, by its NEEDED entry below
            continue
        weak = kind in "wv"
        if name in known or (weak and name in WEAK_TORCH_SYMBOLS | WEAK_LINKER_SYMBOLS):
            continue
        if re.match(r"_?Py[A-Z_]", name):
            complaints.append(f"the library needs Python's {name}; a py3-none wheel must not")
        elif re.match(r"_Z\w*(2at|3c10|5torch)", name):
            complaints.append(f"the library needs {name}, C++ of torch that changes with it")
        elif name in WEAK_TORCH_SYMBOLS:
            complaints.append(f"the library needs {name} strongly; it must be weak")
        else:
            complaints.append(f"the library needs {name}, which torch 2.10 does not export")

    dynamic = output("readelf", "-dW", str(library))
    for needed in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if not re.fullmatch(f"{SYSTEM_LIBRARIES}|{TORCH_LIBRARIES}", needed):
            complaints.append(f"the library needs {needed}")
    for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic):
        complaints.append(f"the library has a run path: {path}")
    for text in build_paths(library.read_bytes())[:5]:
        complaints.append(f"the library holds a path of the machine that built it: {text[:200]}")
    return complaints


def tag_complaints(wheel: Path) -> list[str]:
    name = re.fullmatch(r"flashattn_lite-([\w.+]+)-(\w+)-(\w+)-([\w.]+)\.whl", wheel.name)
    if not name:
        return [f"{wheel.name} is not a wheel's name"]
    _, python, abi, platform = name.groups()
    if (python, abi) != ("py3", "none") or not re.match(r"(linux|manylinux|musllinux)_", platform):
        return [f"the tag is {python}-{abi}-{platform}; it must be py3-none-<a Linux platform>"]
    return []


def metadata_complaints(archive: zipfile.ZipFile, info: str, wheel: Path) -> list[str]:
    """dist-info/METADATA and dist-info/WHEEL against the wheel's name and what is promised."""

    def headers(name: str) -> email.message.Message:
        return email.parser.Parser().parsestr(archive.read(f"{info}/{name}").decode())

    complaints = []
    metadata, built = headers("METADATA"), headers("WHEEL")
    wanted = {"Requires-Python": ">=3.10", "License-Expression": "BSD-3-Clause"}
    for key, value in wanted.items():
        if metadata[key] != value:
            complaints.append(f"METADATA has {key}: {metadata[key]}; it must be {value}")
    unconditional = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    if unconditional != ["torch>=2.10"]:
        complaints.append(f"METADATA requires {unconditional}; it must be ['torch>=2.10']")
    version = re.search(r'"(.*)"', archive.read("flashattn_lite/_version.py").decode())[1]
    if not (metadata["Version"] == version == wheel.name.split("-")[1]):
        complaints.append(
            f"the wheel is {wheel.name}, METADATA {metadata['Version']}, "
            f"flashattn_lite/_version.py {version}"
        )
    if f"-{built['Tag']}.whl" not in wheel.name:
        complaints.append(f"WHEEL has Tag: {built['Tag']}, unlike the file's name {wheel.name}")
    if built["Root-Is-Purelib"] != "false":
        complaints.append(f"WHEEL has Root-Is-Purelib: {built['Root-Is-Purelib']}")
    return complaints


def wheel_complaints(wheel: Path) -> list[str]:
    """What is wrong with the wheel, one sentence each."""
    complaints = tag_complaints(wheel)
    if wheel.stat().st_size >= MAX_BYTES:
        complaints.append(f"the wheel has {wheel.stat().st_size:,} bytes; 50 MB is the limit")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/")]
        info = next((n.rpartition("/")[0] for n in names if n.endswith(".dist-info/METADATA")), "")
        for name in names:
            if not (name.startswith(f"{info}/") or re.fullmatch(PACKAGE_FILES, name)):
                complaints.append(f"{name} does not belong in the wheel")
        for name in (
            "flashattn_lite/__init__.py",
            "flashattn_lite/_version.py",
            "flashattn_lite/py.typed",
            "flashattn_lite/_C.so",
            "flashattn_lite/serving/tiny/config.json",
            "flashattn_lite/serving/tiny/model.safetensors",
            "flashattn_lite/serving/tiny/tokenizer.json",
            f"{info}/METADATA",
            f"{info}/WHEEL",
            f"{info}/licenses/LICENSE",
        ):
            if name not in names:
                complaints.append(f"{name} is missing")
        libraries = [n for n in names if re.search(r"\.so(\.\d+)*$", n)]
        if libraries != ["flashattn_lite/_C.so"]:
            complaints.append(f"the shared libraries are {libraries}; only _C.so belongs there")
        if any("is missing" in c for c in complaints):
            return complaints
        complaints += metadata_complaints(archive, info, wheel)
        with tempfile.TemporaryDirectory() as folder:
            complaints += library_complaints(Path(archive.extract(libraries[0], folder)))
    return complaints


def summary(wheel: Path) -> str:
    """The wheel in one line, with the glibc that its library needs."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        library = archive.extract("flashattn_lite/_C.so", folder)
        undefined = output("nm", "-D", "--undefined-only", library)
        files = len(archive.namelist())
    versions = re.findall(r"@GLIBC_(\d+)\.(\d+)", undefined)
    glibc = "{}.{}".format(*max((int(a), int(b)) for a, b in versions))
    torch_symbols = len(re.findall(r"\b(?:aoti_)?torch_\w+", undefined))
    return (
        f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {files} files, {torch_symbols} "
        f"symbols of torch's stable C interface, glibc >= {glibc}: as it should be"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="check a built wheel")
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    complaints = wheel_complaints(wheel)
    for complaint in complaints:
        print(f"{wheel.name}: {complaint}", file=sys.stderr)
    if not complaints:
        print(summary(wheel))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
