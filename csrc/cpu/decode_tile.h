// The products of decode: the query rows of a few K/V heads against a tile of up to kDecodeKeys
// keys, K/V read as they are stored and in the order in which memory holds them: all heads of a
// key, then the next key. The processor's prefetchers follow that; head by head they do not.
//
// A column is one (head, query row) of a pass: column h * M + i is row i of head h, and a pass has
// columns = heads * M of them, a power of two. Scores are [key][column]. S = K Q^T keeps kLanes
// sums at once (kLanes / M rows of K x M query rows), so that each element of K is loaded and
// converted once for M rows, and turns them into one vector of scores by kLanes - 1
// exchange-and-adds. O += P V keeps M rows x a few vectors of O in registers over the whole tile, a
// head at a time, or, for one row, goes through L1 key by key, as memory holds V.
//
// Every column is computed by itself, in an order that depends on nothing but its keys: how heads
// are gathered into passes changes no bit.
#pragma once

#include "decode_keys.h"

namespace fal::cpu::FAL_CPU_ISA {

// Most query rows that share a load: with 8 lanes the sums of 4 rows and the operands fill the
// registers.
constexpr int kDecodeGroup = kLanes >= 16 ? 8 : 4;
// Vectors of O that stay in registers: half of the 16 or 32 there are.
constexpr int kDecodeAccumulators = kRows > 6 || kVectors > 2 ? 16 : 8;

// Two loads a line instead of one: the processor's prefetchers then run further ahead.
#if defined(__AVX512F__)
FAL_INLINE __m512i load_line(const void* line) {
  const auto* halves = static_cast<const __m256i_u*>(line);
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(halves));
  __m512i x;  // not to be made one load again
  asm("vinserti64x4 $1, %2, %1, %0" : "=v"(x) : "v"(low), "m"(halves[1]));
  return x;
}
FAL_INLINE Float load_row(const float* p) { return (Float)load_line(p); }
#else
FAL_INLINE Float load_row(const float* p) { return load(p); }
#endif
template <class E>
FAL_INLINE Float load_row(const E* p) {
  return load(p);
}

// How a row of K, kStep dims at a time, meets a row of Q.
template <class E>
struct DecodeProduct {
  using Query = float;
  using Row = Float;
  static constexpr int kStep = kLanes;
  static constexpr bool kScaledQ = true;  // the scale is in Q

  FAL_INLINE static Row row(const E* k) { return load_row(k); }
  FAL_INLINE static Row row_first(const E* k, int n) { return load_first(k, n); }
  FAL_INLINE static Float add(Row x, const Query* q, Float c) { return fma(x, load(q), c); }
};
// Two vectors at a time.
template <>
struct DecodeProduct<Float8E4M3> {
  using Query = float;
  struct Row {
    Float low, high;
  };
  static constexpr int kStep = 2 * kLanes;
  static constexpr bool kScaledQ = true;

  FAL_INLINE static Row row(const Float8E4M3* k) {
    Row x;
    load_units(k, &x.low, &x.high);
    return x;
  }
  FAL_INLINE static Row row_first(const Float8E4M3* k, int n) {
    Float8E4M3 lanes[kStep] = {};
    for (int i = 0; i < n; ++i) lanes[i] = k[i];
    return row(lanes);
  }
  FAL_INLINE static Float add(Row x, const Query* q, Float c) {
    return fma(x.high, load(q + kLanes), fma(x.low, load(q), c));
  }
};
#if defined(__AVX512BF16__)
// Pairs of bf16 as they are: twice the arithmetic and no conversion. The scale would round Q.
template <>
struct DecodeProduct<BFloat16> {
  using Query = BFloat16;
  using Row = __m512i;
  static constexpr int kStep = 2 * kLanes;
  static constexpr bool kScaledQ = false;

  FAL_INLINE static Row row(const BFloat16* k) { return load_line(k); }
  FAL_INLINE static Row row_first(const BFloat16* k, int n) {
    return _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, k);
  }
  FAL_INLINE static Float add(Row x, const Query* q, Float c) {
    return _mm512_dpbf16_ps(c, (__m512bh)x, (__m512bh)_mm512_loadu_si512(q));
  }
};
#endif

