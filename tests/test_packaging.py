"""tests/packaging/check_wheel.py on wheels with planted faults; importing a broken installation."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from native.build import CXX, ROOT

PACKAGE = ROOT / "flashattn_lite"


def load_check(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tests/packaging/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_wheel, check_sdist = load_check("check_wheel"), load_check("check_sdist")

LIBRARY = """
#include <stdlib.h>
extern "C" int torch_get_num_threads(unsigned*);
extern "C" __attribute__((weak)) int aoti_torch_get_current_cuda_stream(int, void**);
static const auto threads = [] {
  unsigned n = getenv("FAL_CHECK") ? 1 : 0;
  if (aoti_torch_get_current_cuda_stream) aoti_torch_get_current_cuda_stream(0, 0);
  return torch_get_num_threads(&n);
}();
"""
METADATA = """Metadata-Version: 2.4
Name: flashattn-lite
Version: 1.2.3
License-Expression: BSD-3-Clause
Requires-Python: >=3.10
Requires-Dist: torch>=2.10
Requires-Dist: pytest; extra == "dev"
"""
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-linux_x86_64\n"
INFO = "flashattn_lite-1.2.3.dist-info"
NAME = "flashattn_lite-1.2.3-py3-none-linux_x86_64.whl"


def compile_library(folder: Path, source: str, flags: tuple[str, ...] = ()) -> bytes:
    (folder / "library.cpp").write_text(source)
    command = [CXX, "-shared", "-s", "-fPIC", "-fvisibility=hidden", "library.cpp", *flags]
    subprocess.run([*command, "-o", "library.so"], cwd=folder, check=True)
    return (folder / "library.so").read_bytes()


def wheel_files(tmp_path: Path, source: str = LIBRARY, flags: tuple[str, ...] = ()) -> dict:
    return {
        "flashattn_lite/__init__.py": "",
        "flashattn_lite/_version.py": '__version__ = "1.2.3"\n',
        "flashattn_lite/layers/rotary.py": "",
        "flashattn_lite/py.typed": "",
        "flashattn_lite/_C.so": compile_library(tmp_path, source, flags),
        "flashattn_lite/serving/tiny/config.json": "",
        "flashattn_lite/serving/tiny/model.safetensors": "",
        "flashattn_lite/serving/tiny/tokenizer.json": "",
        f"{INFO}/METADATA": METADATA,
        f"{INFO}/WHEEL": WHEEL,
        f"{INFO}/licenses/LICENSE": "",
        f"{INFO}/RECORD": "",
    }


def complaints_of(tmp_path: Path, files: dict, name: str = NAME) -> list[str]:
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
    return check_wheel.wheel_complaints(path)


def test_a_good_wheel_passes(tmp_path: Path) -> None:
    files = wheel_files(tmp_path)
    assert complaints_of(tmp_path, files) == []
    command = [sys.executable, ROOT / "tests/packaging/check_wheel.py", tmp_path / NAME]
    good = subprocess.run(command, capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith(f"{NAME}: ") and good.stdout.count("\n") == 1

    complaints_of(tmp_path, files | {"setup.py": ""})
    bad = subprocess.run(command, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == f"{NAME}: setup.py does not belong in the wheel\n"


def without(name: str) -> Callable[[dict], None]:
    return lambda files: files.pop(name)


def with_file(name: str, data: str | bytes = "") -> Callable[[dict], None]:
    return lambda files: files.update({name: data})


def replacing(name: str, old: str, new: str) -> Callable[[dict], None]:
    return lambda files: files.update({name: files[name].replace(old, new)})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (with_file("tests/test_core.py"), "tests/test_core.py does not belong in the wheel"),
        (with_file("csrc/simt/host_api.h"), "csrc/simt/host_api.h does not belong"),
        (with_file("flashattn_lite/kernel.cu"), "flashattn_lite/kernel.cu does not belong"),
        (with_file("flashattn_lite/_D.so"), "the shared libraries are ['flashattn_lite/_C.so', "),
        (without("flashattn_lite/_C.so"), "flashattn_lite/_C.so is missing"),
        (without("flashattn_lite/serving/tiny/model.safetensors"), "model.safetensors is missing"),
        (with_file("flashattn_lite/serving/tiny/optimizer.pt"), "optimizer.pt does not belong"),
        (without("flashattn_lite/py.typed"), "flashattn_lite/py.typed is missing"),
        (without(f"{INFO}/licenses/LICENSE"), "LICENSE is missing"),
        (replacing(f"{INFO}/METADATA", ">=2.10", ">=2.12"), "METADATA requires ['torch>=2.12']"),
        (replacing(f"{INFO}/METADATA", ">=3.10", ">=3.11"), "Requires-Python: >=3.11"),
        (replacing(f"{INFO}/METADATA", "1.2.3", "1.2.4"), "METADATA 1.2.4"),
        (replacing(f"{INFO}/WHEEL", "py3-", "cp312-"), "WHEEL has Tag: cp312-none-linux_x86_64"),
        (replacing(f"{INFO}/WHEEL", "false", "true"), "Root-Is-Purelib: true"),
        (with_file("flashattn_lite/large.py", bytes(50_000_001)), "50 MB is the limit"),
    ],
)
def test_a_fault_in_the_wheel_is_found(tmp_path: Path, change, complaint: str) -> None:
    files = wheel_files(tmp_path)
    change(files)
    found = complaints_of(tmp_path, files)
    assert len(found) >= 1 and any(complaint in text for text in found), found


def test_a_wrong_tag_is_found(tmp_path: Path) -> None:
    name = NAME.replace("py3-none", "cp312-cp312")
    found = complaints_of(tmp_path, wheel_files(tmp_path), name)
    assert "the tag is cp312-cp312-linux_x86_64; it must be py3-none-<a Linux platform>" in found


@pytest.mark.parametrize(
    ("source", "flags", "complaint"),
    [
        ('extern "C" __attribute__((visibility("default"))) int seen() { return 1; }', (),
         "the library exports seen; it must export nothing"),
        ('extern "C" void PyErr_Clear(); static int x = (PyErr_Clear(), 1);', (),
         "the library needs Python's PyErr_Clear"),
        ("namespace c10 { int f(); } static int x = c10::f();", (),
         "C++ of torch that changes with it"),
        ('extern "C" int torch_new_in_2_12(); static int x = torch_new_in_2_12();', (),
         "the library needs torch_new_in_2_12, which torch 2.10 does not export"),
        ('extern "C" int aoti_torch_get_current_cuda_stream(int, void**);'
         "static int x = aoti_torch_get_current_cuda_stream(0, 0);", (),
         "the library needs aoti_torch_get_current_cuda_stream strongly; it must be weak"),
        ('extern "C" int puts(const char*); static int x = puts("/home/user/fal/a.cpp");', (),
         "the library holds a path of the machine that built it: /home/user/fal/a.cpp"),
        ("", ("-Wl,--no-as-needed,-lresolv",), "the library needs libresolv.so.2"),
        ("", ("-Wl,-rpath,/opt/lib",), "the library has a run path: /opt/lib"),
    ],
)  # fmt: skip
def test_a_fault_in_the_library_is_found(tmp_path: Path, source, flags, complaint) -> None:
    found = complaints_of(tmp_path, wheel_files(tmp_path, source, flags))
    assert len(found) == 1 and complaint in found[0], found


def test_the_built_library_is_fit_for_a_wheel() -> None:
    assert check_wheel.library_complaints(PACKAGE / "_C.so") == []


IMPORT_EACH = """
import json, sys
import torch

