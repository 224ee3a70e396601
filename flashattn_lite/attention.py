"""``attention``: every option of the library on one function; the other public functions are thin
layers over it. Options are normalised here, the operator checks them, and autograd comes in only
when a gradient is needed. What the options mean, exactly: docs/semantics.md and reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from typing_extensions import Unpack

from flashattn_lite import _argument_types, _checks, _ops, reference
from flashattn_lite._autograd import (
    Attention,
    TransformableAttention,
    apply_plain,
    refuse_tangents,
)
from flashattn_lite._masks import is_causal_bias
from flashattn_lite.block_mask import BlockMask

__all__ = ["attention", "draw_dropout_seed"]

Window = tuple[int | None, int | None]
UNBOUNDED: Window = (None, None)


def draw_dropout_seed() -> Tensor:
    """One int64 on the CPU from torch's default generator, which ``torch.manual_seed`` governs.

    >>> _ = torch.manual_seed(0)
    >>> draw_dropout_seed().shape
    torch.Size([1])
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device="cpu")


def window_sides(window: Any, causal: bool, name: str) -> tuple[int, int]:
    """(left, right) with -1 for unbounded; causal is right = 0."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: window is {window!r}; it must be a pair (left, right) of ints or None"
        ) from None
    left, right = -1 if left is None else left, -1 if right is None else right
    if not (type(left) is type(right) is int and left < 2**63 > right):
        left = _argument_types.index(name, "window[0]", left)
        right = _argument_types.index(name, "window[1]", right)
    if left < -1 or right < -1:
        raise _ops.ArgumentError(
            f"{name}: window is {(left, right)}; a side must be >= 0, or None or -1 for unbounded"
        )
    return left, 0 if causal else right


def flash_window(window_size: Any, seqlen_k: int, name: str) -> Window:
    """flash_attn's convention: a negative side, or one as long as the keys, is unbounded."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: window_size is {window_size!r}; it must be a pair (left, right) of ints"
        ) from None
    if not (type(left) is type(right) is int):
        left = _argument_types.index(name, "window_size[0]", left)
        right = _argument_types.index(name, "window_size[1]", right)
    if left < 0 and right < 0:
        return UNBOUNDED
    return (
        None if left < 0 or left >= seqlen_k else left,
        None if right < 0 or right >= seqlen_k else right,
    )


