"""csrc/core's arithmetic: score modifications, the softmax state, Philox and the dropout mask.

Error bounds are in units of U = 2^-24, float32's unit roundoff, counted operation by operation:
exp, log and tanh of the C library are taken to be within 2 ulp.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native.build import load

core = load("core", [Path(__file__).parent / "native/core.cpp"], ["-O1"])

U = 2.0**-24
INF, NAN = math.inf, math.nan

property_test = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


# ---- score_mod.h


def score(x: np.ndarray, softcap: float, slope: float, distance: int, bias: float) -> np.ndarray:
    """The softmax's argument of a visible element, in float64."""
    capped = softcap * np.tanh(x / softcap) if softcap > 0 else x
    return capped + bias - slope * abs(distance)


soft_caps = st.one_of(st.just(0.0), floats(0.5, 100.0))


@given(soft_caps, floats(-2.0, 2.0), floats(-50.0, 50.0), st.data())
@property_test
def test_score_value_is_the_formula(softcap, slope, bias, data) -> None:
    seqlen_q, seqlen_k = (data.draw(st.integers(1, 2**30)) for _ in range(2))
    i, j = data.draw(st.integers(0, seqlen_q - 1)), data.draw(st.integers(0, seqlen_k - 1))
    shift = seqlen_k - seqlen_q
    x = np.float32(data.draw(st.lists(floats(-300.0, 300.0), min_size=1, max_size=20)))
    mod = core.GeneralScoreMod(softcap, [slope], 0, 0, 0, shift)
    expected = score(x.astype(np.float64), softcap, slope, i + shift - j, bias)
    # tanh's argument is off by 2 U relative, tanh by 2 ulp, and each later operation rounds once.
    magnitude = np.minimum(np.abs(x), softcap or INF) + abs(bias) + abs(slope * (i + shift - j))
    assert (np.abs(mod.value(x, i, j, bias) - expected) <= 8 * U * magnitude).all()


@given(floats(0.5, 100.0), st.lists(floats(-300.0, 300.0), min_size=1, max_size=20))
@property_test
def test_score_derivative_is_the_slope_of_the_value(softcap, values) -> None:
    x = np.float64(values)
    step = 1e-4 * softcap
    ahead, behind = (score(x + s, softcap, 0.3, 7, 1.5) for s in (step, -step))
    difference = (ahead - behind) / (2 * step)
    mod = core.GeneralScoreMod(softcap, [0.3], 0, 0, 0, 0)
    # tanh is off by 3 U (argument 1 U after its slope, function 2 U), its square by 7 U, the
    # result by 8 U; the central difference by step^2 / 6 * max |f'''| = 0.06 U.
    assert (np.abs(mod.derivative(x) - difference) <= 9 * U).all()


def test_without_softcap_the_derivative_is_one() -> None:
    x = np.array([-1e30, -1.0, 0.0, 2.5, 1e30])
    assert (core.GeneralScoreMod(0.0, [0.5], 0, 0, 0, 3).derivative(x) == 1).all()
    assert core.no_score_mod(2.5, 3, 4, 1.0) == (2.5, 1.0)


def test_a_nan_score_stays_nan() -> None:
    for softcap in (0.0, 5.0):
        mod = core.GeneralScoreMod(softcap, [0.5], 0, 0, 0, 0)
        assert np.isnan(mod.value([NAN], 0, 0, 0.0)).all()
        assert np.isnan(mod.value([1.0], 0, 0, NAN)).all()


def test_alibi_slopes_per_head_and_per_batch_entry() -> None:
    slopes = np.arange(1, 7, dtype=np.float32) / 8  # (batch 2, heads 3), exact in float32
    for b, h in itertools.product(range(2), range(3)):
        per_batch = core.GeneralScoreMod(0.0, slopes, 3, b, h, 10)
        assert per_batch.value([0.0], 2, 5, 0.0) == -slopes[b * 3 + h] * 7
        per_head = core.GeneralScoreMod(0.0, slopes[:3], 0, b, h, 10)
        assert per_head.value([0.0], 2, 5, 0.0) == -slopes[h] * 7
    assert core.GeneralScoreMod(0.0, None, 0, 1, 2, 10).value([0.25], 2, 5, 0.5) == 0.75


