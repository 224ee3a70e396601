"""The native library: loading it, saying clearly why it cannot be loaded, and its operators' fakes.

The operators do the checking (csrc/torch/arguments.cpp): one place knows every rule that protects
memory. What they raise begins with the operator's name; ``argument_error`` puts the public
function's name there instead.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

TORCH_FLOOR = (2, 10)

# The forward operator's arguments, in the schema's order. Backward takes the same from
# "cu_seqlens_q" to "dropout_p" (SHARED_ARGUMENTS).
FORWARD_ARGUMENTS = (
    *("q", "k", "v"),
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k"),
    *("block_table", "k_scale", "v_scale", "max_seqlen_q", "max_seqlen_k"),
    *("alibi_slopes", "sinks", "bias", "dropout_seed"),
    *("block_mask", "block_mask_layout"),
    *("softmax_scale", "softcap", "window_left", "window_right", "dropout_p"),
    *("backend", "num_splits"),
)
SHARED_ARGUMENTS = FORWARD_ARGUMENTS[3:-2]

OPERATORS = (
    *("forward", "forward_plain", "forward_plain_training", "backward", "backward_plain"),
    *("rotate", "append_kv", "mask_band", "mask_padding"),
    *("build_info", "cpu_isa", "set_cpu_isa", "fma_peak"),
    *("ptx_conformance", "ptx_conformance_sections"),
)


class ArgumentError(ValueError, RuntimeError):
    """An argument that cannot be used: what, where, which value, and what would be right.

    A ValueError, as Python has it, and a RuntimeError, as flash_attn and torch raise it.
    """


def _load() -> None:
    version = torch.__version__
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise ImportError(f"flashattn_lite needs torch >= {floor} but torch is {version}")
    path = Path(__file__).with_name("_C.so")
    if not path.exists():
        raise ImportError(
            f"flashattn_lite: the native library {path} is missing; "
            "build it with `pip install .` in the source tree (needs g++)",
            path=str(path),
        )
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"flashattn_lite: the native library {path} does not load with torch {version} on "
            f"this machine ({error.__cause__ or error}); reinstall flashattn_lite here",
            path=str(path),
        ) from error
    operators = torch.ops.flashattn_lite
    arguments: tuple[str, ...] = ()
    if all(hasattr(operators, name) for name in OPERATORS):
        schema = operators.forward.default._schema
        arguments = tuple(argument.name for argument in schema.arguments)
    if arguments != FORWARD_ARGUMENTS:
        raise ImportError(
            f"flashattn_lite: the native library {path} was built from other sources than these "
            "Python files; reinstall flashattn_lite",
            path=str(path),
        )
    wanted, active = os.environ.get("FAL_CPU_ISA"), operators.cpu_isa.default()
    if wanted and wanted != active:
        names = ", ".join(json.loads(operators.build_info.default())["cpu"]["isas"])
        raise ImportError(
            f"flashattn_lite: FAL_CPU_ISA is {wanted!r}; this build on this processor has {names}"
        )


_load()

forward = torch.ops.flashattn_lite.forward.default
backward = torch.ops.flashattn_lite.backward.default

# Dense, few options: cheaper to call, and the cheaper the fewer are given.
forward_plain = torch.ops.flashattn_lite.forward_plain.default
forward_plain_training = torch.ops.flashattn_lite.forward_plain_training.default
backward_plain = torch.ops.flashattn_lite.backward_plain.default
# Without the Python of OpOverload.__call__, 0.6 us; not for tracing.
forward_plain_untraced = getattr(forward_plain, "_op", forward_plain)
forward_plain_training_untraced = getattr(forward_plain_training, "_op", forward_plain_training)
backward_plain_untraced = getattr(backward_plain, "_op", backward_plain)

rotate = torch.ops.flashattn_lite.rotate.default
append_kv = torch.ops.flashattn_lite.append_kv.default
mask_band = torch.ops.flashattn_lite.mask_band.default
mask_padding = torch.ops.flashattn_lite.mask_padding.default
build_info = torch.ops.flashattn_lite.build_info.default
cpu_isa = torch.ops.flashattn_lite.cpu_isa.default
set_cpu_isa = torch.ops.flashattn_lite.set_cpu_isa.default
fma_peak = torch.ops.flashattn_lite.fma_peak.default


def argument_error(error: RuntimeError, name: str) -> Exception:
    """The error that a public function raises for one that an operator raised."""
    text = str(error)
    for operator in OPERATORS:
        operator = f"flashattn_lite::{operator}"
        if text.startswith(f"{operator}: "):
            return ArgumentError(text.replace(operator, name, 1))
        if text.startswith(f"{operator}() "):  # the dispatcher's: an argument of another type
            sentence = text.splitlines()[0].removeprefix(f"{operator}() ")
            sentence = sentence.replace("found type 'int'", "found one of more than 64 bits")
            return TypeError(f"{name}: {sentence[0].lower()}{sentence[1:]}")
    return error


def renamed(error: Exception, words: Mapping[str, str]) -> Exception:
    """The same error where a function calls arguments otherwise than the one below it that raised:
    ``words`` is {name there: name here}."""
    if not (words and isinstance(error, ArgumentError | TypeError)):
        return error
    pattern = rf"(?<!\.)\b({'|'.join(words)})\b"
    return type(error)(re.sub(pattern, lambda found: words[found[1]], str(error)))


def _laid_out_like(t: Tensor, last: int) -> Tensor:
    """empty_laid_out_like of csrc/torch/tensor.h."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    order, strides = list(range(t.dim())), t.stride()
    if not (guard_or_false(strides[-1] != 1) or any(guard_or_false(s == 0) for s in strides)):
        for i in range(1, t.dim() - 1):
            for j in range(i, 0, -1):
                if not guard_or_false(strides[order[j - 1]] < strides[order[j]]):
                    break
                order[j - 1], order[j] = order[j], order[j - 1]
    return torch.empty_permuted((*t.shape[:-1], last), order, dtype=t.dtype, device=t.device)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    for argument, t in zip(FORWARD_ARGUMENTS[3:], options, strict=False):
        # One meta tensor among real ones brings a call here, where results hold nothing.
        device = "cpu" if argument == "dropout_seed" else q.device.type
        if isinstance(t, Tensor) and t.device.type != device:
            raise RuntimeError(
                f"flashattn_lite::forward: {argument} is on {t.device}; it must be on {device}"
            )
    if not q.device == k.device == v.device:
        raise RuntimeError(
            f"flashattn_lite::forward: q is on {q.device}, k on {k.device} and v on {v.device}; "
            "they must be on one device"
        )
    out = _laid_out_like(q, v.shape[-1])
    if q.dim() == 3:
        return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _fake_forward_plain_training(
    q: Tensor, k: Tensor, v: Tensor, heads_first: bool = False, *_options: Any
) -> tuple[Tensor, Tensor]:
    out, lse = _fake_forward(q, k, v)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32) if heads_first else lse


