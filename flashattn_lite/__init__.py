"""Exact attention for CPU and GPU: FlashAttention kernels with a drop-in Python API.

from flashattn_lite import flash_attn_func          # flash_attn 2.8's functions
from flashattn_lite import attention                # the same kernels with every option
"""

from flashattn_lite import block_patterns, nn
from flashattn_lite._ops import ArgumentError
from flashattn_lite._version import __version__
from flashattn_lite.attention import attention
from flashattn_lite.block_mask import BlockMask
from flashattn_lite.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashattn_lite.inspection import attention_weights
from flashattn_lite.kv_cache import append_kv_cache, flash_attn_with_kvcache
from flashattn_lite.merge import flash_attn_combine, merge_attention_states
from flashattn_lite.paged_kv_cache import OutOfPagesError, PagedKVCache
from flashattn_lite.sdpa import scaled_dot_product_attention, use_as_sdpa

__all__ = [
    "ArgumentError",
    "BlockMask",
    "OutOfPagesError",
    "PagedKVCache",
    "__version__",
    "append_kv_cache",
    "attention",
    "attention_weights",
    "block_patterns",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "merge_attention_states",
    "nn",
    "scaled_dot_product_attention",
    "use_as_sdpa",
]