def test_plain_means_scale_and_band_only() -> None:
    assert core.plain(0.0, False, False, False, 0)
    assert core.plain(0.0, False, True, False, 0)  # a sink does not touch the scores
    assert not core.plain(1.0, False, False, False, 0)
    assert not core.plain(0.0, True, False, False, 0)
    assert not core.plain(0.0, False, False, True, 0)
    assert not core.plain(0.0, False, False, False, 1)


# ---- online_softmax.h


def merge(a: tuple[np.ndarray, float], b: tuple[np.ndarray, float]) -> tuple[np.ndarray, float]:
    """Two partial results (out, lse) into one, in float32 as the engines do it."""
    weights = core.merge_weights([a[1]], [b[1]])[0]
    return weights[0] * a[0] + weights[1] * b[0], weights[2]


def merged_exactly(outs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, float]:
    """outs (n, d) and lses (n) merged in float64; +inf marks an empty part, as -inf does."""
    lses = np.where(lses == INF, -INF, lses.astype(np.float64))
    if lses.max() == -INF:
        return np.zeros(outs.shape[1]), -INF
    weights = np.exp(lses - lses.max())
    total = weights.sum()
    return weights @ outs.astype(np.float64) / total, lses.max() + math.log(total)


partial_lses = st.one_of(floats(-80.0, 80.0), floats(-3.0, 3.0), st.sampled_from([-INF, INF]))


@given(st.lists(partial_lses, min_size=1, max_size=9), st.randoms(use_true_random=False))
@property_test
def test_merging_is_associative_and_commutative(lses, random) -> None:
    lses = np.array(lses, dtype=np.float32)
    outs = np.array([[random.uniform(-1, 1) for _ in range(4)] for _ in lses], dtype=np.float32)
    expected_out, expected_lse = merged_exactly(outs, lses)
    parts = list(zip(outs, lses, strict=True))
    shuffled = random.sample(parts, len(parts))

    def tree(parts: list) -> tuple:
        half = len(parts) // 2
        return parts[0] if half == 0 else merge(tree(parts[:half]), tree(parts[half:]))

    def from_the_right(parts: list) -> tuple:
        result = parts[-1]
        for part in reversed(parts[:-1]):
            result = merge(part, result)
        return result

    def from_the_left(parts: list) -> tuple:
        result = parts[0]
        for part in parts[1:]:
            result = merge(result, part)
        return result

    # A merge's LSE is off by U |lse| (its last addition) + 4 U (exp, sum, log); a weight by as much
    # as its LSEs together, and 8 U of its own; values are at most 1.
    reach = np.abs(lses[np.isfinite(lses)]).max(initial=0) + 4
    bound = len(parts) * (2 * reach + 16) * U
    for order in (tree, from_the_left, from_the_right):
        for sequence in (parts, shuffled):
            out, lse = merge(order(sequence), (np.zeros(4, np.float32), -INF))
            assert (np.abs(out - expected_out) <= bound).all()
            assert lse == expected_lse or abs(lse - expected_lse) <= bound


@given(floats(-(2.0**100), 2.0**100), floats(-(2.0**100), 2.0**100))
@property_test
def test_merging_two_commutes_bitwise(a, b) -> None:
    (x,), (y,) = core.merge_weights([a], [b]), core.merge_weights([b], [a])
    assert x.tolist() == [y[1], y[0], y[2]]
    assert abs(x[0] + x[1] - 1) <= 3 * U


@pytest.mark.parametrize("nothing", [-INF, INF])
def test_an_empty_part_is_the_identity_of_merging(nothing: float) -> None:
    for lse in (-3e38, -2.5, 0.0, 1e-30, 3e38):
        (result,) = core.merge_weights([lse], [nothing])
        assert result.tolist() == [1.0, 0.0, np.float32(lse)]
    (result,) = core.merge_weights([nothing], [-nothing])
    assert result.tolist() == [0.0, 0.0, -INF]


def test_a_nan_part_makes_the_merged_result_nan() -> None:
    for other in (-INF, INF, 0.0, -3e38, 3e38, NAN):
        for a, b in ((NAN, other), (other, NAN)):
            assert np.isnan(core.merge_weights([a], [b])).all(), (a, b)


def test_an_empty_row() -> None:
    largest, total = core.empty_state()
    assert (largest, total) == (-INF, 0.0)
    assert core.lse(largest, total) == -INF
    assert core.inverse_sum(largest, total) == 0.0
    assert core.softmax_reference(-INF) == 0.0
    # exp(s - lse_reference(lse)) of such a row is 0 for every finite s, and for a masked one.
    assert core.lse_reference(-INF) == INF
    assert core.softmax_reference(2.5) == 2.5 and core.lse_reference(2.5) == 2.5


