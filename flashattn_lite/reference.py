"""The oracle: what attention means, in plain torch, written to be read rather than to be fast.

Every feature of the library is here once more, in any floating-point precision, on any device that
torch has. It materialises the scores (seqlen_q x seqlen_k), imports no backend of this library, and
its gradients are autograd's. The rules are the same as in ``docs/semantics.md`` and ``csrc/core``.

The truth of a test is ``precision=torch.float64``. The yardstick of its error budget is the same
formula with ``precision=q.dtype``: what rounding alone costs when every step is done in that dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

if TYPE_CHECKING:
    from flashattn_lite.block_mask import BlockMask

__all__ = [
    "Options",
    "Sequence",
    "attention",
    "attention_weights",
    "dropout_keep",
    "dropout_keep_scale",
    "dropout_threshold",
    "sequences",
    "visible",
]


# ---- visibility ----------------------------------------------------------------------------------


def visible(
    seqlen_q: int,
    seqlen_k: int,
    window: tuple[int | None, int | None] = (None, None),
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """THE visibility rule: which keys (columns) each query row may attend to.

    Row i sees key j iff ``i + shift - left <= j <= i + shift + right`` with
    ``shift = seqlen_k - seqlen_q``; a side that is None or -1 hides nothing. Causal is right = 0.

    Returns: bool (seqlen_q, seqlen_k).

    >>> visible(2, 3, (None, 0)).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    left, right = window
    diagonal = torch.arange(seqlen_q, device=device).unsqueeze(1) + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=device).unsqueeze(0)
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left is not None and left >= 0:
        seen = seen & (key >= diagonal - left)
    if right is not None and right >= 0:
        seen = seen & (key <= diagonal + right)
    return seen


# ---- dropout -------------------------------------------------------------------------------------


def dropout_threshold(dropout_p: float) -> int:
    """Drop an element iff its 16-bit draw is below this: the probability in units of 2^-16."""
    return min(65535, int(dropout_p * 65536.0 + 0.5))


def dropout_keep_scale(dropout_p: float) -> float:
    """What survivors are multiplied by: 1 / (the keep probability that is really applied)."""
    return 65536.0 / (65536 - dropout_threshold(dropout_p))


_WORD = 0xFFFFFFFF


