"""``block_mask=`` on every attention function, against the reference with the dense mask: forward
and gradients within the error budget, over every pattern and every option it composes with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashattn_lite import (
    ArgumentError,
    BlockMask,
    attention,
    attention_weights,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    reference,
)
from flashattn_lite import block_patterns as patterns
from flashattn_lite.testing import Case, Inputs, check_within_budget, gradients_of, make_inputs

S = 330  # two tiles of rows and three of keys, all cut off
IDS = torch.repeat_interleave(torch.arange(4), torch.tensor([100, 3, 150, 77]))

PATTERNS: dict[str, Callable[[int | tuple[int, int]], BlockMask]] = {
    "sliding_window": lambda n: patterns.sliding_window(S, 70, block_size=n),
    "dilated_window": lambda n: patterns.dilated_window(S, 20, 4, block_size=n),
    "strided": lambda n: patterns.strided(S, 18, block_size=n),
    "strided_by_block": lambda n: patterns.strided(S, 64, by_block=True, block_size=n),
    "fixed": lambda n: patterns.fixed(S, 32, 4, block_size=n),
    "longformer": lambda n: patterns.longformer(S, 30, 5, block_size=n),
    "bigbird": lambda n: patterns.bigbird(S, block_size=n),
    "bigbird_causal": lambda n: patterns.bigbird(S, is_causal=True, block_size=n),
    "butterfly": lambda n: patterns.butterfly(S, block_size=n),
    "pixelfly": lambda n: patterns.butterfly(S, global_blocks=1, is_causal=True, block_size=n),
    "streaming": lambda n: patterns.streaming(S, 4, 60, block_size=n),
    "a_shape": lambda n: patterns.a_shape(S, 64, 96, block_size=n),
    "vertical_slash": lambda n: patterns.vertical_slash(
        S, torch.tensor([0, 130]), torch.tensor([0, 1, 90]), block_size=n
    ),
    "documents": lambda n: patterns.documents(IDS, block_size=n),
    "documents_both": lambda n: patterns.documents(IDS, is_causal=False, block_size=n),
    "prefix_lm": lambda n: patterns.prefix_lm(S, 120, block_size=n),
    "heads": lambda n: BlockMask.stack_heads(
        [
            patterns.streaming(S, 4, 60, block_size=n),
            patterns.documents(IDS, block_size=n),
            patterns.butterfly(S, block_size=n),
            patterns.causal(S, block_size=n),
        ]
    ),
    "batch": lambda n: BlockMask.stack_batch(
        [patterns.prefix_lm(S, 100, block_size=n), patterns.sliding_window(S, 9, block_size=n)]
    ),
    "nothing": lambda n: BlockMask.from_dense(torch.zeros(S, S).bool(), block_size=n),
    "holes": lambda n: BlockMask.from_dense(holes(), block_size=n),
}
SIZES: list[int | tuple[int, int]] = [16, (64, 32), 128, (48, 256)]


def holes() -> Tensor:
    """Empty rows and columns within tiles and across them, and elements drawn alone."""
    dense = torch.rand(S, S, generator=torch.Generator().manual_seed(1)) < 0.1
    dense[60:130] = dense[:, 40:170] = dense[5] = dense[:, 299] = False
    return dense


def check(
    function: Callable[..., Any], inputs: Inputs, mask: BlockMask, dtype: torch.dtype, what: str
) -> None:
    """out, lse and every gradient within the budget of the reference with the dense mask."""
    options = inputs.reference_options() | {"block_mask": mask}
    wide = {"precision": torch.float64}
    truth = gradients_of(reference.attention, inputs, options | wide, dtype=torch.float64)
    low = gradients_of(
        reference.attention, inputs, options | {"precision": dtype, "kernel_backward": True}
    )
    actual = gradients_of(function, inputs, inputs.options | {"block_mask": mask})
    seen = truth.lse[torch.isfinite(truth.lse)]
    largest = float(seen.abs().max()) if seen.numel() else 1.0
    for result, a, t, x, factor in (
        ("out", actual.out, truth.out, low.out, 2.0),
        ("lse", actual.lse, truth.lse, low.lse, 2.0),
        *(
            (f"d{n}", g, truth.grads[n].double(), low.grads[n], 3.0)
            for n, g in actual.grads.items()
        ),
    ):
        check_within_budget(f"{what}: {result}", a, t, x, factor=factor, largest_score=largest)
    hidden = truth.lse == -torch.inf
    heads_first = actual.out.movedim(-2, -3 if actual.out.dim() == 4 else 0)
    assert (heads_first[hidden] == 0).all()


def with_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return attention(q, k, v, return_lse=True, **options)


def masked(name: str, size: int | tuple[int, int], dtype: torch.dtype, **more: Any) -> None:
    case = Case(
        name, ((S, S), (S, S)), heads_q=4, heads_k=2, head_dim=40, head_dim_v=24, dtype=dtype
    )
    case = Case(**(vars(case) | more))
    check(with_lse, make_inputs(case), PATTERNS[name](size), dtype, f"{name} {size} {dtype} {more}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("number", range(len(PATTERNS)), ids=list(PATTERNS))
def test_every_pattern_equals_the_dense_mask(number: int, dtype: torch.dtype) -> None:
    name = list(PATTERNS)[number]
    for size in (SIZES[number % 4], SIZES[(number + 2) % 4]):
        masked(name, size, dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (50, 20)},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": "batch"},
    "sinks": {"sinks": True},
    "bias": {"bias": "full"},
    "dropout": {"dropout_p": 0.2},
    "multi_query": {"heads_k": 1},
    "negative_scale": {"softmax_scale": -0.3},
    "all": {
        **{"causal": True, "window": (120, None), "softcap": 4.0, "alibi": "heads"},
        **{"sinks": True, "bias": "broadcast", "dropout_p": 0.1},
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_it_composes_with_every_option(option: str, dtype: torch.dtype) -> None:
    for name, size in (("holes", (64, 32)), ("heads", 48)):
        if name == "heads" and option not in ("causal", "dropout", "all"):
            continue
        masked(name, size, dtype, **OPTIONS[option])


@pytest.mark.parametrize("layout", ["varlen", "seqused", "leftpad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequences_of_other_lengths(layout: str, dtype: torch.dtype) -> None:
    """One mask, placed by position: also where it ends inside, and with more rows than keys."""
    lengths = ((200, 200), (0, 40), (1, 330), (33, 170), (60, 20), (130, 330))
    case = Case(layout, lengths, layout, heads_q=4, heads_k=2, head_dim=32, dtype=dtype)
    for name in ("streaming", "holes", "documents", "heads"):
        check(with_lse, make_inputs(case), PATTERNS[name](32), dtype, f"{layout} {name}")


def test_the_flash_attn_functions_take_it() -> None:
    case = Case("dense", ((S, S),) * 2, head_dim=16)
    inputs, mask = make_inputs(case), PATTERNS["streaming"](32)
    expected = attention(inputs.q, inputs.k, inputs.v, block_mask=mask, causal=True)
    out = flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True, block_mask=mask)
    assert torch.equal(out, expected)
    out, lse, _ = flash_attn_func(
        *(inputs.q, inputs.k, inputs.v), block_mask=PATTERNS["holes"](32), return_attn_probs=True
    )
    empty = ~holes().any(1)
    assert (out[:, empty] == 0).all() and (lse[:, :, empty] == torch.inf).all()
    packed = [t.flatten(0, 1) for t in (inputs.q, inputs.k, inputs.v)]
    cu = torch.tensor([0, S, 2 * S], dtype=torch.int32)
    out = flash_attn_varlen_func(*packed, cu, cu, S, S, causal=True, block_mask=mask)
    assert torch.equal(out, expected.flatten(0, 1))


@pytest.mark.parametrize("page_size", [5, 64])
def test_decoding_steps_equal_the_prefill(page_size: int) -> None:
    """One square mask serves prefill, chunks and single tokens, contiguous and paged."""
    heads, dim = 2, 32
    q, k, v = (
        torch.randn(1, S, n, dim, generator=torch.Generator().manual_seed(n)) for n in (4, heads, 3)
    )
    v = v[:, :, :heads].contiguous()
    mask = PATTERNS["vertical_slash"](32)
    whole = attention(q, k, v, block_mask=mask)
    pages = -(-S // page_size)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int()
    caches = []
    for t in (k, v):
        cache = torch.full((pages, page_size, heads, dim), torch.nan)
        padded = torch.full((pages * page_size, heads, dim), torch.nan)
        padded[:S] = t[0]
        cache[order.long()] = padded.reshape(pages, page_size, heads, dim)
        caches.append(cache)
    for begin, end in ((0, 1), (40, 41), (100, 137), (328, 330), (329, 330)):
        lengths = torch.tensor([end], dtype=torch.int32)
        paged = flash_attn_with_kvcache(
            *(q[:, begin:end], *caches), cache_seqlens=lengths, block_table=order[None],
            block_mask=mask,
        )  # fmt: skip
        contiguous = flash_attn_with_kvcache(
            q[:, begin:end], k, v, cache_seqlens=lengths, block_mask=mask
        )
        assert torch.equal(paged, contiguous)
        torch.testing.assert_close(contiguous, whole[:, begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_at_a_hidden_key_never_shows(dtype: torch.dtype) -> None:
    """Not even beside visible ones of the same tile, forward or backward."""
    case = Case("nan", ((S, S),), heads_q=2, heads_k=2, head_dim=32, dtype=dtype)
    inputs, mask = make_inputs(case), PATTERNS["holes"](32)
    unseen = ~holes().any(0)
    assert unseen.sum() > 100
    clean = gradients_of(with_lse, inputs, {"block_mask": mask})
    inputs.k[:, unseen] = inputs.v[:, unseen] = torch.nan
    inputs.v[:, unseen, 1] = torch.inf
    dirty = gradients_of(with_lse, inputs, {"block_mask": mask})
    torch.testing.assert_close(dirty.out, clean.out)
    assert torch.equal(dirty.lse, clean.lse)
    for name in ("q", "k", "v"):
        torch.testing.assert_close(dirty.grads[name], clean.grads[name], rtol=0.02, atol=1e-2)
    seen = int(holes().any(0).nonzero()[0])
    inputs.v[:, seen] = torch.nan
    out = attention(inputs.q, inputs.k, inputs.v, block_mask=mask)
    assert torch.equal(out.isnan().any(-1)[0].any(-1), holes()[:, seen])


def test_results_do_not_depend_on_threads_and_repeat() -> None:
    case = Case("threads", ((S, S),) * 2, head_dim=32)
    inputs, threads = make_inputs(case), torch.get_num_threads()
    options = {"block_mask": PATTERNS["holes"](16)}
    first = gradients_of(with_lse, inputs, options)
    try:
        torch.set_num_threads(1)
        alone = gradients_of(with_lse, inputs, options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.out, alone.out)
    for name, gradient in first.grads.items():
        assert torch.equal(gradient, alone.grads[name])


def test_the_reference_and_the_weights_take_it() -> None:
    case = Case("weights", ((S, S),), head_dim=16)
    inputs, mask = make_inputs(case), PATTERNS["holes"](32)
    weights = attention_weights(inputs.q, inputs.k, block_mask=mask)
    assert torch.equal(weights[0, 0] > 0, holes())
    wide = [t.double() for t in (inputs.q, inputs.k, inputs.v)]
    out = attention(*wide, block_mask=mask)
    expected, _ = reference.attention(*wide, mask=mask.to_dense())
    assert torch.equal(out, expected)


Q, K = torch.ones(2, 64, 4, 8), torch.ones(2, 64, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda: patterns.causal(48, block_size=16), "block_mask has seqlen_k 48"),
        (
            lambda: patterns.band(32, 64, None, 0, block_size=16),
            "the first query row lies 32 rows before the mask's first",
        ),
        (
            lambda: BlockMask.stack_heads([patterns.causal(64, block_size=16)] * 2),
            "block_mask has 2 heads; it must be 1 or 4",
        ),
        (
            lambda: BlockMask.stack_batch([patterns.causal(64, block_size=16)] * 3),
            "block_mask has batch 3; it must be 1 or 2",
        ),
    ],
)
def test_errors_name_the_mask(mask: Any, words: str, dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentError) as error:
        attention(Q.to(dtype), K.to(dtype), K.to(dtype), block_mask=mask())
    assert str(error.value).startswith("attention: ") and words in str(error.value)


def test_a_mask_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="from_dense makes one of a boolean tensor"):
        attention(Q, K, K, block_mask=torch.ones(64, 64).bool())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m & 3, "unsupported operand type"),
        (lambda m: m | torch.ones(1), "unsupported operand type"),
        (lambda m: m.to_dense("x"), "seqlen_q is 'x'; it must be an int"),
        (lambda m: m.to_dense(-1), "seqlen_q is -1; it must be >= 0"),
        (lambda m: m.text(head=1), "head is 1; it must be 0 to 0"),
        (lambda m: m.text(width=0), "width is 0; it must be >= 1"),
        (lambda m: m.flops("8"), "head_dim is '8'; it must be an int"),
        (lambda m: BlockMask.from_predicate(m, 64), "predicate is BlockMask"),
        (lambda m: BlockMask.from_predicate(lambda *_: torch.ones(3), 64), "predicate gave shape"),
        (lambda m: patterns.prefix_lm(-1, 2), "prefix_lm: seqlen is -1; it must be >= 0"),
        (lambda m: patterns.full(2**31), "seqlen_q is 2147483648; it must be 0 to 2"),
    ],
)
def test_methods_and_patterns_name_what_they_refuse(call: Any, words: str) -> None:
    with pytest.raises((TypeError, ArgumentError), match=words):
        call(patterns.causal(64, block_size=16))


def test_corrupt_contents_are_refused() -> None:
    """No content of the packed mask can make a kernel read outside it."""
    mask = patterns.streaming(64, 4, 20, block_size=16)
    packed, layout = mask.packed(torch.device("cpu"))
    refused = 0
    for place in range(0, packed.numel(), 3):
        for value in (-1, 7, 1 << 20):
            changed = packed.clone()
            changed[place] = value
            mask._packed[torch.device("cpu")] = (changed, layout)
            try:
                attention(Q, K, K, block_mask=mask)
            except ArgumentError as error:
                assert "block_mask" in str(error)
                refused += 1
    assert refused > packed.numel() // 3
    mask._packed[torch.device("cpu")] = (packed[:-1], layout)
    with pytest.raises(ArgumentError, match="its layout needs"):
        attention(Q, K, K, block_mask=mask)


def test_it_compiles_whole() -> None:
    case = Case("compile", ((S, S),), head_dim=16)
    inputs, mask = make_inputs(case), PATTERNS["streaming"](32)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, block_mask=mask)  # type: ignore[return-value]

    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    expected = call(*leaves)
    compiled = torch.compile(call, fullgraph=True)(*leaves)
    assert torch.equal(compiled, expected)
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)
