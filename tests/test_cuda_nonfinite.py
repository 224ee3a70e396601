"""What a hidden element may hold: a NaN or an infinity of Q, K, V or dO shows in every result that
depends on it through a visible pair of row and key, and in no other. On the emulator."""

import dataclasses
import math

import pytest
import torch
from native import cuda_problem
from torch import Tensor

from flashattn_lite import reference, testing
from flashattn_lite.testing import Case

ALGORITHMS = ("flash2", "flash1")
BF16, F16 = torch.bfloat16, torch.float16

# Several tiles of rows and keys; each hides something from someone.
CASES = (
    Case("causal", ((205, 205),), causal=True, dtype=BF16),
    Case("causal_more_keys", ((130, 300),), causal=True, head_dim=128, dtype=F16),
    Case("causal_more_rows", ((300, 130),), causal=True, head_dim=80, dtype=BF16),
    Case("window", ((205, 205),), window=(9, 3), heads_q=2, head_dim=128, dtype=BF16),
    Case("window_left", ((150, 280),), window=(70, None), dtype=F16),
    Case("varlen", ((70, 33), (0, 9), (100, 190)), "varlen", causal=True, dtype=BF16),
    Case("seqused", ((40, 61), (130, 130)), "seqused", window=(30, 20), heads_k=4, dtype=BF16),
    Case("leftpad", ((90, 90), (40, 161)), "leftpad", causal=True, heads_q=6, dtype=F16),
    Case("softcap", ((150, 150),), causal=True, softcap=3.0, heads_k=1, dtype=BF16),
    Case("unaligned", ((90, 150),), causal=True, head_dim=37, dtype=BF16),
    Case("wide", ((140, 140),), window=(20, 5), heads_q=1, heads_k=1, head_dim=256, dtype=BF16),
    Case("wide_192", ((140, 90),), causal=True, heads_q=2, head_dim=192, dtype=F16),
)
# An infinity of Q or K may cancel to NaN or saturate: what becomes of it is rounding's affair.
POISONS = tuple((name, math.nan) for name in ("q", "k", "v", "dout")) + tuple(
    (name, value) for name in ("v", "dout") for value in (math.inf, -math.inf)
)
# Each case with two of them, each of them with three cases.
COMBINATIONS = [(case, POISONS[(2 * i + j) % 8]) for i, case in enumerate(CASES) for j in (0, 3)]


def poisoned(inputs: testing.Inputs, name: str, value: float) -> testing.Inputs:
    """The same inputs with `value` in a few elements of the tensor: in the middle of a sequence, at
    its end and in a first tile; in one head and one column each."""
    tensor = getattr(inputs, name).clone()
    rows = tensor.flatten(0, -3)  # (rows of all sequences, heads, dim)
    used = torch.isfinite(rows[:, 0, 0]).nonzero().flatten()
    for share, head, column in ((0.02, 0, 3), (0.45, -1, 0), (1.0, 0, -1)):
        rows[used[int(share * (len(used) - 1))], head, column] = value
    return dataclasses.replace(inputs, **{name: tensor})


