"""csrc/core/block_mask.h and the block-sparse cursors of tiles.h against the dense mask, written
out element by element: brute force over every tile of drawn masks."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from native.build import load

core = load("block_mask", [Path(__file__).parent / "native" / "block_mask.cpp"], ["-O1"])

property_test = settings(max_examples=150, deadline=None, derandomize=True, database=None)
FULL, BAND, DOCUMENTS, BITMAP = 0, 1, 2, 4
WINDOWS = [(-1, -1), (-1, 0), (5, 0), (3, 7), (0, 0), (40, 2), (-1, 9)]


@dataclass
class Drawn:
    """A mask as the kernels get it, and what it means."""

    mask: object
    dense: np.ndarray  # (tables, seqlen_q, seqlen_k), elements visible
    listed: np.ndarray  # (tables, seqlen_q, seqlen_k), elements of listed blocks
    shape: tuple[int, int]
    block: tuple[int, int]
    batch: int
    heads: int


def csr(listed: np.ndarray, rules: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of (tables, lines, blocks): start (tables, lines + 1), index and rule of all entries."""
    counts = listed.sum(-1)
    ends = counts.reshape(-1).cumsum().reshape(counts.shape)
    start = np.concatenate([(ends[:, :1] - counts[:, :1]), ends], axis=1).astype(np.int32)
    return start, np.nonzero(listed)[2].astype(np.int32), rules[listed].astype(np.int32)