// kWidth vectors of a row of V from dim d on, in the units of its stored type. Only a single vector
// may be the last, narrower one.
template <class E, int kWidth>
FAL_INLINE void load_values(const E* row, int d, int dims, Float (&x)[kWidth]) {
#pragma GCC unroll 16
  for (int w = 0; w < kWidth; ++w) {
    x[w] = kWidth == 1 ? load_dims(row, d, dims) : load_row(row + d + w * kLanes);
  }
}
template <int kWidth>
FAL_INLINE void load_values(const Float8E4M3* row, int d, int dims, Float (&x)[kWidth]) {
  if constexpr (kWidth == 1) {
    x[0] = load_dims(row, d, dims) * (1.f / kFloat8Unit);
  } else {
    static_assert(kWidth % 2 == 0, "vectors come in pairs");
#pragma GCC unroll 16
    for (int w = 0; w < kWidth; w += 2) load_units(row + d + w * kLanes, &x[w], &x[w + 1]);
  }
}

template <int kBlock>
FAL_INLINE void add_lanes_step(Float (&c)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * kBlock) {
    exchange_blocks<kBlock>(c[i], c[i + kBlock], std::make_integer_sequence<int, kLanes>{});
    c[i] += c[i + kBlock];
  }
}

// Lane l of the result is the sum of c[l]'s lanes, added in the same order for every l.
FAL_INLINE Float add_lanes(Float (&c)[kLanes]) {
  add_lanes_step<1>(c);
  add_lanes_step<2>(c);
  if constexpr (kLanes > 4) add_lanes_step<4>(c);
  if constexpr (kLanes > 8) add_lanes_step<8>(c);
  return c[0];
}

// c[i] = lane by lane, a row of K times query row i of those at q, `ld` apart.
template <class E, int M, int kDims>
FAL_INLINE void decode_dots(const E* k, const typename DecodeProduct<E>::Query* q, int ld, int dims,
                            Float* c) {
  using Product = DecodeProduct<E>;
  constexpr int kStep = Product::kStep;
  const auto add = [&](int d, const typename Product::Row& x) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) c[i] = Product::add(x, q + i * ld + d, c[i]);
  };
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) c[i] = set1(0.f);
  if constexpr (kDims > 0) {
    static_assert(kDims % kStep == 0, "whole vectors");
#pragma GCC unroll 32
    for (int d = 0; d < kDims; d += kStep) add(d, Product::row(k + d));
  } else {
    const int whole = round_down(dims, kStep);
#pragma GCC unroll 1
    for (int d = 0; d < whole; d += kStep) add(d, Product::row(k + d));
    if (whole < dims) add(whole, Product::row_first(k + whole, dims - whole));
  }
}

// run(std::integral_constant<int, d>) with a head dim whose loops are written out, or 0: a row's
// loops are so short that counting them takes as long as what they do.
template <class Run>
FAL_INLINE void with_known_dims(int dims, const Run& run) {
  if (dims == 128) {
    run(std::integral_constant<int, 128>{});
  } else if (dims == 64) {
    run(std::integral_constant<int, 64>{});
  } else {
    run(std::integral_constant<int, 0>{});
  }
}

// scores[key][columns] = scale * rows of K times the query rows at q, `ld` apart: whole vectors of
// scores up to the tile's last key. If wanted, its rows of V are on their way when this returns,
// and rows of K ahead. kDims: all dims, of K and V, where they are known.
template <class E, int M, int kDims>
static FAL_NOINLINE void decode_scores(const DecodeKeys<E>& keys, const DecodeHeads& heads,
                                       const typename DecodeProduct<E>::Query* q, int ld, int dims,
                                       int dims_v, bool prefetch, float scale, float* scores) {
  using Product = DecodeProduct<E>;
  constexpr int kRowsAtOnce = kLanes / M;
  if constexpr (kDims > 0) ld = dims = dims_v = kDims;
  const int shift = heads.shift(), mask = heads.count - 1;
  const int rows = keys.count << shift, ahead = rows_ahead<E>(dims);
  for (int r = 0; r < rows; r += kRowsAtOnce) {
    Float c[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int key = (r + j) >> shift, head = (r + j) & mask;
      if (prefetch) {
        prefetch_row(keys.v[key] + head * heads.v_stride, dims_v);
        if (const int next = r + j + ahead; ahead > 0 && next < rows) {
          prefetch_row(keys.k[next >> shift] + (next & mask) * heads.k_stride, dims);
        }
      }
      decode_dots<E, M, kDims>(keys.k[key] + head * heads.k_stride, q + head * (M * ld), ld, dims,
                               c + j * M);
    }
    Float s = add_lanes(c);
    if constexpr (!Product::kScaledQ) s *= scale;
    if constexpr (DecodeKeys<E>::kQuantised) s *= permute(load(keys.k_scale + r), iota() / M);
    if (r + kRowsAtOnce > rows) {
      s = select(less(iota() / M + r, set1(rows)), s, set1(-FAL_INFINITY));
    }
    store(scores + r * M, s);
  }
}

