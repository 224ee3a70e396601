"""The CUDA decode kernels, unmodified, on the SIMT emulator: exact over every layout and storage of
K and V, free of reports, the same bits whatever surrounds a sequence, each element read once."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from native import cuda_problem, kv_caches
from torch import Tensor

from flashattn_lite import reference, testing


def few_queries(case: testing.Case) -> testing.Case:
    """With at most five query tokens a sequence: what decode is for."""
    return replace(case, seqlens=tuple((min(5, q), k) for q, k in case.seqlens))


# Dropout is refused, float32 too; a last stride other than 1 never reaches an engine.
CASES = [
    few_queries(case)
    for case in testing.all_cases()
    if case.dtype in (torch.float16, torch.bfloat16)
    and not case.dropout_p
    and case.strides != "last"
]


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> cuda_problem.Result:
    """The kernels' result; nothing may have been reported."""
    result = cuda_problem.forward("decode", q, k, v, **options)
    assert not result.reports, "\n".join(" ".join(report) for report in result.reports)
    return result


def check(result: cuda_problem.Result, inputs: testing.Inputs) -> None:
    options = inputs.reference_options()
    truth = reference.attention(inputs.q, inputs.k, inputs.v, **options)
    low = reference.attention(inputs.q, inputs.k, inputs.v, **options, precision=inputs.q.dtype)
    lse = truth[1][torch.isfinite(truth[1])]
    largest = float(lse.abs().max()) if lse.numel() else 1.0
    for name, actual, t, x in zip(
        ("out", "lse"), (result.out, result.lse), truth, low, strict=True
    ):
        testing.check_within_budget(name, actual, t, x, largest_score=largest)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: testing.Case) -> None:
    """As the case lays K and V out: strided, unaligned, varlen, used lengths, left padding."""
    inputs = testing.make_inputs(case)
    check(run(inputs.q, inputs.k, inputs.v, **inputs.reference_options()), inputs)


IN_CACHES = [
    pytest.param(case, layout, kv_caches.STORED_AS[(i + j) % 3], i + j, id=f"{case}-{layout}")
    for i, case in enumerate(case for case in CASES if case.batch)
    for j, layout in enumerate(kv_caches.LAYOUTS)
]


@pytest.mark.parametrize(("case", "layout", "storage", "turn"), IN_CACHES)
def test_case_over_caches(case: testing.Case, layout: str, storage: str, turn: int) -> None:
    """Every case in every layout, and in every storage (in two layouts each); four schedules and
    three numbers of splits take turns."""
    inputs = kv_caches.over_cache(case, layout, storage)
    more = {"seed": turn % 4, "num_splits": turn % 5 % 3}
    check(run(inputs.q, inputs.k, inputs.v, **more, **inputs.reference_options()), inputs)


EVERYTHING = testing.Case(
    "everything",
    ((3, 700), (1, 45), (0, 9), (5, 300)),
    "varlen",
    heads_q=6,
    heads_k=2,
    head_dim=40,
    head_dim_v=24,
    causal=True,
    window=(400, 0),
    softcap=3.0,
    alibi="batch",
    sinks=True,
    dtype=torch.bfloat16,
)


@pytest.mark.parametrize("layout", kv_caches.LAYOUTS)
@pytest.mark.parametrize("storage", kv_caches.STORED_AS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_everything_at_once(layout: str, storage: str, dtype: torch.dtype) -> None:
    inputs = kv_caches.over_cache(replace(EVERYTHING, dtype=dtype), layout, storage)
    results = [
        run(inputs.q, inputs.k, inputs.v, seed=seed, **inputs.reference_options())
        for seed in (0, 1, 2)
    ]
    check(results[0], inputs)
    for result in results:  # whatever order the threads run in
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.lse, results[0].lse)


