// Rotary position embedding (Su et al., "RoFormer", section 3.4) and the cache-append problem that
// uses it.
//
// The first 2 * pairs elements of a row are rotated in pairs by the angles of its position: pair p
// is elements (2p, 2p + 1) when interleaved (GPT-J) and (p, p + pairs) when not (GPT-NeoX). The
// rest is copied.
#pragma once

#include "convert.h"

namespace fal {

struct Rotary {
  const void* cos;  // (positions, pairs), unit last stride; null = no rotation
  const void* sin;
  int64_t row_stride;
  int32_t pairs;
  int32_t positions;
  bool interleaved;
  DType dtype;
};

// Element d of the row x[offset ..] rotated for a position; x is of the given dtype.
FAL_HOST_DEVICE float rotated_element(const Rotary& rotary, const void* x, DType dtype,
                                      int64_t offset, int64_t position, int32_t d) {
  const float own = load_element(x, dtype, offset + d);
  if (!rotary.cos || d >= 2 * rotary.pairs) return own;
  const int32_t pair = rotary.interleaved ? d / 2 : d % rotary.pairs;
  const bool second = rotary.interleaved ? d % 2 != 0 : d >= rotary.pairs;
  const int32_t step = rotary.interleaved ? 1 : rotary.pairs;
  const float other = load_element(x, dtype, offset + (second ? d - step : d + step));
  const int64_t angle = position * rotary.row_stride + pair;
  const float c = load_element(rotary.cos, rotary.dtype, angle);
  const float s = load_element(rotary.sin, rotary.dtype, angle);
  return second ? other * s + own * c : own * c - other * s;
}

// x (batch, row, head, dim) -> out, rotated. Row i of entry b has position offsets[b] + i, or
// offsets[b] for every row when advance is false.
struct RotateProblem {
  int32_t batch, seqlen, heads, head_dim;
  DType dtype;
  AnyView x, out;
  const int32_t* cu_seqlens;  // (batch + 1): x is (total, head, dim); null = dense
  const int32_t* offsets;     // (batch); null = 0
  bool advance;
  Rotary rotary;
};

// New keys and values go to rows cache_seqlens[b] + i of the cache, keys rotated for that position,
// both quantised when the cache is. Nothing else of the cache is written.
struct AppendProblem {
  int32_t batch, seqlen, heads_k, head_dim, head_dim_v;
  DType dtype;  // of the new rows
  AnyView k, v;
  const int32_t* cu_seqlens;     // (batch + 1): k and v are (total, head, dim); null = dense
  const int32_t* cache_seqlens;  // (batch)
  KeyValue cache;
  Rotary rotary;  // of k
};

}  // namespace fal
