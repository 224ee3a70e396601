"""Calls of flash_attn_with_kvcache drawn from axes, over every layout and storage of a cache, held
to the reference: for the CPU's kernels (test_kv_cache.py) and the emulated CUDA ones."""

from typing import Any

import torch
from native import kv_caches
from torch import Tensor

import flashattn_lite as fal
from flashattn_lite import reference, testing

AXES: dict[str, tuple[Any, ...]] = {
    "layout": ("contiguous", "page16", "page1", "page5", "page64", "page256", "batch_idx"),
    "storage": ("same", "int8", "fp8"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "append": ("none", "plain", "interleaved", "half"),
    "seqlen_q": (1, 2, 3, 5, 9, 40),
    "heads": ((4, 1), (3, 3), (6, 2), (8, 1), (7, 1)),
    "head_dims": ((64, 64), (128, 128), (37, 37), (24, 40), (256, 256), (80, 80), (8, 1)),
    "band": (
        (False, (-1, -1)),
        (True, (-1, -1)),
        (False, (33, 2)),
        (True, (70, -1)),
        (False, (10**6, 0)),
        (False, (10**6, -1)),  # no window: rows that do not advance are rotated alike
    ),
    "score": ("", "softcap", "alibi", "alibi_batch", "sinks", "all"),
    "lengths": ((5, 61, 0), (130, 64, 1), (1100, 513)),
    "leftpad": (False, True),
}


def cases_of(axes: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Every pair of values in some case."""
    rows = testing._pairwise([len(values) for values in axes.values()])
    return [{axis: axes[axis][i] for axis, i in zip(axes, row, strict=True)} for row in rows]


def seeded(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


class Problem:
    """The tensors of a case. Lengths count rows in the cache before appending, padding included."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, dtype = case, case["dtype"]
        heads_q, heads_k = case["heads"]
        dim, dim_v = case["head_dims"]
        seqlen_q = case["seqlen_q"]
        self.appends = case["append"] != "none"
        self.new = seqlen_q if self.appends else 0
        self.lengths = list(case["lengths"])
        batch, longest = len(self.lengths), max(self.lengths) + self.new
        self.leftpad = [n // 3 for n in self.lengths] if case["leftpad"] else None
        self.capacity = longest + 7
        k = [seeded(n, heads_k, dim, dtype=dtype) for n in self.lengths]
        v = [seeded(n, heads_k, dim_v, dtype=dtype) for n in self.lengths]
        self.cache = kv_caches.make_cache(
            case["layout"], case["storage"], k, v, self.capacity, leftpad=self.leftpad
        )
        self.total = [n + self.new for n in self.lengths]
        kv_caches.forget_unused_pages(self.cache, self.total)
        self.q = seeded(batch, seqlen_q, heads_q, dim, dtype=dtype)
        self.k = seeded(batch, self.new, heads_k, dim, dtype=dtype)
        self.v = seeded(batch, self.new, heads_k, dim_v, dtype=dtype)
        self.causal, self.window = case["band"]
        self.score: dict[str, Any] = {}
        if case["score"] in ("softcap", "all"):
            self.score["softcap"] = 3.0
        if case["score"] in ("alibi", "all"):
            self.score["alibi_slopes"] = torch.rand(heads_q) * 0.2
        if case["score"] == "alibi_batch":
            self.score["alibi_slopes"] = torch.rand(batch, heads_q) * 0.2
        if case["score"] in ("sinks", "all"):
            self.score["sinks"] = torch.randn(heads_q)
        self.rotary: dict[str, Any] = {}
        if case["append"] in ("interleaved", "half"):
            pairs = max(1, dim // 4)  # partial: dims beyond 2 * pairs are not rotated
            angles = torch.rand(longest + 3, pairs) * 6
            self.rotary = {
                "rotary_cos": angles.cos().to(dtype),
                "rotary_sin": angles.sin().to(dtype),
                "rotary_interleaved": case["append"] == "interleaved",
            }

    def check(self, **more: Any) -> None:
        """The result is within the budget, and no byte of the cache written but the new rows."""
        before = [t.clone() for t in self.cache.tensors()]
        out, lse = self.run(**more)
        self.check_cache(before)
        truth, low = self.truth(torch.float64), self.truth(self.q.dtype)
        finite = truth[1][truth[1].isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 1.0
        testing.check_within_budget("out", out, truth[0], low[0], largest_score=largest)
        lse = torch.where(lse == torch.inf, -torch.inf, lse)
        testing.check_within_budget("lse", lse, truth[1], low[1], largest_score=largest)

    def run(self, **more: Any) -> tuple[Tensor, Tensor]:
        appended = {"k": self.k, "v": self.v} if self.appends else {}
        pad = None if self.leftpad is None else torch.tensor(self.leftpad, dtype=torch.int32)
        return fal.flash_attn_with_kvcache(  # type: ignore[return-value]
            self.q,
            self.cache.k,
            self.cache.v,
            cache_seqlens=torch.tensor(self.lengths, dtype=torch.int32),
            cache_leftpad=pad,
            causal=self.causal,
            window_size=self.window,
            return_softmax_lse=True,
            **self.cache.options,
            **self.score,
            **self.rotary,
            **appended,
            **more,
        )

    def _rotated(self, x: Tensor, advance: bool) -> Tensor:
        """Of x (batch, rows, heads, dim), in float64."""
        if not self.rotary:
            return x.double()
        rows = torch.arange(x.shape[1]) if advance else torch.zeros(x.shape[1], dtype=torch.long)
        cos, sin = self.rotary["rotary_cos"], self.rotary["rotary_sin"]
        interleaved = self.rotary["rotary_interleaved"]
        return torch.stack(
            [
                kv_caches.rotate(x[b], cos, sin, rows + n, interleaved)
                for b, n in enumerate(self.lengths)
            ]
        )

    def truth(self, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """The reference on what the cache holds now."""
        left, right = self.window
        window = (None if left < 0 or left >= 10**6 else left, None if right < 0 else right)
        advance = self.causal or window != (None, None)
        q = self._rotated(self.q, advance).to(self.q.dtype)
        pad = None if self.leftpad is None else torch.tensor(self.leftpad)
        return reference.attention(
            q,
            self.cache.k,
            self.cache.v,
            causal=self.causal,
            window=window,
            seqused_k=torch.tensor(self.total),
            leftpad_k=pad,
            precision=precision,
            **self.cache.reference_options(),
            **self.score,
        )

    def expected_rows(self) -> tuple[Tensor, Tensor]:
        """What is appended to K and V, before it is rounded or quantised: float64."""
        return self._rotated(self.k, True), self.v.double()

    def check_cache(self, before: list[Tensor]) -> None:
        """New slots hold the new rows; every other byte is what it was."""
        after = self.cache.tensors()
        for b, n in enumerate(self.lengths):
            for i in range(self.new):
                where = self.cache.where(b, n + i)
                for which, rows in enumerate(self.expected_rows()):
                    self.check_row(after, which, where, rows[b, i])
                for old, new in zip(before, after, strict=True):
                    old[where] = new[where]
        for old, new in zip(before, after, strict=True):
            assert torch.equal(kv_caches.bits(old), kv_caches.bits(new))

    def check_row(
        self, after: list[Tensor], which: int, where: tuple[int, int], row: Tensor
    ) -> None:
        stored = after[which][where].double()
        if not self.cache.scales():
            # One rounding of the exact value; the sum of two products has one of its own.
            eps = torch.finfo(self.q.dtype).eps + 2 * torch.finfo(torch.float32).eps
            assert bool(((stored - row).abs() <= eps * row.abs().amax()).all())
            return
        scale = after[2 + which][where].double().unsqueeze(-1)
        limit = kv_caches.LIMITS[after[which].dtype]
        torch.testing.assert_close(
            scale.squeeze(-1), row.abs().amax(-1) / limit, rtol=1e-6, atol=0.0
        )
        # int8: half a step; e4m3: half a unit of a 4-bit significand, or of a subnormal (2^-9).
        step = 0.5 * scale
        if after[which].dtype is torch.float8_e4m3fn:
            step = torch.maximum(row.abs() * 2.0**-4, scale * 2.0**-10)
        assert bool(((stored * scale - row).abs() <= step * (1 + 1e-5) + 1e-30).all())
