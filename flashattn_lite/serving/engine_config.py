"""The engine's sizes and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashattn_lite import _argument_types
from flashattn_lite.serving.scheduler import BLOCK

__all__ = ["EngineConfig", "Role"]

Role = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. Every request's prompt and output must fit num_pages * page_size.

    Args:
        num_pages: pages in the pool; default: room for max_running requests of 1024 tokens, or of
            the model's context if that is shorter.
        page_size: tokens of a page.
        max_step_tokens: tokens of a step, decodes and prefill chunks together; at least
            max_running, so that every running request gets a token in every step.
        max_running: requests in the batch at once; the others wait.
        prefix_cache: keep full pages of finished requests and share them by content.
        role: "mixed"; "prefill" hands each request over after its first token; "decode" takes such
            requests.
        max_context: tokens of a request, prompt and output; default: the model's.
        max_waiting: requests that may wait; None is unbounded.
        reproducible: a request's tokens are the same bits of the same computation whatever the
            batch, the cache and preemption do; on the CPU. What it costs: docs/serving.md.
        cuda_graphs: replay decode steps as CUDA graphs; needs a model on CUDA. It has not run on a
            GPU yet.
    """

    num_pages: int | None = None
    page_size: int = 16
    max_step_tokens: int = 512
    max_running: int = 64
    prefix_cache: bool = True
    role: Role = "mixed"
    max_context: int | None = None
    max_waiting: int | None = None
    reproducible: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("prefix_cache", "reproducible", "cuda_graphs"):
            flag = _argument_types.flag("EngineConfig", name, getattr(self, name))
            object.__setattr__(self, name, flag)
        optional = ("num_pages", "max_context", "max_waiting")
        for name in ("page_size", "max_running", "max_step_tokens", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            value = _argument_types.index("EngineConfig", name, value)
            if value < 1:
                raise ValueError(f"EngineConfig: {name} is {value}; it must be >= 1")
            object.__setattr__(self, name, value)
        least = self.max_running + (BLOCK if self.reproducible else 0)
        if self.max_step_tokens < least:
            raise ValueError(
                f"EngineConfig: max_step_tokens is {self.max_step_tokens}; it must be >= {least}, "
                "so that every running request gets a token in every step"
            )
        if self.role not in ("mixed", "prefill", "decode"):
            raise ValueError(
                f"EngineConfig: role is {self.role!r}; it must be mixed, prefill or decode"
            )
