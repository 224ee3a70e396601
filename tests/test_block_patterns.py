"""The patterns against their definitions, element by element; the algebra; what masks tell of
themselves; interchange; construction at full length."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashattn_lite import ArgumentError, BlockMask
from flashattn_lite import block_patterns as patterns

property_test = settings(max_examples=25, deadline=None, derandomize=True, database=None)

S = 150  # ends inside a block of 16, 32 and 48
I, J = torch.arange(S).unsqueeze(1), torch.arange(S).unsqueeze(0)  # noqa: E741
CAUSAL = J <= I
IDS = torch.repeat_interleave(torch.tensor([3, 1, 2, 9]), torch.tensor([40, 1, 70, 39]))
VERTICALS, SLASHES = torch.tensor([0, 17, 149]), torch.tensor([0, 1, 33])
GLOBAL = torch.isin(torch.arange(S), torch.tensor([0, 20, 21, 140]))


def blocks_of(size: tuple[int, int], definition: Callable[[int, int], bool]) -> Tensor:
    """A pattern over whole blocks, element by element."""
    rows, keys = (-(-S // n) for n in size)
    blocks = torch.tensor([[definition(r, c) for c in range(keys)] for r in range(rows)])
    return blocks.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)[:S, :S]


def one_bit(x: int) -> bool:
    return x & (x - 1) == 0


# name: (the mask by block size, its elements by block size)
PATTERNS: dict[str, tuple[Callable[..., BlockMask], Callable[..., Tensor]]] = {
    "full": (lambda n: patterns.full(S, block_size=n), lambda n: CAUSAL | ~CAUSAL),
    "causal": (lambda n: patterns.causal(S, block_size=n), lambda n: CAUSAL),
    "sliding_window": (
        lambda n: patterns.sliding_window(S, 37, block_size=n),
        lambda n: CAUSAL & (I - J < 37),
    ),
    "sliding_window_both": (
        lambda n: patterns.sliding_window(S, 20, is_causal=False, block_size=n),
        lambda n: (I - J).abs() < 20,
    ),
    "dilated_window": (
        lambda n: patterns.dilated_window(S, 9, 5, block_size=n),
        lambda n: CAUSAL & (I - J <= 40) & ((I - J) % 5 == 0),
    ),
    "chunked": (
        lambda n: patterns.chunked(S, 44, block_size=n),
        lambda n: CAUSAL & (I // 44 == J // 44),
    ),
    "streaming": (
        lambda n: patterns.streaming(S, 5, 30, block_size=n),
        lambda n: CAUSAL & ((J < 5) | (I - J < 30)),
    ),
    "a_shape": (
        lambda n: patterns.a_shape(S, 32, 48, block_size=n),
        lambda n: CAUSAL & ((J < 32) | (I - J < 48)),
    ),
    "longformer": (
        lambda n: patterns.longformer(S, 10, GLOBAL, block_size=n),
        lambda n: ((I - J).abs() < 10) | GLOBAL | GLOBAL.unsqueeze(1),
    ),
    "longformer_causal": (
        lambda n: patterns.longformer(S, 10, 3, is_causal=True, block_size=n),
        lambda n: CAUSAL & ((I - J < 10) | (J < 3) | (I < 3)),
    ),
    "strided": (
        lambda n: patterns.strided(S, 12, block_size=n),
        lambda n: CAUSAL & ((I - J < 12) | ((I - J) % 12 == 0)),
    ),
    "strided_by_block": (
        lambda n: patterns.strided(S, 2 * n[1], by_block=True, block_size=n),
        lambda n: (
            CAUSAL
            & blocks_of(
                n,
                lambda r, c: abs(r * n[0] // n[1] - c) < 2 or (r * n[0] // n[1] - c) % 2 == 0,
            )
        ),
    ),
    "fixed": (
        lambda n: patterns.fixed(S, 24, 5, block_size=n),
        lambda n: CAUSAL & ((J // 24 == I // 24) | (J % 24 >= 19)),
    ),
    "butterfly": (
        lambda n: patterns.butterfly(S, block_size=n),
        lambda n: blocks_of(n, lambda r, c: one_bit((r * n[0] // n[1]) ^ c)),
    ),
    "pixelfly_causal": (
        lambda n: patterns.butterfly(S, global_blocks=1, is_causal=True, block_size=n),
        lambda n: (
            CAUSAL & blocks_of(n, lambda r, c: one_bit((r * n[0] // n[1]) ^ c) or c == 0 or r == 0)
        ),
    ),
    "prefix_lm": (
        lambda n: patterns.prefix_lm(S, 45, block_size=n),
        lambda n: CAUSAL | (J < 45),
    ),
    "documents": (
        lambda n: patterns.documents(IDS, block_size=n),
        lambda n: CAUSAL & (IDS.unsqueeze(1) == IDS),
    ),
    "documents_both": (
        lambda n: patterns.documents(IDS, is_causal=False, block_size=n),
        lambda n: IDS.unsqueeze(1) == IDS,
    ),
    "vertical_slash": (
        lambda n: patterns.vertical_slash(S, VERTICALS, SLASHES, block_size=n),
        lambda n: CAUSAL & (torch.isin(J, VERTICALS) | torch.isin(I - J, SLASHES)),
    ),
    "query_rows": (
        lambda n: patterns.query_rows(S, GLOBAL, block_size=n),
        lambda n: GLOBAL.unsqueeze(1).expand(S, S),
    ),
}
BLOCK_SIZES = [(16, 16), (32, 48), (64, 16), (256, 256)]


@pytest.mark.parametrize("size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_its_definition(name: str, size: tuple[int, int]) -> None:
    make, definition = PATTERNS[name]
    mask = make(size)
    expected = definition(size)
    assert torch.equal(mask.to_dense(), expected[None, None])
    assert mask.density() == pytest.approx(expected.float().mean().item())
    check_kinds(mask, expected)


def check_kinds(mask: BlockMask, expected: Tensor) -> None:
    """What is not listed hides all; what is full shows all; and that is what FLOPs count."""
    block_q, block_k = mask.block_size
    kinds = mask.kinds()[0, 0].tolist()
    for r, c in itertools.product(range(len(kinds)), range(len(kinds[0]))):
        kind = kinds[r][c]
        part = expected[r * block_q : (r + 1) * block_q, c * block_k : (c + 1) * block_k]
        assert kind != 0 or not part.any()
        assert (kind == 2) == bool(part.all())
    listed = mask.kinds() > 0
    shown = listed[0, 0].repeat_interleave(block_q, 0).repeat_interleave(block_k, 1)[:S, :S]
    assert mask.flops(64) == 4 * 64 * int(shown.sum())
    assert mask.flops(64, 32, backward=True) == 2 * (3 * 64 + 2 * 32) * int(shown.sum())
    assert mask.block_density() == listed.double().mean().item()


@pytest.mark.parametrize("is_causal", [False, True])
def test_bigbird_lists_its_window_globals_and_random_blocks(is_causal: bool) -> None:
    mask = patterns.bigbird(
        *(16 * 40,), random_blocks=4, is_causal=is_causal, block_size=16, seed=3
    )
    kinds = mask.kinds()[0, 0]
    for r, c in itertools.product(range(40), range(40)):
        required = abs(r - c) <= 1 or c == 0 or (r == 0 and not is_causal)
        if required and (c <= r or not is_causal):
            assert kinds[r, c]
        if is_causal and c > r:
            assert not kinds[r, c]
    for r in range(8, 39):  # three of the window, one global, four at random
        assert int((kinds[r] > 0).sum()) == (7 if is_causal else 8)
    again = patterns.bigbird(16 * 40, random_blocks=4, is_causal=is_causal, block_size=16, seed=3)
    assert torch.equal(again.kinds(), mask.kinds())


def test_a_tree_sees_the_context_and_its_ancestors() -> None:
    parents = [-1, 0, 0, 1, 1, 2, 5]
    mask = patterns.tree(parents, 40)
    dense = mask.to_dense()[0, 0]
    assert dense.shape == (7, 47) and dense[:, :40].all()
    for node in range(7):
        line, up = {node}, parents[node]
        while up >= 0:
            line, up = line | {up}, parents[up]
        assert set(dense[node, 40:].nonzero().flatten().tolist()) == line


# ---- algebra -------------------------------------------------------------------------------------

SOME = st.sampled_from([name for name in PATTERNS if name != "strided_by_block"])


@given(SOME, SOME, SOME, st.sampled_from(BLOCK_SIZES))
@property_test
def test_and_and_or_are_those_of_the_elements(a, b, c, size) -> None:
    x, y, z = (PATTERNS[name][0](size) for name in (a, b, c))
    p, q, r = (PATTERNS[name][1](size) for name in (a, b, c))
    assert torch.equal((x & y).to_dense()[0, 0], p & q)
    assert torch.equal((x | y).to_dense()[0, 0], p | q)
    assert torch.equal(((x & y) | z).to_dense()[0, 0], (p & q) | r)
    assert torch.equal(((x | y) & z).to_dense()[0, 0], (p | q) & r)
    check_listing((x | y), p | q)


def check_listing(mask: BlockMask, expected: Tensor) -> None:
    block_q, block_k = mask.block_size
    for r, c in (mask.kinds()[0, 0] == 2).nonzero().tolist():
        rows, keys = slice(r * block_q, (r + 1) * block_q), slice(c * block_k, (c + 1) * block_k)
        assert expected[rows, keys].all()


def test_blocks_that_an_intersection_empties_are_not_listed() -> None:
    even = BlockMask.from_dense((I + J) % 2 == 0, block_size=16)
    odd = BlockMask.from_dense(((I + J) % 2 == 1) | (J < 16), block_size=16)
    kinds = (even & odd).kinds()[0, 0]
    assert kinds[:, 0].all() and not kinds[:, 1:].any()


@given(st.data())
@property_test
def test_tables_broadcast_and_stack(data) -> None:
    size = data.draw(st.sampled_from(BLOCK_SIZES))
    names = data.draw(st.lists(SOME, min_size=3, max_size=3))
    masks = [PATTERNS[name][0](size) for name in names]
    dense = [PATTERNS[name][1](size) for name in names]
    heads, batch = BlockMask.stack_heads(masks), BlockMask.stack_batch(masks[:2])
    assert torch.equal(heads.to_dense(), torch.stack(dense)[None])
    assert torch.equal(batch.to_dense(), torch.stack(dense[:2])[:, None])
    both = torch.stack(dense)[None] & torch.stack(dense[:2])[:, None]
    assert torch.equal((heads & batch).to_dense(), both)
    either = torch.stack(dense)[None] | torch.stack(dense[:2])[:, None]
    assert torch.equal((batch | heads).to_dense(), either)
    assert torch.equal((heads & masks[0]).to_dense(), (torch.stack(dense) & dense[0])[None])
    assert torch.equal(
        BlockMask.stack_batch([heads, heads & masks[1]]).to_dense(),
        torch.stack([torch.stack(dense), torch.stack(dense) & dense[1]]),
    )


@given(
    st.sampled_from(BLOCK_SIZES),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(0, 90), st.integers(0, 90)),
    st.sampled_from([0.02, 0.5, 0.99]),
    st.integers(0, 2**31),
)
@property_test
def test_dense_masks_and_predicates_come_back(size, shape, share, seed) -> None:
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    mask = BlockMask.from_dense(dense, block_size=size)
    assert torch.equal(mask.to_dense(), dense)
    batch, heads, seqlen_q, seqlen_k = shape
    asked = BlockMask.from_predicate(
        *(lambda b, h, i, j: dense[b, h, i, j], seqlen_q, seqlen_k),
        batch=batch,
        heads=heads,
        block_size=size,
    )
    assert torch.equal(asked.to_dense(), dense)
    assert torch.equal(asked.packed(torch.device("cpu"))[0], mask.packed(torch.device("cpu"))[0])


def test_scores_keep_the_best_blocks() -> None:
    scores = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    kept = BlockMask.from_scores(scores, 3, S, S, block_size=16).kinds() > 0
    assert torch.equal(kept, scores >= scores.topk(3, -1).values[..., -1:])
    mask = BlockMask.from_scores(scores, 3, S, S, block_size=16, causal=True)
    r, c = torch.arange(10).unsqueeze(1), torch.arange(10)
    assert not (mask.kinds() > 0)[..., c > r].any()
    best = scores.masked_fill(c > r, -1)
    expected = (best >= best.topk(3, -1).values[..., -1:]) & (c <= r)
    assert torch.equal(mask.kinds() > 0, expected)
    assert not mask.to_dense()[..., ~CAUSAL].any()


@pytest.mark.parametrize("seqlens", [(150, 150), (1, 60), (40, 100), (150, 20), (200, 150), (0, 9)])
def test_a_mask_keeps_its_place_by_position(seqlens: tuple[int, int]) -> None:
    mask = patterns.prefix_lm(S, 45, block_size=32)
    dense = mask.to_dense(*seqlens)[0, 0]
    assert dense.shape == seqlens
    for i, j in itertools.product(*(range(0, n, 7) for n in seqlens)):
        p = i + seqlens[1] - seqlens[0]
        assert bool(dense[i, j]) == (0 <= p < S and bool((CAUSAL | (J < 45))[p, j]))


# ---- flex_attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["streaming", "documents", "vertical_slash", "butterfly", "full"])
def test_flex_masks_go_both_ways(name: str) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    make, definition = PATTERNS[name]
    mask = BlockMask.stack_heads([make((32, 32)), patterns.causal(S, block_size=32)])
    expected = torch.stack([definition((32, 32)), CAUSAL])
    theirs = mask.to_flex()
    b, h = torch.zeros(1, dtype=torch.int64), torch.arange(2).reshape(2, 1, 1)
    shown = theirs.mask_mod(b, h, I.unsqueeze(0), J.unsqueeze(0))
    assert torch.equal(shown, expected)
    assert torch.equal(BlockMask.from_flex(theirs).to_dense()[0], expected)
    q = torch.randn(1, 2, S, 16, generator=torch.Generator().manual_seed(0))
    ours = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=expected)
    torch.testing.assert_close(flex.flex_attention(q, q, q, block_mask=theirs), ours)


def test_a_flex_mask_of_their_own_is_taken() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < 40 + 30 * h) & (j + b * 10 < 140)

    theirs = flex.create_block_mask(mod, 2, 3, S, S, device="cpu", BLOCK_SIZE=(32, 64))
    mask = BlockMask.from_flex(theirs)
    assert mask.block_size == (32, 64) and (mask.batch, mask.heads) == (2, 3)
    b, h = torch.arange(2).reshape(2, 1, 1, 1), torch.arange(3).reshape(3, 1, 1)
    assert torch.equal(mask.to_dense(), mod(b, h, I, J))
    assert (mask.kinds() == 2).any()


# ---- what is said --------------------------------------------------------------------------------


def test_text_and_picture(tmp_path) -> None:
    mask = patterns.streaming(128, 16, 20, block_size=16)
    lines = mask.text().splitlines()
    assert lines[0] == "▒·······" and lines[7] == "█····▒█▒"[0] + "····" + "▒▒▒"
    assert mask.text(width=4).splitlines()[0] == "▒···"
    pytest.importorskip("matplotlib")
    mask.picture(tmp_path / "mask.svg", title="streaming")
    assert "<svg" in (tmp_path / "mask.svg").read_text()[:500]
    assert mask.picture().axes


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: patterns.causal(64, block_size=24), "block_size is 24 rows"),
        (lambda: patterns.causal(64, block_size=(16, 512)), "block_size is 512 keys"),
        (lambda: patterns.sliding_window(64, 0), "window is 0"),
        (lambda: patterns.band(4, 4, -3, 0), "sides are (-3, 0)"),
        (lambda: patterns.fixed(64, 8, 9), "summary must be 0 to stride"),
        (lambda: patterns.tree([0], 4), "parents[0] is 0"),
        (lambda: patterns.vertical_slash(8, torch.tensor([8]), torch.tensor([0])), "verticals"),
        (lambda: BlockMask.from_dense(torch.ones(4, 4)), "it must be bool"),
        (
            lambda: BlockMask.from_blocks(torch.ones(2, 2).bool(), 64, 64, block_size=16),
            "64 x 64 elements are (4, 4)",
        ),
        (
            lambda: patterns.causal(64, block_size=16) & patterns.causal(64, block_size=32),
            "blocks of 16 x 16 and 64 x 64 in blocks of 32 x 32",
        ),
        (
            lambda: (
                BlockMask.stack_heads([patterns.causal(64)] * 2)
                | BlockMask.stack_heads([patterns.causal(64)] * 3)
            ),
            "heads 2 and 3",
        ),
        (lambda: BlockMask.stack_heads([]), "masks is empty"),
    ],
)
def test_errors_say_what_is_wrong(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ArgumentError) as error:
        call()
    assert words in str(error.value)


def test_a_long_mask_takes_memory_by_blocks() -> None:
    """128k tokens: the mask's arrays, and what is looked at on the way, stay far below S x S."""
    seqlen = 131072
    mask = patterns.streaming(seqlen, 4, 4096)
    packed, _ = mask.packed(torch.device("cpu"))
    assert packed.numel() * 4 < 2**20
    rows = torch.tensor([0, 3, 5000, seqlen - 1])
    visible = torch.minimum(rows + 1, torch.tensor(4096)) + (rows - 4095).clamp(0, 4)
    expected = (torch.arange(1, seqlen + 1).clamp(max=4096)).sum() + (
        torch.arange(seqlen) - 4095
    ).clamp(0, 4).sum()
    assert round(mask.density() * seqlen**2) == int(expected) and visible[3] == 4100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patterns.sliding_window("64", 4), "sliding_window: seqlen is '64'; it must"),
        (
            lambda: patterns.sliding_window(64, 4.5),
            "sliding_window: window is 4.5; it must be",
        ),
        (lambda: patterns.streaming(64, -1, 4), "streaming: sinks is -1; it must be >= 0"),
        (
            lambda: patterns.causal(64, block_size=None),
            "block_size is None; it must be an int",
        ),
        (lambda: patterns.causal(64, block_size=(16, 17)), "block_size is 17 keys; it must"),
        (
            lambda: patterns.key_columns(64, torch.ones(64)),
            "visible is float32 of shape (64,)",
        ),
        (lambda: patterns.documents([0, 1]), "documents: ids is [0, 1]; it must be a torch"),
        (
            lambda: patterns.documents(torch.zeros(4)),
            "documents: ids is float32 of shape (4,",
        ),
        (lambda: patterns.tree([-1, 1.5], 3), "tree: parents[1] is 1.5; it must be an int"),
        (lambda: patterns.tree([-1], -3), "tree: context is -3; it must be >= 0"),
        (lambda: BlockMask.from_dense(None), "BlockMask.from_dense: mask is None; it must be a"),
        (lambda: BlockMask.from_scores(torch.ones(2, 2), -1, 32, 32), "keep is -1 and scores"),
        (lambda: BlockMask.from_predicate(max, 16, batch=-1), "BlockMask: batch is -1; it must be"),
        (lambda: BlockMask.from_flex(3), "mask is a int; it must be a torch.nn.attention.flex"),
        (lambda: BlockMask.stack_heads([1]), "masks must be a sequence of BlockMask"),
    ],
)
def test_what_no_mask_can_be_made_of_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ArgumentError), match=re.escape(message)):
        call()
