"""A serving loop on the library's paged attention: schedule, run, postprocess.

from flashattn_lite.serving import Engine, EngineConfig, SamplingParams, load_model, load_tokenizer

engine = Engine(load_model(folder), load_tokenizer(folder))
engine.generate(["def add(a, b):"], SamplingParams(max_tokens=16, temperature=0))

Design, guarantees and limits: docs/serving.md. Needs ``pip install 'flashattn-lite[serve]'``.
"""

from flashattn_lite.serving.engine import Engine
from flashattn_lite.serving.engine_config import EngineConfig
from flashattn_lite.serving.loading import load_model
from flashattn_lite.serving.request import (
    Completion,
    QueueFullError,
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from flashattn_lite.serving.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "QueueFullError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
    "Tokenizer",
    "load_model",
    "load_tokenizer",
]