def test_a_nan_row_is_not_an_empty_row() -> None:
    for largest in (NAN, 1.0, -INF):
        assert math.isnan(core.lse(largest, NAN))
        assert math.isnan(core.inverse_sum(largest, NAN))
        state = core.absorb_sink([largest], [NAN], [0.5])[0]
        assert math.isnan(core.lse(state[0], state[1]))
    assert math.isnan(core.softmax_reference(NAN)) and math.isnan(core.lse_reference(NAN))
    for state in ((-INF, 0.0), (1.0, 2.0)):
        largest, total, _ = core.absorb_sink([state[0]], [state[1]], [NAN])[0]
        assert math.isnan(core.lse(largest, total))


@given(st.lists(floats(-90.0, 90.0), max_size=12), st.one_of(floats(-90.0, 90.0), st.just(-INF)))
@property_test
def test_a_sink_joins_the_denominator_only(scores, sink) -> None:
    x = np.array(scores, dtype=np.float64)
    largest = x.max(initial=-INF)
    total = np.exp(x - largest).sum() if scores else 0.0
    new_max, new_sum, alpha = core.absorb_sink([largest], [total], [sink])[0]

    everything = np.append(x, sink)
    top = everything.max()
    if top == -INF:
        assert (new_max, new_sum) == (-INF, 0.0)
        return
    expected_sum = np.exp(everything - top).sum()
    assert new_max == np.float32(top)
    # The sum: its rounding to float32, alpha's (argument 1 U |d| e^-d, exp 2 U), product, addition.
    assert abs(new_sum - expected_sum) <= 10 * U * expected_sum
    expected_alpha = math.exp(largest - top)
    assert abs(alpha - expected_alpha) <= 200 * U * expected_alpha + 2.0**-149  # |d| <= 180
    lse = core.lse(new_max, new_sum)
    assert abs(lse - (top + math.log(expected_sum))) <= (10 + 4 + abs(top)) * U
    assert abs(core.inverse_sum(new_max, new_sum) * expected_sum - 1) <= 12 * U


# ---- philox.h


