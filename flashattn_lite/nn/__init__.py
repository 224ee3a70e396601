"""Modules: torch's MultiheadAttention, and attention for today's models, on our kernels."""

from flashattn_lite.nn.attention import Attention, KVCache
from flashattn_lite.nn.multihead_attention import MultiheadAttention
from flashattn_lite.nn.replace import Replacement, replace_attention

__all__ = ["Attention", "KVCache", "MultiheadAttention", "Replacement", "replace_attention"]
