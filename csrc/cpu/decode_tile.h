// The products of decode: M query rows that read one K/V head against a tile of up to kDecodeKeys
// keys, K/V read as they are stored. Lanes are dimensions of a row; scores have lanes
// (key, query row), key-major: lane l of vector n is key n * (kLanes / M) + l / M, row l % M.
//
// S = K Q^T keeps kLanes sums at once (kLanes / M keys x M rows), so that each element of K is
// loaded and converted once for M rows, and turns them into one vector of scores by kLanes - 1
// exchange-and-adds. O += P V keeps M rows x a few vectors of O in registers over the whole tile.
#pragma once

#include "pack.h"

namespace fal::cpu::FAL_CPU_ISA {

constexpr int kDecodeKeys = 64;
// Most query rows that share a load: with 8 lanes the sums of 4 rows and the operands fill the
// registers.
constexpr int kDecodeGroup = kLanes >= 16 ? 8 : 4;
// Vectors of O that stay in registers: half of the 16 or 32 there are.
constexpr int kDecodeAccumulators = kRows > 6 || kVectors > 2 ? 16 : 8;

// One tile's rows, wherever they are. Entries past the last key repeat it.
template <class E>
struct DecodeRows {
  const E *k[kDecodeKeys + kLanes], *v[kDecodeKeys + kLanes];
  float k_scale[kDecodeKeys + kLanes], v_scale[kDecodeKeys + kLanes];  // quantised K/V only

  FAL_INLINE void fetch(const KvRuns& runs, int begin, int n) {
    constexpr bool kQuantised = sizeof(E) == 1;
    const int64_t k_stride = runs.k_stride(), v_stride = runs.v_stride();
    for (int r = 0; r < n;) {
      const KvRun run = runs.at(begin + r);
      const int end = min_int(n - r, run.rows);
      for (int i = 0; i < end; ++i) {
        k[r + i] = reinterpret_cast<const E*>(run.k + i * k_stride);
        v[r + i] = reinterpret_cast<const E*>(run.v + i * v_stride);
      }
      if constexpr (kQuantised) {
        for (int i = 0; i < end; ++i) {
          k_scale[r + i] = run.k_scale[i * runs.kv.k_scale.row];
          v_scale[r + i] = run.v_scale[i * runs.kv.v_scale.row];
        }
      }
      r += end;
    }
    for (int i = 0; i < kLanes; ++i) {
      k[n + i] = k[n - 1];
      v[n + i] = v[n - 1];
      if constexpr (kQuantised) k_scale[n + i] = v_scale[n + i] = 0.f;
    }
  }
};

template <class E>
FAL_INLINE void prefetch_row(const E* row, int dims) {
  const char* begin = reinterpret_cast<const char*>(row);
  for (int at = 0; at < dims * static_cast<int>(sizeof(E)); at += 64) {
    __builtin_prefetch(begin + at);
  }
}

// The key of each lane, relative to its vector's first; and the query row.
template <int M>
FAL_INLINE Int lane_key() {
  return iota() / M;
}
template <int M>
FAL_INLINE Int lane_row() {
  return iota() & (M - 1);
}

template <int kBlock>
FAL_INLINE void add_lanes_step(Float (&c)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * kBlock) {
    exchange_blocks<kBlock>(c[i], c[i + kBlock], std::make_integer_sequence<int, kLanes>{});
    c[i] += c[i + kBlock];
  }
}

// Lane l of the result is the sum of c[l]'s lanes.
FAL_INLINE Float add_lanes(Float (&c)[kLanes]) {
  add_lanes_step<1>(c);
  add_lanes_step<2>(c);
  if constexpr (kLanes > 4) add_lanes_step<4>(c);
  if constexpr (kLanes > 8) add_lanes_step<8>(c);
  return c[0];
}

// The maximum over the lanes of each query row, in every lane of it.
template <int M>
FAL_INLINE Float max_over_keys(Float x) {
  if constexpr (M <= 8 && kLanes > 8) x = max(permute(x, (iota() + 8) & (kLanes - 1)), x);
  if constexpr (M <= 4 && kLanes > 4) x = max(permute(x, (iota() + 4) & (kLanes - 1)), x);
  if constexpr (M <= 2) x = max(permute(x, (iota() + 2) & (kLanes - 1)), x);
  if constexpr (M <= 1) x = max(permute(x, (iota() + 1) & (kLanes - 1)), x);
  return x;
}

