"""PagedKVCache against plain lists of rows: contents, counts and leaks after random operations."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import reference, testing

PAGES, PAGE_SIZE = 12, 3


class Machine(RuleBasedStateMachine):
    """Every token is a number, stored in its key (and negated in its value); the model is a list
    of numbers for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = fal.PagedKVCache(PAGES, PAGE_SIZE, 1, 2, 1)
        self.model: dict[int, list[float]] = {}
        self.token = 0

    def some(self, data: Any) -> int:
        return int(data.draw(st.sampled_from(sorted(self.model))))

    @rule()
    def create(self) -> None:
        self.model[self.cache.create()] = []

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        sequence = self.some(data)
        self.model[self.cache.fork(sequence)] = list(self.model[sequence])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        sequence = self.some(data)
        self.cache.free(sequence)
        del self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        sequence = self.some(data)
        length = data.draw(st.integers(0, len(self.model[sequence])))
        self.cache.truncate(sequence, length)
        del self.model[sequence][length:]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 5))
    def append(self, data: Any, count: int) -> None:
        sequences = data.draw(
            st.lists(st.sampled_from(sorted(self.model)), min_size=1, unique=True)
        )
        total = count * len(sequences)
        tokens = torch.arange(self.token, self.token + total).float()
        k = tokens.reshape(len(sequences), count, 1, 1).expand(-1, -1, -1, 2)
        needed, free = (
            self.cache.pages_needed(sequences, [count] * len(sequences)),
            self.cache.free_pages,
        )
        try:
            self.cache.append(sequences, k, -k[..., :1])
        except fal.OutOfPagesError:
            assert needed > free == self.cache.free_pages
            return
        assert self.cache.free_pages == free - needed
        self.token += total
        for i, sequence in enumerate(sequences):
            self.model[sequence] += tokens[i * count : (i + 1) * count].tolist()

    @invariant()
    def contents_are_the_models(self) -> None:
        assert sorted(self.cache.sequences) == sorted(self.model)
        for sequence, tokens in self.model.items():
            assert self.cache.length(sequence) == len(tokens)
            pages = self.cache.block_table([sequence])[0].long()
            keys = self.cache.k[0][pages].reshape(-1, 2)[: len(tokens)]
            values = self.cache.v[0][pages].reshape(-1)[: len(tokens)]
            assert keys[:, 0].tolist() == keys[:, 1].tolist() == tokens
            assert (-values).tolist() == tokens

    @invariant()
    def nothing_leaks(self) -> None:
        held = Counter(page for s in self.model for page in self.cache.pages(s))
        assert [self.cache.references(p) for p in range(PAGES)] == [held[p] for p in range(PAGES)]
        assert self.cache.free_pages == PAGES - len(held)
        for sequence, tokens in self.model.items():
            assert len(self.cache.pages(sequence)) == -(-len(tokens) // PAGE_SIZE)

    def teardown(self) -> None:
        for sequence in list(self.model):
            self.cache.free(sequence)
        assert self.cache.free_pages == PAGES
        assert all(self.cache.references(p) == 0 for p in range(PAGES))


Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestMachine = Machine.TestCase


def filled(
    lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[fal.PagedKVCache, list[int]]:
    """Sequences that share a prefix of lengths[0] tokens and go on by lengths[1:] of their own."""
    cache = fal.PagedKVCache(64, 4, 2, 16, dtype=dtype, **more)
    rows = dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
    prefix = cache.create()
    cache.append([prefix], *(torch.randn(1, lengths[0], 2, 16).to(rows) for _ in range(2)))
    sequences = [cache.fork(prefix) for _ in lengths[1:]]
    for sequence, n in zip(sequences, lengths[1:], strict=True):
        cache.append([sequence], *(torch.randn(1, n, 2, 16).to(rows) for _ in range(2)))
    return cache, sequences


def truth_of(
    cache: fal.PagedKVCache, sequences: list[int], q: Tensor, precision: torch.dtype, **more: Any
) -> tuple[Tensor, Tensor]:
    return reference.attention(
        q,
        cache.k[0],
        cache.v[0],
        block_table=cache.block_table(sequences),
        seqused_k=cache.lengths(sequences),
        precision=precision,
        **more,
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn))
def test_attend(dtype: torch.dtype) -> None:
    cache, sequences = filled((10, 3, 1, 40), dtype)
    rows = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    q = torch.randn(3, 2, 4, 16).to(rows)
    out, lse = cache.attend(sequences, q, causal=True, return_lse=True)
    scales = cache._scales(0)
    truth, low = (
        truth_of(cache, sequences, q, p, causal=True, **scales) for p in (torch.float64, rows)
    )
    testing.check_within_budget("out", out, truth[0], low[0])
    testing.check_within_budget("lse", lse, truth[1], low[1])


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("seqlen_q", (1, 3, 7))
@pytest.mark.parametrize("prefix", (3, 16, 41))
@pytest.mark.parametrize("own", ((7, 9, 30), (4, 1, 30)))  # shorter than q: its rows reach back
def test_cascade_equals_the_plain_result(
    causal: bool, seqlen_q: int, prefix: int, own: tuple[int, ...]
) -> None:
    cache, sequences = filled((prefix, *own))
    assert cache.shared_prefix(sequences) == prefix // 4 * 4
    q = torch.randn(3, seqlen_q, 4, 16)
    out, lse = cache.attend_cascade(sequences, q, causal=causal)
    truth, low = (
        truth_of(cache, sequences, q, p, causal=causal) for p in (torch.float64, torch.float32)
    )
    testing.check_within_budget("out", out, truth[0], low[0])
    testing.check_within_budget("lse", lse, truth[1], low[1])


def test_a_shared_prefix_ends_with_the_shortest_sequence() -> None:
    cache, (sequence,) = filled((9, 2))
    short = cache.fork(sequence)
    cache.truncate(short, 6)  # in the middle of the second page, which both hold
    assert cache.shared_prefix([sequence, short]) == 4
    q = torch.randn(2, 2, 4, 16)
    out, _ = cache.attend_cascade([sequence, short], q)
    torch.testing.assert_close(out, cache.attend([sequence, short], q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.int8))
def test_a_writer_copies_a_shared_page_with_all_layers_and_factors(dtype: torch.dtype) -> None:
    cache = fal.PagedKVCache(8, 4, 2, 16, dtype=dtype, num_layers=2)
    pools = [pool for pool in (cache.k, cache.v, cache.k_scale, cache.v_scale) if pool is not None]

    def extend(sequence: int, rows: int) -> None:
        cache.extend([sequence], [rows])
        for layer in range(2):
            cache.write([sequence], *torch.randn(2, 1, rows, 2, 16).unbind(0), layer=layer)

    def first_rows(sequence: int) -> list[Tensor]:
        (page, *_) = cache.pages(sequence)
        return [pool[:, page, :3].clone() for pool in pools]

    first = cache.create()
    extend(first, 3)
    second, before = cache.fork(first), first_rows(first)
    extend(second, 2)
    assert cache.pages(first)[0] != cache.pages(second)[0]
    for sequence in (first, second):
        assert all(map(torch.equal, before, first_rows(sequence)))
        assert all(bool(t.any()) for t in before)


def test_layers_share_pages_and_ragged_rows_are_written() -> None:
    cache = fal.PagedKVCache(8, 4, 1, 8, num_layers=2)
    sequences = [cache.create(), cache.create()]
    cache.extend(sequences, [5, 2])
    cu_seqlens = torch.tensor([0, 5, 7], dtype=torch.int32)
    rows = [torch.randn(7, 1, 8) for _ in range(2)]
    for layer in range(2):
        cache.write(sequences, rows[layer], rows[layer], layer=layer, cu_seqlens=cu_seqlens)
    for layer in range(2):
        for sequence, part in zip(sequences, rows[layer].split([5, 2]), strict=True):
            pages = list(cache.pages(sequence))
            assert torch.equal(cache.k[layer][pages].flatten(0, 1)[: len(part)], part)


def test_errors() -> None:
    cache = fal.PagedKVCache(2, 4, 1, 8)
    sequence = cache.create()
    with pytest.raises(fal.OutOfPagesError, match=r"3 pages are needed but 2 of 2 are free"):
        cache.extend([sequence], [9])
    with pytest.raises(fal.ArgumentError, match="no sequence 7"):
        cache.fork(7)
    with pytest.raises(fal.ArgumentError, match="named twice"):
        cache.extend([sequence, sequence], [1, 1])
    with pytest.raises(fal.ArgumentError, match="length is 1; sequence 0 has 0 tokens"):
        cache.truncate(sequence, 1)
    with pytest.raises(fal.ArgumentError, match=r"PagedKVCache.write: k_cache"):
        cache.append([sequence], torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    assert cache.length(sequence) == 0 and cache.free_pages == 2
    with pytest.raises(fal.ArgumentError, match="page_size is 0"):
        fal.PagedKVCache(2, 0, 1, 8)
    with pytest.raises(fal.ArgumentError, match="head_dim is 577; it must be 1 to 576"):
        fal.PagedKVCache(2, 4, 1, 577, 512)
    cache.extend([sequence], [2])
    row, used = torch.zeros(1, 1, 1, 8), cache.lengths([sequence])
    for call, words in (
        (lambda: fal.PagedKVCache("x", 4, 1, 8), "num_pages is 'x'; it must be an int"),
        (lambda: fal.PagedKVCache(2.5, 4, 1, 8), "num_pages is 2.5; it must be an int"),
        (lambda: cache.fork([sequence]), r"no sequence \[0\]; a sequence is what create or fork"),
        (lambda: cache.lengths(sequence), "sequences is 0; it must be a list"),
        (lambda: cache.extend([sequence], None), "counts is None; it must be a list of ints"),
        (lambda: cache.extend([sequence], [0.5]), "counts is 0.5; it must be an int"),
        (lambda: cache.pages_needed([sequence], []), r"counts is \[\]; it must hold a number"),
        (lambda: cache.references(-1), "page is -1; it must be 0 to 1"),
        (lambda: cache.truncate(sequence, "x"), "length is 'x'; it must be an int"),
        (lambda: cache.write([sequence], row, row, layer=-1), "layer is -1; it must be 0 to 0"),
        (lambda: cache.write([sequence], 3, row), "k is 3; it must be a torch.Tensor"),
        (lambda: cache.append([sequence], row[0], row), r"k has shape \(1, 1, 8\); it must be"),
        (lambda: cache.append([sequence], row[0], row[0], cu_seqlens=used), "cu_seqlens is torch"),
        (lambda: cache.attend([sequence], row, layer=1), "layer is 1; it must be 0 to 0"),
        (lambda: cache.attend_cascade([sequence], row[0]), "q has shape"),
    ):
        with pytest.raises((TypeError, fal.ArgumentError), match=f"^PagedKVCache.*: .*{words}"):
            call()
    with pytest.raises(fal.ArgumentError, match="window cannot be used here"):
        cache.attend_cascade([sequence], torch.zeros(1, 1, 1, 8), window=(1, 1))