def _multiply_32x32(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of constant * x, for x in [0, 2^32) held in int64."""
    low_part = constant * (x & 0xFFFF)  # < 2^48
    middle = constant * (x >> 16) + (low_part >> 16)  # < 2^49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)


def _philox4x32_7(key: Tensor, counter: list[Tensor]) -> list[Tensor]:
    """Seven rounds of Philox (Salmon et al., SC 2011): four 32-bit words, each held in int64."""
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    c0, c1, c2, c3 = counter
    for _ in range(7):
        high0, low0 = _multiply_32x32(0xD2511F53, c0)
        high1, low1 = _multiply_32x32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def dropout_keep(
    seed: Tensor | int,
    batch_heads: Tensor,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
) -> Tensor:
    """Which elements dropout keeps: a pure function of (seed, batch entry and head, row, key).

    One Philox call makes eight 16-bit draws for the rows {g, g + 8} and keys {2c, 2c + 1, 2c + 8,
    2c + 9} of a 16 x 16 block of scores: see ``csrc/core/philox.h``, which this equals bit for bit.

    Args:
        seed: one int64.
        batch_heads: int64, any shape: batch entry * heads_q + query head.

    Returns: bool (*batch_heads.shape, seqlen_q, seqlen_k).
    """
    device = batch_heads.device
    key = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    rows = torch.arange((seqlen_q + 15) // 16 * 8, device=device).unsqueeze(1)
    columns = torch.arange((seqlen_k + 15) // 16 * 4, device=device).unsqueeze(0)
    heads = batch_heads.to(torch.int64)[..., None, None]
    zero = torch.zeros_like(heads + rows + columns)
    words = torch.stack(_philox4x32_7(key, [zero + rows, zero + columns, zero + heads, zero]), -1)

    i = torch.arange(seqlen_q, device=device).unsqueeze(1)
    j = torch.arange(seqlen_k, device=device).unsqueeze(0)
    row, column = (i >> 4) * 8 + (i & 7), (j >> 4) * 4 + ((j & 7) >> 1)
    word = ((i >> 3) & 1) * 2 + ((j >> 3) & 1)  # which of the four; its half is j's parity
    draw = (words[..., row, column, word] >> (16 * (j & 1))) & 0xFFFF
    return draw >= dropout_threshold(dropout_p)


# ---- options and sequences -----------------------------------------------------------------------


class Options(TypedDict, total=False):
    """Keyword options of ``attention``: named as in ``flashattn_lite.attention``, and three more.

    All index tensors are integers of any width here; lengths and offsets count rows (tokens).
    """

    causal: bool  # the same as window=(window[0], 0)
    window: tuple[int | None, int | None]  # (left, right), inclusive; None or -1: unbounded
    softmax_scale: float | None  # None: 1 / sqrt(head_dim)
    softcap: float  # 0: off
    alibi_slopes: Tensor | None  # (heads_q) or (batch, heads_q)
    sinks: Tensor | None  # (heads_q), natural-log units like the scores
    bias: Tensor | None  # broadcasts to (batch, heads_q, seqlen_q, seqlen_k)
    mask: Tensor | None  # bool, broadcasts likewise; False hides
    block_mask: BlockMask | None  # what it hides is hidden too; placed by position
    dropout_p: float
    dropout_seed: Tensor | int | None  # one int64
    cu_seqlens_q: Tensor | None  # (batch + 1): q is (total_q, heads_q, head_dim)
    cu_seqlens_k: Tensor | None  # (batch + 1): k, v are (total_k, heads_k, head_dim)
    seqused_q: Tensor | None  # (batch): rows used of each sequence
    seqused_k: Tensor | None  # (batch): keys used, counted before left padding is taken off
    leftpad_k: Tensor | None  # (batch): keys to skip at the start
    block_table: Tensor | None  # (batch, pages): k, v are (pages, page_size, heads_k, head_dim)
    k_scale: Tensor | None  # k.shape[:-1]: one factor per (token, head) of quantised keys
    v_scale: Tensor | None
    precision: torch.dtype  # every step is done, and out and lse are returned, in this dtype
    kernel_backward: bool  # gradients by the kernels' formula instead of autograd's: for budgets


class Sequence(NamedTuple):
    """One sequence of a batch. Rows count within the batch entry, or within a varlen tensor."""

    batch: int
    row_q: int
    seqlen_q: int
    row_k: int
    seqlen_k: int


def _integers(t: Tensor | None) -> list[int] | None:
    return None if t is None else [int(x) for x in t.tolist()]


def sequences(q: Tensor, k: Tensor, options: Options) -> list[Sequence]:
    """Dense, varlen, "used" lengths, left padding and pages all become one Sequence per entry."""
    cu_q, cu_k = _integers(options.get("cu_seqlens_q")), _integers(options.get("cu_seqlens_k"))
    used_q, used_k = _integers(options.get("seqused_q")), _integers(options.get("seqused_k"))
    leftpad, table = _integers(options.get("leftpad_k")), options.get("block_table")
    batch = q.shape[0] if cu_q is None else len(cu_q) - 1
    result = []
    for b in range(batch):
        row_q, seqlen_q = (0, q.shape[1]) if cu_q is None else (cu_q[b], cu_q[b + 1] - cu_q[b])
        if table is not None:
            row_k, seqlen_k = 0, table.shape[1] * k.shape[1]
        elif cu_k is None:
            row_k, seqlen_k = 0, k.shape[1]
        else:
            row_k, seqlen_k = cu_k[b], cu_k[b + 1] - cu_k[b]
        if used_q is not None:
            seqlen_q = min(seqlen_q, used_q[b])
        if used_k is not None:
            seqlen_k = min(seqlen_k, used_k[b])
        if leftpad is not None:
            row_k, seqlen_k = row_k + leftpad[b], max(0, seqlen_k - leftpad[b])
        result.append(Sequence(b, row_q, seqlen_q, row_k, seqlen_k))
    return result


# ---- one sequence, heads first -------------------------------------------------------------------


class _Scoring(NamedTuple):
    """Options of the scores, broadcast against (..., heads_q, seqlen_q, seqlen_k)."""

    scale: float
    softcap: float
    bias: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None


def _scores(q: Tensor, k: Tensor, seen: Tensor, scoring: _Scoring) -> Tensor:
    """The softmax's argument, -inf where nothing is seen. q, k (..., heads_q, seqlen, head_dim)."""
    s = q @ k.transpose(-1, -2) * scoring.scale
    if scoring.softcap > 0:
        s = scoring.softcap * torch.tanh(s / scoring.softcap)
    if scoring.bias is not None:
        s = s + scoring.bias
    if scoring.slopes is not None:
        seqlen_q, seqlen_k = s.shape[-2:]
        i = torch.arange(seqlen_q, device=s.device).unsqueeze(1)
        j = torch.arange(seqlen_k, device=s.device).unsqueeze(0)
        s = s - scoring.slopes * (i + seqlen_k - seqlen_q - j).abs().to(s.dtype)
    return s.masked_fill(~seen, -math.inf)


def _softmax(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and natural-log normaliser over the last dimension; a sink (..., 1, 1) takes
    part in the denominator only. A row of -inf gives probabilities 0 and LSE -inf, NaN stays NaN.
    """
    if sinks is not None:
        s = torch.cat([s, sinks.expand(*s.shape[:-1], 1)], dim=-1)
    if s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], -math.inf)
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = torch.where(empty, torch.zeros_like(s), s)
    lse = torch.where(empty.squeeze(-1), -math.inf, torch.logsumexp(s, -1))
    p = torch.where(empty, torch.zeros_like(s), torch.softmax(s, -1))
    return (p if sinks is None else p[..., :-1]), lse


def _weighted_sum(p: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """P @ V in which a NaN or infinity of V reaches just the rows that see it (0 * NaN is NaN)."""
    bad = ~torch.isfinite(v)
    sees_bad = (seen.to(p.dtype) @ bad.to(p.dtype)) > 0
    return torch.where(sees_bad, p @ v, p @ torch.where(bad, torch.zeros_like(v), v))


class _KernelBackward(torch.autograd.Function):
    """Softmax and P @ V, differentiated as kernels do it: dS = P * (dP - delta), delta =
    rowsum(dO * O) - dLSE (FlashAttention-2, algorithm 2). The same gradient as autograd's in exact
    arithmetic; its rounding is other, and that is what an error budget must know."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, sinks: Tensor | None, v: Tensor, factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        p, lse = _softmax(s, sinks)
        out = (p if factor is None else p * factor) @ v
        ctx.save_for_backward(p, sinks, v, factor, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        p, sinks, v, factor, out, lse = ctx.saved_tensors
        dp = dout @ v.transpose(-1, -2)
        delta = (dout * out).sum(-1, keepdim=True) - dlse.unsqueeze(-1)
        if factor is not None:
            dp = dp * factor
        ds = p * (dp - delta)
        dv = (p if factor is None else p * factor).transpose(-1, -2) @ dout
        if sinks is None:
            return ds, None, dv, None
        p_sink = torch.exp(sinks - lse.unsqueeze(-1))
        return ds, -(p_sink * delta).sum(-2, keepdim=True), dv, None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scoring: _Scoring,
    keep: Tensor | None,
    keep_scale: float,
    kernel_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, P of (..., heads_q, seqlen_q, head_dim) against (..., heads_k, seqlen_k, ...)."""
    group = q.shape[-3] // max(1, k.shape[-3])
    k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    used = seen.any(-2).unsqueeze(-1)  # keys that some row sees: nothing else may be touched
    k, v = torch.where(used, k, torch.zeros_like(k)), torch.where(used, v, torch.zeros_like(v))
    s = _scores(q, k, seen, scoring)
    if kernel_backward:
        factor = None if keep is None else (keep * keep_scale).to(s.dtype)
        out, lse = _KernelBackward.apply(s, scoring.sinks, v, factor)  # type: ignore[no-untyped-call]
        return out, lse, s
    p, lse = _softmax(s, scoring.sinks)
    if keep is not None:
        p = p * keep * keep_scale
    return _weighted_sum(p, v, seen), lse, p


# ---- the whole call ------------------------------------------------------------------------------


def _of_sequence(t: Tensor, s: Sequence) -> Tensor:
    """(heads or 1, seqlen_q or 1, seqlen_k or 1): the part of a bias or mask that s covers."""
    t = t[(None,) * (4 - t.dim())]
    part = t[s.batch if t.shape[0] > 1 else 0]
    part = part[:, : s.seqlen_q] if part.shape[1] > 1 else part
    return part[:, :, : s.seqlen_k] if part.shape[2] > 1 else part


def _run(
    q: Tensor, k: Tensor, v: Tensor, options: Options
) -> list[tuple[Sequence, Tensor, Tensor, Tensor]]:
    """For every sequence: out (heads_q, seqlen_q, head_dim_v), lse, P (..., seqlen_q, seqlen_k)."""
    precision = options.get("precision", torch.float64)
    heads_q, head_dim = q.shape[-2:]
    left, right = options.get("window", (None, None))
    dropout_p, seed = options.get("dropout_p", 0.0), options.get("dropout_seed")
    if dropout_p > 0 and seed is None:
        raise ValueError("reference.attention: dropout_p needs dropout_seed")
    scale = options.get("softmax_scale")
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    slopes, sinks = options.get("alibi_slopes"), options.get("sinks")
    bias, mask = options.get("bias"), options.get("mask")
    block_mask = options.get("block_mask")
    table, cu_k = options.get("block_table"), options.get("cu_seqlens_k")

    def keys(t: Tensor, factor: Tensor | None, s: Sequence) -> Tensor:
        """(heads_k, seqlen_k, dim) of one sequence, dequantised."""
        rows = slice(s.row_k, s.row_k + s.seqlen_k)
        if table is not None:  # row r is slot r % page_size of logical page r // page_size
            row = torch.arange(rows.start, rows.stop, device=t.device)
            where = (table[s.batch][row // t.shape[1]].long(), row % t.shape[1])
        # float8 by bytes: not every torch can index it on every device.
        eight_bits = t.dtype is torch.float8_e4m3fn
        x = t.view(torch.uint8) if eight_bits else t
        x = x[where] if table is not None else x[rows] if cu_k is not None else x[s.batch, rows]
        x = (x.view(t.dtype) if eight_bits else x).to(precision)
        if factor is not None:
            f = factor
            f = f[where] if table is not None else f[rows] if cu_k is not None else f[s.batch, rows]
            x = x * f.to(precision).unsqueeze(-1)
        return x.transpose(0, 1)

    results = []
    for s in sequences(q, k, options):
        rows = slice(s.row_q, s.row_q + s.seqlen_q)
        query = q[rows] if q.dim() == 3 else q[s.batch, rows]
        seen = visible(
            s.seqlen_q,
            s.seqlen_k,
            (left, 0 if options.get("causal", False) else right),
            device=q.device,
        )
        if mask is not None:
            seen = seen & _of_sequence(mask, s)
        if block_mask is not None:
            shown = block_mask.to_dense(s.seqlen_q, s.seqlen_k)
            seen = seen & shown[s.batch if shown.shape[0] > 1 else 0].to(seen.device)
        slope = None
        if slopes is not None:
            slope = (slopes if slopes.dim() == 1 else slopes[s.batch]).to(precision)[:, None, None]
        scoring = _Scoring(
            scale,
            options.get("softcap", 0.0),
            None if bias is None else _of_sequence(bias, s).to(precision),
            slope,
            None if sinks is None else sinks.to(precision)[:, None, None],
        )
        keep = None
        if seed is not None and dropout_p > 0:
            heads = s.batch * heads_q + torch.arange(heads_q, device=q.device)
            keep = dropout_keep(seed, heads, s.seqlen_q, s.seqlen_k, dropout_p)
        out, lse, p = _attend(
            query.transpose(0, 1).to(precision),
            keys(k, options.get("k_scale"), s),
            keys(v, options.get("v_scale"), s),
            seen,
            scoring,
            keep,
            dropout_keep_scale(dropout_p),
            options.get("kernel_backward", False),
        )
        results.append((s, out, lse, p))
    return results


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> tuple[Tensor, Tensor]:
    """Attention, exactly: softmax(mask(mod(scale * Q K^T))) V.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim) with cu_seqlens_q.
        k: (batch, seqlen_k, heads_k, head_dim), varlen with cu_seqlens_k, pages with block_table.
        v: like k, with its own head_dim_v.
        options: see ``Options``.

    Returns:
        out: like q with head_dim_v, in ``precision`` (default float64); 0 in rows that see nothing
            and in rows that belong to no sequence.
        lse: (batch, heads_q, seqlen_q) or (heads_q, total_q), natural log, in ``precision``; -inf
            in such rows. Includes the sink, not the dropout.

    >>> q = torch.zeros(1, 1, 1, 2); k = torch.zeros(1, 2, 1, 2)
    >>> v = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> out, lse = attention(q, k, v)
    >>> round(out.item(), 4), round(lse.exp().item(), 4)
    (2.0, 2.0)
    """
    precision = options.get("precision", torch.float64)
    varlen = q.dim() == 3
    # The sum of nothing: 0, and it ties the result to its inputs, so that gradients exist (and are
    # zero) when no sequence does.
    inputs = [t for t in (q, k, v, options.get("sinks"), options.get("bias")) if t is not None]
    nothing = torch.stack([t[None][:0].to(precision).sum() for t in inputs]).sum()
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=precision) + nothing
    shape = (q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_full(shape, -math.inf, dtype=precision)
    for s, out_s, lse_s, _ in _run(q, k, v, options):
        rows = slice(s.row_q, s.row_q + s.seqlen_q)
        if varlen:
            out[rows], lse[:, rows] = out_s.transpose(0, 1), lse_s
        else:
            out[s.batch, rows], lse[s.batch, :, rows] = out_s.transpose(0, 1), lse_s
    return out, lse


def attention_weights(
    q: Tensor, k: Tensor, v: Tensor | None = None, **options: Unpack[Options]
) -> Tensor:
    """P itself: (batch, heads_q, seqlen_q, seqlen_k), with dropout applied if it is asked for.

    Ragged batches are padded with zeros to the longest sequence. Rows sum to 1 (less with a sink,
    0 when they see nothing).
    """
    values = k[..., :1] if v is None else v
    results = _run(q, k, values, options)
    seqlen_q = q.shape[1] if q.dim() == 4 else max([0, *(s.seqlen_q for s, *_ in results)])
    seqlen_k = max([0, *(s.seqlen_k for s, *_ in results)])
    if k.dim() == 4 and options.get("block_table") is None:
        seqlen_k = k.shape[1]
    weights = q.new_zeros(
        (len(results), q.shape[-2], seqlen_q, seqlen_k),
        dtype=options.get("precision", torch.float64),
    )
    for s, _, _, p in results:
        weights[s.batch, :, : s.seqlen_q, : s.seqlen_k] = p
    return weights