// scores[key][M] = rows of K times M query rows at q, `ld` apart; lanes past key n are -inf. With
// kPrefetch, the tile's rows of V are on their way when this returns.
template <class E, int M, bool kPrefetch>
FAL_INLINE void decode_scores(const DecodeRows<E>& rows, int n, const float* q, int ld, int dims,
                              int dims_v, float* scores) {
  constexpr int kKeys = kLanes / M;
  const int whole = round_down(dims, kLanes);
  for (int r = 0; r < n; r += kKeys) {
    if constexpr (kPrefetch) {
      for (int j = 0; j < kKeys; ++j) prefetch_row(rows.v[r + j], dims_v);
    }
    const E* k[kKeys];
    Float c[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) k[j] = rows.k[r + j];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) c[i] = set1(0.f);
#pragma GCC unroll 1
    for (int d = 0; d < whole; d += kLanes) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        const Float x = load(k[j] + d);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) c[j * M + i] = fma(x, load(q + i * ld + d), c[j * M + i]);
      }
    }
    if (whole < dims) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        const Float x = load_first(k[j] + whole, dims - whole);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) c[j * M + i] = fma(x, load(q + i * ld + whole), c[j * M + i]);
      }
    }
    Float s = add_lanes(c);
    if constexpr (sizeof(E) == 1) s *= permute(load(rows.k_scale + r), lane_key<M>());
    if (r + kKeys > n) s = select(less(lane_key<M>() + r, set1(n)), s, set1(-FAL_INFINITY));
    store(scores + r * M, s);
  }
}

// P = exp2(S - max) in place (times V's factors, if it is quantised), the running maximum and the
// lanes' sums; alpha shrinks what was accumulated before.
template <class E, int M>
FAL_INLINE void decode_softmax(const DecodeRows<E>& rows, int n, float* scores, float* max_lanes,
                               float* sum_lanes, float* alpha) {
  constexpr int kKeys = kLanes / M;
  const Float before = load(max_lanes);
  Float top = before;
  for (int r = 0; r < n; r += kKeys) top = max(load(scores + r * M), top);
  top = max_over_keys<M>(top);
  const Float reference = select(equal(top, set1(-FAL_INFINITY)), set1(0.f), top);
  const Float shrink = exp2(before - reference);
  Float total = load(sum_lanes) * shrink;
  for (int r = 0; r < n; r += kKeys) {
    Float p = exp2(load(scores + r * M) - reference);
    total += p;
    if constexpr (sizeof(E) == 1) p *= permute(load(rows.v_scale + r), lane_key<M>());
    store(scores + r * M, p);
  }
  store(max_lanes, top);
  store(sum_lanes, total);
  store(alpha, shrink);
}

// Vectors [d, d + kWidth) of O = alpha O + P V over n keys.
template <class E, int M, int kWidth>
FAL_INLINE void decode_columns(const DecodeRows<E>& rows, int n, const float* p, const float* alpha,
                               int d, int dims, float* out, int ld) {
  Float c[M][kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int w = 0; w < kWidth; ++w) {
      c[i][w] = load(out + i * ld + d + w * kLanes) * set1(alpha[i]);
    }
  }
#pragma GCC unroll 1
  for (int r = 0; r < n; ++r) {
    Float x[kWidth];
    // Only a single vector may be the last, narrower one.
#pragma GCC unroll 16
    for (int w = 0; w < kWidth; ++w) {
      x[w] = kWidth == 1 ? load_dims(rows.v[r], d, dims) : load(rows.v[r] + d + w * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Float weight = set1(p[r * M + i]);
#pragma GCC unroll 16
      for (int w = 0; w < kWidth; ++w) c[i][w] = fma(weight, x[w], c[i][w]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int w = 0; w < kWidth; ++w) store(out + i * ld + d + w * kLanes, c[i][w]);
  }
}

// O[M][ld] = alpha O + P V. `next` is the tile after this one, or null: its rows of K are fetched
// meanwhile.
template <class E, int M>
FAL_INLINE void decode_values(const DecodeRows<E>& rows, int n, const float* p, const float* alpha,
                              int dims, float* out, int ld, const DecodeRows<E>* next, int next_n,
                              int dims_k) {
  constexpr int kWidth = kDecodeAccumulators / M > 8 ? 8 : kDecodeAccumulators / M;
  int d = 0;
  for (; d + kWidth * kLanes <= dims; d += kWidth * kLanes) {
    decode_columns<E, M, kWidth>(rows, n, p, alpha, d, dims, out, ld);
    if (next && d == 0) {
      for (int r = 0; r < next_n; ++r) prefetch_row(next->k[r], dims_k);
    }
  }
  for (; d < dims; d += kLanes) decode_columns<E, M, 1>(rows, n, p, alpha, d, dims, out, ld);
}

// The same when query rows see different keys: row i just those of seen[i], because a masked
// element of V may be a NaN and 0 * NaN is NaN.
template <class E, int M>
FAL_INLINE void decode_values_exactly(const DecodeRows<E>& rows, const Range (&seen)[M],
                                      const float* p, const float* alpha, int dims, float* out,
                                      int ld) {
  for (int i = 0; i < M; ++i) {
    for (int d = 0; d < dims; d += kLanes) {
      Float c = load(out + i * ld + d) * set1(alpha[i]);
      for (int r = seen[i].begin; r < seen[i].end; ++r) {
        c = fma(set1(p[r * M + i]), load_dims(rows.v[r], d, dims), c);
      }
      store(out + i * ld + d, c);
    }
  }
}

}  // namespace fal::cpu::FAL_CPU_ISA
