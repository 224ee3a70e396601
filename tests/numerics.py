"""Prints the tables of docs/numerics.md: how much of its error budget each result uses, over the
whole case table. Run: python tests/numerics.py [seeds]"""

import json
import sys
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from flashattn_lite import _ops, attention
from flashattn_lite.testing import all_cases, check_case


def with_lse(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = attention(*tensors, **options, return_lse=True)
    return out, lse


def main() -> None:
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    cases = all_cases()
    print(f"{len(cases)} cases, {seeds} seeds; largest error / budget\n")
    for isa in json.loads(_ops.build_info())["cpu"]["isas"]:
        _ops.set_cpu_isa(isa)
        worst: dict[tuple[str, str], float] = defaultdict(float)
        for case in cases:
            for seed in range(seeds):
                for result, share in check_case(with_lse, case, seed=seed).items():
                    key = str(case.dtype).removeprefix("torch."), result
                    worst[key] = max(worst[key], share)
        results = ["out", "lse", "dq", "dk", "dv", "dsinks", "dbias"]
        print(f"| {isa} | " + " | ".join(results) + " |")
        print("|---|" + "---|" * len(results))
        for dtype in ("float32", "float16", "bfloat16"):
            row = " | ".join(f"{worst[dtype, result]:.2f}" for result in results)
            print(f"| {dtype} | {row} |")
        print()


if __name__ == "__main__":
    main()
