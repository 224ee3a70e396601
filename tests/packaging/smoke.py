"""Tries the installed package where only it and torch are installed; prints one line.

    cd $(mktemp -d) && python .../tests/packaging/smoke.py

The results are held against the oracle that is in the wheel, within the budget that is in it too.
"""

import functools
import importlib.metadata
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def check(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"smoke: {message}")


def import_quietly() -> None:
    """The import touches no GPU and needs no compiler of kernels."""
    before = set(sys.modules)
    import flashattn_lite

    check(not torch.cuda.is_initialized(), "importing flashattn_lite initialised CUDA")
    check("triton" not in set(sys.modules) - before, "importing flashattn_lite imported triton")
    folder = Path(flashattn_lite.__file__).resolve().parents[1]
    check(folder != ROOT, f"flashattn_lite comes from the sources in {folder}, not from a wheel")
    installed = importlib.metadata.version("flashattn-lite")
    version = flashattn_lite.__version__
    check(installed == version, f"flashattn-lite {installed} is installed but says it is {version}")


def check_cases() -> int:
    """Forward, LSE and every gradient of some cases against float64; how many they were."""
    import flashattn_lite
    from flashattn_lite import testing

    plain = testing.Case("plain")
    cases = [
        replace(case, name=f"{case.name} {dtype}", dtype=dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for case in (
            plain,
            replace(plain, name="causal", causal=True, head_dim=128),
            replace(plain, name="window", window=(9, 5), head_dim=37, softcap=4.0, sinks=True),
            replace(plain, name="dropout", dropout_p=0.2, alibi="heads", bias="full"),
            replace(plain, name="varlen", layout="varlen", seqlens=((17, 17), (0, 5), (70, 33))),
        )
    ]
    for case in cases:
        testing.check_case(functools.partial(flashattn_lite.attention, return_lse=True), case)
    return len(cases)


def check_flash_attn_func() -> None:
    """The drop-in function, by a formula written here."""
    import flashattn_lite

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 33, 4, 64) for _ in range(3))
    out = flashattn_lite.flash_attn_func(q, k, v, causal=True)
    wide = [t.double().transpose(1, 2) for t in (q, k, v)]
    truth = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
    # q.k, exp and the sum over 33 keys are each rounded: far less than 64 units of roundoff.
    error = float((out.double() - truth).abs().max())
    bound = 64 * torch.finfo(torch.float32).eps * float(truth.abs().max())
    check(error <= bound, f"flash_attn_func is off by {error:.3g}; {bound:.3g} is the bound")


def check_error_message() -> None:
    import flashattn_lite

    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (64, 96))
    q, k, v = (torch.zeros(64, 4, 32) for _ in range(3))
    expected = "flash_attn_varlen_func: cu_seqlens_k ends at 96 but k has 64 rows"
    try:
        flashattn_lite.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 64, 96)
    except RuntimeError as error:
        check(expected in str(error), f"the message is {str(error)!r}; it must be {expected!r}")
    else:
        check(False, "cu_seqlens_k past the end of k was accepted")


def main() -> None:
    import_quietly()
    cases = check_cases()
    check_flash_attn_func()
    check_error_message()

    import flashattn_lite
    from flashattn_lite import _ops

    info = json.loads(_ops.build_info())
    isas = " ".join(info["cpu"]["isas"])
    cuda = info["cuda"]["architectures"] if info["cuda"] else "none"
    print(
        f"flashattn_lite {flashattn_lite.__version__} with torch {torch.__version__} on Python "
        f"{platform.python_version()}: forward and backward of {cases} cases are within budget; "
        f"CPU {info['cpu']['active']} of {isas}, CUDA {cuda}"
    )


if __name__ == "__main__":
    main()
