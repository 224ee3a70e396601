"""csrc/torch/stable_abi.h against the installed torch and against what torch 2.10 exports."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from native.build import CXX, ROOT

HEADER = ROOT / "csrc/torch/stable_abi.h"
EXPORTS = {
    line
    for line in (Path(__file__).parent / "data/torch_2_10_exports.txt").read_text().split("\n")
    if line and not line.startswith("#")
}
TORCH_INCLUDE = Path(torch.__file__).parent / "include"
# USE_CUDA shows the functions of libtorch_cuda.so, which need no CUDA header.
TORCH_HEADERS = """
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
"""


def declarations() -> dict[str, str]:
    """Function name -> its whole declaration, of everything that the header declares."""
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    body = text.split('extern "C" {', 1)[1].rsplit("}", 1)[0]
    statements = [" ".join(s.split()) for s in body.split(";") if "(" in s]
    found = {}
    for statement in statements:
        name = re.match(r"(?:__attribute__\(\(weak\)\) )?[\w ]+[ *]+(\w+)\(", statement)
        assert name, f"not a function's declaration: {statement}"
        found[name[1]] = statement + ";"
    return found


DECLARATIONS = declarations()


def is_weak(name: str) -> bool:
    return "weak" in DECLARATIONS[name]


def compile_errors(source: str, tmp_path: Path) -> str:
    path = tmp_path / "abi.cpp"
    path.write_text(source)
    command = [CXX, "-std=c++20", "-fsyntax-only", "-fmax-errors=0", "-w"]
    command += [f"-I{ROOT}", f"-isystem{TORCH_INCLUDE}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (done.stderr == ""), done.stderr
    return done.stderr


def test_the_header_was_read_whole() -> None:
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    assert set(DECLARATIONS) == set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", text))
    assert len(DECLARATIONS) >= 30


def test_our_declarations_agree_with_torchs(tmp_path: Path) -> None:
    uses = "\n".join(f"auto* use_{name} = &{name};" for name in DECLARATIONS)
    # First torch's alone: a function that torch does not declare could not disagree with ours.
    assert compile_errors(TORCH_HEADERS + uses, tmp_path) == ""
    both = TORCH_HEADERS + '#include "csrc/torch/stable_abi.h"\n'
    assert compile_errors(both + uses, tmp_path) == ""


@pytest.mark.parametrize("wrong", ["argument", "result"])
def test_a_wrong_declaration_is_an_error(wrong: str, tmp_path: Path) -> None:
    """Each function in turn, with an argument too many or another result."""
    lines = []
    for statement in DECLARATIONS.values():
        if wrong == "argument":
            lines.append(
                re.sub(r"\(\);$", "(double);", re.sub(r"(?<!\()\);$", ", double);", statement))
            )
        else:
            lines.append(
                re.sub(r"^(__attribute__\(\(weak\)\) )?.*?(\w+\()", r"\1double \2", statement)
            )
    opaque = "class TorchLibraryOpaque;\n"
    source = TORCH_HEADERS + opaque + 'extern "C" {\n' + "\n".join(lines) + "\n}\n"
    errors = [line for line in compile_errors(source, tmp_path).split("\n") if "error:" in line]
    for name in DECLARATIONS:
        assert any(f"{name}(" in line for line in errors), name
    assert len(errors) == len(DECLARATIONS)


def test_every_symbol_is_exported_by_torch_2_10() -> None:
    needed = {name for name in DECLARATIONS if not is_weak(name)}
    assert needed - EXPORTS == set()
    # What 2.10's libtorch_cpu.so lacks, and only that, is weak.
    assert {name for name in DECLARATIONS if is_weak(name)} & EXPORTS == set()


def test_the_recorded_list_is_torchs() -> None:
    """Stable means that no later torch takes a symbol away that we use."""
    library = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    command = ["nm", "-D", "--defined-only", str(library)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    needed = {name for name in DECLARATIONS if not is_weak(name)}
    assert needed - set(symbols) == set()
    assert len(EXPORTS) == 336 and all(re.match(r"(aoti_)?torch_\w+$", name) for name in EXPORTS)