// The scores of the keys that a tile lacks.
FAL_INLINE void hide_rest(int n, int columns, float* scores) {
  for (int at = round_up(n * columns, kLanes); at < kDecodeKeys * columns; at += kLanes) {
    store(scores + at, set1(-FAL_INFINITY));
  }
}

// P = exp2(S - max) in place (times V's factors, if they are given), the running maximum and sum of
// each column, and alpha, which shrinks what was accumulated before. Arrays of columns repeat up to
// a whole vector. The sum over a tile is the same tree for any number of columns: key j with j + 8,
// then + 4, + 2, + 1. kVectors: of a vector of columns.
template <int kVectors, bool kFactors>
static FAL_NOINLINE void decode_softmax(const float* factors, int columns, int row_shift,
                                        float* scores, float* max_columns, float* sum_columns,
                                        float* alpha) {
  const int stride = max_int(columns, kLanes);
  for (int c = 0; c < columns; c += kLanes) {
    const Float before = load(max_columns + c);
    Float p[kVectors], top = before;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) top = max(p[v] = load(scores + v * stride + c), top);
    for (int s = kLanes / 2; s >= columns; s /= 2) {
      top = max(permute(top, (iota() + s) & (kLanes - 1)), top);
    }
    const Float reference = select(equal(top, set1(-FAL_INFINITY)), set1(0.f), top);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * stride + c;
      p[v] = exp2(p[v] - reference);
      Float x = p[v];
      if constexpr (kFactors) {
        x *= permute(load(factors + (at >> row_shift)), iota() >> row_shift);
      }
      store(scores + at, x);
    }
#pragma GCC unroll 16
    for (int half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
      for (int v = 0; v < half; ++v) p[v] += p[v + half];
    }
    for (int s = kLanes / 2; s >= columns; s /= 2) {
      p[0] += permute(p[0], (iota() + s) & (kLanes - 1));
    }
    const Float shrink = exp2(before - reference);
    store(max_columns + c, top);
    store(sum_columns + c, fma(load(sum_columns + c), shrink, p[0]));
    store(alpha + c, shrink);
  }
}

template <bool kFactors>
FAL_INLINE void decode_softmax(const float* factors, int columns, int row_shift, float* scores,
                               float* max_columns, float* sum_columns, float* alpha) {
  const auto run = [&](auto vectors) {
    decode_softmax<decltype(vectors)::value, kFactors>(factors, columns, row_shift, scores,
                                                       max_columns, sum_columns, alpha);
  };
  switch (kDecodeKeys * min_int(columns, kLanes) / kLanes) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    case 8:
      return run(std::integral_constant<int, 8>{});
    default:
      return run(std::integral_constant<int, kDecodeKeys>{});
  }
}

// O *= alpha, where that changes anything.
FAL_INLINE void decode_shrink(const float* alpha, int columns, float* out, int ld) {
  for (int c = 0; c < columns; ++c) {
    if (alpha[c] == 1.f) continue;
    float* row = out + static_cast<int64_t>(c) * ld;
    for (int d = 0; d < ld; d += kLanes) store(row + d, load(row + d) * set1(alpha[c]));
  }
}

// Vectors [d, d + kWidth) of O += P V over the tile's keys, for one head.
template <class E, int M, int kWidth>
FAL_INLINE void decode_columns(const DecodeKeys<E>& keys, int64_t offset, const float* p, int p_ld,
                               int d, int dims, float* out, int ld) {
  Float c[M][kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int w = 0; w < kWidth; ++w) {
      c[i][w] = load(out + i * ld + d + w * kLanes);
    }
  }
