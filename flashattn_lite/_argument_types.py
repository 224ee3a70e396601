"""What kind of thing an argument is, before its shape or value is looked at: the sentences that
callers get for a string, a list or a sparse tensor where something else was meant.

Each function takes the name that messages begin with, and arguments by name and value.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from flashattn_lite._ops import ArgumentError

__all__ = ["break_graph", "by_annotation", "dense", "flag", "given", "index", "number", "tensors"]

P = ParamSpec("P")
R = TypeVar("R")


def tensors(name: str, **values: Any) -> None:
    """Raises unless all are tensors."""
    for argument, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {argument} is {_text(value)}; it must be a torch.Tensor")


def dense(name: str, **values: Any) -> None:
    """Raises unless all are tensors with strides (not nested, sparse, quantised), on one device."""
    tensors(name, **values)
    first = next(iter(values), "")
    device = values[first].device if first else None
    for argument, value in values.items():
        if value.is_nested or value.layout is not torch.strided or value.is_quantized:
            if value.is_nested:
                kind, remedy = "nested", "; the varlen functions take its sequences end to end"
            else:
                kind, remedy = "quantised" if value.is_quantized else "sparse", ""
            raise ArgumentError(
                f"{name}: {argument} is a {kind} tensor; it must be a dense one{remedy}"
            )
        if value.device != device:
            raise ArgumentError(
                f"{name}: {argument} is on {value.device} but {first} is on {device}"
            )


def given(**values: Any) -> dict[str, Any]:
    """Those that were not left out (None)."""
    return {argument: value for argument, value in values.items() if value is not None}


def break_graph(name: str, reason: str) -> None:
    """Under torch.compile, ends the graph before a tensor is read; fullgraph=True says why."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=f"{name}: {reason}")


def number(name: str, argument: str, value: Any) -> float:
    """A float from a float, an int, or a scalar of numpy's or torch's."""
    if isinstance(value, float | torch.SymFloat | torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                f"{name}: {argument} requires a gradient and has none here; pass it detached (a "
                "scale that is learned can multiply q)"
            )
        break_graph(name, f"{argument} is a tensor, which has to be read; give it as a float")
    try:
        if not isinstance(value, str | bytes | complex):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"{name}: {argument} is {_text(value)}; it must be a float")


def index(name: str, argument: str, value: Any) -> int:
    """An int from an int, or an integer scalar of numpy's or torch's; nothing cut from a float."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor):
        break_graph(name, f"{argument} is a tensor, which has to be read; give it as an int")
    try:
        integer = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: {argument} is {_text(value)}; it must be an int") from None
    if not -(2**63) <= integer < 2**63:
        raise ArgumentError(f"{name}: {argument} is {integer}; it must be an int of 64 bits")
    return integer


def flag(name: str, argument: str, value: Any) -> bool:
    """A bool from a bool, 0, 1 or None, or such a scalar of numpy's or torch's."""
    if value is None:
        return False
    try:
        if isinstance(value, bool | torch.SymBool) or value in (0, 1):
            return bool(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name}: {argument} is {_text(value)}; it must be a bool")


def by_annotation(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: what the function annotates as int, bool or Tensor is one when it begins."""
    signature, name = inspect.signature(function), function.__qualname__
    checks: dict[str, Callable[[str, str, Any], Any]]
    checks = {"int": index, "bool": flag, "Tensor": _tensor}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for argument, value in bound.arguments.items():
            kind, _, optional = str(signature.parameters[argument].annotation).partition(" | ")
            if kind in checks and not (value is None and optional == "None"):
                if optional not in ("", "None") and isinstance(value, Tensor):
                    continue  # int | Tensor
                value = bound.arguments[argument] = checks[kind](name, argument, value)
                if kind == "int" and argument.startswith("seqlen") and value < 0:
                    raise ArgumentError(f"{name}: {argument} is {value}; it must be >= 0")
        return function(*bound.args, **bound.kwargs)

    return checked


def _tensor(name: str, argument: str, value: Any) -> Any:
    dense(name, **{argument: value})
    return value


def _text(value: Any) -> str:
    """A value as an error message shows it: short, and without a tensor's elements."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {'(nested)' if value.is_nested else tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