outcomes = {}
for folder, version in json.loads(sys.argv[1]):
    for name in [n for n in sys.modules if n.split(".")[0] == "flashattn_lite"]:
        del sys.modules[name]
    real, torch.__version__ = torch.__version__, version or torch.__version__
    sys.path.insert(0, folder)
    try:
        import flashattn_lite
        outcomes[folder] = ["imported", flashattn_lite.__file__]
    except BaseException as error:
        outcomes[folder] = [type(error).__name__, str(error)]
    sys.path.pop(0)
    torch.__version__ = real
print(json.dumps(outcomes))
"""


def sdist_complaints(tmp_path: Path, change: Callable[[dict], None]) -> list[str]:
    """check_sdist's, of what a build needs, changed."""
    folders = [ROOT / source for source in check_sdist.SOURCES]
    paths = [p for f in folders for p in f.rglob("*") if p.is_file() and p.suffix != ".so"]
    files = {str(p.relative_to(ROOT)): "" for p in paths if "__pycache__" not in p.parts}
    files |= dict.fromkeys(check_sdist.NEEDED, "")
    change(files)
    path = tmp_path / "flashattn_lite-1.2.3.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"flashattn_lite-1.2.3/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data.encode() if isinstance(data, str) else data))
    return check_sdist.sdist_complaints(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (with_file("tests/test_core.py"), "tests/test_core.py does not belong"),
        (with_file("csrc/simt/host_api.h"), "csrc/simt/host_api.h does not belong"),
        (with_file("flashattn_lite/_C.so"), "flashattn_lite/_C.so does not belong"),
        (without("csrc/core/band.h"), "csrc/core/band.h is missing"),
        (without("setup.py"), "setup.py is missing"),
        (with_file("flashattn_lite/random.py", os.urandom(20_000_001)), "is the limit"),
    ],
)
def test_a_fault_in_the_sdist_is_found(tmp_path: Path, change, complaint: str) -> None:
    assert sdist_complaints(tmp_path, lambda files: None) == []
    found = sdist_complaints(tmp_path, change)
    assert len(found) == 1 and complaint in found[0], found


