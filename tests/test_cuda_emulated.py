"""The CUDA kernels, unmodified, on the SIMT emulator: exact on the case table, free of races,
out-of-bounds and uninitialised reads, of bank conflicts and of uncoalesced tile accesses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native import cuda_problem

from flashattn_lite import reference, testing

ALGORITHMS = ("flash2", "flash1")
CASES = [
    case
    for case in testing.all_cases()
    if case.dtype in cuda_problem.DTYPES and not case.bias and case.strides != "last"
]


def clean(result: cuda_problem.Result) -> None:
    """Nothing was reported."""
    assert not result.reports, "\n".join(" ".join(report) for report in result.reports)


def check_forward(result: cuda_problem.Result, inputs: testing.Inputs, dtype: torch.dtype) -> None:
    options = inputs.reference_options()
    truth = reference.attention(inputs.q, inputs.k, inputs.v, **options)
    low = reference.attention(inputs.q, inputs.k, inputs.v, **options, precision=dtype)
    testing.check_within_budget("out", result.out, truth[0], low[0])
    testing.check_within_budget("lse", result.lse, truth[1], low[1])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(algorithm: str, case: testing.Case) -> None:
    inputs = testing.make_inputs(case)
    result = cuda_problem.forward(
        algorithm, inputs.q, inputs.k, inputs.v, **inputs.reference_options()
    )
    clean(result)
    check_forward(result, inputs, case.dtype)


def _paged(page_size: int, lengths: list[int], **more: Any) -> tuple[Any, ...]:
    """K/V in shuffled pages: NaN in slots and pages that nobody owns, huge unused table entries."""
    generator = torch.Generator().manual_seed(page_size)
    needed = [-(-n // page_size) for n in lengths]
    table = torch.full((len(lengths), max(needed) + 2), 2**30, dtype=torch.int32)
    free = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    q = torch.randn(len(lengths), 40, 4, 64, generator=generator).bfloat16()
    pages = [torch.full((sum(needed) + 3, page_size, 2, 64), torch.nan) for _ in range(2)]
    for b, n in enumerate(lengths):
        for p in range(needed[b]):
            page = table[b, p] = free.pop()
            used = min(page_size, n - p * page_size)
            for tensor in pages:
                tensor[page, :used] = torch.randn(used, 2, 64, generator=generator)
    k, v = (tensor.bfloat16() for tensor in pages)
    used_k = torch.tensor(lengths, dtype=torch.int32)
    return q, k, v, {"block_table": table, "seqused_k": used_k, "causal": True, **more}


@pytest.mark.parametrize("page_size", (1, 5, 16, 64, 256))
@pytest.mark.parametrize("softcap", (0.0, 3.0))
def test_forward_paged(page_size: int, softcap: float) -> None:
    q, k, v, options = _paged(page_size, [3, 130, 64, 41], softcap=softcap)
    result = cuda_problem.forward("flash2", q, k, v, **options)
    clean(result)
    check_forward(result, testing.Inputs(q, k, v, options), torch.bfloat16)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("grid")][:6], ids=str)
def test_schedules_change_nothing(algorithm: str, case: testing.Case) -> None:
    """Whatever order the threads run in, the bits are the same and no race is seen."""
    inputs = testing.make_inputs(case)
    results = [
        cuda_problem.forward(
            algorithm, inputs.q, inputs.k, inputs.v, seed=seed, **inputs.reference_options()
        )
        for seed in (0, 1, 2)
    ]
    for result in results:
        clean(result)
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.lse, results[0].lse)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("head_dim", (64, 128, 192, 256))
def test_tiles_move_at_full_width(algorithm: str, head_dim: int) -> None:
    """No bank conflict and no wasted sector in any tile access of the plain forward."""
    case = testing.Case(
        "full", ((256, 256),), heads_q=2, heads_k=1, head_dim=head_dim, dtype=torch.bfloat16
    )
    inputs = testing.make_inputs(case)
    result = cuda_problem.forward(algorithm, inputs.q, inputs.k, inputs.v)
    clean(result)
    kinds = {site["kind"] for site in result.sites}
    assert {"cp.async source", "ldmatrix", "st.shared", "ld.shared", "st.global"} <= kinds
    wasteful = [s for s in result.sites if s["units"] > s["ideal"] and s["bytes"] > 4096]
    assert not wasteful, wasteful


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_keys_that_nobody_sees_are_not_read(algorithm: str) -> None:
    """A window leaves the start of the cache unseen: NaN there must not show."""
    case = testing.Case("window", ((1, 300),), window=(20, 0), dtype=torch.bfloat16)
    inputs = testing.make_inputs(case)
    inputs.k[:, :279] = inputs.v[:, :279] = torch.nan
    result = cuda_problem.forward(algorithm, inputs.q, inputs.k, inputs.v, window=(20, 0))
    clean(result)
    assert torch.isfinite(result.out).all()
    visible = [t[:, 279:] for t in (inputs.k, inputs.v)]
    truth, _ = reference.attention(inputs.q, *visible)
    testing.check_within_budget("out", result.out, truth, truth.bfloat16())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dropout_is_its_definition(algorithm: str) -> None:
    """With V the identity, the output is P itself: dropped exactly where the definition says."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, n, 3, 64, generator=generator).half() for n in (200, 96))
    v = torch.eye(96).half().expand(2, 3, 96, 96).transpose(1, 2)
    options = {"dropout_p": 0.3, "dropout_seed": torch.tensor([2**61 + 12345])}
    result = cuda_problem.forward(algorithm, q, k, v, **options)
    clean(result)
    heads = torch.arange(6).reshape(2, 3)
    keep = reference.dropout_keep(options["dropout_seed"], heads, 200, 96, 0.3)
    assert torch.equal(result.out.transpose(1, 2) != 0, keep)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_of_no_sequence_are_cleared(algorithm: str) -> None:
    """Behind the last of cu_seqlens, outputs and gradients are 0, LSE -inf; nothing is read."""
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 70, 70, 81], [0, 20, 64, 90]))
    generator = torch.Generator().manual_seed(2)
    q, dout = (torch.randn(100, 4, 64, generator=generator).bfloat16() for _ in range(2))
    k, v = (torch.randn(120, 2, 64, generator=generator).bfloat16() for _ in range(2))
    q[81:], dout[81:], k[90:], v[90:] = torch.nan, torch.nan, torch.nan, torch.nan
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": True}
    inputs = testing.Inputs(q, k, v, options, dout=dout, dlse=torch.zeros(4, 100))
    forward = cuda_problem.forward(algorithm, q, k, v, **options)
    clean(forward)
    check_forward(forward, inputs, torch.bfloat16)
    assert (forward.out[81:] == 0).all() and (forward.lse[:, 81:] == -torch.inf).all()
    for deterministic in (False, True):
        result = run_backward(algorithm, inputs, deterministic=deterministic)
        clean(result)
        assert result.dq is not None and result.dk is not None and result.dv is not None
        for gradient, rows in ((result.dq, 81), (result.dk, 90), (result.dv, 90)):
            assert (gradient[rows:] == 0).all() and torch.isfinite(gradient[:rows]).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_offsets_beyond_32_bits(algorithm: str) -> None:
    """Heads 2^31 elements apart, in memory that is mostly never touched."""
    apart = 2**31 + 64
    shape = (1, 20, 2, 64)
    big = [torch.empty(apart + 20 * 64, dtype=torch.float16) for _ in range(3)]
    q, k, v = (t.as_strided(shape, (0, 64, apart, 1)) for t in big)
    for t in (q, k, v):
        t.copy_(torch.randn(shape))
    result = cuda_problem.forward(algorithm, q, k, v, causal=True)
    clean(result)
    check_forward(result, testing.Inputs(q, k, v, {"causal": True}), torch.float16)


