"""``flashattn-lite demo``: what was built, how exact it is, how fast it is, on this machine.

Exactness: every feature's output and gradients against float64, beside PyTorch's own error for the
same computation in the same dtype (scaled_dot_product_attention where it has the feature, the same
formula in plain PyTorch otherwise). Speed: a few rows of the benchmark. Text: the small model in
the package, streamed out of the serving loop. The exit status is 1 if anything is beyond its error
budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashattn_lite import attention, reference
from flashattn_lite.bench import machine, present, runner, tables
from flashattn_lite.bench.cases import DTYPES
from flashattn_lite.bench.cases import Case as SpeedCase
from flashattn_lite.bench.progress import Progress
from flashattn_lite.bench.results import Row
from flashattn_lite.bench.suites import ragged_lengths
from flashattn_lite.bench.timing import Rounds
from flashattn_lite.testing import Case, Gradients, Inputs, error_budget, gradients_of, make_inputs

PAIR = ((160, 160), (160, 160))  # (seqlen_q, seqlen_k) of two sequences
FEATURES = (
    Case("dense", PAIR, heads_k=4),
    Case("causal", PAIR, heads_k=4, causal=True),
    Case("fewer queries than keys, causal", ((40, 160),) * 2, heads_k=4, causal=True),
    Case("window of 32 before, 16 after", PAIR, heads_k=4, window=(32, 16)),
    Case("grouped heads, 8 on 2", PAIR, heads_q=8, heads_k=2, causal=True),
    Case("head dim 256", PAIR, heads_k=4, head_dim=256),
    Case("head dims 37 (Q, K) and 72 (V)", PAIR, heads_k=4, head_dim=37, head_dim_v=72),
    Case("ragged batch (varlen), causal", ((160, 160), (7, 90), (33, 33)), "varlen", causal=True),
    Case("bias with gradient", PAIR, heads_k=4, bias="full"),
    Case("ALiBi, causal", PAIR, heads_k=4, alibi="heads", causal=True),
    Case("softcap 20", PAIR, heads_k=4, softcap=20.0),
    Case("attention sinks, causal", PAIR, heads_k=4, sinks=True, causal=True),
    Case("dropout 0.1", PAIR, heads_k=4, dropout_p=0.1),
)


@dataclass(frozen=True)
class Error:
    """Largest absolute errors against float64: ours, PyTorch's, and what is allowed."""

    ours: float
    pytorch: float
    allowed: float

    @property
    def exact(self) -> bool:
        return self.ours <= self.allowed

    def cells(self) -> list[str]:
        return [("+" if self.exact else "!") + f"{self.ours:.1e}", f"{self.pytorch:.1e}"]


def main() -> int:
    """Runs the demonstration; 0 if everything is exact."""
    _title("What was built, and for which machine")
    print("\n".join(machine.headline(machine.describe())))
    inexact = _show_exactness()
    failures = _show_speed()
    _show_text()
    if inexact or failures:
        print(f"\n{tables.paint(f'INEXACT: {len(inexact) + len(failures)} results', tables.RED)}")
        for text in inexact + failures:
            print(f"  {text}")
        return 1
    return 0


def _title(text: str) -> None:
    print("\n" + tables.paint(text, tables.BOLD) + "\n")


# ---- exactness ----------------------------------------------------------------------------------


def _show_exactness() -> list[str]:
    """Prints the table; returns the features that are beyond their budget."""
    _title("Exactness: largest error against float64, ours and (beside it) PyTorch's own")
    torch.set_num_threads(1)  # small tensors: more threads wait more than they work
    outputs, gradients, inexact = [], [], []
    with Progress(len(FEATURES) * len(DTYPES), "exactness") as progress:
        for feature in FEATURES:
            found = []
            for name, dtype in DTYPES.items():
                progress.step(f"{feature.name}, {name}", 1.0)
                out, grad = errors(replace(feature, dtype=dtype))
                found.append((out, grad))
                if not (out.exact and grad.exact):
                    inexact.append(f"{feature.name}, {name}")
            how = "SDPA" if sdpa_has(feature) else "plain"
            outputs.append([feature.name, *(c for o, _ in found for c in o.cells()), how])
            gradients.append([feature.name, *(c for _, g in found for c in g.cells()), how])
    headers = [text for name in DTYPES for text in (name, "PyTorch")]
    print(tables.terminal(["output", *headers, "by"], outputs))
    print()
    print(tables.terminal(["gradients", *headers, "by"], gradients))
    print(
        "\n  Green: within the budget (docs/numerics.md): 2 times, gradients 3, the error\n"
        "  of the same formula with every step in that dtype, and a few units in the last place.\n"
        "  PyTorch's error is by scaled_dot_product_attention, or by the plain formula where that\n"
        "  lacks the feature. Gradients: the one that uses most of its budget."
    )
    return inexact


