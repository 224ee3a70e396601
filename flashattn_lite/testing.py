"""The case table as data, the inputs it stands for, and the error budget: what a test of any engine
of this library needs. The truth is ``reference.attention`` in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashattn_lite import reference

__all__ = [
    "EDGE_CASES",
    "Case",
    "Gradients",
    "Inputs",
    "all_cases",
    "check_case",
    "check_within_budget",
    "error_budget",
    "gradients_of",
    "make_inputs",
    "pairwise_cases",
]


@dataclass(frozen=True)
class Case:
    """One attention problem. Lengths: one pair for a dense batch, else one for each sequence."""

    name: str
    seqlens: tuple[tuple[int, int], ...] = ((33, 47), (33, 47))  # (seqlen_q, seqlen_k) of each
    layout: str = "dense"  # dense | varlen | seqused | leftpad
    heads_q: int = 4
    heads_k: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None  # None: head_dim
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: str = ""  # "" | heads | batch
    sinks: bool = False
    bias: str = ""  # "" | full | broadcast
    dropout_p: float = 0.0
    strides: str = "contiguous"  # contiguous | heads_first | offset | last

    @property
    def batch(self) -> int:
        return len(self.seqlens)

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    """Tensors of a case, and the options that go with them, as keywords of ``attention``."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    dout: Tensor = field(default_factory=lambda: torch.empty(0))
    dlse: Tensor = field(default_factory=lambda: torch.empty(0))

    def reference_options(self) -> dict[str, Any]:
        """The same as keywords of ``reference.attention``."""
        return {n: o for n, o in self.options.items() if not n.startswith("max_seqlen")}


def _strided(shape: tuple[int, ...], strides: str, draw: Callable[..., Tensor]) -> Tensor:
    """A (..., row, head, dim) tensor whose memory is laid out otherwise."""
    *lead, rows, heads, dim = shape
    if strides == "heads_first":  # (batch, heads, seqlen, dim) memory, as SDPA has it
        return draw((*lead, heads, rows, dim)).transpose(-2, -3)
    if strides == "offset":  # a part of a larger tensor: misaligned, every stride too large
        return draw((*lead, rows + 1, heads + 1, dim + 3))[..., 1:, 1:, 3:]
    if strides == "last":  # last stride not 1: the only one that must be copied
        return draw((*lead, rows, dim, heads)).transpose(-1, -2)
    if strides == "contiguous":
        return draw(shape)
    raise ValueError(f"strides is {strides!r}")


