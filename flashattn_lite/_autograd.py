"""The operators as torch differentiates them: the common way, a shorter one for plain calls, one
for torch.func's transforms, and what is refused (second derivatives, forward mode)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashattn_lite import _ops

__all__ = ["Attention", "TransformableAttention", "apply_plain", "refuse_tangents"]

_REMEDY = (
    "use float64 inputs or flashattn_lite.reference.attention, which torch differentiates any "
    "number of times"
)


class Attention(torch.autograd.Function):
    """The operator pair. Arguments: those that have a gradient singly, the operator's others
    in one tuple (every argument of an autograd.Function costs a tiny call 0.3 us)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = TransformableAttention.forward(*inputs)
        TransformableAttention.setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        out, lse, q, k, v, *options = ctx.saved_tensors
        _, _, _, need_dsinks, need_dbias, *_ = ctx.needs_input_grad
        if dout is None:
            dout = torch.zeros_like(out)
        arguments = (
            *(dout, dlse, q, k, v, out, lse),
            *(*options[:8], *ctx.max_seqlens, *options[8:], *ctx.numbers),
            *(ctx.deterministic, need_dsinks, need_dbias, ctx.backend),
        )
        try:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
                gradients = _Backward.apply(ctx.caller, *arguments)  # type: ignore[no-untyped-call]
            else:
                gradients = _ops.backward(*arguments)
        except RuntimeError as error:
            raise _ops.argument_error(error, f"{ctx.caller} (backward)") from None
        dq, dk, dv, dsinks, dbias = gradients
        return (
            *(dq, dk, dv, dsinks if need_dsinks else None, dbias if need_dbias else None),
            *(None, None, None),
        )


class PlainAttention(torch.autograd.Function):
    """``Attention`` with few options and without an LSE: half its cost on tiny tensors. Not for
    tracing, nor for torch.func."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], name: str
    ) -> Tensor:
        """options: the first of heads_first, window_right, softmax_scale and window_left."""
        out, lse = _ops.forward_plain_training_untraced(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = options, name
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        options, name = ctx.call
        saved = ctx.saved_tensors
        try:
            if torch.is_grad_enabled():  # create_graph=True
                gradients = _differentiable_gradients(name, dout, saved, *options)
            else:
                gradients = _ops.backward_plain_untraced(dout, *saved, *options)
        except RuntimeError as error:
            raise _ops.argument_error(error, f"{name} (backward)") from None
        return *gradients, None, None


# Without what Function.apply does for torch.func and default arguments: 4 us.
apply_plain: Callable[..., Tensor] = super(torch.autograd.Function, PlainAttention).apply


def _differentiable_gradients(
    name: str,
    dout: Tensor,
    saved: tuple[Tensor, ...],
    heads_first: bool = False,
    window_right: int = -1,
    softmax_scale: float | None = None,
    window_left: int = -1,
) -> tuple[Tensor, ...]:
    """dq, dk, dv of ``PlainAttention`` from ``_Backward``, which has all options."""
    given: dict[str, Any] = {"softcap": 0.0, "dropout_p": 0.0, "softmax_scale": softmax_scale}
    given |= {"window_left": window_left, "window_right": window_right}
    *tensors, lse = (dout, *saved)
    if heads_first:
        tensors = [t.transpose(1, 2) for t in tensors]
    dout, q, k, v, out = tensors
    given |= {"max_seqlen_q": q.shape[1], "max_seqlen_k": k.shape[1]}
    arguments = (
        *(dout, None, q, k, v, out, lse),
        *map(given.get, _ops.SHARED_ARGUMENTS),
        *(True, False, False, "auto"),
    )
    gradients = _Backward.apply(name, *arguments)[:3]  # type: ignore[no-untyped-call]
    return tuple(t.transpose(1, 2) for t in gradients) if heads_first else gradients


class TransformableAttention(torch.autograd.Function):
    """The same in the form that torch.func's transforms take; a call costs 26 us more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        others: tuple[Any, ...],
        name: str,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        lengths, slopes, tensors, numbers = others[:10], others[10], others[11:14], others[14:]
        out, lse = _ops.forward(q, k, v, *lengths, slopes, sinks, bias, *tensors, *numbers)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sinks, bias, others, ctx.caller, ctx.deterministic = inputs
        lengths, slopes, tensors, numbers = others[:10], others[10], others[11:14], others[14:]
        ctx.save_for_backward(*output, q, k, v, *lengths[:8], slopes, sinks, bias, *tensors)
        ctx.max_seqlens, ctx.numbers, ctx.backend = lengths[8:], numbers[:-2], numbers[-2]
        ctx.set_materialize_grads(False)

    backward = Attention.backward

    @staticmethod
    def jvp(ctx: Any, *_tangents: Tensor) -> None:  # of a gradient's forward pass: a hessian
        raise NotImplementedError(_no_forward_mode(ctx.caller))


class _Backward(torch.autograd.Function):
    """The backward operator where its results might be differentiated: that raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(_name: str, *arguments: Any) -> Any:
        return _ops.backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.caller = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.caller}: second derivatives are not implemented by the kernels; {_REMEDY}"
        )

    @staticmethod
    def jvp(ctx: Any, *_tangents: Tensor) -> None:
        raise NotImplementedError(_no_forward_mode(ctx.caller))


def _no_forward_mode(name: str) -> str:
    return f"{name}: forward-mode differentiation is not implemented by the kernels; {_REMEDY}"


def refuse_tangents(name: str, *tensors: Tensor | None) -> None:
    """Forward-mode differentiation would pass the operators by and give zeros."""
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(_no_forward_mode(name))
