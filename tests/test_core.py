"""csrc/core against definitions written out here: brute force over small shapes, hypothesis beyond.

The definitions are the ones of docs/semantics.md in their plainest form (element by element, in
Python's integers or in float64); nothing in csrc/core is used to check itself.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native.build import load

NATIVE = Path(__file__).parent / "native"
core = load("core", [NATIVE / "core.cpp"], ["-O1"])

MAX_LENGTH = 2**30
UNBOUNDED = -1
SHAPES = list(itertools.product(range(8), range(8)))
SIDES = [UNBOUNDED, 0, 1, 2, 3, 5, 9, 40]
WINDOWS = list(itertools.product(SIDES, SIDES))
TILES = [1, 2, 3, 4, 8]

# Deterministic, so that a failure in CI is a failure everywhere.
property_test = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def visible(seqlen_q: int, seqlen_k: int, left: int, right: int) -> np.ndarray:
    """(seqlen_q, seqlen_k): i + shift - left <= j <= i + shift + right."""
    i = np.arange(seqlen_q)[:, None]
    j = np.arange(seqlen_k)[None, :]
    seen = np.ones((seqlen_q, seqlen_k), dtype=bool)
    if left != UNBOUNDED:
        seen &= i + seqlen_k - seqlen_q - left <= j
    if right != UNBOUNDED:
        seen &= j <= i + seqlen_k - seqlen_q + right
    return seen


def key_range(i: int, seqlen_q: int, seqlen_k: int, left: int, right: int) -> range:
    """The keys that row i sees, for lengths too long to write out."""
    diagonal = i + seqlen_k - seqlen_q
    begin = 0 if left == UNBOUNDED else max(0, diagonal - left)
    end = seqlen_k if right == UNBOUNDED else min(seqlen_k, diagonal + right + 1)
    return range(begin, max(begin, end))


def subranges(length: int) -> np.ndarray:
    """Every non-empty half-open range within [0, length)."""
    pairs = list(itertools.combinations(range(length + 1), 2))
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)


def span(mask: np.ndarray) -> tuple[int, int] | None:
    """The smallest range that holds every True, or None."""
    places = np.flatnonzero(mask)
    return (int(places[0]), int(places[-1]) + 1) if places.size else None


def same_range(pair: np.ndarray, expected: tuple[int, int] | None) -> bool:
    """All empty ranges are one."""
    return pair[0] >= pair[1] if expected is None else tuple(pair) == expected


def every_band():
    for (seqlen_q, seqlen_k), (left, right) in itertools.product(SHAPES, WINDOWS):
        yield (
            (seqlen_q, seqlen_k, left, right),
            core.Band(seqlen_q, seqlen_k, left, right),
            visible(seqlen_q, seqlen_k, left, right),
        )


# ---- band.h


def test_visible_is_the_definition() -> None:
    for case, band, seen in every_band():
        assert np.array_equal(band.visible(), seen), case


def test_an_unbounded_band_hides_nothing_and_a_bounded_one_says_so() -> None:
    for case, band, seen in every_band():
        if not band.bounded:
            assert seen.all(), case
    assert core.Band(4, 4, UNBOUNDED, 0).bounded
    assert not core.Band(4, 4, 4, 4).bounded


def test_ranges_of_rows_and_keys_are_exact() -> None:
    for case, band, seen in every_band():
        seqlen_q, seqlen_k = seen.shape
        keys_of = band.keys_of(np.arange(seqlen_q))
        for i in range(seqlen_q):
            assert same_range(keys_of[i], span(seen[i])), (case, i)
            assert seen[i].sum() == max(0, keys_of[i, 1] - keys_of[i, 0])  # an interval
        rows = subranges(seqlen_q)
        any_of, all_of = band.keys_of_any(rows), band.keys_of_all(rows)
        for n, (begin, end) in enumerate(rows):
            assert same_range(any_of[n], span(seen[begin:end].any(0))), (case, begin, end)
            assert same_range(all_of[n], span(seen[begin:end].all(0))), (case, begin, end)
        keys = subranges(seqlen_k)
        rows_of_any = band.rows_of_any(keys)
        for n, (begin, end) in enumerate(keys):
            assert same_range(rows_of_any[n], span(seen[:, begin:end].any(1))), (case, begin, end)


def test_classify_is_exact_for_every_tile() -> None:
    for case, band, seen in every_band():
        rows, keys = subranges(seen.shape[0]), subranges(seen.shape[1])
        # Visible elements of every tile, from the summed-area table.
        table = np.zeros((seen.shape[0] + 1, seen.shape[1] + 1), dtype=np.int64)
        table[1:, 1:] = seen.cumsum(0).cumsum(1)
        columns = table[:, keys[:, 1]] - table[:, keys[:, 0]]
        count = columns[rows[:, 1]] - columns[rows[:, 0]]
        size = np.outer(rows[:, 1] - rows[:, 0], keys[:, 1] - keys[:, 0])
        kind = np.where(count == 0, core.SKIP, np.where(count == size, core.FULL, core.PARTIAL))
        assert np.array_equal(band.classify(rows, keys), kind), case


def test_classify_skips_empty_tiles() -> None:
    band = core.Band(8, 8, UNBOUNDED, UNBOUNDED)
    rows = np.array([[3, 3], [0, 8], [5, 2]])
    keys = np.array([[4, 4], [0, 8], [7, 6]])
    kinds = np.full((3, 3), core.SKIP)
    kinds[1, 1] = core.FULL
    assert np.array_equal(band.classify(rows, keys), kinds)


lengths = st.one_of(
    st.integers(1, 40), st.integers(MAX_LENGTH - 40, MAX_LENGTH), st.integers(1, MAX_LENGTH)
)
sides = st.one_of(
    st.just(UNBOUNDED),
    st.integers(0, 40),
    st.integers(MAX_LENGTH - 40, MAX_LENGTH + 40),
    st.integers(2**31 - 40, 2**31 - 1),
    st.integers(0, 2**31 - 1),
)


@given(lengths, lengths, sides, sides, st.data())
@property_test
def test_band_of_long_sequences(seqlen_q, seqlen_k, left, right, data) -> None:
    """Nothing overflows near 2^30, whatever the window."""
    band = core.Band(seqlen_q, seqlen_k, left, right)

    def keys(i: int) -> range:
        return key_range(i, seqlen_q, seqlen_k, left, right)

    edges = st.sampled_from([0, seqlen_q - 1]) | st.integers(0, seqlen_q - 1)
    first, last = sorted((data.draw(edges), data.draw(edges)))
    for i in (first, last):
        begin, end = band.keys_of([i])[0]
        assert range(begin, max(begin, end)) == keys(i)
        diagonal = i + seqlen_k - seqlen_q
        near = [diagonal - left, diagonal + right, 0, seqlen_k - 1]
        for j in {j + d for j in near for d in (-1, 0, 1)}:
            if 0 <= j < seqlen_k:
                assert band.visible_at(i, j) == (j in keys(i))

    tile = np.array([[first, last + 1]])
    begin, end = band.keys_of_any(tile)[0]
    union = range(keys(first).start, keys(last).stop)
    assert range(begin, max(begin, end)) == union
    begin, end = band.keys_of_all(tile)[0]
    common = range(keys(last).start, keys(first).stop)
    assert range(begin, max(begin, end)) == range(common.start, max(common.start, common.stop))

    key_edges = st.sampled_from([0, seqlen_k - 1]) | st.integers(0, seqlen_k - 1)
    first_key, last_key = sorted((data.draw(key_edges), data.draw(key_edges)))
    begin, end = band.rows_of_any([[first_key, last_key + 1]])[0]
    # Row i sees key j iff j - shift - right <= i <= j - shift + left.
    shift = seqlen_k - seqlen_q
    low = 0 if right == UNBOUNDED else max(0, first_key - shift - right)
    high = seqlen_q if left == UNBOUNDED else min(seqlen_q, last_key - shift + left + 1)
    assert range(begin, max(begin, end)) == range(low, max(low, high))

    kind = band.classify(tile, [[first_key, last_key + 1]])[0, 0]
    overlap = max(union.start, first_key) < min(union.stop, last_key + 1)
    inside = common.start <= first_key and last_key < common.stop
    assert kind == (core.SKIP if not overlap else core.FULL if inside else core.PARTIAL)


# ---- tiles.h


def check_tiles(tiles: np.ndarray, seen: np.ndarray, case: object) -> None:
    """tiles: (n, 3) of begin, end, kind over seen's columns, which hold what may be visited.

    Every visible element is visited once, and a tile's kind tells the truth about every element of
    it.
    """
    visits = np.zeros(seen.shape[1], dtype=int)
    previous_end = 0
    for begin, end, kind in tiles:
        assert previous_end <= begin < end <= seen.shape[1], case
        previous_end = end
        visits[begin:end] += 1
        assert kind in (core.FULL, core.PARTIAL), case
        inside = seen[:, begin:end]
        assert inside.any(), case
        assert (kind == core.FULL) == inside.all(), case
    wanted = seen.any(0)
    assert (visits[wanted] == 1).all() and (visits <= 1).all(), case


def row_tiles(length: int, tile: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + tile, length)) for begin in range(0, length, tile)]


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "keys"])
def test_dense_cursors_visit_what_is_visible_once(transposed: bool) -> None:
    walk = core.tiles_of_keys if transposed else core.tiles_of_rows
    for case, band, seen in every_band():
        matrix = seen.T if transposed else seen
        for outer, inner in itertools.product((1, 3, 4), TILES):
            for begin, end in row_tiles(matrix.shape[0], outer):
                tiles, count = walk(band, begin, end, inner)
                check_tiles(tiles, matrix[begin:end], (case, begin, end, inner))
                assert count == len(tiles), (case, begin, end, inner)
                assert (tiles[:, 0] % inner == 0).all(), (case, begin, end, inner)


def test_a_whole_tile_of_keys_is_seen_by_every_row_or_not() -> None:
    for case, band, seen in every_band():
        for begin, end in row_tiles(seen.shape[0], 3):
            for tile, start in itertools.product((1, 4), range(seen.shape[1])):
                keys = seen[begin:end, start : start + tile]
                whole = keys.shape[1] == tile and bool(keys.all())
                assert core.full_from(band, begin, end, tile, start) == whole, (case, begin, start)


def test_cursors_over_an_empty_tile_visit_nothing() -> None:
    band = core.Band(5, 7, UNBOUNDED, UNBOUNDED)
    assert core.tiles_of_rows(band, 3, 3, 4)[1] == 0
    assert len(core.tiles_of_rows(band, 3, 3, 4)[0]) == 0
    assert core.tiles_of_keys(band, 3, 3, 4)[1] == 0
    assert len(core.tiles_of_keys(band, 3, 3, 4)[0]) == 0


@given(st.data())
@property_test
def test_dense_cursors_at_the_end_of_long_sequences(data) -> None:
    seqlen_k = data.draw(st.integers(MAX_LENGTH - 300, MAX_LENGTH))
    seqlen_q = data.draw(st.sampled_from([1, 77, seqlen_k - 5, seqlen_k, MAX_LENGTH]))
    left, tile = data.draw(st.integers(0, 300)), data.draw(st.sampled_from([16, 48, 64, 128]))
    band = core.Band(seqlen_q, seqlen_k, left, 0)
    tiles, count = core.tiles_of_rows(band, seqlen_q - 1, seqlen_q, tile)
    assert count == len(tiles)
    keys = key_range(seqlen_q - 1, seqlen_q, seqlen_k, left, 0)
    assert tiles[0, 0] == keys.start // tile * tile and tiles[-1, 1] == seqlen_k
    assert (tiles[1:, 0] == tiles[:-1, 1]).all()
    tiles, count = core.tiles_of_keys(band, seqlen_k - 1, seqlen_k, tile)
    assert count == len(tiles) == 1  # only the last row sees the last key
    assert tiles[0].tolist() == [(seqlen_q - 1) // tile * tile, seqlen_q, tiles[0, 2]]


# ---- problem.h

counts = st.lists(st.integers(0, 50), min_size=1, max_size=6)


@given(counts, st.sets(st.sampled_from(["cu_q", "cu_k", "used_q", "used_k", "leftpad"])), st.data())
@property_test
def test_sequences_of_every_combination_of_lengths(sizes, given_names, data) -> None:
    batch = len(sizes)
    per_sequence = st.lists(st.integers(0, 60), min_size=batch, max_size=batch)
    dense_q, dense_k = max(sizes), data.draw(st.integers(0, 60))
    lengths_q = sizes if "cu_q" in given_names else [dense_q] * batch
    lengths_k = data.draw(per_sequence) if "cu_k" in given_names else [dense_k] * batch
    used_q, used_k, leftpad = (data.draw(per_sequence) for _ in range(3))

    def offsets(values: list[int]) -> list[int]:
        return [0, *itertools.accumulate(values)]

    result = core.sequences(
        batch,
        max(lengths_q) + 3 if "cu_q" in given_names else dense_q,
        max(lengths_k) + 3 if "cu_k" in given_names else dense_k,
        cu_seqlens_q=offsets(lengths_q) if "cu_q" in given_names else None,
        cu_seqlens_k=offsets(lengths_k) if "cu_k" in given_names else None,
        seqused_q=used_q if "used_q" in given_names else None,
        seqused_k=used_k if "used_k" in given_names else None,
        leftpad_k=leftpad if "leftpad" in given_names else None,
    )
    for b in range(batch):
        row_q = offsets(lengths_q)[b] if "cu_q" in given_names else 0
        row_k = offsets(lengths_k)[b] if "cu_k" in given_names else 0
        seqlen_q, seqlen_k = lengths_q[b], lengths_k[b]
        if "used_q" in given_names:
            seqlen_q = min(seqlen_q, used_q[b])
        if "used_k" in given_names:
            seqlen_k = min(seqlen_k, used_k[b])
        if "leftpad" in given_names:
            row_k, seqlen_k = row_k + leftpad[b], max(0, seqlen_k - leftpad[b])
        expected = [row_q, row_k, seqlen_q, seqlen_k, lengths_q[b], lengths_k[b]]
        assert result[b].tolist() == expected


def test_query_heads_share_key_heads_in_order() -> None:
    for heads_k, group in itertools.product(range(1, 9), range(1, 9)):
        expected = [h // group for h in range(heads_k * group)]
        assert core.kv_heads(heads_k * group, heads_k).tolist() == expected


# ---- kv.h

# Element offsets stay below 2^56, as an address space does; the products pass 2^32 all the time.
strides = st.tuples(*[st.one_of(st.integers(0, 300), st.integers(2**31, 2**33))] * 3)
kv_types = st.sampled_from(["float", "int8"])


@given(kv_types, strides, strides, st.integers(0, 2**24), st.data())
@property_test
def test_contiguous_kv_addresses(dtype, k_strides, v_strides, first_row, data) -> None:
    b, head = data.draw(st.integers(0, 5000)), data.draw(st.integers(0, 200))
    rows = data.draw(st.lists(st.integers(0, 2**24), min_size=1, max_size=20))
    contiguous_offsets = getattr(core, f"contiguous_offsets_{dtype}")
    result = contiguous_offsets(k_strides, v_strides, first_row, b, head, rows)
    for n, j in enumerate(rows):
        for stride, offset in zip((k_strides, v_strides), result[n], strict=True):
            assert offset == b * stride[0] + (first_row + j) * stride[1] + head * stride[2]


@given(kv_types, st.sampled_from([1, 5, 16, 64, 256]), strides, strides, st.data())
@property_test
def test_paged_kv_addresses(dtype, page_size, k_strides, v_strides, data) -> None:
    length = data.draw(st.integers(1, 600))
    leftpad = data.draw(st.integers(0, length - 1))
    used_pages = -(-length // page_size)
    batch, head = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 8))
    b = data.draw(st.integers(0, batch - 1))
    # What lies beyond the last page in use is poison: an offset made from it would be far off.
    table = np.full((batch, used_pages + 3), 2**31 - 1, dtype=np.int32)
    seed = data.draw(st.integers(0, 2**32 - 1))
    table[b, :used_pages] = np.random.default_rng(seed).integers(0, 2**16, used_pages)
    rows = np.arange(length - leftpad)
    paged_offsets = getattr(core, f"paged_offsets_{dtype}")
    result = paged_offsets(k_strides, v_strides, table, page_size, leftpad, b, head, rows)
    page = table[b].astype(np.int64)[(rows + leftpad) // page_size]
    slot = (rows + leftpad) % page_size
    for c, stride in enumerate((k_strides, v_strides)):
        expected = page * stride[0] + slot * stride[1] + head * stride[2]
        assert np.array_equal(result[:, c], expected)


# ---- dispatch.h


def test_dispatch_calls_once_with_the_value_or_not_at_all() -> None:
    for value in range(-1, 300):
        exact = [value] if value in (64, 128, 256) else []
        assert core.dispatch_int(value) == (bool(exact), exact)
        enough = [v for v in (64, 128, 256) if v >= value][:1]
        assert core.dispatch_at_least(value) == (bool(enough), enough)
    assert core.dispatch_bool(True) == [True]
    assert core.dispatch_bool(False) == [False]