def make_inputs(case: Case, *, seed: int = 0, device: str = "cpu") -> Inputs:
    """Random tensors of the case. What no sequence owns (beyond a used length, before a left
    padding) holds NaN, so that it shows when it is read."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def offsets(lengths: list[int]) -> Tensor:
        return integers([0, *itertools.accumulate(lengths)])

    lengths_q, lengths_k = ([pair[side] for pair in case.seqlens] for side in (0, 1))
    longest_q, longest_k = max(lengths_q, default=0), max(lengths_k, default=0)
    head_dim_v = case.head_dim if case.head_dim_v is None else case.head_dim_v
    options: dict[str, Any] = {
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "softmax_scale": case.softmax_scale,
    }
    if case.layout == "varlen":
        rows_q: tuple[int, ...] = (sum(lengths_q),)
        rows_k: tuple[int, ...] = (sum(lengths_k),)
        options |= {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
        options |= {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    else:
        rows_q, rows_k = (case.batch, longest_q), (case.batch, longest_k)
    q = _strided((*rows_q, case.heads_q, case.head_dim), case.strides, draw)
    k = _strided((*rows_k, case.heads_k, case.head_dim), case.strides, draw)
    v = _strided((*rows_k, case.heads_k, head_dim_v), case.strides, draw)
    if case.layout == "seqused":
        options |= {"seqused_q": integers(lengths_q), "seqused_k": integers(lengths_k)}
        for b, (seqlen_q, seqlen_k) in enumerate(case.seqlens):
            q[b, seqlen_q:] = k[b, seqlen_k:] = v[b, seqlen_k:] = torch.nan
    elif case.layout == "leftpad":
        options |= {"seqused_q": integers(lengths_q)}
        options |= {"leftpad_k": integers([longest_k - n for n in lengths_k])}
        for b, (seqlen_q, seqlen_k) in enumerate(case.seqlens):
            q[b, seqlen_q:] = torch.nan
            k[b, : longest_k - seqlen_k] = v[b, : longest_k - seqlen_k] = torch.nan
    if case.alibi:
        shape = (case.heads_q,) if case.alibi == "heads" else (case.batch, case.heads_q)
        options["alibi_slopes"] = torch.rand(shape, generator=generator).to(device) * 0.3
    if case.sinks:
        options["sinks"] = torch.randn(case.heads_q, generator=generator).to(device)
    if case.bias:
        full = (case.batch, case.heads_q, longest_q, longest_k)
        options["bias"] = draw(full if case.bias == "full" else (1, case.heads_q, 1, longest_k))
    if case.dropout_p > 0:
        options["dropout_p"] = case.dropout_p
        options["dropout_seed"] = torch.randint(2**62, (1,), generator=generator)
    lse_shape = (
        (case.heads_q, *rows_q) if len(rows_q) == 1 else (case.batch, case.heads_q, rows_q[1])
    )
    return Inputs(
        q,
        k,
        v,
        options,
        dout=_strided((*rows_q, case.heads_q, head_dim_v), case.strides, draw),
        dlse=torch.randn(lse_shape, generator=generator).to(device),
    )


# ---- the table ----------------------------------------------------------------------------------

EDGE_CASES: tuple[Case, ...] = (
    Case("one_element", seqlens=((1, 1),), heads_q=1, heads_k=1, head_dim=1),
    Case("empty_batch", seqlens=()),
    Case("no_queries", seqlens=((0, 5),)),
    Case("no_keys", seqlens=((5, 0),), sinks=True),
    Case("no_keys_no_sink", seqlens=((5, 0),)),
    Case("one_query", seqlens=((1, 97),), causal=True),
    Case("one_key", seqlens=((70, 1),)),
    Case("odd_everything", seqlens=((67, 131),) * 2, heads_q=3, heads_k=1, head_dim=37),
    Case("q_longer_causal", seqlens=((90, 33),), causal=True),
    Case("q_longer_window", seqlens=((90, 33),), window=(5, 7)),
    Case("window_sees_nothing", seqlens=((80, 16),), window=(0, 0), sinks=True),
    Case("fully_masked_tile_row", seqlens=((300, 20),), causal=True),
    Case("window_of_one", seqlens=((65, 65),), window=(0, 0)),
    Case("window_wider_than_keys", seqlens=((20, 40),), window=(1000, 3)),
    Case("window_right_beyond_keys", seqlens=((90, 33),), window=(None, 40)),
    Case("window_huge", seqlens=((20, 40),), window=(2**40, 2**40)),
    Case("causal_and_window", seqlens=((150, 150),), causal=True, window=(17, 9)),
    Case("several_tiles", seqlens=((257, 513),), causal=True, head_dim=80),
    Case("varlen_with_empty", ((0, 7), (5, 0), (0, 0), (1, 1), (64, 129), (130, 65)), "varlen"),
    Case("varlen_causal", ((3, 3), (0, 4), (100, 40), (40, 100)), "varlen", causal=True),
    Case("varlen_window", ((50, 50), (1, 70), (70, 1)), "varlen", window=(4, 2)),
    Case("seqused", ((0, 3), (9, 0), (40, 61)), "seqused", causal=True),
    Case("leftpad", ((12, 0), (12, 30), (5, 61)), "leftpad", causal=True),
    Case("value_dim_larger", head_dim=24, head_dim_v=96, causal=True),
    Case("value_dim_smaller", head_dim=192, head_dim_v=128),
    Case("value_dim_one", head_dim=64, head_dim_v=1),
    Case("head_dim_256", head_dim=256, causal=True),
    Case("head_dim_255", head_dim=255),
    Case("large_scores", softmax_scale=20.0),
    Case("negative_scale", softmax_scale=-0.2, causal=True),
    Case("multi_query", heads_q=8, heads_k=1, causal=True),
    Case("dropout_nearly_all", dropout_p=0.99),
    Case("bias_broadcast_alibi_batch", bias="broadcast", alibi="batch", causal=True),
    Case(
        "everything",
        ((30, 30), (1, 45), (77, 20)),
        "varlen",
        heads_q=6,
        heads_k=3,
        head_dim=40,
        head_dim_v=24,
        causal=True,
        window=(11, 0),
        softcap=3.0,
        alibi="batch",
        sinks=True,
        bias="full",
        dropout_p=0.2,
    ),
)

# Each axis of the grid, its plainest value first.
_AXES: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "lengths": (
        ("dense", ((33, 47), (33, 47))),
        ("dense", ((130, 130),)),
        ("dense", ((64, 128), (64, 128))),
        ("varlen", ((17, 17), (0, 5), (70, 33))),
        ("seqused", ((20, 31), (64, 90))),
        ("leftpad", ((16, 31), (16, 64))),
    ),
    "heads": ((2, 2), (4, 2), (6, 1), (5, 5)),
    "head_dims": ((64, 64), (128, 128), (80, 80), (96, 96), (37, 37), (256, 256), (32, 72), (8, 8)),
    "band": (
        (False, (None, None)),
        (True, (None, None)),
        (False, (9, 5)),
        (True, (20, None)),
        (False, (None, 3)),
    ),
    "softcap": (0.0, 4.0),
    "alibi": ("", "heads", "batch"),
    "sinks": (False, True),
    "bias": ("", "full", "broadcast"),
    "dropout_p": (0.0, 0.17),
    "strides": ("contiguous", "heads_first", "offset", "last"),
}


def _pair(a: int, i: int, b: int, j: int) -> tuple[int, int, int, int]:
    """Value i of axis a together with value j of axis b."""
    return (a, i, b, j) if a < b else (b, j, a, i)


def _pairwise(sizes: list[int]) -> Iterator[tuple[int, ...]]:
    """Rows that together hold every pair of values of every two axes: greedy, deterministic."""
    axes = range(len(sizes))
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(axes, 2)
        for i in range(sizes[a])
        for j in range(sizes[b])
    }
    while missing:
        a, i, b, j = min(missing)
        row = {a: i, b: j}
        for axis in (x for x in axes if x not in row):
            news = [
                sum(_pair(axis, value, x, row[x]) in missing for x in row)
                for value in range(sizes[axis])
            ]
            row[axis] = news.index(max(news))
        missing -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(axes, 2)}
        yield tuple(row[axis] for axis in axes)


def pairwise_cases() -> tuple[Case, ...]:
    """Every pair of values of every two axes appears in some case; not every triple."""
    cases = []
    for number, row in enumerate(_pairwise([len(values) for values in _AXES.values()])):
        value = {axis: _AXES[axis][i] for axis, i in zip(_AXES, row, strict=True)}
        layout, seqlens = value.pop("lengths")
        heads_q, heads_k = value.pop("heads")
        head_dim, head_dim_v = value.pop("head_dims")
        causal, window = value.pop("band")
        cases.append(
            Case(
                name=f"grid{number:02d}",
                seqlens=seqlens,
                layout=layout,
                heads_q=heads_q,
                heads_k=heads_k,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                causal=causal,
                window=window,
                **value,
            )
        )
    return tuple(cases)


def all_cases() -> tuple[Case, ...]:
    """The edge cases in each dtype, and the grid."""
    edges = (
        replace(case, name=f"{case.name}-{str(dtype).removeprefix('torch.')}", dtype=dtype)
        for case in EDGE_CASES
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )
    return (*edges, *pairwise_cases())


# ---- gradients and the budget -------------------------------------------------------------------


class Gradients(NamedTuple):
    """What a call returned, and the gradients of sum(out * dout) + sum(lse * dlse)."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]  # of q, k, v, and of sinks and bias where they are given


