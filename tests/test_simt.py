"""The SIMT emulator: correct kernels give right results and no report, planted bugs are reported by
kind, file and line, and the counters count what is known by hand."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from native import emulated
from native.emulated import NATIVE

SOURCES = ["attention", "gemm", "small", "mistakes"]
KERNELS = [NATIVE / f"simt_{name}.cu" for name in SOURCES]


@pytest.fixture(scope="module")
def simt() -> ModuleType:
    return emulated.load("simt_tests", [NATIVE / "simt_tests.cpp"], KERNELS)


@pytest.fixture(autouse=True)
def clean(simt: ModuleType) -> None:
    simt.reset()
    simt.configure()


def share(simt: ModuleType, writable: bool = True, **tensors: torch.Tensor) -> list[int]:
    """Registers tensors as device buffers under their keyword names; returns their addresses."""
    for name, tensor in tensors.items():
        assert tensor.is_contiguous()
        bytes_ = tensor.numel() * tensor.element_size()
        simt.register_buffer(tensor.data_ptr(), bytes_, name, writable)
    return [tensor.data_ptr() for tensor in tensors.values()]


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


# ---- the kernels, each with its reference --------------------------------------------------------


def attention(
    simt: ModuleType, heads: int = 1, seqlen: int = 200, causal: bool = True, bug: str = "none"
) -> float:
    """Runs the kernel; returns the largest error of out and lse against float64."""
    generator = torch.Generator().manual_seed(1)
    shape = (heads, seqlen, 64)
    q, k, v = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(3))
    out, lse = nans(*shape, dtype=torch.bfloat16), nans(heads, seqlen)
    inputs = share(simt, writable=False, q=q, k=k, v=v)
    outputs = share(simt, out=out, lse=lse)
    simt.attention(*inputs, *outputs, heads, seqlen, causal, 0.125, bug)
    scores = q.double() @ k.double().transpose(1, 2) * 0.125
    if causal:
        scores = scores.masked_fill(torch.ones(seqlen, seqlen).triu(1).bool(), -math.inf)
    reference = scores.softmax(-1) @ v.double()
    error_out = (out.double() - reference).abs().max().item()
    error_lse = (lse.double() - scores.logsumexp(-1)).abs().max().item()
    return max(error_out, 10 * error_lse)


ATTENTION_ERROR = 2**-6  # two roundings to bfloat16 of values around 2 or less


def gemm_sm80(simt: ModuleType, m: int, n: int, k: int) -> float:
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(-8, 9, (m, k), generator=generator).to(torch.bfloat16)
    b = torch.randint(-8, 9, (k, n), generator=generator).to(torch.bfloat16)
    c = nans(m, n)
    addresses = share(simt, writable=False, a=a, b=b) + share(simt, c=c)
    simt.gemm_sm80(*addresses, m, n, k)
    return (c.double() - a.double() @ b.double()).abs().max().item()


def gemm_sm90(
    simt: ModuleType,
    m: int = 64,
    n: int = 64,
    k: int = 256,
    transposed: bool = False,
    bug: str = "none",
) -> float:
    """Sums of at most 256 integers in [-1, 1] are exact in bfloat16: the error must be 0."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(-1, 2, (m, k), generator=generator).to(torch.bfloat16)
    b = torch.randint(-1, 2, (k, n), generator=generator).to(torch.bfloat16)
    stored_b = b.t().contiguous() if transposed else b
    c = nans(m, n, dtype=torch.bfloat16)
    addresses = share(simt, writable=False, a=a, b=stored_b) + share(simt, c=c)
    simt.gemm_sm90(*addresses, m, n, k, transposed, bug)
    return (c.double() - a.double() @ b.double()).abs().max().item()


def block_sum(simt: ModuleType, n: int, blocks: int) -> float:
    x = torch.arange(n, dtype=torch.float32) % 17
    out = torch.zeros(1)
    simt.sum(*share(simt, writable=False, x=x), *share(simt, out=out), n, blocks)
    return abs(out.item() - x.sum().item())


def last_block(simt: ModuleType, n: int = 1000, blocks: int = 5, bug: str = "none") -> float:
    x = torch.arange(n, dtype=torch.float32) % 17
    partial, counter, out = nans(blocks), torch.zeros(1, dtype=torch.int32), nans(1)
    outputs = share(simt, partial=partial, counter=counter, out=out)
    simt.sum_last_block(*share(simt, writable=False, x=x), *outputs, n, blocks, bug)
    return abs(out.item() - x.sum().item())