# ---- backward -----------------------------------------------------------------------------------


def run_backward(
    algorithm: str, inputs: testing.Inputs, *, dlse: bool = True, **more: Any
) -> cuda_problem.Result:
    options = inputs.reference_options()
    forward = cuda_problem.forward(algorithm, inputs.q, inputs.k, inputs.v, **options)
    return cuda_problem.backward(
        algorithm,
        inputs.q,
        inputs.k,
        inputs.v,
        forward.out,
        forward.lse,
        inputs.dout,
        dlse=inputs.dlse if dlse else None,
        **options,
        **more,
    )


class Emulated(torch.autograd.Function):
    """The kernels as a differentiable function; whatever the emulator reports is an error."""

    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, sinks: Any, call: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = {n: o for n, o in call["options"].items() if not n.startswith("max_seqlen")}
        ctx.options = options | {"sinks": sinks}
        ctx.call = call
        result = cuda_problem.forward(call["algorithm"], q, k, v, seed=call["seed"], **ctx.options)
        clean(result)
        ctx.save_for_backward(q, k, v, result.out, result.lse)
        return result.out, result.lse

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dout, dlse = gradients
        result = cuda_problem.backward(
            ctx.call["algorithm"],
            *ctx.saved_tensors,
            dout,
            dlse=dlse,
            deterministic=ctx.call["deterministic"],
            seed=ctx.call["seed"],
            **ctx.options,
        )
        clean(result)
        return result.dq, result.dk, result.dv, result.dsinks, None


def emulated(algorithm: str, *, deterministic: bool, seed: int) -> Callable[..., Any]:
    """``function(q, k, v, **options)`` under a schedule, for what the tests of every engine ask."""

    def function(
        q: Any, k: Any, v: Any, sinks: Any = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call = {"algorithm": algorithm, "deterministic": deterministic, "options": options}
        call["seed"] = seed
        out, lse = Emulated.apply(q, k, v, sinks, call)
        return out, lse

    return function


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("deterministic", (False, True), ids=("atomic", "deterministic"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(algorithm: str, deterministic: bool, case: testing.Case) -> None:
    """Under two random schedules; with test_forward's orderly one, every case sees three."""
    function = emulated(algorithm, deterministic=deterministic, seed=1 + deterministic)
    testing.check_case(function, case)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("grid")][:4], ids=str)
def test_deterministic_backward_repeats(algorithm: str, case: testing.Case) -> None:
    """The same bits whatever order blocks and threads run in."""
    inputs = testing.make_inputs(case)
    results = [run_backward(algorithm, inputs, deterministic=True, seed=seed) for seed in (0, 1, 2)]
    for result in results:
        clean(result)
        for name in ("dq", "dk", "dv", "dsinks"):
            first, other = getattr(results[0], name), getattr(result, name)
            assert first is None or torch.equal(first, other), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("head_dim", (64, 128, 192, 256))
@pytest.mark.parametrize("deterministic", (False, True), ids=("atomic", "deterministic"))
def test_backward_tiles_move_at_full_width(
    algorithm: str, head_dim: int, deterministic: bool
) -> None:
    case = testing.Case(
        "full", ((256, 256),), heads_q=2, heads_k=1, head_dim=head_dim, dtype=torch.bfloat16
    )
    result = run_backward(
        algorithm, testing.make_inputs(case), dlse=False, deterministic=deterministic
    )
    clean(result)
    wasteful = [s for s in result.sites if s["units"] > s["ideal"] and s["bytes"] > 4096]
    assert not wasteful, wasteful
