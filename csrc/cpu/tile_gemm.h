// The one inner loop of the engine: C[kRows][kPanel] += A B for a few rows of A, read as
// broadcasts, and a panel of B, read as vectors. All products of forward and backward are this loop
// with other strides (scores S^T = K Q^T, outputs O = P V, and the five of backward).
//
// Operands are tiles of words (fp32, or pairs of bf16 along the depth) in scratch memory:
//   rows    [row][ld]                A of the scores: word (i, k) at a + i * ld + k
//   panels  [dim / kPanel][row][kPanel]   B: one panel's rows are adjacent
//   scores  [key][kScoreStride]      lanes are query rows. It is the transposed A of O = P V as it
//                                    stands: word (i, k) at a + i + k * kScoreStride
#pragma once

#include "simd.h"

namespace fal::cpu::FAL_CPU_ISA {

// Query rows and keys of one tile: multiples of kPanel (rows) and of kRows (both) for every
// instruction set, and of 16, the dropout generator's block.
constexpr int kTileRows = 192;
constexpr int kTileKeys = 144;
// An odd number of cache lines, so that a column of scores spreads over all sets of the L1 cache.
constexpr int kScoreStride = kTileRows + 16;
static_assert(kTileRows % kPanel == 0 && kTileRows % kRows == 0 && kTileRows % 16 == 0, "");
static_assert(kTileKeys % kRows == 0 && kTileKeys % 16 == 0, "");

FAL_INLINE int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }
FAL_INLINE int round_down(int x, int unit) { return x / unit * unit; }

// Words that hold `elements` along the depth.
template <class Word>
FAL_INLINE int words(int elements) {
  return (elements + kPerWord<Word> - 1) / kPerWord<Word>;
}
static_assert(kTileRows % 2 == 0 && kTileKeys % 2 == 0 && kRows % 2 == 0, "tiles are whole pairs");

template <int kV>
FAL_INLINE void clear(Float (&c)[kRows][kV]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) c[i][v] = set1(0.f);
  }
}

// c += sum over k < depth of a[i * a_row + k * a_depth] * b[k * kPanel + lane]. The loop over k is
// not unrolled: unrolling by two cost 40 % with GCC (accumulators spilled).
template <int kV, class Word>
FAL_INLINE void multiply_add(Float (&c)[kRows][kV], const Word* a, int64_t a_row, int64_t a_depth,
                             const Word* b, int depth) {
  // One pointer for every three rows: an address is then pointer + {0, 1, 2} * a_row.
  const Word* p[kRows / 3];
#pragma GCC unroll 16
  for (int g = 0; g < kRows / 3; ++g) p[g] = a + 3 * g * a_row;
#pragma GCC unroll 1
  for (int k = 0; k < depth; ++k) {
    decltype(load(b)) row[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto x = broadcast(p[i / 3] + i % 3 * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) c[i][v] = fma(x, row[v], c[i][v]);
    }
#pragma GCC unroll 16
    for (int g = 0; g < kRows / 3; ++g) p[g] += a_depth;
    b += kPanel;
  }
}

// Calls f(integral_constant kV, first dimension) for each panel of a tile that is `vectors` vectors
// wide; the last panel may be narrower than kVectors.
template <class F>
FAL_INLINE void for_each_panel(int vectors, F&& f) {
  int v = 0;
  for (; v + kVectors <= vectors; v += kVectors) {
    f(std::integral_constant<int, kVectors>{}, v * kLanes);
  }
  if (vectors - v == 1) f(std::integral_constant<int, 1>{}, v * kLanes);
  if constexpr (kVectors > 2) {
    if (vectors - v == 2) f(std::integral_constant<int, 2>{}, v * kLanes);
    if (vectors - v == 3) f(std::integral_constant<int, 3>{}, v * kLanes);
  }
}

// C[rows][ld] += A B over whole panels, the range of k trimmed for each group of kRows rows.
//   a_row, a_depth   strides of A, in words
//   b                panels of room for `b_rows` elements of depth each
//   clear_c          C starts from 0; otherwise from C, times scale[row] when kScaled
//   depth_of(r)      Range of elements along the depth for rows [r, r + kRows); what shares a word
//                    with its ends is 0 in A
// C has round_up(rows, kRows) rows of memory; those past `rows` receive arbitrary values.
template <bool kScaled, class Word, class DepthOf>
FAL_INLINE void accumulate(float* c_tile, int64_t ld, int rows, int vectors, const Word* a,
                           int64_t a_row, int64_t a_depth, const Word* b, int b_rows, bool clear_c,
                           const float* scale, DepthOf&& depth_of) {
  for_each_panel(vectors, [&](auto width, int dim) {
    constexpr int kV = decltype(width)::value;
    const Word* panel = b + static_cast<int64_t>(dim) * words<Word>(b_rows);
    for (int r = 0; r < rows; r += kRows) {
      const Range elements = depth_of(r);
      const Range k{elements.begin / kPerWord<Word>, words<Word>(elements.end)};
      if (k.empty() && !clear_c) continue;
      float* c_row = c_tile + r * ld + dim;
      Float c[kRows][kV];
      clear(c);
      multiply_add(c, a + r * a_row + k.begin * a_depth, a_row, a_depth, panel + k.begin * kPanel,
                   k.size());
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) {
          float* to = c_row + i * ld + v * kLanes;
          // A tile's sum is added as a whole: over a long sequence, one running sum of every
          // product loses several times as much to rounding.
          if (!clear_c) {
            c[i][v] = kScaled ? fma(load(to), set1(scale[r + i]), c[i][v]) : load(to) + c[i][v];
          }
          store(to, c[i][v]);
        }
      }
    }
  });
}

// The same for operands that hold a NaN or an infinity at a masked place: one row at a time over
// exactly what is visible, shows(row, k) within depth_of_row(row), because 0 * NaN in a group's
// trimmed range would be NaN.
template <class Word, class DepthOf, class Shows>
FAL_NOINLINE void accumulate_exactly(float* c_tile, int64_t ld, int rows, int vectors,
                                     const Word* a, int64_t a_row, int64_t a_depth, const Word* b,
                                     int b_rows, bool clear_c, const float* scale,
                                     DepthOf&& depth_of_row, Shows&& shows) {
  for (int v = 0; v < vectors; ++v) {
    const int dim = v * kLanes;
    const Word* panel =
        b + static_cast<int64_t>(dim / kPanel * kPanel) * words<Word>(b_rows) + dim % kPanel;
    for (int r = 0; r < rows; ++r) {
      float* c_row = c_tile + r * ld + dim;
      Float c = clear_c ? set1(0.f) : load(c_row) * set1(scale ? scale[r] : 1.f);
      const Range range = depth_of_row(r);
      for (int k = range.begin; k < range.end; ++k) {
        if (!shows(r, k)) continue;
        const int word = k / kPerWord<Word>, part = k % kPerWord<Word>;
        c = fma(element(broadcast(a + r * a_row + word * a_depth), part),
                element(load(panel + word * kPanel), part), c);
      }
      store(c_row, c);
    }
  }
}

}  // namespace fal::cpu::FAL_CPU_ISA
