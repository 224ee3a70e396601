"""Other packages as contenders, against modules that compute what their documentation says the
arguments mean: flash_attn 2.8, xformers 0.0.35, FlashInfer 0.7."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashattn_lite
from flashattn_lite.bench import exactness, runner
from flashattn_lite.bench.cases import Case
from flashattn_lite.bench.contenders import COMPETITORS
from flashattn_lite.bench.inputs import Inputs
from flashattn_lite.bench.timing import Rounds

PROMPT = Case(suite="forward", dtype="bf16", head_dim=16, seqlen=40, heads=4, batch=2)
DECODE = Case(suite="decode", dtype="bf16", head_dim=16, seqlen=300, heads=4, batch=2, tokens=1)
RAGGED = (40, 3, 17)
CASES = [
    PROMPT,
    replace(PROMPT, causal=True),
    replace(PROMPT, causal=True, heads_k=2),
    replace(PROMPT, causal=True, window=9),
    replace(PROMPT, lengths=RAGGED, batch=3),
    replace(PROMPT, lengths=RAGGED, batch=3, causal=True, heads_k=2),
    replace(PROMPT, score="bias"),
    replace(PROMPT, score="alibi", causal=True),
    replace(PROMPT, backward=True, causal=True),
    replace(DECODE, batch=1),
    DECODE,
    replace(DECODE, heads_k=2),
    replace(DECODE, heads_k=2, lengths=(300, 5, 33), batch=3),
    replace(DECODE, page_size=16, heads_k=2),
    replace(DECODE, page_size=256),
    replace(DECODE, page_size=16, lengths=(300, 5, 32), batch=3),
]
RUN = {  # how many of the cases each of them runs
    "flash_attn": 13,
    "xformers": 12,
    "flashinfer": 10,
}


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over (batch, rows, heads, dim); mask (rows, keys) or (batch, heads, rows, keys)."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    if mask is not None:
        added = mask.float() if mask.dtype != torch.bool else torch.where(mask, 0.0, -torch.inf)
        scores = scores + added
    return (scores.softmax(-1) @ v.repeat_interleave(group, 1)).transpose(1, 2).bfloat16()


def band(rows: int, keys: int, left: int = -1, *, causal: bool = True) -> Tensor:
    """Aligned at the bottom right; left < 0: no window."""
    distance = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)
    seen = distance >= 0 if causal else torch.ones(rows, keys, dtype=torch.bool)
    return seen & (distance <= left) if left >= 0 else seen


# ---- flash_attn ---------------------------------------------------------------------------------


def fake_flash_attn() -> ModuleType:
    """Our own functions have its signatures and meaning (tests/test_flash_attn_interface.py)."""
    module: Any = ModuleType("flash_attn")

    def with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> Tensor:
        assert options.get("block_table") is None or k_cache.shape[1] % 256 == 0
        return flashattn_lite.flash_attn_with_kvcache(q, k_cache, v_cache, **options)

    module.flash_attn_func = flashattn_lite.flash_attn_func
    module.flash_attn_varlen_func = flashattn_lite.flash_attn_varlen_func
    module.flash_attn_with_kvcache = with_kvcache
    return module


# ---- xformers -----------------------------------------------------------------------------------


class Mask:
    """An attn_bias by what it shows of (rows, keys)."""

    def __init__(self, show: Any) -> None:
        self.show = show


class BlockDiagonalMask(Mask):
    def __init__(self, lengths: Sequence[int], causal: bool) -> None:
        self.lengths = lengths
        blocks = [band(n, n, causal=causal) for n in lengths]
        super().__init__(lambda rows, keys: torch.block_diag(*blocks))

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: Any = None
    ) -> BlockDiagonalMask:
        assert kv_seqlen is None
        return cls(q_seqlen, causal=False)

    def make_causal(self) -> BlockDiagonalMask:
        return BlockDiagonalMask(self.lengths, causal=True)


class PaddedKeysMask(Mask):
    """The queries of each sequence over the first kv_seqlen of its kv_padding keys."""

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], *, device: Any
    ) -> PaddedKeysMask:
        def block(rows: int, keys: int) -> Tensor:
            return torch.cat([band(rows, keys), torch.zeros(rows, kv_padding - keys)], 1).bool()

        blocks = [block(*pair) for pair in zip(q_seqlen, kv_seqlen, strict=True)]
        return cls(lambda rows, keys: torch.block_diag(*blocks))


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
    """Of rank 4 (batch, rows, heads, dim), or 5 with the heads of a group expanded in K and V."""
    assert q.shape[-2:] == k.shape[-2:]
    shape = q.shape
    if q.dim() == 5:
        assert k.stride(3) == v.stride(3) == 0
        q, k, v = (t.flatten(2, 3) for t in (q, k, v))
    mask = attn_bias.show(q.shape[1], k.shape[1]) if isinstance(attn_bias, Mask) else attn_bias
    return dense(q, k, v, mask).view(shape)


def fake_xformers() -> dict[str, ModuleType]:
    ops: Any = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    masks: Any = ModuleType("xformers.ops.fmha.attn_bias")
    masks.BlockDiagonalMask = BlockDiagonalMask
    masks.BlockDiagonalCausalWithOffsetPaddedKeysMask = PaddedKeysMask
    masks.LowerTriangularMask = lambda: Mask(band)
    masks.LocalAttentionFromBottomRightMask = lambda window_left, window_right: Mask(
        lambda rows, keys: band(rows, keys, window_left)
    )
    names = ("xformers", "xformers.ops.fmha")
    return {
        **{name: ModuleType(name) for name in names},
        "xformers.ops": ops,
        "xformers.ops.fmha.attn_bias": masks,
    }


# ---- FlashInfer ---------------------------------------------------------------------------------


class Ragged:
    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(self, qo_indptr: Tensor, kv_indptr: Tensor, heads: int, kv_heads: int, dim: int, *,
             causal: bool, window_left: int, q_data_type: torch.dtype) -> None:  # fmt: skip
        self.causal, self.left, self.dtype = causal, window_left, q_data_type
        self.counts = qo_indptr.diff().tolist()
        assert torch.equal(qo_indptr, kv_indptr) and qo_indptr.dtype == torch.int32
        self.shapes = [(heads, dim), (kv_heads, dim), (kv_heads, dim)]

    def run(self, *tensors: Tensor) -> Tensor:
        assert [t.shape[1:] for t in tensors] == self.shapes and tensors[0].dtype == self.dtype
        parts = zip(*(t.split(self.counts) for t in tensors), strict=True)
        return torch.cat(
            [
                dense(*(t[None] for t in part), band(n, n, self.left, causal=self.causal))[0]
                for n, part in zip(self.counts, parts, strict=True)
            ]
        )


class Paged:
    def __init__(self, workspace: Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, heads: int,
             kv_heads: int, dim: int, page_size: int, *, q_data_type: torch.dtype,
             kv_data_type: torch.dtype) -> None:  # fmt: skip
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        self.pages = indices.split(indptr.diff().tolist())
        self.last, self.shape = last_page_len.tolist(), (page_size, kv_heads, dim)

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        assert all(t.shape[1:] == self.shape for t in cache)
        found = []
        for one, pages, last in zip(q, self.pages, self.last, strict=True):
            length = (len(pages) - 1) * self.shape[0] + last
            k, v = (t[pages.long()].flatten(0, 1)[None, :length] for t in cache)
            found.append(dense(one[None, None], k, v, None)[0, 0])
        return torch.stack(found)


def fake_flashinfer() -> ModuleType:
    module: Any = ModuleType("flashinfer")

    def single(q: Tensor, k: Tensor, v: Tensor, kv_layout: str) -> Tensor:
        assert (q.dim(), k.dim(), kv_layout) == (2, 3, "NHD")
        return dense(q[None, None], k[None], v[None], None)[0, 0]

    module.single_decode_with_kv_cache = single
    module.BatchPrefillWithRaggedKVCacheWrapper = Ragged
    module.BatchDecodeWithPagedKVCacheWrapper = Paged
    return module


# ---- tests --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {**fake_xformers(), "flash_attn": fake_flash_attn(), "flashinfer": fake_flashinfer()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", RUN)
def test_each_is_called_for_the_case_s_computation(name: str) -> None:
    competitor, ran = COMPETITORS[name], 0
    for case in CASES:
        if competitor.refuses(case) is not None:
            continue
        inputs = Inputs(case)
        entry = competitor.build(case, inputs)
        known = list(exactness.truths(case, inputs))
        found = exactness.check(case, inputs, known, entry.run(), entry.layout)
        assert found.used < 4, f"{name}, {case.label()}: {found}"  # rounded twice, in bfloat16
        ran += 1
    assert ran == RUN[name]


def test_what_they_cannot_do_is_refused_with_a_reason() -> None:
    def refused(name: str, **changes: Any) -> str | None:
        start = DECODE if "page_size" in changes or "storage" in changes else PROMPT
        return COMPETITORS[name].refuses(replace(start, **changes))

    assert refused("flash_attn", dtype="fp32") == "it has no float32"
    assert refused("flash_attn", page_size=16) == "its pages hold multiples of 256 tokens"
    assert refused("flash_attn", storage="int8") == "it reads no quantised cache"
    assert refused("xformers", page_size=16) == "measured without pages"
    assert refused("flashinfer", backward=True) == "it has no backward"
    assert COMPETITORS["flashinfer"].refuses(DECODE) == "it decodes batches over pages"
    for name in RUN:
        assert COMPETITORS[name].missing("cpu") == "it runs on CUDA only"


def test_who_computes_something_else_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = SimpleNamespace(memory_efficient_attention=lambda q, k, v, attn_bias: q)
    monkeypatch.setitem(sys.modules, "xformers.ops", wrong)  # type: ignore[arg-type]
    once = Rounds(budget_s=0.0, at_least=1, at_most=1, min_sample_s=0.0)
    settings = runner.Settings(rounds=once, competitors=("xformers", "flash_attn"))
    row = runner.measure(PROMPT, settings)
    assert row.failure is None and row.baseline == "flash_attn"
    assert set(row.ratios) == {"flash_attn"}
    (note,) = row.notes
    assert note.startswith("xformers: its out is ") and "not the same computation" in note
