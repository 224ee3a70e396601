// Where a tile of decode's keys is, and what is asked of memory before it is needed.
#pragma once

#include "pack.h"

namespace fal::cpu::FAL_CPU_ISA {

constexpr int kDecodeKeys = 16;     // a power of two: the sum over a tile is a tree
constexpr int kDecodeColumns = 64;  // of a pass, at most: Q and the scores then stay in L1

// The heads that one item walks together.
struct DecodeHeads {
  int first, count;            // count is a power of two
  int64_t k_stride, v_stride;  // elements from a head's row to the next head's

  FAL_INLINE int shift() const { return __builtin_ctz(count); }
};

// A tile's keys, wherever they are: rows of the first head. Entries past the last key repeat it.
template <class E>
struct DecodeKeys {
  static constexpr bool kQuantised = sizeof(E) == 1;
  static constexpr int kScales = kQuantised ? kDecodeKeys * kDecodeColumns + kLanes : 1;
  // Of K's and V's elements as loaded: the factors make up for it.
  static constexpr float kUnit = std::is_same<E, Float8E4M3>::value ? kFloat8Unit : 1.f;

  int count;
  const E *k[kDecodeKeys], *v[kDecodeKeys];
  float k_scale[kScales], v_scale[kScales];  // [key][head]

  FAL_INLINE static void copy_factors(const float* from, const RowStats& stats, int rows, int heads,
                                      float* to) {
    if (stats.head == 1 && stats.row == heads) {
      heads *= rows;
      rows = 1;
    }
    for (int i = 0; i < rows; ++i, from += stats.row, to += heads) {
      if (stats.head == 1) {  // so that the compiler takes vectors
        for (int h = 0; h < heads; ++h) to[h] = from[h] * kUnit;
      } else {
        for (int h = 0; h < heads; ++h) to[h] = from[h * stats.head] * kUnit;
      }
    }
  }

  FAL_INLINE void fetch(const KvRuns& runs, const DecodeHeads& heads, int begin, int n) {
    const int64_t k_stride = runs.k_stride(), v_stride = runs.v_stride();
    count = n;
    for (int r = 0; r < n;) {
      const KvRun run = runs.at(begin + r);
      const int rows = min_int(n - r, run.rows);
      for (int i = 0; i < rows; ++i) {
        k[r + i] = reinterpret_cast<const E*>(run.k + i * k_stride);
        v[r + i] = reinterpret_cast<const E*>(run.v + i * v_stride);
      }
      if constexpr (kQuantised) {
        const int at = r * heads.count;
        copy_factors(run.k_scale, runs.kv.k_scale, rows, heads.count, k_scale + at);
        copy_factors(run.v_scale, runs.kv.v_scale, rows, heads.count, v_scale + at);
      }
      r += rows;
    }
    const E *const last_k = k[n - 1], *const last_v = v[n - 1];
    for (int i = n; i < kDecodeKeys; ++i) {
      k[i] = last_k;
      v[i] = last_v;
    }
    if constexpr (kQuantised) {
      // The lanes of the last vectors that hold no key; their products are replaced or 0.
      for (int i = n * heads.count; i < kDecodeKeys * heads.count + kLanes; ++i) {
        k_scale[i] = v_scale[i] = 0.f;
      }
    }
  }
};

// Into L2: the lines come in memory order, and L1 has no room for a tile.
template <class E>
FAL_INLINE void prefetch_row(const E* row, int dims) {
  const char* begin = reinterpret_cast<const char*>(row);
#pragma GCC unroll 8
  for (int at = 0; at < dims * static_cast<int>(sizeof(E)); at += 64) {
    __builtin_prefetch(begin + at, 0, 2);
  }
}

// One line of every kBytes that rows of `width` bytes touch, `stride` apart.
template <int kBytes>
FAL_INLINE void prefetch_every(const void* first, int64_t stride, int rows, int64_t width) {
  if (stride - width < kBytes) {  // one piece, with nothing of that size between
    width += (rows - 1) * stride;
    rows = 1;
  }
  const char* row = static_cast<const char*>(first);
  for (int i = 0; i < rows; ++i, row += stride) {
    for (int64_t at = 0; at < width; at += kBytes) __builtin_prefetch(row + at, 0, 2);
  }
}

// Of the tile that begins with key `begin`, a tile before it is needed: its memory pages, because
// finding where they are takes longer than reading them, and the factors of quantised rows.
template <class E>
FAL_INLINE void prefetch_pages_of_tile(const KvRuns& runs, const DecodeHeads& heads, int begin,
                                       int dims, int dims_v) {
  constexpr int kPage = 4096, kLine = 64;
  const KvRun run = runs.at(begin);
  const int rows = min_int(run.rows, kDecodeKeys);
  const auto width = [&](int64_t head_stride, int dims) {
    return ((heads.count - 1) * head_stride + dims) * static_cast<int64_t>(sizeof(E));
  };
  prefetch_every<kPage>(run.k, runs.k_stride(), rows, width(heads.k_stride, dims));
  prefetch_every<kPage>(run.v, runs.v_stride(), rows, width(heads.v_stride, dims_v));
  if constexpr (DecodeKeys<E>::kQuantised) {
    const auto factors = [&](const float* first, const RowStats& stats) {
      const int64_t bytes = sizeof *first;
      if (stats.head != 1) return;
      prefetch_every<kLine>(first, stats.row * bytes, rows, heads.count * bytes);
    };
    factors(run.k_scale, runs.kv.k_scale);
    factors(run.v_scale, runs.kv.v_scale);
  }
}

// How many rows of K are asked for ahead of those in use. The processor's prefetchers start anew in
// every 4 KB and lag behind rows of 16 bits and less; with fp32 they keep up, and this only costs.
template <class E>
FAL_INLINE int rows_ahead(int dims) {
  constexpr int kBytes = 8192;
  return sizeof(E) > 2 ? 0 : kBytes / (dims * static_cast<int>(sizeof(E)));
}

// The rows of K ahead at the start of the tile that begins with key `begin`.
template <class E>
FAL_INLINE void prefetch_first_rows(const KvRuns& runs, const DecodeHeads& heads, int begin,
                                    int dims) {
  const KvRun run = runs.at(begin);
  const int rows = min_int(min_int(run.rows, kDecodeKeys) << heads.shift(), rows_ahead<E>(dims));
  for (int i = 0; i < rows; ++i) {
    const auto* key = reinterpret_cast<const E*>(run.k + (i >> heads.shift()) * runs.k_stride());
    prefetch_row(key + (i & (heads.count - 1)) * heads.k_stride, dims);
  }
}

}  // namespace fal::cpu::FAL_CPU_ISA