def errors(feature: Case) -> tuple[Error, Error]:
    """Errors of the output, and of the worst gradient in proportion to its budget."""
    inputs = make_inputs(feature)
    inputs.dlse.zero_()  # SDPA returns no LSE

    def formula(inputs: Inputs, precision: torch.dtype) -> Gradients:
        return gradients_of(
            lambda *t, **o: reference.attention(*t, **o, precision=precision),
            inputs,
            inputs.reference_options(),
            dtype=torch.float64 if precision == torch.float64 else None,
        )

    def mine(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, **options, return_lse=True)
        return out, lse

    low = formula(inputs, feature.dtype)
    truth = formula(_widened(inputs), torch.float64)
    largest = float(truth.lse[torch.isfinite(truth.lse)].abs().max())
    ours = gradients_of(mine, inputs, inputs.options)
    options = inputs.reference_options()
    theirs = gradients_of(_sdpa(feature), inputs, options) if sdpa_has(feature) else low

    def error(name: str, pick: Callable[[Gradients], Tensor], factor: float) -> Error:
        exact, rounded = pick(truth), pick(low)
        allowed = error_budget(exact, rounded, feature.dtype, factor, largest_score=largest)
        return Error(_worst(pick(ours), exact), _worst(pick(theirs), exact), allowed)

    found = [error(n, lambda g, n=n: g.grads[n], 3.0) for n in truth.grads]  # type: ignore[misc]
    return error("out", lambda g: g.out, 2.0), max(found, key=lambda e: e.ours / e.allowed)


def _widened(inputs: Inputs) -> Inputs:
    """The same numbers in float64, so that the gradients are float64 too."""
    options = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.options.items()
    }
    q, k, v, dout, dlse = (
        t.double() for t in (inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse)
    )
    return Inputs(q, k, v, options, dout=dout, dlse=dlse)


def _worst(actual: Tensor, exact: Tensor) -> float:
    return float(torch.nan_to_num((actual.double() - exact).abs(), nan=math.inf).max())


def sdpa_has(feature: Case) -> bool:
    """Whether scaled_dot_product_attention can compute the feature (with a mask, if need be)."""
    return not (feature.softcap or feature.sinks or feature.dropout_p)


def _sdpa(feature: Case) -> Callable[..., tuple[Tensor, Tensor]]:
    """SDPA sequence by sequence, everything but the softmax itself in its float mask."""

    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        heads, outs = q.shape[-2], []
        window = options["window"]
        band = (window[0], 0 if options["causal"] else window[1])
        for s in reference.sequences(q, k, options):  # type: ignore[arg-type]
            rows, keys = slice(s.row_q, s.row_q + s.seqlen_q), slice(s.row_k, s.row_k + s.seqlen_k)
            part = [
                (t[r] if t.dim() == 3 else t[s.batch, r]).transpose(0, 1)[None]
                for t, r in ((q, rows), (k, keys), (v, keys))
            ]
            mask = torch.zeros(1, heads, s.seqlen_q, s.seqlen_k, dtype=q.dtype)
            if "alibi_slopes" in options:
                i = torch.arange(s.seqlen_q)[:, None] + s.seqlen_k - s.seqlen_q
                distance = (i - torch.arange(s.seqlen_k)).abs()
                mask = mask - (options["alibi_slopes"][:, None, None] * distance).to(q.dtype)
            if "bias" in options:
                mask = mask + options["bias"][s.batch]
            seen = reference.visible(s.seqlen_q, s.seqlen_k, band)
            mask = mask.masked_fill(~seen, -math.inf)
            query, key, value = part
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        out = torch.cat(outs) if q.dim() == 3 else torch.stack(outs)
        return out, out.new_zeros(_lse_shape(q), dtype=torch.float32)

    return run


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])


