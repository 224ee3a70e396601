"""The result words of every PTX wrapper (csrc/cuda/conformance.h): run, keep and compare them.

The committed file holds the emulator's words. Write it again after a wrapper or an input changed:

    PYTHONPATH=tests python -m native.conformance --write

On a machine with a GPU, `make gpu-check` compares that GPU's words with them.
"""

import argparse
import base64
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "data" / "ptx_conformance.json"
NOTE = (
    "Result words of each PTX wrapper on the SIMT emulator, as base64 of zlib of little-endian "
    "32-bit words. Not yet confirmed by hardware."
)
CAPACITY = 1 << 17  # words


@dataclass(frozen=True)
class Section:
    """What one wrapper returned, and how closely another device must agree."""

    name: str
    compare: str  # "exact", "ulp N" or "abs X" (the words are float32)
    words: tuple[int, ...]


def collect(sections: str, run: Callable[[int], list[int]]) -> list[Section]:
    """Cuts the words of a run into the sections that its description lists."""
    words = run(CAPACITY)
    result, begin = [], 0
    for line in sections.splitlines():
        name, count, compare = line.split(" ", 2)
        result.append(Section(name, compare, tuple(words[begin : begin + int(count)])))
        begin += int(count)
    if begin != len(words):
        raise ValueError(f"the sections hold {begin} words, the run returned {len(words)}")
    return result


def write(path: Path, sections: list[Section], note: str = NOTE) -> None:
    body = {
        s.name: {
            "compare": s.compare,
            "words": base64.b64encode(
                zlib.compress(struct.pack(f"<{len(s.words)}I", *s.words), 9)
            ).decode(),
        }
        for s in sections
    }
    path.write_text(json.dumps({"note": note, "sections": body}, indent=1) + "\n")


def read(path: Path = REFERENCE) -> list[Section]:
    result = []
    for name, entry in json.loads(path.read_text())["sections"].items():
        data = zlib.decompress(base64.b64decode(entry["words"]))
        words = struct.unpack(f"<{len(data) // 4}I", data)
        result.append(Section(name, entry["compare"], words))
    return result


def _as_float(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


def _ordered(word: int) -> int:
    """Floats' bits as integers in the floats' order, so that neighbours differ by one."""
    return word if word < 1 << 31 else (1 << 31) - word


def differences(expected: Section, actual: Section) -> list[str]:
    """One line per word outside the section's bound, and one when the sections differ in shape."""
    if (expected.name, len(expected.words)) != (actual.name, len(actual.words)):
        return [f"{expected.name}: {len(expected.words)} words, not {actual.name}"]
    kind, _, bound = expected.compare.partition(" ")
    lines = []
    for i, (want, got) in enumerate(zip(expected.words, actual.words, strict=True)):
        if want == got:
            continue
        if kind == "ulp" and abs(_ordered(want) - _ordered(got)) <= int(bound):
            continue
        if kind == "abs" and abs(_as_float(want) - _as_float(got)) <= float(bound):
            continue
        lines.append(f"{expected.name} word {i}: expected {want:08x}, got {got:08x}")
    return lines


def emulated_sections() -> list[Section]:
    """The sections as the emulator computes them, sm_80's first."""
    from native import emulated

    module = emulated.load(
        "simt_conformance",
        [emulated.NATIVE / "simt_conformance.cpp"],
        [emulated.CUDA / "conformance.cu", emulated.CUDA / "conformance_sm90.cu"],
    )
    module.reset()
    module.configure()
    result = collect(module.sections(), module.run)
    result += collect(module.sections_sm90(), module.run_sm90)
    reports = module.reports()
    if reports:
        raise RuntimeError(f"the emulator reports {reports}")
    return result


def described(sm90: bool) -> str:
    """The sections of sm_80's or of sm_90's kernels, as the built library lists them."""
    import torch

    import flashattn_lite  # noqa: F401  it registers the operators

    return str(torch.ops.flashattn_lite.ptx_conformance_sections(sm90))


def device_words(sm90: bool) -> list[int]:
    import torch

    import flashattn_lite  # noqa: F401  it registers the operators

    words = torch.ops.flashattn_lite.ptx_conformance(sm90)
    return [int(word) & 0xFFFFFFFF for word in words.tolist()]


def device_sections() -> list[Section]:
    """The sections as the current GPU computes them; sm_90's on compute capability 9.0 alone."""
    import torch

    sections = []
    for sm90 in (False, True) if torch.cuda.get_device_capability() == (9, 0) else (False,):
        sections += collect(described(sm90), lambda _, flag=sm90: device_words(flag))
    return sections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the committed words")
    parser.add_argument("--device", type=Path, metavar="FILE", help="write the GPU's words there")
    arguments = parser.parse_args()
    sections = device_sections() if arguments.device else emulated_sections()
    if arguments.device:
        write(arguments.device, sections, "Result words of each PTX wrapper on this GPU.")
    elif arguments.write:
        write(REFERENCE, sections)
    print(f"{len(sections)} sections, {sum(len(s.words) for s in sections)} words")


if __name__ == "__main__":
    main()
