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

#include <type_traits>

#include "amx.h"
#include "pack_pairs.h"

namespace fal::cpu::FAL_CPU_ISA {

FAL_INLINE void store_tile_row(char* tile, int row, __m512i x) {
  _mm512_store_si512(tile + row * 64, x);
}
FAL_INLINE void store_transposed(Float (&block)[16], char* tile) {
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(tile) + i * 16, block[i]);
}

// Where up to 32 rows are; only the first n exist. Asked once a row, not once a row and step:
// `whole` blocks then load without a branch.
struct RowBlock {
  const BFloat16* row[32];
  int n;

  template <class Rows>
  FAL_INLINE RowBlock(const Rows& rows, int first, int end, int size)
      : n(min_int(end - first, size)) {
    for (int i = 0; i < n; ++i) row[i] = rows(first + i);
  }
  // Elements [d, d + 32) of row i of a tensor of `dims` dims.
  template <bool kWhole>
  FAL_INLINE __m512i load_32(int i, int d, int dims) const {
    if constexpr (kWhole) return _mm512_loadu_si512(row[i] + d);
    return i < n ? load_row_32(row[i] + d, dims - d) : _mm512_setzero_si512();
  }
  template <bool kWhole>
  FAL_INLINE __m256i load_16(int i, int d, int dims) const {
    if constexpr (kWhole) return _mm256_loadu_si256((const __m256i*)(row[i] + d));
    return i < n ? load_row_16(row[i] + d, dims - d) : _mm256_setzero_si256();
  }
};

template <class F>
FAL_INLINE void if_whole(bool whole, F&& f) {
  whole ? f(std::true_type{}) : f(std::false_type{});
}

// -> row tiles of round_up(n, 32) rows.
template <class Rows>
FAL_INLINE void pack_row_tiles(const Rows& rows, int n, int dims, char* out) {
  for (int r = 0; r < round_up(n, kBlock); r += 16) {
    const RowBlock block(rows, r, n, 16);
    for (int d = 0; d < dims; d += kTileDepth, out += kTileBytes) {
      if_whole(
          block.n == 16 && d + kTileDepth <= dims, [&](auto whole) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
              store_tile_row(out, i, block.template load_32<decltype(whole)::value>(i, d, dims));
            }
          });
    }
  }
}

// -> pair tiles of round_up(n, 32) rows.
template <class Rows>
FAL_INLINE void pack_pair_tiles(const Rows& rows, int n, int dims, char* out) {
  const int steps = (dims + kTileDepth - 1) / kTileDepth;
  for (int r = 0; r < round_up(n, kBlock); r += 16) {
    const RowBlock block(rows, r, n, 16);
    char* tile = out + (static_cast<int64_t>(r / kBlock) * steps * 2 + r / 16 % 2) * kTileBytes;
    for (int d = 0; d < dims; d += kTileDepth, tile += 2 * kTileBytes) {
      if_whole(block.n == 16 && d + kTileDepth <= dims,
               [&](auto whole) __attribute__((always_inline)) {
                 Float lanes[16];
#pragma GCC unroll 16
                 for (int i = 0; i < 16; ++i) {
                   lanes[i] = (Float)block.template load_32<decltype(whole)::value>(i, d, dims);
                 }
                 store_transposed(lanes, tile);
               });
    }
  }
}

// -> depth tiles; room for `capacity` rows (a multiple of 32), of which round_up(n, 32) are
// written, and for round_up(dims, 32) dims.
template <class Rows>
FAL_INLINE void pack_depth_tiles(const Rows& rows, int n, int capacity, int dims, char* out) {
  const int64_t stride = static_cast<int64_t>(capacity / kTileDepth) * kTileBytes;
  for (int r = 0; r < n; r += kTileDepth) {
    const RowBlock block(rows, r, n, kTileDepth);
    char* tile = out + r / kTileDepth * kTileBytes;
    for (int d = 0; d < round_up(dims, kBlock); d += 16, tile += stride) {
      if_whole(block.n == kTileDepth && d + 16 <= dims,
               [&](auto whole) __attribute__((always_inline)) {
                 constexpr bool kWhole = decltype(whole)::value;
                 Float pairs[16];
#pragma GCC unroll 16
                 for (int i = 0; i < 16; ++i) {
                   pairs[i] = (Float)pair_rows(block.template load_16<kWhole>(2 * i, d, dims),
                                               block.template load_16<kWhole>(2 * i + 1, d, dims))
                                  .lanes;
                 }
                 store_transposed(pairs, tile);
               });
    }
  }
}

// -> row pairs of round_up(n, 32) rows and round_up(dims, 32) dims.
template <class Rows>
FAL_INLINE void pack_row_pairs(const Rows& rows, int n, int dims, char* out) {
  for (int r = 0; r < n; r += kBlock) {
    const RowBlock block(rows, r, n, kBlock);
    for (int d = 0; d < round_up(dims, kBlock); d += 16, out += kTileBytes) {
      if_whole(block.n == kBlock && d + 16 <= dims, [&](auto whole) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const Pairs pairs = pair_rows(block.template load_16<kWhole>(2 * i, d, dims),
                                        block.template load_16<kWhole>(2 * i + 1, d, dims));
          store_tile_row(out, i, (__m512i)pairs.lanes);
        }
      });
    }
  }
}

}  // namespace fal::cpu::FAL_CPU_ISA
