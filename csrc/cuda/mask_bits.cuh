// What a partly visible tile shows, a bit for each (row, key), by the band and, where one is given,
// a block mask. The bits are made before the scores, when registers are free, a word of 32 keys at
// a time; scores are then masked by them whatever rule they came from.
#pragma once

#include "../core/tiles.h"
#include "softmax.cuh"

namespace fal::cuda {

// The bits of one warp's kRows x kKeys elements, in its lanes: lane r and, with 16 rows, lane 16 +
// r hold the words of row r, dealt in turn.
template <int kRows, int kKeys>
struct WarpBits {
  static constexpr int kLanes = kWarpSize / kRows;  // of a row
  static constexpr int kWords = kKeys / 32;         // of a row
  static constexpr int kHeld = (kWords + kLanes - 1) / kLanes;
  static_assert(kRows == 16 || kRows == 32, "a lane has words of one row");
  static_assert(kKeys % 32 == 0, "whole words");

  uint32_t held[kHeld];

  __device__ __forceinline__ void look(const Sight& sight, int rule, int row, int key, int lane) {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const int w = n * kLanes + lane / kRows;
      held[n] = w < kWords ? sight.word(rule, row + lane % kRows, key + 32 * w) : 0;
    }
  }
  // All lanes of the warp ask at once; w is the same for all.
  __device__ __forceinline__ uint32_t word(int row, int w) const {
    uint32_t from = held[0];
#pragma unroll
    for (int n = 1; n < kHeld; ++n) {
      if (w / kLanes == n) from = held[n];
    }
    return __shfl_sync(kAllLanes, from, row + kRows * (w % kLanes));
  }
  __device__ __forceinline__ bool sees(int row, int key) const {
    return word(row, key / 32) >> key % 32 & 1;
  }
};

// `value` in the accumulators of hidden elements; their order is told in softmax.cuh.
template <int kM, int kN8, int kRows, int kKeys>
__device__ __forceinline__ void hide(float (&s)[kM][kN8][4], const WarpBits<kRows, kKeys>& bits,
                                     int lane, float value) {
  static_assert(kRows == kM * 16 && kKeys == kN8 * 8);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int w = 0; w < kKeys / 32; ++w) {
        const uint32_t word = bits.word(m * 16 + half * 8 + lane / 4, w) >> lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (!(word >> (n * 8 + e) & 1)) s[m][w * 4 + n][half * 2 + e] = value;
          }
        }
      }
    }
  }
}

// The bits of a tile of kRows x kKeys elements, in shared memory.
template <int kRows, int kKeys>
struct TileBits {
  static constexpr int kWords = kKeys / 32;  // of a row
  using Words = uint32_t[kRows][kWords];

  uint32_t smem;

  // By all kThreads of the block; a barrier must follow.
  template <int kThreads>
  __device__ __forceinline__ void look(const Sight& sight, int rule, int row, int key) const {
#pragma unroll 1
    for (int id = ptx::opaque(threadIdx.x); id < kRows * kWords; id += kThreads) {
      ptx::store_shared(smem + id * 4, sight.word(rule, row + id / kWords, key + id % kWords * 32));
    }
  }
  __device__ __forceinline__ uint32_t word(int row, int w) const {
    return ptx::load_shared<uint32_t>(smem + (row * kWords + w) * 4);
  }
  __device__ __forceinline__ bool sees(int row, int key) const {
    return word(row, key / 32) >> key % 32 & 1;
  }
};

// 0 in both accumulators of hidden elements, transposed: element (m, n, e) is key m * 16 + e / 2 *
// 8 + g and row n * 8 + 2c + e % 2 from (row, key) of the tile on.
template <int kM, int kN8, int kRows, int kKeys>
__device__ __forceinline__ void hide_transposed(float (&p)[kM][kN8][4], float (&ds)[kM][kN8][4],
                                                const TileBits<kRows, kKeys>& bits, int row,
                                                int key, int lane) {
#pragma unroll
  for (int n = 0; n < kN8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t word =
          bits.word(row + n * 8 + lane % 4 * 2 + e, key / 32) >> (key % 32 + lane / 4);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!(word >> (m * 16 + half * 8) & 1)) {
            p[m][n][half * 2 + e] = ds[m][n][half * 2 + e] = 0.f;
          }
        }
      }
    }
  }
}

}  // namespace fal::cuda