def histogram(simt: ModuleType, n: int = 1000, bins: int = 10, bug: str = "none") -> float:
    x = (torch.arange(n) * 7919 % bins).to(torch.int32)
    out = torch.zeros(bins, dtype=torch.int32)
    simt.histogram(*share(simt, writable=False, x=x), *share(simt, out=out), n, bins, bug)
    return float((out - torch.bincount(x, minlength=bins)).abs().max())


def transpose(simt: ModuleType, n: int, pad: int) -> float:
    x, out = torch.arange(n * n, dtype=torch.float32).view(n, n), nans(n, n)
    simt.transpose(*share(simt, writable=False, x=x), *share(simt, out=out), n, pad)
    return (out - x.t()).abs().max().item()


def ping_pong(simt: ModuleType, rounds: int = 4, bug: str = "none") -> float:
    out = nans(rounds, 64)
    simt.ping_pong(*share(simt, out=out), rounds, bug)
    expected = 100 * torch.arange(rounds).view(-1, 1) + torch.arange(64).flip(0)
    return (out - expected).abs().max().item()


def warp_scan(simt: ModuleType, bug: str = "none") -> float:
    x, out = torch.arange(32, dtype=torch.float32), nans(32)
    simt.warp_scan(*share(simt, writable=False, x=x), *share(simt, out=out), bug)
    return (out - x.cumsum(0)).abs().max().item()


def mistake(simt: ModuleType, bug: str = "none") -> float:
    x, out = torch.zeros(256), torch.zeros(1024)
    simt.mistake(*share(simt, writable=False, x=x), *share(simt, out=out), bug)
    return 0.0


# ---- no false report -----------------------------------------------------------------------------

Run = tuple[str, Callable[[ModuleType], float], float]
CORRECT: list[Run] = []
for heads, seqlen in [(1, 1), (2, 64), (1, 65), (1, 128), (1, 200)]:
    for causal in (False, True):
        CORRECT.append(
            (
                f"attention-{heads}x{seqlen}{'-causal' * causal}",
                lambda s, h=heads, n=seqlen, c=causal: attention(s, h, n, c),
                ATTENTION_ERROR,
            )
        )
for m, n, k in [(64, 64, 64), (64, 128, 192), (128, 64, 320)]:
    CORRECT.append((f"gemm_sm80-{m}x{n}x{k}", lambda s, m=m, n=n, k=k: gemm_sm80(s, m, n, k), 0.0))
for m, n, k in [(64, 64, 64), (64, 128, 256)]:
    for transposed in (False, True):
        CORRECT.append(
            (
                f"gemm_sm90-{m}x{n}x{k}{'-transposed' * transposed}",
                lambda s, m=m, n=n, k=k, t=transposed: gemm_sm90(s, m, n, k, t),
                0.0,
            )
        )
for n, blocks in [(1, 1), (1000, 3), (4096, 8)]:
    CORRECT.append((f"sum-{n}", lambda s, n=n, b=blocks: block_sum(s, n, b), 0.0))
    CORRECT.append((f"last_block-{n}", lambda s, n=n, b=blocks: last_block(s, n, b), 0.0))
for n, bins in [(1, 1), (1000, 10), (300, 64)]:
    CORRECT.append((f"histogram-{n}", lambda s, n=n, b=bins: histogram(s, n, b), 0.0))
CORRECT += [
    ("transpose-conflicts", lambda s: transpose(s, 64, 0), 0.0),
    ("transpose-padded", lambda s: transpose(s, 96, 1), 0.0),
    ("ping_pong", lambda s: ping_pong(s, 6), 0.0),
    ("warp_scan", warp_scan, 0.0),
    ("mistake-free", mistake, 0.0),
]
SCHEDULES = 8


@pytest.mark.parametrize("run,bound", [c[1:] for c in CORRECT], ids=[c[0] for c in CORRECT])
def test_correct_kernels_give_no_report_under_any_schedule(
    simt: ModuleType, run: Callable[[ModuleType], float], bound: float
) -> None:
    for seed in range(SCHEDULES):
        simt.reset()
        simt.configure(seed=seed, async_late=seed % 2 == 0)
        error = run(simt)
        assert simt.reports() == [], f"schedule {seed}"
        assert error <= bound, f"schedule {seed}"


def test_at_least_200_correct_runs() -> None:
    assert len(CORRECT) * SCHEDULES >= 200


