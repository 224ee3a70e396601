// Products in which a hidden element may hold anything. A tensor core multiplies the zeros of P or
// dS at hidden pairs of row and key as well, and 0 * NaN is NaN: a NaN (or an infinity) of V, K, Q
// or dO would reach rows and keys that do not see it. So of a partly visible tile, whose rows see
// different keys, every thread looks at the chunks that it has copied itself, the vote rides on the
// barrier that follows the copy anyway, and where something is not finite the product is made one
// pair at a time, over the visible ones only.
//
// A full tile costs nothing. A partial one costs a thread one 16-byte read and ten instructions for
// each chunk that it has copied: no barrier, no shared memory.
#pragma once

#include "mma_sm80.cuh"

namespace fal::cuda {

// Whether one of the chunks that this thread copied with load_tile is not finite. Its own copies
// have landed; other threads' may not have.
template <class T, int kDim, int kRows, int kThreads>
__device__ __forceinline__ bool copied_nonfinite(uint32_t smem_tile) {
  using Layout = TileLayout<kDim>;
  // An exponent of ones carries into the sign, any other does not.
  constexpr uint32_t kExponents = Mma<T>::kExponents, kOne = 0x80008000u - kExponents;
  uint32_t found = 0;
#pragma unroll 1
  for (int id = ptx::opaque(threadIdx.x); id < kRows * Layout::kChunks; id += kThreads) {
    const uint4 v = ptx::load_shared<uint4>(
        smem_tile + Layout::offset(id / Layout::kChunks, id % Layout::kChunks));
    found |= ((v.x & kExponents) + kOne) | ((v.y & kExponents) + kOne) |
             ((v.z & kExponents) + kOne) | ((v.w & kExponents) + kOne);
  }
  return found & 0x80008000u;
}

// A barrier of the block. `look`, the same for all threads, asks whether any of them finds
// something.
template <class Find>
__device__ __forceinline__ bool sync_and_find(bool look, Find find) {
  if (look) return __syncthreads_or(find());
  __syncthreads();
  return false;
}

// Element (row, column) of a tile in shared memory.
template <class T, int kDim>
__device__ __forceinline__ float tile_element(uint32_t smem_tile, int row, int column) {
  const uint32_t word = ptx::load_shared<uint32_t>(
      smem_tile + TileLayout<kDim>::offset(row, column / kChunkElements) +
      column % kChunkElements / 2 * 4);
  return Mma<T>::to_float(static_cast<uint16_t>(column % 2 ? word >> 16 : word));
}

// A operands in shared memory as they lie in registers: kM * kSteps * 512 bytes of one warp.
template <int kM, int kSteps>
__device__ __forceinline__ void stage_fragments(uint32_t smem, const FragmentsA<kM, kSteps>& frag,
                                                int lane) {
  lane = ptx::opaque(lane);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        ptx::store_shared(smem + (((k * kM + m) * 4 + r) * kWarpSize + lane) * 4, frag.r[k][m][r]);
      }
    }
  }
}

template <class T, int kM>
__device__ __forceinline__ float fragment_element(uint32_t smem, int row, int column) {
  const int r = column % 16 / 8 * 2 + row % 16 / 8, lane = row % 8 * 4 + column % 8 / 2;
  const uint32_t word = ptx::load_shared<uint32_t>(
      smem + (((column / 16 * kM + row / 16) * 4 + r) * kWarpSize + lane) * 4);
  return Mma<T>::to_float(static_cast<uint16_t>(column % 2 ? word >> 16 : word));
}

// acc += A B over the pairs (r, k) that `sees(r, k)` allows, nothing else being touched: r counts
// the rows of acc, k the `depth` rows of B's tile, weight(r, k) is A. B's columns as in
// multiply_nn.
template <class T, int kDim, int kColumnStride = 1, int kM, int kN8, class Sees, class Weight>
__device__ __forceinline__ void multiply_seen(float (&acc)[kM][kN8][4], uint32_t smem_b, int depth,
                                              int lane, int group, Sees sees, Weight weight) {
  lane = ptx::opaque(lane);
#pragma unroll 1
  for (int k = 0; k < depth; ++k) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = m * 16 + half * 8 + lane / 4;
        if (!sees(r, k)) continue;
        const float a = weight(r, k);
#pragma unroll
        for (int n = 0; n < kN8; ++n) {
          const int chunk = 2 * (group + n / 2 * kColumnStride) + n % 2;
          const uint32_t b = ptx::load_shared<uint32_t>(
              smem_b + TileLayout<kDim>::offset(k, chunk) + lane % 4 * 4);
          acc[m][n][2 * half] =
              fmaf(a, Mma<T>::to_float(static_cast<uint16_t>(b)), acc[m][n][2 * half]);
          acc[m][n][2 * half + 1] =
              fmaf(a, Mma<T>::to_float(static_cast<uint16_t>(b >> 16)), acc[m][n][2 * half + 1]);
        }
      }
    }
  }
}

}  // namespace fal::cuda