@st.composite
def masks(draw) -> Drawn:
    """Blocks of 1 to 5 elements, which reach every corner, or of 16 to 48, which fill words."""
    small = draw(st.booleans())
    sizes, longest = ([1, 2, 3, 5], 14) if small else ([16, 32, 48], 120)
    block_q, block_k = (draw(st.sampled_from(sizes)) for _ in range(2))
    seqlen_q, seqlen_k = (draw(st.integers(1, longest)) for _ in range(2))
    batch, heads = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tables, words = batch * heads, -(-block_k // 32)
    grid = (tables, -(-seqlen_q // block_q), -(-seqlen_k // block_k))
    listed = rng.random(grid) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    bitmaps = rng.integers(0, 2**32, (3, block_q, words), dtype=np.uint32)
    flags = rng.choice([FULL, FULL, BAND, DOCUMENTS, BITMAP, BAND | DOCUMENTS, 7], size=grid)
    rules = np.where(flags & BITMAP, flags | (rng.integers(0, 3, grid) << 3), flags)
    bands = np.array([WINDOWS[n] for n in rng.integers(0, len(WINDOWS), tables)], dtype=np.int32)
    documents_q = np.sort(rng.integers(0, 3, (tables, seqlen_q)), -1).astype(np.int32)
    documents_k = np.sort(rng.integers(0, 3, (tables, seqlen_k)), -1).astype(np.int32)

    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None, :]
    dense = np.zeros((tables, seqlen_q, seqlen_k), dtype=bool)
    for t in range(tables):
        rule = rules[t][i // block_q, j // block_k]
        left, right = bands[t]
        diagonal = i + seqlen_k - seqlen_q
        band = ((left < 0) | (j >= diagonal - left)) & ((right < 0) | (j <= diagonal + right))
        same = documents_q[t][:, None] == documents_k[t][None, :]
        word = bitmaps[np.minimum(rule >> 3, 2), i % block_q, j % block_k // 32]
        bit = (word >> (j % block_k % 32).astype(np.uint32)) & 1
        dense[t] = listed[t][i // block_q, j // block_k]
        for flag, test in ((BAND, band), (DOCUMENTS, same), (BITMAP, bit == 1)):
            dense[t] &= ((rule & flag) == 0) | test
    mask = core.Mask(
        *((seqlen_q, seqlen_k), (block_q, block_k), batch, heads),
        *csr(listed, rules),
        *csr(listed.transpose(0, 2, 1), rules.transpose(0, 2, 1)),
        *(bands, documents_q, documents_k, bitmaps),
    )
    elements = listed[:, i // block_q, j // block_k]
    return Drawn(mask, dense, elements, (seqlen_q, seqlen_k), (block_q, block_k), batch, heads)


@dataclass
class Problem:
    """One sequence under a drawn mask and a band."""

    head: object
    seen: np.ndarray  # by the mask
    touched: np.ndarray  # in listed blocks and within the band
    visible: np.ndarray  # by mask and band


def placed(dense: np.ndarray, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """The mask's elements in a problem of another shape: the same distance from the diagonal."""
    out = np.zeros((seqlen_q, seqlen_k), dtype=bool)
    offset = (seqlen_k - seqlen_q) - (dense.shape[1] - dense.shape[0])
    for i in range(seqlen_q):
        if 0 <= i + offset < dense.shape[0]:
            n = min(seqlen_k, dense.shape[1])
            out[i, :n] = dense[i + offset, :n]
    return out


@st.composite
def problems(draw) -> Problem:
    drawn = draw(masks())
    b, h = draw(st.integers(0, drawn.batch - 1)), draw(st.integers(0, drawn.heads - 1))
    seqlen_q, seqlen_k = drawn.shape
    if draw(st.booleans()):  # a decode, a chunk, another sequence's lengths
        seqlen_q, seqlen_k = (draw(st.integers(1, n + 3)) for n in drawn.shape)
    left, right = draw(st.sampled_from(WINDOWS))
    # Whatever is broadcast is asked with any entry and head.
    head = core.Head(
        *(drawn.mask, b if drawn.batch > 1 else 7, h if drawn.heads > 1 else 5),
        *(seqlen_q, seqlen_k, left, right),
    )
    table = b * drawn.heads + h
    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None, :]
    diagonal = i + seqlen_k - seqlen_q
    band = ((left < 0) | (j >= diagonal - left)) & ((right < 0) | (j <= diagonal + right))
    seen = placed(drawn.dense[table], seqlen_q, seqlen_k)
    touched = placed(drawn.listed[table], seqlen_q, seqlen_k) & band
    return Problem(head, seen, touched, seen & band)


def some_tiles(length: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


@given(problems())
@property_test
def test_elements_are_the_definition(problem) -> None:
    assert np.array_equal(problem.head.visible(), problem.seen)
    rows, keys = problem.seen.shape
    for i, j in itertools.product(range(0, rows, 3), range(0, keys, 7)):
        word = problem.head.visible_word(i, j)
        expected = problem.seen[i, j : j + 32].tolist()
        assert [bool(word >> t & 1) for t in range(len(expected))] == expected


@given(problems(), st.sampled_from([1, 4, 16, 33]), st.sampled_from([1, 4, 16, 33]))
@property_test
def test_tiles_touch_alike_from_both_sides(problem, tile_rows, tile_keys) -> None:
    head = problem.head
    rows, keys = problem.seen.shape
    for r, k in itertools.product(some_tiles(rows, tile_rows), some_tiles(keys, tile_keys)):
        inside = problem.touched[r[0] : r[1], k[0] : k[1]]
        assert (head.next_key(*r, k[0]) < k[1]) == inside.any()
        assert (head.next_row(*k, r[0]) < r[1]) == inside.any()
        seen = problem.visible[r[0] : r[1], k[0] : k[1]]
        kind = head.classify(r, k)
        assert (kind == core.SKIP) == (not inside.any())
        if kind == core.FULL:
            assert seen.all()


@given(problems(), st.sampled_from([1, 3, 16, 33]), st.sampled_from([1, 2, 5, 16, 40, 64]))
@property_test
def test_tiles_of_rows_cover_what_is_visible_once(problem, tile_rows, tile_keys) -> None:
    rows, keys = problem.seen.shape
    for begin, end in some_tiles(rows, tile_rows):
        visits = np.zeros(keys, dtype=int)
        for first, last, kind, rule in problem.head.tiles_of_rows(begin, end, tile_keys):
            assert 0 <= first < last <= keys and last - first <= tile_keys
            assert visits[first:].sum() == 0
            visits[first:last] += 1
            seen = problem.visible[begin:end, first:last]
            assert problem.touched[begin:end, first:last].any()
            assert kind in (core.FULL, core.PARTIAL)
            if kind == core.FULL:
                assert seen.all()
            if rule != core.MIXED:
                for i, j in itertools.product(range(begin, end), range(first, last, 32)):
                    n = min(32, last - j)
                    word = problem.head.rule_word(rule, i, j, n)
                    bits = [bool(word >> t & 1) for t in range(n)]
                    assert bits == problem.seen[i, j : j + n].tolist()
        assert (visits[problem.visible[begin:end].any(0)] == 1).all()


@given(problems(), st.sampled_from([1, 3, 16, 33]), st.sampled_from([1, 2, 5, 16, 64]))
@property_test
def test_tiles_of_keys_are_those_that_touch(problem, tile_keys, tile_rows) -> None:
    rows, keys = problem.seen.shape
    for begin, end in some_tiles(keys, tile_keys):
        tiles = problem.head.tiles_of_keys(begin, end, tile_rows)
        expected = [
            r for r in some_tiles(rows, tile_rows) if problem.touched[r[0] : r[1], begin:end].any()
        ]
        assert [(first, last) for first, last, _, _ in tiles.tolist()] == expected
        for first, last, kind, rule in tiles.tolist():
            if kind == core.FULL:
                assert problem.visible[first:last, begin:end].all()
            if rule != core.MIXED:
                for i, j in itertools.product(range(first, last), range(begin, end, 32)):
                    word = problem.head.rule_word(rule, i, j, min(32, end - j))
                    bits = [bool(word >> t & 1) for t in range(min(32, end - j))]
                    assert bits == problem.seen[i, j : min(j + 32, end)].tolist()


@given(problems(), st.sampled_from([1, 4, 16, 33]), st.sampled_from([32, 64]))
@property_test
def test_tiles_looked_at_in_any_order(problem, tile_rows, tile_keys) -> None:
    """As the cursors and classify() have them; and words of 32 keys by the tile's rule."""
    head = problem.head
    rows, keys = problem.seen.shape
    for r, k in itertools.product(some_tiles(rows, tile_rows), some_tiles(keys, tile_keys)):
        kind, rule = head.tile_of_keys(r, k)
        assert head.tile_of_rows(r, k) == (kind, rule)
        assert kind == head.classify(r, k)
        if kind == core.SKIP:
            continue
        behind = [rows, rows + 5] if r[1] == rows else []
        for i, j in itertools.product([*range(*r), *behind], range(*k, 32)):
            word = head.word(rule, i, j)
            expected = problem.visible[i, j : j + 32] if i < rows else np.zeros(32, dtype=bool)
            bits = [bool(word >> t & 1) for t in range(32)]
            assert bits == [*expected.tolist(), *[False] * (32 - len(expected))]


@given(problems())
@property_test
def test_full_blocks_make_full_tiles(problem) -> None:
    """A tile that is wholly visible through full blocks is not called partial."""
    rows, keys = problem.seen.shape
    for r, k in itertools.product(some_tiles(rows, 16), some_tiles(keys, 16)):
        for first, last, kind, rule in problem.head.tiles_of_rows(*r, 16).tolist():
            if rule == FULL and problem.visible[r[0] : r[1], first:last].all():
                assert kind == core.FULL
        if problem.head.classify(r, k) == core.PARTIAL:
            assert problem.touched[r[0] : r[1], k[0] : k[1]].any()
