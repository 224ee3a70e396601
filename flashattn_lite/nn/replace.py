"""Swapping a model's attention for this library's, in place, with a report of what was done."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from flashattn_lite.nn.attention import Attention
from flashattn_lite.nn.multihead_attention import MultiheadAttention

__all__ = ["Replacement", "replace_attention"]

MAX_HEAD_DIM = 256


@dataclass
class Replacement:
    """What ``replace_attention`` did. Names are those of ``model.named_modules()``."""

    swapped: dict[str, str] = field(default_factory=dict)
    """Module name -> what it runs on now."""
    left: dict[str, str] = field(default_factory=dict)
    """Module name -> why it was left alone."""

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left {len(self.left)}"]
        lines += [f"  {name or '(model)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"  {name or '(model)'}: left: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def replace_attention(model: torch.nn.Module, *, transformers_name: str = "fal") -> Replacement:
    """Makes a model attend with this library, in place; parameters, hooks and names stay.

    torch.nn.MultiheadAttention modules become flashattn_lite.nn.MultiheadAttention. Models of the
    transformers library are switched to the registered attention implementation. Whatever else
    looks like attention is left and named: code that calls torch's scaled_dot_product_attention is
    reached by ``flashattn_lite.use_as_sdpa()`` instead.

    Args:
        model: any module; it may itself be one to swap.
        transformers_name: the attention implementation to register and choose.

    Returns: what was swapped, and what was left and why. It prints well.

    >>> report = replace_attention(torch.nn.TransformerEncoderLayer(64, 4))
    >>> report.swapped
    {'self_attn': 'flashattn_lite.nn.MultiheadAttention'}
    """
    report = Replacement()
    pretrained: Any = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    inside_transformers: list[str] = []
    for name, module in model.named_modules():
        if any(
            name == outer or name.startswith(f"{outer}.") or not outer
            for outer in inside_transformers
        ):
            continue
        if pretrained and isinstance(module, pretrained):
            _switch_transformers(name, module, transformers_name, report)
            inside_transformers.append(name)
        elif isinstance(module, MultiheadAttention | Attention):
            report.left[name] = "is this library's already"
        elif type(module) is torch.nn.MultiheadAttention:
            if module.head_dim > MAX_HEAD_DIM:
                report.left[name] = f"head_dim is {module.head_dim}; the kernels take 1 to 256"
            else:
                module.__class__ = MultiheadAttention
                report.swapped[name] = "flashattn_lite.nn.MultiheadAttention"
        elif isinstance(module, torch.nn.MultiheadAttention):
            report.left[name] = f"{_class_of(module)} derives from torch.nn.MultiheadAttention"
        elif "attention" in type(module).__name__.lower():
            report.left[name] = (
                f"{_class_of(module)} is not known; if it calls torch's "
                "scaled_dot_product_attention, run it under flashattn_lite.use_as_sdpa()"
            )
    return report


def _class_of(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _switch_transformers(name: str, model: Any, implementation: str, report: Replacement) -> None:
    from flashattn_lite.integrations.transformers import register

    register(implementation)
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:
        report.left[name] = f"transformers: {error}"
        return
    if model.config._attn_implementation == implementation:
        report.swapped[name] = f"transformers attn_implementation {implementation!r}"
    else:
        report.left[name] = (
            f"{_class_of(model)} kept {model.config._attn_implementation!r}: it does not look its "
            "attention up in transformers' AttentionInterface"
        )