@pytest.fixture(scope="module")
def broken_imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What importing says: (type, text) for each broken installation, by its name."""
    root = tmp_path_factory.mktemp("broken")
    libraries = {
        "missing": None,
        "not_a_library": b"not a library",
        "needs_a_later_torch": compile_library(
            root, 'extern "C" int torch_new_in_2_99(); static int x = torch_new_in_2_99();'
        ),
        "of_other_sources": compile_library(root, ""),  # registers none of the operators
        "old_torch": (PACKAGE / "_C.so").read_bytes(),
    }
    arguments = []
    for name, library in libraries.items():
        folder = root / name
        shutil.copytree(
            PACKAGE,
            folder / "flashattn_lite",
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        )
        if library is not None:
            (folder / "flashattn_lite/_C.so").write_bytes(library)
        arguments.append((str(folder), "2.9.1+cu128" if name == "old_torch" else None))
    command = [sys.executable, "-c", IMPORT_EACH, json.dumps(arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    outcomes = json.loads(done.stdout)
    return {Path(folder).name: outcome for folder, outcome in outcomes.items()}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"CXX": "no-such-g++"}, "there is no no-such-g++ on PATH: install g++"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS is 'many'; it must be a whole number above 0"),
        ({"FAL_CUDA": "2"}, "FAL_CUDA is '2'; it must be auto, 0 or 1"),
    ],
)
def test_a_build_that_cannot_begin_says_why(
    tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        **{"cwd": ROOT, "capture_output": True, "text": True},
        env={**os.environ, "FAL_CUDA": "0", **variables},
    )
    assert done.returncode and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("installation", "says"),
    [
        ("missing", ["flashattn_lite/_C.so is missing", "pip install"]),
        ("not_a_library", ["flashattn_lite/_C.so does not load", "file too short"]),
        ("needs_a_later_torch", ["flashattn_lite/_C.so does not load", "torch_new_in_2_99"]),
        ("of_other_sources", ["flashattn_lite/_C.so was built from other sources", "reinstall"]),
        ("old_torch", ["needs torch >= 2.10 but torch is 2.9.1+cu128"]),
    ],
)
def test_a_broken_installation_says_so_in_one_sentence(
    broken_imports: dict[str, list[str]], installation: str, says: list[str]
) -> None:
    kind, text = broken_imports[installation]
    assert kind == "ImportError", text
    for part in says:
        assert part in text
    assert "\n" not in text and text.startswith("flashattn_lite")