#pragma GCC unroll 1
  for (int r = 0; r < keys.count; ++r) {
    Float x[kWidth];
    load_values(keys.v[r] + offset, d, dims, x);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Float weight = set1(p[r * p_ld + i]);
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

// O[column][ld] += P V, a head at a time: O stays in registers.
template <class E, int M>
FAL_INLINE void decode_values(const DecodeKeys<E>& keys, const DecodeHeads& heads, const float* p,
                              int dims, float* out, int ld) {
  constexpr int kWidth = kDecodeAccumulators / M > 8 ? 8 : kDecodeAccumulators / M;
  const int columns = heads.count * M;
  for (int h = 0; h < heads.count; ++h) {
    const int64_t offset = h * heads.v_stride;
    const float* p_head = p + h * M;
    float* out_head = out + static_cast<int64_t>(h) * M * ld;
    int d = 0;
    const auto add = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      decode_columns<E, M, kWidth>(keys, offset, p_head, columns, d, dims, out_head, ld);
      d += kWidth * kLanes;
    };
    while (d + kWidth * kLanes <= dims) add(std::integral_constant<int, kWidth>{});
    if constexpr (kWidth > 4) {
      if (d + 4 * kLanes <= dims) add(std::integral_constant<int, 4>{});
    }
    while (d < dims) add(std::integral_constant<int, 1>{});
  }
}

// The same for one query row a head, a key at a time and so in memory's order: O passes through L1.
template <class E, int kDims>
static FAL_NOINLINE void decode_values_in_order(const DecodeKeys<E>& keys, const DecodeHeads& heads,
                                                const float* p, int dims, float* out, int ld) {
  constexpr int kPair = 2;  // fp8 is loaded so
  if constexpr (kDims > 0) ld = dims = kDims;
  const int count = heads.count;
  const int64_t stride = heads.v_stride;
  for (int r = 0; r < keys.count; ++r) {
    const E* v = keys.v[r];
    float* row = out;
#pragma GCC unroll 1
    for (int h = 0; h < count; ++h, v += stride, row += ld, ++p) {
      const Float weight = set1(*p);
      const auto add = [&](int d, auto width) {
        constexpr int kWidth = decltype(width)::value;
        Float x[kWidth];
        load_values(v, d, dims, x);
#pragma GCC unroll 2
        for (int w = 0; w < kWidth; ++w) {
          float* o = row + d + w * kLanes;
          store(o, fma(weight, x[w], load(o)));
        }
      };
      const std::integral_constant<int, kPair> pair{};
      if constexpr (kDims > 0) {
        static_assert(kDims % (kPair * kLanes) == 0, "whole pairs");
#pragma GCC unroll 32
        for (int d = 0; d < kDims; d += kPair * kLanes) add(d, pair);
      } else {
        int d = 0;
        for (; d + kPair * kLanes <= dims; d += kPair * kLanes) add(d, pair);
        for (; d < dims; d += kLanes) add(d, std::integral_constant<int, 1>{});
      }
    }
  }
}

// The same when query rows see different keys: column c just those of the bits of visible[c],
// because a masked element of V may be a NaN and 0 * NaN is NaN.
template <class E, int M>
FAL_INLINE void decode_values_exactly(const DecodeKeys<E>& keys, const DecodeHeads& heads,
                                      const int32_t* visible, const float* p, int dims, float* out,
                                      int ld) {
  const int columns = heads.count * M;
  for (int c = 0; c < columns; ++c) {
    const int64_t offset = c / M * heads.v_stride;
    for (int d = 0; d < dims; d += kLanes) {
      float* at = out + static_cast<int64_t>(c) * ld + d;
      Float sum = load(at);
      for (uint32_t bits = visible[c]; bits; bits &= bits - 1) {
        const int r = __builtin_ctz(bits);
        Float x[1];
        load_values(keys.v[r] + offset, d, dims, x);
        sum = fma(set1(p[r * columns + c]), x[0], sum);
      }
      store(at, sum);
    }
  }
}

}  // namespace fal::cpu::FAL_CPU_ISA
