"""Checks a source distribution: that it holds what a build needs, and nothing that is not the
product's.

    python check_sdist.py dist/flashattn_lite-0.1.0.tar.gz

Needs nothing but the standard library. Prints one line, or every complaint and exit status 1. (That
it builds is proven by building the wheel from it.)
"""

import argparse
import re
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What stays in the repository: tests, the emulator, results, pages, editor and CI files.
REPOSITORY_ONLY = r"(tests|bench|docs|examples|csrc/simt|build|\.\w[^/]*)/"
BUILT = r".*\.(so|o|a|py[cod]|whl)"
NEEDED = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "PKG-INFO", "MANIFEST.in")
SOURCES = ("csrc/core", "csrc/cpu", "csrc/cuda", "csrc/torch", "flashattn_lite")
MAX_BYTES = 20 * 1000 * 1000


def sdist_complaints(sdist: Path) -> list[str]:
    """What is wrong with the source distribution, one sentence each."""
    complaints = []
    with tarfile.open(sdist) as archive:
        members = [m for m in archive.getmembers() if m.isfile()]
    folder = sdist.name.removesuffix(".tar.gz")
    names = set()
    for member in members:
        if not member.name.startswith(f"{folder}/"):
            complaints.append(f"{member.name} lies outside {folder}/")
        names.add(member.name.partition("/")[2])
    for name in sorted(names):
        if re.match(REPOSITORY_ONLY, name) or re.fullmatch(BUILT, name):
            complaints.append(f"{name} does not belong in the source distribution")
    wanted = [*NEEDED]
    for source in SOURCES:
        wanted += [
            str(path.relative_to(ROOT))
            for path in sorted((ROOT / source).rglob("*"))
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".safetensors", ".json")
        ]
    complaints += [f"{name} is missing" for name in wanted if name not in names]
    if sdist.stat().st_size >= MAX_BYTES:
        complaints.append(f"it has {sdist.stat().st_size:,} bytes; {MAX_BYTES:,} is the limit")
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description="check a source distribution")
    parser.add_argument("sdist", type=Path)
    sdist = parser.parse_args().sdist
    complaints = sdist_complaints(sdist)
    for complaint in complaints:
        print(f"{sdist.name}: {complaint}", file=sys.stderr)
    if not complaints:
        print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB: as it should be")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
