// FlashAttention, backward (Dao et al., 2022, algorithm 4):
//
//   for every tile of K and V:        read once; dK and dV stay in registers
//     for every tile of Q and dO:     dQ read, updated and written each time
//       P  = exp(scale Q K^T - LSE)     dV += P^T dO
//       dS = P * (dO V^T - delta)       dK += scale dS^T Q     dQ += scale dS K
//
// with delta = rowsum(dO * O) - dLSE from backward_pieces.cu. One thread block computes one K/V
// head of one batch entry, whole, for each query head of its group in turn: nobody else touches
// its dQ, so sums need no atomics and are always made in the same order.
//
// A tile of keys is worked on as in FlashAttention-2's backward, whose step it is: there as here
// warps split the keys and dS passes through shared memory. The two differ in who does which tile,
// and in dQ. Shared memory is as in flash2_backward.cuh.
#pragma once

#include "flash1.h"
#include "flash2_backward.cuh"

namespace fal::cuda {

// The loop over tiles of keys needs registers too: 128 keys fit beside plain scores only. Beside
// head dim 256 plain scores have no kernel of their own, which spilled 8 bytes on sm_90a.
template <class T, int kHeadDim, class ScoreMod>
using Flash1BackwardConfig =
    Flash2BackwardConfig<T, kHeadDim, ScoreMod, kHeadDim <= 128 && !ScoreMod::kGeneral>;

// dQ's sums for a block that owns them. A thread reads what it wrote itself one tile of keys ago.
template <int kHeadDim>
struct OwnedDqTile : DqTile<kHeadDim> {
  using DqTile<kHeadDim>::kThreads, DqTile<kHeadDim>::kVectors;

  __device__ __forceinline__ static void begin(const float* tile, int fragment, float (&acc)[4]) {
    DqTile<kHeadDim>::load(tile, fragment, acc);
  }
  __device__ __forceinline__ static void add(float* tile, int fragment, const float (&acc)[4]) {
    float* base = tile + fragment * kThreads * 4;
    if constexpr (kVectors) {
      ptx::store_global(base + threadIdx.x * 4, make_float4(acc[0], acc[1], acc[2], acc[3]));
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) base[e * kThreads + threadIdx.x] = acc[e];
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash1_backward_kernel(const __grid_constant__ BackwardArgs args) {
  int key_begin = 0;
#pragma unroll 1
  while (key_begin < args.problem.forward.lengths.sequence(blockIdx.y).seqlen_k) {
    backward_of_keys<Config, OwnedDqTile<Config::kHeadDim>>(args, key_begin, blockIdx.x,
                                                            blockIdx.y);
    __syncthreads();  // dK and dV have left shared memory
    key_begin += Config::kTileN;
  }
}

// ---- launcher -----------------------------------------------------------------------------------
template <class T>
cudaError_t flash1_backward_of(const BackwardArgs& args, cudaStream_t stream) {
  const Shape& shape = args.problem.forward.shape;
  return launch_backward<64, 128, 256>(args, [&](auto dim, auto mod) {
    using ScoreMod = std::conditional_t<dim.value <= 128, decltype(mod), GeneralScoreMod>;
    using Config = Flash1BackwardConfig<T, dim.value, ScoreMod>;
    return launch(flash1_backward_kernel<Config>, dim3(shape.heads_k, shape.batch),
                  Config::kThreads, sizeof(Flash2BackwardSmem<Config>), stream, args);
  });
}

}  // namespace fal::cuda