# ---- speed --------------------------------------------------------------------------------------


def speed_cases() -> list[SpeedCase]:
    """Dense, causal, window, ragged and training, in every dtype, on up to two threads."""
    threads = min(2, len(machine.usable_processors()))
    lengths = ragged_lengths()
    common: dict[str, Any] = {"suite": "forward", "threads": threads, "head_dim": 64}
    shapes: tuple[dict[str, Any], ...] = (
        {"seqlen": 1024, "heads": 8},
        {"seqlen": 1024, "heads": 8, "causal": True},
        {"seqlen": 4096, "heads": 2, "causal": True, "window": 128},
        {"seqlen": max(lengths), "lengths": lengths, "heads": 8, "batch": len(lengths)},
        {"seqlen": 512, "heads": 8, "causal": True, "backward": True},
    )
    return [SpeedCase(**common, **shape, dtype=dtype) for shape in shapes for dtype in DTYPES]


def _show_speed() -> list[str]:
    """Prints the table and the losses; returns the rows that failed."""
    cases = speed_cases()
    threads = cases[0].threads
    count = f"{threads} threads" if threads > 1 else "one thread"
    _title(f"Speed against F.scaled_dot_product_attention, {count}, head dim 64")
    settings = runner.Settings(rounds=Rounds(budget_s=0.2, at_least=3, at_most=21))
    rows: list[Row] = []
    with Progress(sum(runner.cost(c, settings) for c in cases), "speed") as progress:
        for case in cases:
            progress.step(f"{_work(case)}, {case.dtype}", runner.cost(case, settings))
            rows.append(runner.measure(case, settings))
    body = []
    for row in rows:
        figure, work = row.figure(), _work(row.case)
        if row.failure is not None or figure is None:
            body.append([work, row.case.dtype, "!FAILED", "", ""])
            continue
        ours, theirs = (tables.seconds(row.samples[n].median()) for n in (row.ours, row.baseline))
        body.append([work, row.case.dtype, ours, theirs, present.mark(figure) + "x"])
    print(tables.terminal(["", "dtype", "ours", "PyTorch", "faster"], body, left=2))
    print("\n  Exactness of each row was checked before its time was taken.")
    lost = present.losses(rows, "wall")
    if lost:
        print(f"  PyTorch is faster in {len(lost)} of {len(rows)} rows:")
        print("\n".join("    " + tables.paint(line, tables.RED) for line in lost))
    else:
        print("  PyTorch is faster in none of these rows.")
    print("  More: flashattn-lite bench --quick")
    return [f"{_work(r.case)}, {r.case.dtype}: {r.failure}" for r in rows if r.failure is not None]


def _work(case: SpeedCase) -> str:
    if case.lengths:
        return f"{len(case.lengths)} ragged sequences, against padding"
    heads = f"{case.heads} heads, length {case.seqlen}"
    if case.window is not None:
        return f"window {case.window}, {heads}, against a mask"
    work = "training, " if case.backward else ""
    return f"{work}{case.mask_name()}, {heads}"


# ---- text ----------------------------------------------------------------------------------------

PROMPT = "class Reader:\n    def __init__(self, path):"


def _show_text() -> None:
    """Streams a continuation out of the serving loop, where its packages are installed."""
    from flashattn_lite.serving import command

    _title("Text: a model of 3.4 million parameters, trained and served on these kernels")
    missing = command.missing_package(command.MODEL_PACKAGES)
    if missing is not None:
        print(f"  Left out: {missing}")
        return
    words = ["generate", PROMPT, "--max-tokens", "110", "--seed", "2", "--ignore-eos"]
    from flashattn_lite.cli import main as run

    run(words)
    print("  More: flashattn-lite generate 'import os', flashattn-lite serve")