def autocasts(q: Tensor) -> bool:
    """Whether torch's autocast is on where q lives."""
    if q.is_cpu:
        return torch.is_autocast_enabled("cpu")
    return q.is_cuda and torch.is_autocast_enabled("cuda")


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What torch's autocast does to an operand of scaled_dot_product_attention. A float8 cache
    stays one: its numbers mean nothing without their scales."""
    cast = t.is_floating_point() and t.dtype is not torch.float64 and t.dtype.itemsize > 1
    return t.to(dtype) if cast else t


def _max_seqlen(value: Any, cu_seqlens: Tensor | None, t: Tensor, name: str, argument: str) -> int:
    """The longest sequence: given, or the number of rows that bounds it."""
    if cu_seqlens is None:
        return t.shape[1] if t.dim() > 1 else 0
    if value is None:
        return t.shape[0]
    if type(value) is int:
        return value
    return _argument_types.index(name, argument, value)


def _expand_bias(bias: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    try:
        return bias.expand(shape)
    except RuntimeError:
        raise _ops.ArgumentError(
            f"{name}: bias has shape {tuple(bias.shape)}; it must broadcast to {shape}"
        ) from None


def _through_reference(
    q: Tensor, k: Tensor, v: Tensor, name: str, **options: Unpack[reference.Options]
) -> tuple[Tensor, Tensor]:
    """float64 all the way; the results in q's dtype (LSE: float32, float64 for float64)."""
    for argument in _checks.READ:
        if options.get(argument) is not None:
            reason = f"{argument} has to be read by the reference, which float64 runs through"
            _argument_types.break_graph(name, f"{reason}; give float32, or no fullgraph=True")
    _checks.check(name, q, k, v, options)
    out, lse = reference.attention(q, k, v, **options)
    return out.to(q.dtype), lse if q.dtype is torch.float64 else lse.float()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = UNBOUNDED,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    num_splits: int = 0,
    backend: str = "auto",
    algorithm: str | None = None,
    name: str = "attention",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(scale * Q K^T) V, dense or over sequences of unequal lengths.

    Everything in natural-log units; lengths count tokens. float32, float16 and bfloat16 run on the
    kernels; float64 runs through ``reference.attention`` in float64.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim) with cu_seqlens_q.
            Any strides; a copy is made only when the last one is not 1.
        k: (batch, seqlen_k, heads_k, head_dim), or (total_k, heads_k, head_dim) with cu_seqlens_k,
            or (num_pages, page_size, heads_k, head_dim) with block_table. heads_q must be a
            multiple of heads_k: query head h reads head h // (heads_q / heads_k).
        v: like k; its head_dim may differ, and is the output's.
        causal: row i sees keys up to i + seqlen_k - seqlen_q (bottom-right): window right = 0.
        window: (left, right), inclusive: row i sees key j iff
            i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right.
            None or -1 is unbounded.
        softmax_scale: default 1 / sqrt(head_dim).
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        alibi_slopes: (heads_q) or (batch, heads_q); adds -slope * |i + seqlen_k - seqlen_q - j|.
            No gradient.
        sinks: (heads_q); a logit per head that joins the softmax's denominator. Has a gradient.
        bias: broadcasts to (batch, heads_q, seqlen_q, seqlen_k), added to the scores after the
            softcap. Has a gradient on the CPU; on CUDA there is none through such a call.
        block_mask: which blocks of keys each row may see, beside causal and window; what is not
            listed is neither read nor computed. A mask of another shape than (seqlen_q, seqlen_k)
            keeps its place by position: see ``BlockMask``.
        dropout_p: in [0, 1); the mask follows ``torch.manual_seed``, equally on every device.
        dropout_seed: one int64 on the CPU; default: drawn from torch's default generator.
        cu_seqlens_q: int32 (batch + 1), offsets of the sequences in q, from 0.
        cu_seqlens_k: int32 (batch + 1), the same for k and v.
        max_seqlen_q: the longest sequence in q; default: total_q, which is never wrong. On CUDA it
            sizes the grid, so give it.
        max_seqlen_k: the same for k.
        seqused_q: int32 (batch), rows of each sequence in use; the others give 0 (LSE -inf).
        seqused_k: int32 (batch), keys of each sequence in use, from its first row.
        leftpad_k: int32 (batch), keys to skip at the start of each sequence; bias begins there.
        block_table: int32 (batch, max_pages), physical page of each logical page; needs seqused_k.
        k_scale: float32 k.shape[:-1], the factor of each (token, head) of int8 or float8 keys.
        v_scale: the same for v.
        deterministic: gradients bitwise repeatable on CUDA too (on the CPU they always are).
        return_lse: also return the log-sum-exp of the scores, which is differentiable.
        num_splits: thread blocks that share a sequence's keys when it is decoded on CUDA, at most
            one for every 256 keys; 0 chooses. No bit of the result depends on it.
        backend: "auto", "cpu", "cuda", "reference", or one engine by name; one that cannot run the
            call raises, with every engine's reason.
        algorithm: "flash1" (FlashAttention) or "flash2" (FlashAttention-2), both on CUDA; default:
            the best that can run the call.
        name: what error messages begin with.

    Returns:
        out: like q, its order in memory included, with v's head_dim; 0 in rows that see nothing.
        lse: float32 (batch, heads_q, seqlen_q) or (heads_q, total_q), if return_lse; -inf in rows
            that see nothing.

    Raises:
        ArgumentError: (a ValueError) for an argument that cannot be used; it says which and why.

    >>> q = torch.ones(1, 2, 4, 8); k = torch.ones(1, 3, 2, 8); v = torch.ones(1, 3, 2, 16)
    >>> attention(q, k, v, causal=True).shape
    torch.Size([1, 2, 4, 16])

    Source: Dao et al., FlashAttention (2022); Dao, FlashAttention-2 (2023).
    """
    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or not isinstance(v, Tensor):
        raise TypeError(
            f"{name}: q, k and v must be torch.Tensor; they are "
            + ", ".join(type(t).__name__ for t in (q, k, v))
        )
    if not (type(causal) is type(deterministic) is type(return_lse) is bool):
        causal = _argument_types.flag(name, "causal", causal)
        deterministic = _argument_types.flag(name, "deterministic", deterministic)
        return_lse = _argument_types.flag(name, "return_lse", return_lse)
    if not (type(softcap) is type(dropout_p) is float):
        softcap = _argument_types.number(name, "softcap", softcap)
        dropout_p = _argument_types.number(name, "dropout_p", dropout_p)
    if sinks is not None or bias is not None or alibi_slopes is not None:
        given = _argument_types.given(sinks=sinks, bias=bias, alibi_slopes=alibi_slopes)
        _argument_types.tensors(name, **given)
    if autocasts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = _autocast(q, dtype), _autocast(k, dtype), _autocast(v, dtype)
    if window is UNBOUNDED:
        left, right = -1, 0 if causal else -1
    else:
        left, right = window_sides(window, causal, name)
    if not (softmax_scale is None or type(softmax_scale) is float):
        softmax_scale = _argument_types.number(name, "softmax_scale", softmax_scale)
    if sinks is not None and sinks.dtype in (torch.float16, torch.bfloat16):
        sinks = sinks.float()
    if bias is not None:
        _argument_types.dense(name, q=q, bias=bias)
        if is_causal_bias(bias):
            raise _ops.ArgumentError(
                f"{name}: bias is torch's CausalBias, which holds no elements; pass causal=True "
                "or a window instead"
            )
        bias = bias[(None,) * (4 - bias.dim())]
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"{name}: block_mask is {type(block_mask).__name__}; it must be a BlockMask: "
            "BlockMask.from_dense makes one of a boolean tensor, BlockMask.from_flex of "
            "flex_attention's"
        )
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise _ops.ArgumentError(f"{name}: alibi_slopes has no gradient here; pass it detached")
    if type(num_splits) is not int:
        num_splits = _argument_types.index(name, "num_splits", num_splits)
    if num_splits < 0:
        raise _ops.ArgumentError(f"{name}: num_splits is {num_splits}; it must be >= 0 (0 chooses)")
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = draw_dropout_seed()
    if type(backend) is not str:
        raise TypeError(f"{name}: backend is {backend!r}; it must be a str")
    if algorithm is not None:
        if algorithm not in ("flash1", "flash2") or backend not in ("auto", "cuda", algorithm):
            raise _ops.ArgumentError(
                f"{name}: algorithm is {algorithm!r} with backend {backend!r}; it must be 'flash1' "
                "or 'flash2', with backend 'auto' or 'cuda'"
            )
        backend = algorithm
    if backend == "reference" or (q.dtype is torch.float64 and backend == "auto"):
        out, lse = _through_reference(
            q,
            k,
            v,
            name,
            window=(left, right),
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            bias=bias,
            block_mask=block_mask,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            leftpad_k=leftpad_k,
            block_table=block_table,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return (out, lse) if return_lse else out
    transformed = _are_functorch_transforms_active()
    if transformed and is_compiling():  # its inputs would say that they require no gradient
        _argument_types.break_graph(
            name, "torch.func's transforms are not traced; leave them, or fullgraph=True, out"
        )
    if forward_ad._current_level >= 0:
        refuse_tangents(name, q, k, v, sinks, bias)
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (sinks is not None and sinks.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    if needs_grad:
        _refuse_gradients(name, q, v, bias)
    try:
        if (
            cu_seqlens_q is None
            and cu_seqlens_k is None
            and seqused_q is None
            and leftpad_k is None
            and alibi_slopes is None
            and sinks is None
            and bias is None
            and block_mask is None
            and dropout_seed is None
            and dropout_p == 0
            and softcap == 0
            and num_splits == 0
            and backend == "auto"
            and not return_lse
        ):
            plain = False, right, softmax_scale, left
            dense = seqused_k is block_table is k_scale is v_scale is None
            if not needs_grad:
                caches = () if dense else (seqused_k, block_table, k_scale, v_scale)
                return _ops.forward_plain(q, k, v, *plain, *caches)  # type: ignore[no-any-return]
            repeatable = not deterministic or q.is_cpu
            if dense and repeatable and not (transformed or is_compiling()):
                return apply_plain(q, k, v, plain, name)
        max_seqlen_q = _max_seqlen(max_seqlen_q, cu_seqlens_q, q, name, "max_seqlen_q")
        max_seqlen_k = _max_seqlen(max_seqlen_k, cu_seqlens_k, k, name, "max_seqlen_k")
        if needs_grad and bias is not None and bias.requires_grad:
            # The kernels' gradient is of the whole (batch, heads, rows, keys): autograd sums it.
            batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
            bias = _expand_bias(bias, (batch, q.shape[-2], max_seqlen_q, max_seqlen_k), name)
        lengths = (
            *(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k),
            *(block_table, k_scale, v_scale, max_seqlen_q, max_seqlen_k, alibi_slopes),
        )
        packed = (None, None) if block_mask is None else block_mask.packed(q.device)
        numbers = (
            *(dropout_seed, *packed),
            *(softmax_scale, softcap, left, right, dropout_p, backend, num_splits),
        )
        if needs_grad:
            others = (*lengths, *numbers)
            function: Any = TransformableAttention if transformed else Attention
            out, lse = function.apply(q, k, v, sinks, bias, others, name, deterministic)
        else:
            out, lse = _ops.forward(q, k, v, *lengths, sinks, bias, *numbers)
    except RuntimeError as error:
        _argument_types.dense(
            name,
            **{"q": q, "k": k, "v": v},
            **_argument_types.given(
                **{"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
                **{"seqused_q": seqused_q, "seqused_k": seqused_k, "leftpad_k": leftpad_k},
                **{"block_table": block_table, "k_scale": k_scale, "v_scale": v_scale},
                **{"alibi_slopes": alibi_slopes, "sinks": sinks, "bias": bias},
            ),
        )
        if dropout_seed is not None:
            _argument_types.dense(name, dropout_seed=dropout_seed)
        raise _ops.argument_error(error, name) from None
    return (out, lse) if return_lse else out


def _refuse_gradients(name: str, q: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Before the forward pass, which takes wider heads when it decodes, and on CUDA a bias, rather
    than after it."""
    if bias is not None and q.is_cuda:
        raise _ops.ArgumentError(
            f"{name}: bias is given and a gradient is wanted, which CUDA does not have through a "
            "bias; call it under torch.no_grad(), or on the CPU"
        )
    for argument, t in (("q", q), ("v", v)):
        if isinstance(t, Tensor) and t.dim() > 0 and t.shape[-1] > 256:
            raise _ops.ArgumentError(
                f"{name}: {argument} has head_dim {t.shape[-1]}; it must be 1 to 256 where a "
                "gradient is wanted"
            )


