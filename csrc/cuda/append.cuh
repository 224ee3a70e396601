// Rotary embedding, and new rows into a KV cache. Bound by memory and small: one warp per (row,
// head), the dtypes decided at run time by uniform branches, so that one kernel serves every
// combination.
//
// Lane l owns elements l, l + 32, ... of the row; a rotation partner is read a second time (from
// L1). A quantised row's scale is a warp-wide maximum.
#pragma once

#include "../core/rotary.h"
#include "device.cuh"

namespace fal::cuda {

constexpr int kAppendWarps = 4;           // rows x heads per block
constexpr int kAppendPerLane = 256 / 32;  // elements of the longest row that a lane holds

// The (sequence, row, head) of a warp. false: nothing to do.
struct AppendItem {
  int32_t b, i, h;
  int64_t row;  // of the new tensor

  __device__ __forceinline__ bool find(int32_t batch, int32_t seqlen, int32_t heads,
                                       const int32_t* cu_seqlens) {
    const int64_t item = int64_t(blockIdx.x) * kAppendWarps + threadIdx.x / 32;
    if (item >= int64_t(batch) * seqlen * heads) return false;
    h = int32_t(item % heads);
    i = int32_t(item / heads % seqlen);
    b = int32_t(item / heads / seqlen);
    row = i;
    if (!cu_seqlens) return true;
    row += cu_seqlens[b];
    return row < cu_seqlens[b + 1];
  }
};

__device__ __forceinline__ int64_t element_offset(const AnyView& view, int64_t b, int64_t row,
                                                  int64_t head) {
  return b * view.batch + row * view.row + head * view.head;
}

__global__ void __launch_bounds__(kAppendWarps * 32)
    rotate_kernel(const __grid_constant__ RotateProblem p) {
  AppendItem item;
  if (!item.find(p.batch, p.seqlen, p.heads, p.cu_seqlens)) return;
  const int64_t position = (p.offsets ? p.offsets[item.b] : 0) + (p.advance ? item.i : 0);
  const int64_t from = element_offset(p.x, item.b, item.row, item.h);
  const int64_t to = element_offset(p.out, item.b, item.row, item.h);
  for (int32_t d = threadIdx.x % 32; d < p.head_dim; d += 32) {
    const float x = rotated_element(p.rotary, p.x.data, p.dtype, from, position, d);
    store_element(p.out.data, p.dtype, to + d, x);
  }
}

// Stores this lane's elements of a row of `dim`; quantised when scale is not null.
__device__ __forceinline__ void store_cache_row(const AnyView& view, DType dtype, int64_t offset,
                                                int32_t dim, const float (&x)[kAppendPerLane],
                                                float* scale) {
  const int32_t lane = threadIdx.x % 32;
  float inverse = 0.f;
  if (scale) {
    float largest = 0.f;
#pragma unroll
    for (int n = 0; n < kAppendPerLane; ++n) {
      if (lane + 32 * n < dim) largest = larger_or_nan(largest, fabsf(x[n]));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      largest = larger_or_nan(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    if (lane == 0) *scale = largest / quantised_limit(dtype);
    inverse = largest > 0.f ? quantised_limit(dtype) / largest : 0.f;
  }
#pragma unroll
  for (int n = 0; n < kAppendPerLane; ++n) {
    const int32_t d = lane + 32 * n;
    if (d >= dim) break;
    if (scale) {
      static_cast<uint8_t*>(view.data)[offset + d] = quantise(x[n] * inverse, dtype);
    } else {
      store_element(view.data, dtype, offset + d, x[n]);
    }
  }
}

__global__ void __launch_bounds__(kAppendWarps * 32)
    append_kernel(const __grid_constant__ AppendProblem p) {
  AppendItem item;
  if (!item.find(p.batch, p.seqlen, p.heads_k, p.cu_seqlens)) return;
  const KeyValue& cache = p.cache;
  const int64_t position = int64_t(p.cache_seqlens[item.b]) + item.i;
  int64_t block = item.b, slot = position;
  if (cache.pages.block_table) {
    block = cache.pages
                .block_table[item.b * cache.pages.table_stride + position / cache.pages.page_size];
    slot = position % cache.pages.page_size;
  }
  const int32_t lane = threadIdx.x % 32;
  const int64_t k_row = element_offset(p.k, item.b, item.row, item.h);
  const int64_t v_row = element_offset(p.v, item.b, item.row, item.h);
  float x[kAppendPerLane] = {};
#pragma unroll
  for (int n = 0; n < kAppendPerLane; ++n) {
    const int32_t d = lane + 32 * n;
    if (d < p.head_dim) x[n] = rotated_element(p.rotary, p.k.data, p.dtype, k_row, position, d);
  }
  store_cache_row(cache.k, cache.dtype, element_offset(cache.k, block, slot, item.h), p.head_dim, x,
                  cache.k_scale.data ? cache.k_scale.at(block, item.h, slot) : nullptr);
#pragma unroll
  for (int n = 0; n < kAppendPerLane; ++n) {
    const int32_t d = lane + 32 * n;
    if (d < p.head_dim_v) x[n] = load_element(p.v.data, p.dtype, v_row + d);
  }
  store_cache_row(cache.v, cache.dtype, element_offset(cache.v, block, slot, item.h), p.head_dim_v,
                  x, cache.v_scale.data ? cache.v_scale.at(block, item.h, slot) : nullptr);
}

}  // namespace fal::cuda