@pytest.mark.parametrize("head_dim", (64, 128, 192, 256))
@pytest.mark.parametrize("storage", kv_caches.STORED_AS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_tiles_move_at_full_width(head_dim: int, storage: str, dtype: torch.dtype) -> None:
    """No bank conflict, no wasted sector, and each element of K and V is read once."""
    case = testing.Case(
        "full",
        ((4, 640),),
        heads_q=8,
        heads_k=2,
        head_dim=head_dim,
        dtype=dtype,
    )
    inputs = kv_caches.over_cache(case, "page16", storage)
    result = run(inputs.q, inputs.k, inputs.v, **inputs.reference_options())
    check(result, inputs)
    kinds = {site["kind"] for site in result.sites}
    assert {"cp.async source", "ldmatrix", "st.shared", "ld.shared", "st.global"} <= kinds
    wasteful = [s for s in result.sites if s["units"] > s["ideal"] and s["bytes"] > 4096]
    # Factors, one float of each row and head, lie apart as the cache has them.
    factors = [
        s for s in wasteful if s["kind"] == "cp.async source" and s["bytes"] == 128 * s["requests"]
    ]
    assert len(factors) == (storage != "same")
    assert wasteful == factors
    for name in ("k", "v"):
        assert result.traffic[name][0] == 640 * 2 * head_dim * (2 if storage == "same" else 1)


# ---- the bits of a sequence are its own ----------------------------------------------------------


def _sequences(lengths: list[int], tokens: int, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [
        tuple(
            torch.randn(rows, heads, 64, generator=generator).to(dtype)
            for rows, heads in ((tokens, 6), (n, 2), (n, 2))
        )
        for n in lengths
    ]


def _bits(
    sequences: list[tuple[Tensor, ...]], layout: str, storage: str, seed: int = 0, **more: Any
) -> list[tuple[Tensor, Tensor]]:
    """Out and LSE of each sequence, computed in one batch."""
    k, v = ([s[i] for s in sequences] for i in (1, 2))
    lengths = [t.shape[0] for t in k]
    cache = kv_caches.make_cache(layout, storage, k, v, max(lengths) + 3, seed=seed)
    kv_caches.forget_unused_pages(cache, lengths)
    used = torch.tensor(lengths, dtype=torch.int32)
    q = torch.stack([s[0] for s in sequences])
    result = run(q, cache.k, cache.v, seqused_k=used, causal=True, **cache.options, **more)
    return list(zip(result.out, result.lse, strict=True))


@pytest.mark.parametrize("storage", kv_caches.STORED_AS)
@pytest.mark.parametrize("tokens", (1, 4))
def test_bits_are_the_sequences_own(storage: str, tokens: int) -> None:
    """Not those of the batch around it, of pages and their order, or of the number of splits."""
    sequences = _sequences([901, 37, 600, 300], tokens, torch.bfloat16)
    alone = [_bits([s], "contiguous", storage)[0] for s in sequences]
    variants: list[Any] = [
        (sequences, "contiguous", {}),
        (sequences, "page16", {}),
        (sequences, "page16", {"seed": 1}),  # the pages in another order
        (sequences, "page5", {}),
        (sequences, "page256", {"multiprocessors": 1}),  # one block walks all parts
        (sequences, "page1", {"multiprocessors": 2}),
        (sequences[:2], "page64", {}),
        (sequences, "page16", {"num_splits": 1}),
        (sequences, "contiguous", {"num_splits": 3}),
        (sequences, "page5", {"num_splits": 1000}),
    ]
    for batch, layout, more in variants:
        for (out, lse), (own_out, own_lse) in zip(
            _bits(batch, layout, storage, **more), alone, strict=False
        ):
            assert torch.equal(out, own_out), (layout, more)
            assert torch.equal(lse, own_lse), (layout, more)


def test_bits_are_those_of_wider_tiles() -> None:
    """A sequence of one token beside one of eight: the call's tiles have 32 rows instead of 16."""
    (q, k, v), (long_q, *_) = _sequences([700], 1, torch.bfloat16) + _sequences(
        [700], 8, torch.bfloat16
    )
    alone = run(q[None], k[None], v[None], causal=True)
    cu_seqlens = torch.tensor([0, 1, 9], dtype=torch.int32)
    both = run(
        torch.cat([q, long_q]),
        torch.stack([k, k]),
        torch.stack([v, v]),
        cu_seqlens_q=cu_seqlens,
        causal=True,
    )
    assert torch.equal(both.out[:1], alone.out[0])
    assert torch.equal(both.lse[:, :1], alone.lse[0])


# ---- what must not show, and what must -----------------------------------------------------------


@pytest.mark.parametrize("storage", kv_caches.STORED_AS)
@pytest.mark.parametrize("side", ("k", "v"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_a_nan_shows_where_it_is_seen_only(storage: str, side: str, dtype: torch.dtype) -> None:
    """The last of three tokens alone sees the last key, the first alone the first one."""
    case = testing.Case(
        "nan", ((3, 300),), heads_q=4, heads_k=2, dtype=dtype, causal=True, window=(280, 0)
    )
    clean = testing.make_inputs(case)
    window = {"causal": True, "window": (280, 0)}
    first = 300 - 3 - 280
    for key, reached in ((299, [2]), (298, [1, 2]), (first, [0]), (first + 1, [0, 1])):
        inputs = testing.Inputs(clean.q, clean.k.clone(), clean.v.clone())
        (inputs.k if side == "k" else inputs.v)[0, key, 1] = torch.nan
        rows = [[t[0]] for t in (inputs.k, inputs.v)]
        cache = kv_caches.make_cache("page16", storage, *rows, 300)
        used = torch.tensor([300], dtype=torch.int32)
        out = run(inputs.q, cache.k, cache.v, seqused_k=used, **window, **cache.options).out
        nan = out.isnan().all(-1)[0]
        assert torch.equal(out.isnan().any(-1)[0], nan)
        expected = torch.zeros(3, 4, dtype=torch.bool)
        expected[reached, 2:] = True
        assert torch.equal(nan, expected), (key, nan)


def test_a_stored_float8_nan_shows() -> None:
    """The bit pattern itself, under a finite factor; every other pattern is exact."""
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(256, dtype=torch.uint8)
        q, k = torch.zeros(1, 1, 1, 64, dtype=dtype), torch.zeros(1, 4, 1, 64, dtype=torch.uint8)
        v = patterns.reshape(1, 4, 1, 64).clone()
        ones = torch.ones(1, 4, 1)
        for row in range(4):
            used = torch.tensor([1], dtype=torch.int32)
            result = run(
                q,
                k[:, row:].view(torch.float8_e4m3fn),
                v[:, row:].view(torch.float8_e4m3fn),
                seqused_k=used,
                k_scale=ones[:, row:],
                v_scale=ones[:, row:],
            )
            exact = v[0, row, 0].view(torch.float8_e4m3fn).to(dtype)
            assert torch.equal(result.out[0, 0, 0].nan_to_num(7.0), exact.nan_to_num(7.0))


def test_every_int8_is_exact() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        v = torch.arange(-128, 128).to(torch.int8).reshape(1, 4, 1, 64)
        q, k = torch.zeros(1, 1, 1, 64, dtype=dtype), torch.zeros_like(v)
        ones = torch.ones(1, 4, 1)
        for row in range(4):
            more = {"k_scale": ones[:, row:], "v_scale": ones[:, row:]}
            used = torch.tensor([1], dtype=torch.int32)
            result = run(q, k[:, row:], v[:, row:], seqused_k=used, **more)
            assert torch.equal(result.out[0, 0, 0], v[0, row, 0].to(dtype))


@pytest.mark.parametrize("storage", ("int8", "fp8"))
@pytest.mark.parametrize("size", (2.0**-10, 1.0, 2.0**14))
def test_factors_of_any_size(storage: str, size: float) -> None:
    """Probabilities times factors keep to float16's range, whatever the factors are."""
    case = testing.Case("sizes", ((1, 400),), heads_q=4, heads_k=2, dtype=torch.float16)
    inputs = testing.make_inputs(case)
    v = (inputs.v * torch.logspace(-3, 0, 400)[None, :, None, None] * size).half()
    cache = kv_caches.make_cache("page16", storage, [inputs.k[0]], [v[0]], 400)
    options = {"seqused_k": torch.tensor([400], dtype=torch.int32), **cache.options}
    result = run(inputs.q, cache.k, cache.v, **options)
    check(result, testing.Inputs(inputs.q, cache.k, cache.v, options))


def test_long_sequences_have_longer_parts() -> None:
    """64 parts at most: beyond 16384 keys they grow."""
    q, k, v = _sequences([17000], 1, torch.bfloat16)[0]
    inputs = testing.Inputs(q[None, :, :1], k[None, :, :1], v[None, :, :1])
    check(run(inputs.q, inputs.k, inputs.v), inputs)


@pytest.mark.parametrize("storage", ("int8", "fp8"))
def test_quantised_prefill(storage: str) -> None:
    """FlashAttention-2 takes no quantised K and V: decode does, whatever the number of queries."""
    case = testing.Case(
        "prefill", ((90, 90), (40, 300)), "varlen", causal=True, dtype=torch.bfloat16
    )
    inputs = kv_caches.over_cache(case, "page16", storage)
    check(run(inputs.q, inputs.k, inputs.v, **inputs.reference_options()), inputs)


def test_offsets_beyond_32_bits() -> None:
    """Pages 2^31 elements apart, in memory that is mostly never touched."""
    apart = 2**31 + 64
    big = [torch.empty(apart + 16 * 64, dtype=torch.float16) for _ in range(2)]
    k, v = (t.as_strided((2, 16, 1, 64), (apart, 64, 64, 1)) for t in big)
    for t in (k, v):
        t.copy_(torch.randn(t.shape))
    q = torch.randn(1, 1, 4, 64).half()
    options = {
        "block_table": torch.tensor([[1, 0]], dtype=torch.int32),
        "seqused_k": torch.tensor([29], dtype=torch.int32),
    }
    check(run(q, k, v, **options), testing.Inputs(q, k, v, options))


def test_no_query_heads() -> None:
    """Nothing to compute, and nothing touched."""
    q, k = torch.zeros(2, 1, 0, 64).half(), torch.zeros(2, 20, 2, 64).half()
    assert run(q, k, k).out.shape == (2, 1, 0, 64)


def test_splits_can_be_forced() -> None:
    """Each block that has keys reads Q once; a part of 256 keys is the least that one takes."""
    q, k, v = (t[None] for t in _sequences([1000], 1, torch.bfloat16)[0])
    results = {n: run(q, k, v, num_splits=n) for n in (0, 1, 2, 3, 4, 100)}
    blocks = {n: r.traffic["q"][0] // (q.numel() * 2) for n, r in results.items()}
    assert blocks == {0: 4, 1: 1, 2: 2, 3: 2, 4: 4, 100: 4}  # runs of two parts in 3 splits: 2
    for result in results.values():
        assert torch.equal(result.out, results[0].out)


def test_splits_fill_the_device() -> None:
    """A block for every part when sequences are few, one for many parts when they are many."""
    splits = cuda_problem.engines().decode_splits
    assert splits(tiles=8, most_parts=32, multiprocessors=132, blocks_per_multiprocessor=3) == 32
    assert splits(tiles=512, most_parts=32, multiprocessors=132, blocks_per_multiprocessor=3) == 13
    assert splits(tiles=10**6, most_parts=32, multiprocessors=132, blocks_per_multiprocessor=3) == 1
    assert splits(tiles=0, most_parts=1, multiprocessors=1, blocks_per_multiprocessor=1) == 1


def test_splits_on_an_h200() -> None:
    """The table of docs/kernels/decode.md: 8 K/V heads, a tile of rows each."""
    splits = cuda_problem.engines().decode_splits
    rows = ((1, 4, 4, 32), (1, 32, 32, 256), (1, 64, 64, 512), (8, 32, 32, 2048))
    for sequences, parts, expected, blocks in (*rows, (64, 32, 13, 5632), (256, 32, 4, 8192)):
        chosen = splits(
            tiles=8 * sequences,
            most_parts=parts,
            multiprocessors=132,
            blocks_per_multiprocessor=3,
        )
        run = -(-parts // chosen)
        assert (chosen, 8 * sequences * -(-parts // run)) == (expected, blocks)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_a_bias_at_any_length(dtype: torch.dtype) -> None:
    """FlashAttention-2 takes no bias: decode does, whatever the number of queries."""
    case = testing.Case(
        "bias", ((90, 90), (40, 300)), "varlen", causal=True, dtype=torch.bfloat16, bias="full"
    )
    inputs = kv_caches.over_cache(case, "page16", "same")
    inputs.options["bias"] = inputs.options["bias"].to(dtype)
    check(run(inputs.q, inputs.k, inputs.v, **inputs.reference_options()), inputs)


def test_reasons_against() -> None:
    """Why decode does not take a call, in words that name the limit."""

    def reason(q: Tensor, k: Tensor, capability: int = 80, **options: Any) -> str | None:
        return cuda_problem.reason_against("decode", q, k, k, capability, **options)

    def tensors(tokens: int, heads: int = 2, dim: int = 64) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, tokens, heads, dim).half(), torch.zeros(1, 20, 1, dim).half()

    assert reason(*tensors(16)) is None
    assert reason(*tensors(1, heads=256)) is None
    many = "q has more than 16 tokens of a sequence, or more than 256 rows for a K/V head"
    assert reason(*tensors(17)) == many
    assert reason(*tensors(16, heads=17)) == many
    assert reason(*tensors(1), dropout_p=0.5) == "decoding has no dropout"
    assert reason(*tensors(1, dim=192), capability=86) == (
        "head dims above 128 need 142 KB of shared memory; this device has 99 KB"
    )
    assert reason(*tensors(1), capability=75) == "the device's compute capability is below 8.0"
    assert reason(*tensors(1, dim=576)) == (
        "the head dim is above 256: latent attention decodes on the CPU engine alone"
    )
    bias = torch.zeros(1, 1, 17, 20)
    assert reason(*tensors(17), bias=bias) is None
    assert reason(*tensors(17), bias=bias.bfloat16()) == (
        "the bias is neither float32 nor of q's dtype"
    )
