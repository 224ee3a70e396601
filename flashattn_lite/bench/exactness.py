"""Before time is taken: a contender's result against the float64 oracle, on probes of the case.

Forward: rows at the start, in the middle and at the end of the first and the last head; over a
cache, those of the first, the shortest and the last sequence. Backward: all of one head, because
every row contributes to dK and dV. Outputs and gradients must stay within
``flashattn_lite.testing.error_budget``: 2 and 3 times what rounding alone costs in that dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashattn_lite import reference
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.inputs import Inputs, Tensors
from flashattn_lite.testing import error_budget

NAMES = ("out", "dq", "dk", "dv")
SOMETHING_ELSE = 10.0  # error budgets: no rounding of the same computation explains as much
ROWS = 48  # rows of one forward probe
CHUNK = 512  # rows that the oracle works on at a time in a backward probe


@dataclass(frozen=True)
class Exactness:
    """Worst element of a result: its error, what the budget allows there, and how much of the
    budget the worst result uses (above 1 is a failure)."""

    error: float  # forward output, absolute, against float64
    used: float  # max over outputs and gradients of error / budget
    worst: str  # which of out, dq, dk, dv used most

    @property
    def exact(self) -> bool:
        return self.used <= 1.0


@dataclass(frozen=True)
class Truth:
    """What a probe should give, and the same formula in the case's own dtype."""

    sequence: int
    head: int
    rows: slice
    exact: dict[str, Tensor]  # float64; out, dq: (rows, dim); dk, dv: (seqlen, dim)
    rounded: dict[str, Tensor]
    largest_score: float  # magnitude of the largest log-sum-exp


def probes(case: Case) -> list[tuple[int, int, int, int]]:
    """(sequence, head, first row, last row + 1)."""
    lengths = case.sequences()
    longest = lengths.index(max(lengths))
    shortest = lengths.index(min(lengths))
    if case.tokens:
        sequences = sorted({0, shortest, len(lengths) - 1})
        return [(s, h, 0, case.tokens) for s in sequences for h in (0, case.heads - 1)]
    if case.backward:
        found = {(longest, case.heads - 1, 0, lengths[longest])}
        return sorted(found | {(shortest, 0, 0, lengths[shortest])} if case.lengths else found)
    found = set()
    for s, h in ((longest, 0), (shortest, case.heads - 1), (len(lengths) - 1, case.heads - 1)):
        n = lengths[s]
        for begin in (0, max(0, n // 2 - ROWS // 2), max(0, n - ROWS)):
            found.add((s, h, begin, min(n, begin + ROWS)))
    return sorted(found)


def truths(case: Case, inputs: Inputs) -> Iterator[Truth]:
    """The oracle's answer to every probe."""
    for sequence, head, begin, end in probes(case):
        exact = _oracle(case, inputs, sequence, head, begin, end, torch.float64)
        rounded = _oracle(case, inputs, sequence, head, begin, end, case.torch_dtype)
        largest = float(exact.pop("lse").abs().max())
        yield Truth(sequence, head, slice(begin, end), exact, rounded, largest)


def check(case: Case, inputs: Inputs, known: list[Truth], got: Tensors, layout: str) -> Exactness:
    """The contender's tensors, in its layout, against the truths."""
    error, used, worst = 0.0, 0.0, "out"
    for name, tensor in zip(NAMES, got, strict=False):
        if name in ("dk", "dv") and case.kv_heads != case.heads:
            continue  # sums over a group of heads, of which a probe has one
        parts = []
        for truth in known:
            rows = truth.rows if name in ("out", "dq") else slice(None)
            head = truth.head * tensor_heads(case, name) // case.heads
            parts.append(_pick(case, inputs, tensor, layout, truth.sequence, head)[rows])
        actual = torch.cat(parts).double()
        exact = torch.cat([truth.exact[name] for truth in known])
        rounded = torch.cat([truth.rounded[name] for truth in known])
        miss = float(torch.nan_to_num((actual - exact).abs(), nan=torch.inf).max())
        factor = 2.0 if name == "out" else 3.0
        largest = max(truth.largest_score for truth in known)
        allowed = error_budget(exact, rounded, case.torch_dtype, factor, largest_score=largest)
        share = miss / max(allowed, sys.float_info.min)  # a gradient may be exactly 0
        if share > used:
            used, worst = share, name
        if name == "out":
            error = miss
    return Exactness(error, used, worst)


def tensor_heads(case: Case, name: str) -> int:
    return case.heads if name in ("out", "dq") else case.kv_heads


def _pick(case: Case, inputs: Inputs, t: Tensor, layout: str, sequence: int, head: int) -> Tensor:
    """(seqlen, dim): one sequence and head of a tensor in that layout."""
    t = t.detach()
    n = case.sequences()[sequence]
    if layout in ("heads_first", "padded_first"):
        return t[sequence, head, :n]
    if case.lengths and t.dim() == 3:
        begin = int(inputs.cu_seqlens[sequence])
        return t[begin : begin + n, head]
    return t[sequence, :, head]


def _oracle(
    case: Case,
    inputs: Inputs,
    sequence: int,
    head: int,
    begin: int,
    end: int,
    precision: torch.dtype,
) -> dict[str, Tensor]:
    """Rows [begin, end) of one head, in chunks: a causal chunk sees the keys up to its end, and the
    oracle aligns rows with keys at the bottom right."""
    kv_head = head * case.kv_heads // case.heads

    def one(t: Tensor, h: int) -> Tensor:  # (1, seqlen, 1, dim)
        return _pick(case, inputs, t, "native", sequence, h)[None, :, None]

    q, dout = one(inputs.q, head), one(inputs.dout, head)
    k, v = (one(t, kv_head).to(precision) for t in inputs.read)
    k, v = k.requires_grad_(case.backward), v.requires_grad_(case.backward)
    options: reference.Options = {"precision": precision, "causal": case.causal}
    if case.window is not None:
        options["window"] = (case.window, 0)
    if inputs.slopes is not None:
        options["alibi_slopes"] = inputs.slopes[head : head + 1]
    outs, lses, dqs = [], [], []
    for first in range(begin, end, CHUNK):
        last = min(end, first + CHUNK)
        rows = q[:, first:last].to(precision).requires_grad_(case.backward)
        keys = last if case.causal else k.shape[1]
        if inputs.bias is not None:
            options["bias"] = inputs.bias[:, head : head + 1, first:last, :keys]
        if inputs.dense_mask is not None:
            options["mask"] = inputs.dense_mask[:, :, first:last]
        out, lse = reference.attention(rows, k[:, :keys], v[:, :keys], **options)
        if case.backward:
            out.backward(dout[:, first:last].to(precision))  # type: ignore[no-untyped-call]
            assert rows.grad is not None
            dqs.append(rows.grad[0, :, 0])
        outs.append(out.detach()[0, :, 0])
        lses.append(lse.detach().flatten())
    result = {"out": torch.cat(outs), "lse": torch.cat(lses)}
    if case.backward:
        assert k.grad is not None and v.grad is not None
        result |= {"dq": torch.cat(dqs), "dk": k.grad[0, :, 0], "dv": v.grad[0, :, 0]}
    return {name: t.double() for name, t in result.items()}