def plain_attention(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    heads_first: bool = False,
) -> Tensor:
    """``attention`` with no further options, by a shorter way when nothing needs the longer one.
    What fails here goes the longer way too, to be told why.

    heads_first: q, k, v and the result are (batch, heads, seqlen, head_dim).
    """
    if (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v, Tensor)
        and q.is_cpu
        and not is_compiling()
        and not _is_any_autocast_enabled()
        and q.dtype is not torch.float64
        and forward_ad._current_level < 0
        and (softmax_scale is None or type(softmax_scale) is float)
        and type(causal) is type(deterministic) is bool
    ):
        options: tuple[Any, ...]  # as few as say it: see csrc/torch/attention.cpp
        if softmax_scale is not None:
            options = heads_first, 0 if causal else -1, softmax_scale
        elif causal:
            options = heads_first, 0
        else:
            options = (True,) if heads_first else ()
        try:
            if not (
                torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            ):
                return _ops.forward_plain_untraced(q, k, v, *options)  # type: ignore[no-any-return]
            if not _are_functorch_transforms_active():
                return apply_plain(q, k, v, options, name)
        except RuntimeError:
            pass
    if heads_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = attention(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        deterministic=deterministic,
        name=name,
    )
    return out.transpose(1, 2) if heads_first else out  # type: ignore[return-value, union-attr]