def test_blocks_on_two_threads(simt: ModuleType) -> None:
    simt.configure(threads=2)
    for run in (
        lambda: histogram(simt, 1000, 10),
        lambda: gemm_sm80(simt, 128, 128, 128),
        lambda: last_block(simt, 1000, 8),
    ):
        simt.reset()
        assert run() == 0.0
        assert simt.reports() == []


def test_votes_and_shuffles(simt: ModuleType) -> None:
    x = torch.arange(64, dtype=torch.int32) - 20
    out = torch.zeros(64, 10, dtype=torch.int32)
    simt.votes(*share(simt, writable=False, x=x), *share(simt, out=out))
    assert simt.reports() == []
    values = x.tolist()
    for t in range(64):
        warp, lane = t // 32 * 32, t % 32
        odd = sum(1 << i for i in range(32) if values[warp + i] % 2)
        odd -= (odd >> 31) << 32  # stored as a signed word
        assert out[t].tolist() == [
            sum(v > 0 for v in values),
            1,
            0,
            odd,
            int(7 in values[warp : warp + 32]),
            1,
            values[warp + lane // 8 * 8 + 3],
            values[t - 2] if lane >= 2 else values[t],
            values[t + 5] if lane % 16 < 11 else values[t],
            values[warp + (lane ^ 9)],
        ]


# ---- planted bugs --------------------------------------------------------------------------------

# kernel, bug, the kinds of which one must be reported (which one depends on the schedule), at the
# statement that the source marks with "reports:".
PLANTED = [
    ("attention", "no_sync_after_wait", "race"),
    ("attention", "no_sync_before_reuse", "race"),
    ("attention", "no_wait", "async-in-flight"),
    ("attention", "wait_for_too_few", "async-in-flight"),
    ("attention", "global_load_past_end", "global-out-of-bounds"),
    ("attention", "global_store_past_end", "global-out-of-bounds"),
    ("attention", "ldmatrix_past_end", "smem-out-of-bounds"),
    ("attention", "ldmatrix_misaligned", "misaligned"),
    ("attention", "ldmatrix_skipped_by_lanes", "divergent-collective"),
    ("attention", "v_not_loaded", "uninitialised-smem"),
    ("attention", "scores_not_cleared", "uninitialised-register"),
    ("attention", "shuffle_skipped_by_half_a_warp", "divergent-collective"),
    ("attention", "barrier_skipped_by_a_warp", "async-in-flight"),
    ("gemm_sm90", "no_full_wait", "async-in-flight"),
    ("gemm_sm90", "no_empty_wait", "async-in-flight"),
    ("gemm_sm90", "expect_too_many_bytes", "deadlock"),
    ("gemm_sm90", "expect_too_few_bytes", "deadlock"),
    ("gemm_sm90", "wrong_parity", "async-in-flight"),
    ("gemm_sm90", "no_wgmma_wait", "async-read-in-flight"),
    ("gemm_sm90", "no_wgmma_fence", "wgmma-fence"),
    ("gemm_sm90", "early_release", "race"),
    ("gemm_sm90", "no_sync_after_init", "race mbarrier"),
    ("gemm_sm90", "no_proxy_fence", "missing-proxy-fence"),
    ("gemm_sm90", "accumulator_written", "wgmma-accumulator-touched"),
    ("gemm_sm90", "too_many_arrivals", "mbarrier"),
    ("gemm_sm90", "mbarrier_not_initialised", "mbarrier"),
    ("gemm_sm90", "swizzled_tile_misaligned", "tma"),
    ("gemm_sm90", "load_never_waited", "tma-unwaited"),
    ("gemm_sm90", "store_without_fence", "missing-proxy-fence"),
    ("gemm_sm90", "store_not_waited", "tma-unwaited"),
    ("gemm_sm90", "store_source_reused", "async-read-in-flight"),
    ("gemm_sm90", "setmaxnreg_not_multiple", "setmaxnreg"),
    ("warp_scan", "no_syncwarp", "race"),
    ("last_block", "no_threadfence", "global-race"),
    ("histogram", "increment_without_atomic", "race"),
    ("ping_pong", "named_count_differs", "barrier-count"),
    ("ping_pong", "named_arrive_forgotten", "deadlock"),
    ("mistake", "static_overrun", "smem-out-of-bounds"),
    ("mistake", "dynamic_overrun", "smem-out-of-bounds"),
    ("mistake", "shared_never_written", "uninitialised-smem"),
    ("mistake", "shared_misaligned", "misaligned"),
    ("mistake", "barrier_in_two_branches", "divergent-barrier"),
    ("mistake", "barrier_against_shuffle", "deadlock"),
    ("mistake", "barrier_exited_lanes", "deadlock"),
    ("mistake", "named_id_too_large", "barrier-count"),
    ("mistake", "store_beside_atomic", "global-race"),
    ("mistake", "two_blocks_store", "global-race"),
    ("mistake", "block_reads_neighbour", "global-race"),
    ("mistake", "load_misaligned", "misaligned"),
    ("mistake", "store_misaligned", "misaligned"),
    ("mistake", "copy_source_misaligned", "misaligned"),
    ("mistake", "register_never_set", "uninitialised-register"),
    ("mistake", "shuffle_register_never_set", "uninitialised-register"),
    ("mistake", "shuffle_from_outside_mask", "shuffle-inactive"),
    ("mistake", "shuffle_lane_not_in_mask", "bad-mask"),
    ("mistake", "mma_in_two_branches", "divergent-collective"),
    ("mistake", "store_to_read_only", "read-only"),
    ("mistake", "copy_never_waited", "cp.async-unwaited"),
    ("mistake", "store_into_copy_in_flight", "async-in-flight"),
    ("mistake", "index_before_start", "global-out-of-bounds"),
    ("mistake", "null_pointer", "global-out-of-bounds"),
    ("mistake", "too_many_threads", "launch"),
    ("mistake", "too_much_shared_memory", "launch"),
    ("mistake", "too_much_static_memory", "launch"),
]
WITHOUT_PLACE = {"too_many_threads", "too_much_shared_memory"}  # refused before the kernel runs
# Wrong addresses inside the right memory: only the result can show them.
NUMERIC_ONLY = [("attention", "ldmatrix_wrong_row"), ("gemm_sm90", "wrong_stride")]
RUNNERS: dict[str, Callable[..., float]] = {
    "attention": attention,
    "gemm_sm90": gemm_sm90,
    "warp_scan": warp_scan,
    "last_block": last_block,
    "histogram": histogram,
    "ping_pong": ping_pong,
    "mistake": mistake,
}


def marked_lines() -> dict[str, list[tuple[str, int]]]:
    """For each bug, the (file, line) of the "reports:" comments that name it."""
    places: dict[str, list[tuple[str, int]]] = {}
    for path in KERNELS:
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            match = re.search(r"// reports: (.*)", line)
            for bug in match.group(1).split() if match else []:
                places.setdefault(bug, []).append((Path(path).name, number))
    return places


def reported_at(report: tuple[str, str, str], places: list[tuple[str, int]]) -> bool:
    """Whether a frame of the report lies in a statement that begins below one of the comments.
    A deadlock has a place for each group of waiting threads, in its message."""
    kind, message, where = report
    text = message if kind == "deadlock" else where
    frames = re.findall(r"(\w+\.cu):(\d+)", text)
    return any(f == file and n < int(line) <= n + 4 for file, line in frames for f, n in places)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("kernel,bug,kind", PLANTED, ids=[f"{k}-{b}" for k, b, _ in PLANTED])
def test_planted_bug_is_reported(
    simt: ModuleType, kernel: str, bug: str, kind: str, seed: int
) -> None:
    simt.configure(seed=seed)
    RUNNERS[kernel](simt, bug=bug)
    reports = [r for r in simt.reports() if r[0] in kind.split()]
    assert reports, f"wanted {kind}, got {simt.reports()}"
    if bug not in WITHOUT_PLACE:
        places = marked_lines()[bug]
        assert any(reported_at(r, places) for r in reports), (reports, places)


@pytest.mark.parametrize("kernel,bug", NUMERIC_ONLY)
def test_wrong_addresses_show_in_the_result(simt: ModuleType, kernel: str, bug: str) -> None:
    assert RUNNERS[kernel](simt, bug=bug) > 0.5
    assert simt.reports() == []


def test_every_bug_of_the_kernels_is_tested(simt: ModuleType) -> None:
    listed = {*simt.attention_bugs, *simt.gemm_bugs, *simt.small_bugs} - {"none"}
    assert listed == {b for _, b, _ in PLANTED} | {b for _, b in NUMERIC_ONLY}
    assert len(PLANTED) >= 25


def test_a_deadlock_says_who_waits_where(simt: ModuleType) -> None:
    ping_pong(simt, bug="named_arrive_forgotten")
    (report,) = simt.reports()
    assert report[0] == "deadlock"
    for warp in (0, 1):
        assert f"warp {warp} lanes ffffffff wait in a named barrier at simt_small.cu:" in report[1]
    assert "barrier 2: 64 of 128 threads have arrived" in report[1]


def test_a_race_names_both_threads(simt: ModuleType) -> None:
    warp_scan(simt, bug="no_syncwarp")
    kind, message, where = simt.reports()[0]
    assert kind == "race"
    pattern = (
        r"(load|store) (reads|overwrites) offset \d+ of row, "
        r"(written|read) by thread \d+ \(warp 0\) at simt_small.cu:\d+ "
    )
    assert re.match(pattern, message)
    assert "[block (0,0,0), thread" in message
    assert where.startswith("simt_small.cu:")


# ---- counters ------------------------------------------------------------------------------------


def test_bytes_per_buffer_are_exact(simt: ModuleType) -> None:
    heads, seqlen = 2, 256
    attention(simt, heads, seqlen, causal=False)
    matrix = heads * seqlen * 64 * 2
    row_tiles = seqlen // 64
    assert simt.traffic() == {
        "q": (matrix, 0),
        "k": (matrix * row_tiles, 0),  # once per tile of query rows
        "v": (matrix * row_tiles, 0),
        "out": (0, matrix),
        "lse": (0, heads * seqlen * 4),
    }
    counters = simt.counters()
    assert counters["mma_flops"] == 4 * heads * seqlen * seqlen * 64
    steps = row_tiles * row_tiles * heads * 128  # thread-steps of the main loop
    assert counters["ex2"] == heads * seqlen * seqlen + steps * 2
    assert counters["global_load_bytes"] == matrix * (1 + 2 * row_tiles)


def test_swizzled_tiles_have_no_bank_conflicts(simt: ModuleType) -> None:
    attention(simt, 1, 128, causal=False)
    counters = simt.counters()
    for kind in ("ldmatrix", "cp_async_smem"):
        assert counters[f"{kind}_wavefronts"] == counters[f"{kind}_wavefronts_ideal"] > 0
    assert counters["global_load_sectors"] == counters["global_load_sectors_ideal"] > 0


@pytest.mark.parametrize("pad,factor", [(0, 32), (1, 1)])
def test_transpose_conflicts(simt: ModuleType, pad: int, factor: int) -> None:
    transpose(simt, 64, pad)
    counters = simt.counters()
    assert counters["smem_load_wavefronts_ideal"] == 64 * 64 // 32
    assert counters["smem_load_wavefronts"] == factor * counters["smem_load_wavefronts_ideal"]
    assert counters["smem_store_wavefronts"] == counters["smem_store_wavefronts_ideal"] == 128
    (site,) = [s for s in simt.sites() if s["kind"] == "ld.shared"]
    assert site["units"] == factor * site["ideal"]
    assert site["where"].startswith("simt_small.cu:")


@pytest.mark.parametrize("stride,sectors", [(1, 4), (2, 8), (8, 32), (0, 1)])
def test_sectors_of_a_strided_load(simt: ModuleType, stride: int, sectors: int) -> None:
    storage = simt.allocate(1024, "x")  # aligned to a sector, as device memory is
    out = nans(32)
    simt.strided(storage, *share(simt, out=out), stride)
    counters = simt.counters()
    assert counters["global_load_sectors"] == sectors
    assert counters["global_load_sectors_ideal"] == min(4, sectors)
    assert simt.traffic()["x"] == (128, 0)
    assert out.isnan().all()  # fresh device memory is NaN


def test_clear_results_keeps_buffers(simt: ModuleType) -> None:
    x, out = torch.arange(32, dtype=torch.float32), nans(32)
    addresses = share(simt, x=x, out=out)
    simt.strided(*addresses, 1)
    simt.clear_results()
    assert simt.counters()["global_load_bytes"] == 0
    simt.strided(*addresses, 1)
    assert simt.reports() == []
    assert torch.equal(out, x)
    assert "no reports" in simt.summary()


def test_registered_buffers_may_not_overlap(simt: ModuleType) -> None:
    x = torch.zeros(64)
    simt.register_buffer(x.data_ptr(), 256, "x", True)
    simt.register_buffer(x.data_ptr() + 128, 128, "tail", True)
    assert simt.reports()[0][:2] == (
        "launch",
        "buffers 'tail' and 'x' overlap: unregister the one that is gone, or register both as one",
    )
