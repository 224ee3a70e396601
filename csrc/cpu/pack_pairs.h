// Rows of bf16 tensors -> tiles of pairs, as pack.h makes tiles of fp32. Nothing is converted or
// scaled: packing is exact. Only rows that belong to the sequence are read; the padding is zeros,
// because it is multiplied by something.
//
//   rows        [row][ld]                              pairs of dims, as they are
//   panels      [dim / kPanel][row / 2][kPanel]        pairs of rows: two rows interleaved
//   transposed  [row / kPanel][dim / 2][kPanel]        pairs of dims: 32-bit words transposed
#pragma once

#include "pack.h"

#if defined(__AVX512BF16__)
namespace fal::cpu::FAL_CPU_ISA {

// The first n <= 32 elements of a row, zeros after them.
FAL_INLINE __m512i load_row_32(const BFloat16* row, int n) {
  if (n >= 32) return _mm512_loadu_si512(row);
  return _mm512_maskz_loadu_epi16((__mmask32{1} << max_int(n, 0)) - 1, row);
}
// The first n <= 16 elements of a row, zeros after them.
FAL_INLINE __m256i load_row_16(const BFloat16* row, int n) {
  if (n >= 16) return _mm256_loadu_si256((const __m256i*)row);
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << max_int(n, 0)) - 1), row);
}

// True if no element of the rows is infinite or NaN.
template <class Rows>
FAL_INLINE bool rows_finite(const Rows& rows, int n, int dims) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 special = 0;
  for (int r = 0; r < n; ++r) {
    for (int d = 0; d < dims; d += 32) {
      const __m512i x = _mm512_and_si512(load_row_32(rows(r) + d, dims - d), exponent);
      special |= _mm512_cmpeq_epi16_mask(x, exponent);
    }
  }
  return special == 0;
}

// Collects whether every element seen is finite.
struct FinitePairs {
  __mmask32 special = 0;

  FAL_INLINE void see(__m512i x) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
  }
  FAL_INLINE bool all_finite() const { return special == 0; }
};

// -> [row][ld], rows up to padded_rows zero. True if all is finite.
template <class Rows>
FAL_INLINE bool pack_rows(const Rows& rows, int n, int padded_rows, int dims, int ld, Pair* out) {
  FinitePairs finite;
  for (int r = 0; r < n; ++r) {
    const BFloat16* row = rows(r);
    for (int d = 0; d < dims; d += 2 * kLanes) {
      const __m512i x = load_row_32(row + d, dims - d);
      finite.see(x);
      store(out + r * ld + d / 2, Pairs{(Int)x});
    }
  }
  memset(out + static_cast<int64_t>(n) * ld, 0, sizeof(Pair) * (padded_rows - n) * ld);
  return finite.all_finite();
}

// -> [dim / kPanel][capacity / 2][kPanel]. True if all is finite.
template <class Rows>
FAL_INLINE bool pack_panels(const Rows& rows, int n, int capacity, int dims, Pair* out) {
  FinitePairs finite;
  for (int r = 0; r < n; r += 2) {
    const BFloat16 *even = rows(r), *odd = r + 1 < n ? rows(r + 1) : nullptr;
    for (int d = 0; d < dims; d += kLanes) {
      const Pairs x = pair_rows(load_row_16(even + d, dims - d),
                                odd ? load_row_16(odd + d, dims - d) : _mm256_setzero_si256());
      finite.see((__m512i)x.lanes);
      store(out + static_cast<int64_t>(d / kPanel * kPanel) * (capacity / 2) + r / 2 * kPanel +
                d % kPanel,
            x);
    }
  }
  return finite.all_finite();
}

// The transpose -> [row / kPanel][dims / 2, rounded up][kPanel]; rows up to a whole panel zero.
template <class Rows>
FAL_INLINE void pack_transposed(const Rows& rows, int n, int dims, Pair* out) {
  const int words = (dims + 1) / 2;
  for (int r0 = 0; r0 < round_up(n, kPanel); r0 += kLanes) {
    Pair* panel = out + static_cast<int64_t>(r0 / kPanel * kPanel) * words + r0 % kPanel;
    for (int w0 = 0; w0 < words; w0 += kLanes) {
      Float block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] =
            r0 + i < n ? (Float)load_row_32(rows(r0 + i) + 2 * w0, dims - 2 * w0) : set1(0.f);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (w0 + i < words) store(panel + (w0 + i) * kPanel, Pairs{(Int)block[i]});
      }
    }
  }
}

}  // namespace fal::cpu::FAL_CPU_ISA
#endif