def product(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """(heads, m, k) @ (heads, k, n) over the pairs (m, k) that are seen, and over no other."""
    return torch.where(seen[:, :, None], a[..., None] * b[:, None], 0.0).sum(-2)


def by_the_rule(inputs: testing.Inputs) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv in float64, by the kernels' formulas."""
    options = inputs.reference_options()
    tensors = [t.double() for t in (inputs.q, inputs.k, inputs.v, inputs.dout)]
    dlse = inputs.dlse.double()
    q, k, v, dout = tensors
    result = {"out": torch.zeros_like(dout), "lse": torch.full_like(dlse, -math.inf)}
    result |= {f"d{n}": torch.zeros_like(t) for n, t in zip("qkv", tensors, strict=False)}
    group = q.shape[-2] // k.shape[-2]
    for s in reference.sequences(q, k, options):
        if not s.seqlen_q or not s.seqlen_k:
            continue

        def rows_of(t: Tensor, begin: int, length: int, b: int = s.batch) -> Tensor:
            """A view (heads, length, dim) of one sequence."""
            sequence = t if t.dim() == 3 else t[b]
            return sequence[begin : begin + length].transpose(0, 1)

        qs, outs, dqs, douts = (
            rows_of(t, s.row_q, s.seqlen_q) for t in (q, result["out"], result["dq"], dout)
        )
        ks, vs, dks, dvs = (
            rows_of(t, s.row_k, s.seqlen_k) for t in (k, v, result["dk"], result["dv"])
        )
        stats = [t if t.dim() == 2 else t[s.batch] for t in (result["lse"], dlse)]
        lse, dlses = (t[:, s.row_q : s.row_q + s.seqlen_q] for t in stats)
        right = 0 if options["causal"] else options["window"][1]
        seen = reference.visible(s.seqlen_q, s.seqlen_k, (options["window"][0], right))
        if (block_mask := options.get("block_mask")) is not None:
            seen = seen & block_mask.to_dense(s.seqlen_q, s.seqlen_k)[0, 0]
        kg, vg = (t.repeat_interleave(group, 0) for t in (ks, vs))
        scaled = qs @ kg.transpose(1, 2) * qs.shape[-1] ** -0.5
        cap = options["softcap"]
        scores = cap * torch.tanh(scaled / cap) if cap else scaled
        slope = 1 - torch.tanh(scaled / cap) ** 2 if cap else torch.ones_like(scaled)
        scores = scores.masked_fill(~seen, -math.inf)
        empty = ~seen.any(-1)
        lse[:] = torch.logsumexp(scores, -1)
        p = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
        outs[:] = product(p, vg, seen)
        delta = (outs * douts).sum(-1) - torch.where(empty, 0.0, dlses)
        dp = douts @ vg.transpose(1, 2)
        ds = p * (dp - delta[..., None]) * slope * qs.shape[-1] ** -0.5
        dqs[:] = product(ds, kg, seen)
        dk = product(ds.transpose(1, 2), qs, seen.T)
        dv = product(p.transpose(1, 2), douts, seen.T)
        dks[:], dvs[:] = (t.unflatten(0, (-1, group)).sum(1) for t in (dk, dv))
    return result


def run(algorithm: str, inputs: testing.Inputs, deterministic: bool) -> dict[str, Tensor]:
    options = inputs.reference_options()
    q, k, v = inputs.q, inputs.k, inputs.v
    forward = cuda_problem.forward(algorithm, q, k, v, **options)
    assert not forward.reports, forward.reports
    dlse = torch.where(forward.lse == -math.inf, 0.0, inputs.dlse)
    backward = cuda_problem.backward(
        *(algorithm, q, k, v, forward.out, forward.lse, inputs.dout),
        dlse=dlse,
        deterministic=deterministic,
        seed=1,
        **options,
    )
    assert not backward.reports, backward.reports
    assert backward.dq is not None and backward.dk is not None and backward.dv is not None
    gradients = {"dq": backward.dq, "dk": backward.dk, "dv": backward.dv}
    return {"out": forward.out, "lse": forward.lse, **gradients}


def rounded(inputs: testing.Inputs) -> dict[str, Tensor]:
    """The kernels' formulas with every step in the inputs' precision: for the budget."""
    more = {"precision": inputs.q.dtype, "kernel_backward": True}
    low = testing.gradients_of(reference.attention, inputs, inputs.reference_options() | more)
    return {"out": low.out, "lse": low.lse, **{f"d{n}": t for n, t in low.grads.items()}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rule_is_the_references(case: Case) -> None:
    """Where everything is finite."""
    inputs = testing.make_inputs(case)
    wide = {n: getattr(inputs, n).double() for n in ("q", "k", "v", "dout", "dlse")}
    exact = testing.gradients_of(
        reference.attention, dataclasses.replace(inputs, **wide), inputs.reference_options()
    )
    truth = by_the_rule(inputs)
    gradients = {f"d{n}": t for n, t in exact.grads.items()}
    for name, value in {"out": exact.out, "lse": exact.lse, **gradients}.items():
        assert torch.allclose(truth[name], value, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "case,poison", COMBINATIONS, ids=[f"{case}-{p[0]}_{p[1]}" for case, p in COMBINATIONS]
)
def test_shows_where_it_is_visible_and_nowhere_else(
    algorithm: str, case: Case, poison: tuple[str, float]
) -> None:
    clean = testing.make_inputs(case)
    inputs = poisoned(clean, *poison)
    truth, low = by_the_rule(inputs), rounded(clean)
    for deterministic in (False, True) if algorithm == "flash2" else (False,):
        for name, actual in run(algorithm, inputs, deterministic).items():
            factor = 2.0 if name in ("out", "lse") else 3.0
            testing.check_within_budget(name, actual, truth[name], low[name], factor=factor)
