"""What this machine, this library and this PyTorch are: the facts beside every result."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# x86 and ARM instruction sets that make a difference to attention, of all the flags in cpuinfo.
FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2", "i8mm"),
)
PROCESSORS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Cpu:
    model: str
    cores: int  # physical, that this process may use
    threads: int  # logical, that this process may use
    flags: list[str]
    caches: dict[str, str]  # "L1d": "48K"
    memory_gib: float


def cpu() -> Cpu:
    """Read from /proc and /sys where they exist."""
    text = _read(Path("/proc/cpuinfo"))
    fields = dict(_split(line) for line in text.splitlines() if ":" in line)
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    usable = usable_processors()
    siblings = {_read(PROCESSORS / f"cpu{i}/topology/thread_siblings_list") or i for i in usable}
    return Cpu(
        model=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(siblings),
        threads=len(usable),
        flags=[flag for flag in FLAGS if flag in present],
        caches=_caches(),
        memory_gib=round(_memory_kib() / 2**20, 1),
    )


def usable_processors() -> list[int]:
    """The logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability, memory and driver of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
                "multiprocessors": p.multi_processor_count,
            }
        )
    return found


def installed() -> dict[str, Any]:
    """This library: version, where it is, the git commit of a checkout, what it was built for."""
    import flashattn_lite
    from flashattn_lite import _ops

    return {
        "version": flashattn_lite.__version__,
        "commit": commit(),
        "build": json.loads(_ops.build_info()),
    }


def pytorch() -> dict[str, Any]:
    parallel = [line.strip() for line in torch.__config__.parallel_info().splitlines()]
    return {
        "version": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "threads": torch.get_num_threads(),
        "pool": next((s for s in parallel if s.startswith("ATen parallel backend")), ""),
    }


def commit() -> str | None:
    """The checkout's commit, with "+" when files have changed since; None outside a checkout."""
    root = checkout()
    if root is None:
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def checkout() -> Path | None:
    """The source tree that this package lies in, or None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / ".git").exists() and (root / "bench" / "results").is_dir() else None


def describe() -> dict[str, Any]:
    """All of it, for JSON."""
    from dataclasses import asdict

    return {
        "cpu": asdict(cpu()),
        "gpus": gpus(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "library": installed(),
        "torch": pytorch(),
    }


def why_no_cuda() -> str | None:
    """Why this library runs nothing on CUDA here; None where it does."""
    if not torch.cuda.is_available():
        why = "" if torch.version.cuda else f" ({torch.__version__} is built without CUDA)"
        return f"torch sees no CUDA device{why}"
    if installed()["build"]["cuda"] is None:
        return (
            "this build of flashattn_lite has no CUDA kernels "
            "(install with nvcc on PATH, or FAL_CUDA=1)"
        )
    return None


def headline(facts: dict[str, Any]) -> list[str]:
    """The lines above a table, from ``describe``'s facts."""
    cpu_, built, torch_ = facts["cpu"], facts["library"], facts["torch"]
    caches = " ".join(f"{name} {size}" for name, size in cpu_["caches"].items())
    version = built["version"] + (f" ({built['commit']})" if built["commit"] else "")
    lines = [
        f"CPU      {cpu_['model']}, {cpu_['cores']} cores ({cpu_['threads']} threads), "
        f"{cpu_['memory_gib']:.0f} GiB" + (f", {caches}" if caches else ""),
        f"         {' '.join(cpu_['flags'])}",
        f"library  flashattn_lite {version}, kernels for "
        f"{', '.join(built['build']['cpu']['isas'])}; in use: {built['build']['cpu']['active']}",
        f"PyTorch  {torch_['version']}, CPU capability {torch_['cpu_capability']}",
    ]
    lines += [
        f"GPU      {g['name']}, compute capability {g['capability']}, {g['memory_gib']:.0f} GiB"
        for g in facts["gpus"]
    ]
    return lines


def _split(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _memory_kib() -> int:
    fields = dict(_split(line) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    return int(fields.get("MemTotal", "0 kB").split()[0])


def _caches() -> dict[str, str]:
    sizes = {}
    for index in sorted((PROCESSORS / "cpu0" / "cache").glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(_read(index / "type"), "")
        if kind != "i":
            sizes[f"L{_read(index / 'level')}{kind}"] = _readable(_read(index / "size"))
    return sizes


def _readable(size: str) -> str:
    """
    >>> _readable("49152K"), _readable("48K")
    ('48M', '48K')
    """
    kib = int(size[:-1]) if size.endswith("K") and size[:-1].isdigit() else 0
    return f"{kib // 1024}M" if kib >= 1024 and kib % 1024 == 0 else size


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