def gradients_of(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: Inputs,
    options: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """Runs ``function(q, k, v, **options)`` and its backward; rows without an LSE have no dlse.

    Args:
        dtype: of the leaves, and so of their gradients: float64 for a truth that nothing rounds;
            default: each its own.
    """
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    leaves |= {n: options[n] for n in ("sinks", "bias") if n in options}
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in leaves.items()}
    more = {n: leaves.get(n, value) for n, value in options.items()}
    out, lse = function(leaves["q"], leaves["k"], leaves["v"], **more)
    seen = torch.isfinite(lse.detach())
    loss_lse = torch.where(seen, lse, torch.zeros_like(lse)) * inputs.dlse.to(lse.dtype)
    loss = (out * inputs.dout.to(out.dtype)).sum() + loss_lse.sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return Gradients(
        out.detach(),
        lse.detach(),
        {
            n: torch.zeros_like(t) if g is None else g
            for (n, t), g in zip(leaves.items(), grads, strict=True)
        },
    )


def error_budget(
    truth: Tensor,
    low: Tensor,
    dtype: torch.dtype,
    factor: float,
    *,
    largest_score: float = 1.0,
    summed: float = 0.0,
) -> float:
    """The largest error allowed: ``factor`` times that of the same formula with every step in the
    low precision; plus, of the largest value, four units in the last place and what one rounding
    of the largest score in float32 makes of it (exp turns an absolute error into a relative one).

    Args:
        truth: float64.
        low: the same computed in ``dtype``.
        dtype: of the result under test.
        factor: 2 for outputs, 3 for gradients.
        largest_score: magnitude of the softmax's largest argument, or its LSE's.
        summed: for few results that are long sums with cancellation, the magnitudes added: they
            stand for the largest value, because what ``low`` shows of one sum is luck.
    """
    finite = torch.isfinite(truth)
    if not finite.any():
        return 0.0
    truth, low = truth[finite], low[finite].double()
    rounding = float(torch.nan_to_num((low - truth).abs(), nan=0.0, posinf=0.0).max())
    scores = max(1.0, largest_score) * torch.finfo(torch.float32).eps
    largest = max(summed, float(truth.abs().max()))
    return factor * rounding + (4 * torch.finfo(dtype).eps + scores) * largest


