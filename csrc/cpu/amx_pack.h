// Rows of bf16 tensors -> operands of AMX's tile products. Nothing is converted or scaled: packing
// is exact. Only elements that belong to the sequence are read; the padding is zeros, because
// whatever a padded element holds is multiplied by something.
//
//   row tiles    [row / 16][dim / 32]       16 rows x 32 dims                  A of S = K Q^T
//   pair tiles   [row / 32][dim / 32][2]    16 pairs of dims x 16 rows         B of S = K Q^T
//   depth tiles  [dim / 16][row / 32]       16 dims x 32 rows (transposed)     A of O^T = V^T P^T
//   row pairs    [row / 32][dim / 16]       16 pairs of rows x 16 dims         B of dV = P^T dO
//
// each a tile of 1 KiB, 64 bytes a row.
#pragma once

#include "amx.h"
#include "pack.h"

namespace fal::cpu::FAL_CPU_ISA {

// The first n <= 32 elements of a row, zeros after them.
FAL_INLINE __m512i load_row_32(const BFloat16* row, int n) {
  if (n >= 32) return _mm512_loadu_si512(row);
  return _mm512_maskz_loadu_epi16((__mmask32{1} << max_int(n, 0)) - 1, row);
}
// The first n <= 16 elements of a row, each in the lower half of a 32-bit lane.
FAL_INLINE __m512i load_row_16(const BFloat16* row, int n) {
  if (n >= 16) return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)row));
  const __mmask16 first = static_cast<__mmask16>((1u << max_int(n, 0)) - 1);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, row));
}
FAL_INLINE void store_tile_row(char* tile, int row, __m512i x) {
  _mm512_store_si512(tile + row * 64, x);
}

// -> row tiles of round_up(n, 32) rows.
template <class Rows>
FAL_INLINE void pack_row_tiles(const Rows& rows, int n, int dims, char* out) {
  const int steps = (dims + kTileDepth - 1) / kTileDepth;
  for (int r = 0; r < round_up(n, kBlock); ++r) {
    char* tile = out + static_cast<int64_t>(r / 16) * steps * kTileBytes;
    for (int s = 0; s < steps; ++s, tile += kTileBytes) {
      store_tile_row(tile, r % 16,
                     r < n ? load_row_32(rows(r) + s * kTileDepth, dims - s * kTileDepth)
                           : _mm512_setzero_si512());
    }
  }
}

FAL_INLINE void store_transposed(Float (&block)[16], char* tile) {
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(tile) + i * 16, block[i]);
}

// -> pair tiles of round_up(n, 32) rows.
template <class Rows>
FAL_INLINE void pack_pair_tiles(const Rows& rows, int n, int dims, char* out) {
  const int steps = (dims + kTileDepth - 1) / kTileDepth;
  for (int r = 0; r < round_up(n, kBlock); r += 16) {
    char* tile = out + (static_cast<int64_t>(r / kBlock) * steps * 2 + r / 16 % 2) * kTileBytes;
    for (int s = 0; s < steps; ++s, tile += 2 * kTileBytes) {
      Float block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = r + i < n
                       ? (Float)load_row_32(rows(r + i) + s * kTileDepth, dims - s * kTileDepth)
                       : set1(0.f);
      }
      store_transposed(block, tile);
    }
  }
}

// -> depth tiles; room for `capacity` rows (a multiple of 32), of which round_up(n, 32) are
// written, and for round_up(dims, 32) dims.
template <class Rows>
FAL_INLINE void pack_depth_tiles(const Rows& rows, int n, int capacity, int dims, char* out) {
  const int steps = capacity / kTileDepth;
  for (int r = 0; r < n; r += kTileDepth) {
    for (int d = 0; d < round_up(dims, kBlock); d += 16) {
      Float block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int even = r + 2 * i;
        __m512i x = _mm512_setzero_si512(), y = x;
        if (even < n) x = load_row_16(rows(even) + d, dims - d);
        if (even + 1 < n) y = load_row_16(rows(even + 1) + d, dims - d);
        block[i] = (Float)_mm512_or_si512(x, _mm512_slli_epi32(y, 16));
      }
      store_transposed(block,
                       out + (static_cast<int64_t>(d / 16) * steps + r / kTileDepth) * kTileBytes);
    }
  }
}

// -> row pairs of round_up(n, 32) rows and round_up(dims, 32) dims.
template <class Rows>
FAL_INLINE void pack_row_pairs(const Rows& rows, int n, int dims, char* out) {
  const int blocks = round_up(dims, kBlock) / 16;
  for (int r = 0; r < round_up(n, kBlock); r += 2) {
    char* tile = out + static_cast<int64_t>(r / kBlock) * blocks * kTileBytes;
    for (int d = 0; d < blocks * 16; d += 16, tile += kTileBytes) {
      __m512i x = _mm512_setzero_si512(), y = x;
      if (r < n) x = load_row_16(rows(r) + d, dims - d);
      if (r + 1 < n) y = load_row_16(rows(r + 1) + d, dims - d);
      store_tile_row(tile, r % kBlock / 2, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
    }
  }
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

}  // namespace fal::cpu::FAL_CPU_ISA