def _fake_forward_plain(*arguments: Any) -> Tensor:
    return _fake_forward_plain_training(*arguments)[0]


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    named = dict(zip(("out", "lse", *SHARED_ARGUMENTS), rest, strict=False))
    need_dsinks, need_dbias = rest[-3], rest[-2]
    dsinks = q.new_empty((q.shape[-2] if need_dsinks else 0,), dtype=torch.float32)
    dbias = q.new_empty((0,), dtype=torch.float32)
    if need_dbias:
        cu_q, cu_k, bias = named["cu_seqlens_q"], named["cu_seqlens_k"], named["bias"]
        batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
        seqlen_q = q.shape[1] if cu_q is None else named["max_seqlen_q"]
        seqlen_k = k.shape[1] if cu_k is None else named["max_seqlen_k"]
        dbias = q.new_empty((batch, q.shape[-2], seqlen_q, seqlen_k), dtype=bias.dtype)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    return dq, dk, dv, dsinks, dbias


def _fake_backward_plain(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    heads_first: bool = False,
    *_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if not heads_first:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dq, dk, dv = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))
    return dq, dk, dv


def _fake_append_kv(k: Tensor, *others: Any) -> None:
    for t in others:  # one meta tensor among real ones would leave the cache as it was
        if isinstance(t, Tensor) and t.device != k.device:
            raise RuntimeError(
                f"flashattn_lite::append_kv: a tensor is on {t.device} but k is on {k.device}"
            )


register_fake("flashattn_lite::forward", _fake_forward)
register_fake("flashattn_lite::forward_plain", _fake_forward_plain)
register_fake("flashattn_lite::forward_plain_training", _fake_forward_plain_training)
register_fake("flashattn_lite::backward", _fake_backward)
register_fake("flashattn_lite::backward_plain", _fake_backward_plain)
register_fake("flashattn_lite::rotate", lambda x, *_: x.new_empty(x.shape))
register_fake("flashattn_lite::append_kv", _fake_append_kv)