def philox(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> tuple[int, ...]:
    """Philox4x32 in Python's integers, written from the paper (Salmon et al., section 3.3)."""
    x, (k0, k1), mask = list(counter), key, 2**32 - 1
    for _ in range(rounds):
        left, right = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [right >> 32 ^ x[1] ^ k0, right & mask, left >> 32 ^ x[3] ^ k1, left & mask]
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return tuple(x)


ONES = 2**32 - 1
PI_COUNTER = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = (0xA4093822, 0x299F31D0)
# (rounds, counter, key, result): Random123's published known answers (kat_vectors).
KNOWN_ANSWERS = [
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI_COUNTER, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(rounds, counter, key, result) -> None:
    assert philox(counter, key, rounds) == result
    if rounds == 7:
        assert tuple(core.philox4x32_7([key[0] | key[1] << 32], [counter])[0]) == result


@given(st.lists(st.tuples(*[st.integers(0, ONES)] * 6), min_size=1, max_size=50))
@property_test
def test_philox_is_philox(words) -> None:
    keys = np.array([w[4] | w[5] << 32 for w in words], dtype=np.uint64)
    result = core.philox4x32_7(keys, np.array([w[:4] for w in words], dtype=np.uint32))
    assert [tuple(row) for row in result] == [philox(w[:4], w[4:], 7) for w in words]


SEED = 0x9E3779B97F4A7C15


def test_a_tensor_core_lane_holds_exactly_its_draws() -> None:
    """Each element of every 16 x 16 block is one lane's, once, with the draw that keeps() takes."""
    draws = core.draws(SEED, 5, 0, 80, 0, 96)
    for i0, j0 in itertools.product(range(0, 80, 16), range(0, 96, 16)):
        block, writes = core.draws_by_lane(SEED, 5, i0, j0)
        assert writes == 256 and block.min() >= 0
        assert np.array_equal(block, draws[i0 : i0 + 16, j0 : j0 + 16])


@given(st.integers(0, 2**64 - 1), st.integers(1, 65535), st.data())
@property_test
def test_the_mask_does_not_depend_on_the_tiling(seed, threshold, data) -> None:
    batch_head = data.draw(st.integers(0, ONES))
    i0, j0 = (data.draw(st.one_of(st.just(0), st.integers(0, 2**30 - 50))) for _ in range(2))
    whole = core.keeps(seed, threshold, batch_head, i0, 50, j0, 50)
    assert np.array_equal(whole, core.draws(seed, batch_head, i0, 50, j0, 50) >= threshold)
    tile_rows, tile_keys = (data.draw(st.integers(1, 50)) for _ in range(2))
    for i, j in itertools.product(range(0, 50, tile_rows), range(0, 50, tile_keys)):
        rows, keys = min(tile_rows, 50 - i), min(tile_keys, 50 - j)
        tile = core.keeps(seed, threshold, batch_head, i0 + i, rows, j0 + j, keys)
        assert np.array_equal(tile, whole[i : i + rows, j : j + keys])


def chi_square(observed: np.ndarray) -> float:
    expected = observed.sum() / observed.size
    return float(((observed - expected) ** 2).sum() / expected)


def plausible(statistic: float, degrees: int) -> bool:
    """Within six standard deviations of a chi-square's mean (a chance of about 1e-7 outside)."""
    return abs(statistic - degrees) <= 6 * math.sqrt(2 * degrees)


def test_draws_are_uniform() -> None:
    draws = np.stack([core.draws(SEED, bh, 0, 512, 0, 512) for bh in range(4)]).ravel()
    for byte in (draws >> 8, draws & 0xFF):
        assert plausible(chi_square(np.bincount(byte, minlength=256)), 255)


def test_neighbouring_draws_are_independent() -> None:
    """Along rows, along keys, to the next head, to the next seed."""
    draws = core.draws(SEED, 0, 0, 512, 0, 512) >> 12
    neighbours = [(draws[d:], draws[:-d]) for d in (1, 8, 16)]
    neighbours += [(draws[:, d:], draws[:, :-d]) for d in (1, 2, 8, 16)]
    neighbours += [(draws, core.draws(SEED, 1, 0, 512, 0, 512) >> 12)]
    neighbours += [(draws, core.draws(SEED + 1, 0, 0, 512, 0, 512) >> 12)]
    neighbours += [(draws, core.draws(SEED + 2**32, 0, 0, 512, 0, 512) >> 12)]
    neighbours += [(draws, draws.T)]
    for a, b in neighbours:
        pairs = (a * 16 + b)[~np.eye(*a.shape, dtype=bool)]
        assert plausible(chi_square(np.bincount(pairs, minlength=256)), 255)


def test_no_two_lanes_share_bits() -> None:
    """Philox is a bijection of its counter, so distinct results mean distinct counters."""
    lanes = set()
    for batch_head in range(3):
        draws = core.draws(SEED, batch_head, 0, 64, 0, 64).reshape(4, 2, 8, 4, 2, 4, 2)
        # (i block, i half, g, j block, j half, c, parity) -> one row of eight draws a lane
        rows = draws.transpose(0, 2, 3, 5, 1, 4, 6).reshape(-1, 8)
        lanes.update(map(tuple, rows.tolist()))
    assert len(lanes) == 3 * (4 * 8) * (4 * 4)


def test_threshold_meets_the_probability_and_the_scale_makes_up_for_it() -> None:
    assert core.threshold_of(0.0) == 0 and core.keep_scale(0) == 1.0
    assert core.keeps(SEED, 0, 0, 0, 64, 0, 64).all()
    for probability in [1e-9, 0.1, 0.17, 0.25, 0.5, 0.9, 0.99999, *np.linspace(0, 0.9999, 1000)]:
        threshold = core.threshold_of(probability)
        assert abs(threshold / 65536 - probability) <= 2**-17
        assert abs(core.keep_scale(threshold) * (1 - threshold / 65536) - 1) <= U
    assert core.threshold_of(1 - 1e-12) == 65535  # never 1: something survives


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.8])
def test_the_dropped_share_is_the_probability(probability: float) -> None:
    threshold = core.threshold_of(probability)
    kept = np.concatenate([core.keeps(SEED, threshold, bh, 0, 512, 0, 512) for bh in range(4)])
    share, applied = 1 - kept.mean(), threshold / 65536
    assert abs(share - applied) <= 6 * math.sqrt(applied * (1 - applied) / kept.size)