def check_within_budget(
    name: str,
    actual: Tensor,
    truth: Tensor,
    low: Tensor,
    *,
    factor: float = 2.0,
    largest_score: float = 1.0,
    summed: float = 0.0,
) -> float:
    """Raises AssertionError with the worst element unless ``actual`` is within the budget of
    ``truth`` (float64). Infinities and NaNs must be where the truth has them.

    Returns: the share of the budget that is used, 0 to 1.
    """
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    if actual.numel() == 0:
        return 0.0
    budget = error_budget(
        truth, low, actual.dtype, factor, largest_score=largest_score, summed=summed
    )
    wide = actual.double()
    same = (wide == truth) | (wide.isnan() & truth.isnan())
    error = torch.where(same, torch.zeros_like(truth), (wide - truth).abs())
    error = torch.nan_to_num(error, nan=torch.inf)
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert float(error.flatten()[worst]) <= budget, (
        f"{name}: {actual.flatten()[worst].item()!r} at {index}, expected "
        f"{truth.flatten()[worst].item()!r}: error {float(error.flatten()[worst]):.3g}, "
        f"budget {budget:.3g}; {int((error > budget).sum())} of {error.numel()} elements are beyond"
    )
    return float(error.flatten()[worst]) / budget if budget else 0.0


def _summed_into_dsinks(inputs: Inputs, truth: Gradients) -> float:
    """The magnitudes that a sink's gradient adds up, over all rows: of the head with most."""
    seen = torch.isfinite(truth.lse)
    delta = (inputs.dout.double() * truth.out).abs().sum(-1).movedim(-1, -2)  # like the LSE
    probability = torch.exp(inputs.options["sinks"].double()[:, None] - truth.lse)
    terms = torch.where(seen, probability * (delta + inputs.dlse.abs()), 0.0).sum(-1)
    heads = terms if terms.dim() == 1 else terms.sum(0)
    return float(heads.max()) if heads.numel() else 0.0


def check_case(
    function: Callable[..., tuple[Tensor, Tensor]],
    case: Case,
    *,
    backward: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """``function`` (with ``attention``'s keywords, returning out and lse) against the reference on
    one case: out, lse, and every gradient. Returns the share of the budget that each uses."""
    inputs = make_inputs(case, device=device, seed=seed)
    options = inputs.reference_options()

    def run(precision: torch.dtype) -> Gradients:
        more: dict[str, Any] = {"precision": precision}
        if precision == torch.float64:
            return gradients_of(reference.attention, inputs, options | more, dtype=precision)
        more["kernel_backward"] = True
        return gradients_of(reference.attention, inputs, options | more)

    truth, low = run(torch.float64), run(case.dtype)
    if backward:
        actual = gradients_of(function, inputs, inputs.options)
    else:
        actual = Gradients(*function(inputs.q, inputs.k, inputs.v, **inputs.options), {})
    lse = truth.lse[torch.isfinite(truth.lse)]
    largest = float(lse.abs().max()) if lse.numel() else 1.0

    def check(
        result: str, a: Tensor, t: Tensor, x: Tensor, factor: float, summed: float = 0.0
    ) -> float:
        return check_within_budget(
            f"{case}: {result}", a, t, x, factor=factor, largest_score=largest, summed=summed
        )

    shares = {
        "out": check("out", actual.out, truth.out, low.out, 2.0),
        "lse": check("lse", actual.lse, truth.lse, low.lse, 2.0),
    }
    for name, gradient in actual.grads.items():
        exact = truth.grads[name]
        summed = _summed_into_dsinks(inputs, truth) if name == "sinks" else 0.0
        shares[f"d{name}"] = check(f"d{name}", gradient, exact, low.grads[name], 3.0, summed)
    return shares
