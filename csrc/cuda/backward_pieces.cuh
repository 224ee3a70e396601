// What every backward needs around its main kernel, in the order of its launches:
//
//   prepare         delta = rowsum(dO * O) - dLSE and LSE in base 2, row by row; dQ's sums cleared
//   (main kernel)   dK, dV; dQ as float32 sums
//   convert dQ      sums times scale, rounded, to dq
//   sink gradients  dsink = -sum over rows of exp(sink - LSE) * delta
//
// In the workspace a sequence starts at a multiple of kBackwardRows rows, so a tile of rows is
// aligned and owned by one sequence.
#pragma once

#include "../core/dispatch.h"
#include "../core/problem.h"
#include "softmax.cuh"

namespace fal::cuda {

inline constexpr int kBackwardRows = 64;  // query rows of a tile, in every backward kernel

// Device scratch memory, carved up by make(). Null members cost nothing.
struct BackwardWorkspace {
  float* lse;    // (heads_q, padded rows), base-2 logarithm; +inf where a row has no P to recompute
  float* delta;  // (heads_q, padded rows)
  float* dq;     // (heads_q, tiles, kBackwardRows * padded head dim), in the order of fragments
  int64_t tiles;
  int32_t padded_dim;

  static int64_t tiles_of(const Shape& shape) {
    return (shape.rows_q + static_cast<int64_t>(shape.batch) * kBackwardRows) / kBackwardRows;
  }
  static int64_t bytes(const Shape& shape, int32_t padded_dim, bool with_dq) {
    const int64_t rows = tiles_of(shape) * kBackwardRows * shape.heads_q;
    return rows * static_cast<int64_t>(sizeof(float)) * (2 + (with_dq ? padded_dim : 0));
  }
  static BackwardWorkspace make(void* memory, const Shape& shape, int32_t padded_dim,
                                bool with_dq) {
    const int64_t tiles = tiles_of(shape), rows = tiles * kBackwardRows * shape.heads_q;
    float* p = static_cast<float*>(memory);
    return {p, p + rows, with_dq ? p + 2 * rows : nullptr, tiles, padded_dim};
  }

  // The first tile of a sequence. Tiles of two sequences never overlap: flooring (row + b tiles)
  // leaves at least ceil(length / tile) tiles to each.
  FAL_HOST_DEVICE int64_t first_tile(const Lengths& lengths, int32_t b) const {
    const int64_t row =
        lengths.cu_seqlens_q ? lengths.cu_seqlens_q[b] : static_cast<int64_t>(b) * lengths.seqlen_q;
    return row / kBackwardRows + b;
  }
  FAL_HOST_DEVICE int64_t stats_offset(int64_t tile, int32_t h) const {
    return (h * tiles + tile) * kBackwardRows;
  }
  FAL_HOST_DEVICE float* dq_tile(int64_t tile, int32_t h) const {
    return dq + (h * tiles + tile) * kBackwardRows * padded_dim;
  }
};

struct BackwardArgs {
  BackwardProblem problem;
  BackwardWorkspace workspace;
  bool aligned;  // every row of every tensor is a whole number of aligned 16-byte chunks
};

// ---- dQ's sums ----------------------------------------------------------------------------------
// A tile of dQ is summed in device memory by the warps of the main kernel, 2 x 4 over rows and
// columns: kFragments accumulators a thread, each four floats.
template <int kHeadDim>
struct DqTile {
  static constexpr int kThreads = 256;
  static constexpr int kWarpsM = 2, kWarpsN = 4;
  static constexpr int kM = kBackwardRows / 16 / kWarpsM;  // 16-row groups of a warp
  static constexpr int kN8 = kHeadDim / 8 / kWarpsN;       // 8-column groups of a warp
  static_assert(kM == 2 && kN8 % 2 == 0, "warps share rows and 16-column groups evenly");

  // From sm_90 on, a warp adds 512 contiguous bytes with one vector instruction; before, with four
  // of 128 contiguous bytes each. Adding and converting agree, being compiled for one target.
#if defined(FAL_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  static constexpr bool kVectors = true;
#else
  static constexpr bool kVectors = false;
#endif

  // What the main kernel starts a fragment with, and what becomes of it: here it is added.
  __device__ __forceinline__ static void begin(const float*, int, float (&acc)[4]) {
    acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
  }
  __device__ __forceinline__ static void add(float* tile, int fragment, const float (&acc)[4]) {
    float* base = tile + fragment * kThreads * 4;
    if constexpr (kVectors) {
      ptx::red_add_f32x4(base + threadIdx.x * 4, make_float4(acc[0], acc[1], acc[2], acc[3]));
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) ptx::red_add_f32(base + e * kThreads + threadIdx.x, acc[e]);
    }
  }

  __device__ __forceinline__ static void load(const float* tile, int fragment, float (&acc)[4]) {
    const float* base = tile + fragment * kThreads * 4;
    if constexpr (kVectors) {
      const float4 v = ptx::load_global<float4>(base + threadIdx.x * 4);
      acc[0] = v.x, acc[1] = v.y, acc[2] = v.z, acc[3] = v.w;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[e] = base[e * kThreads + threadIdx.x];
    }
  }
};

// ---- launches -----------------------------------------------------------------------------------
// All are of element type Shape::dtype. Rows that belong to no sequence are cleared as well.
cudaError_t backward_prepare(const BackwardArgs& args, cudaStream_t stream);
cudaError_t backward_convert_dq(const BackwardArgs& args, cudaStream_t stream);
cudaError_t backward_sinks(const BackwardArgs& args, cudaStream_t stream);

// launch_main(head-dim class, score modification) for the class that the workspace is of;
// NoScoreMod only if `may_be_plain`.
template <int... kHeadDims, class Launch>
cudaError_t launch_backward(const BackwardArgs& args, bool may_be_plain,
                            const Launch& launch_main) {
  const bool plain = may_be_plain && plain_scores(args.problem.forward.score, args.aligned);
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<kHeadDims...>(args.workspace.padded_dim, [&](auto dim) {
    error = plain ? launch_main(dim, NoScoreMod{}) : launch_main(dim, GeneralScoreMod{});
  });
  return error;
}
template <int... kHeadDims, class Launch>
cudaError_t launch_backward(const BackwardArgs& args, const Launch& launch_main) {
  return launch_backward<kHeadDims...>(args, true, launch_main);
}

}  // namespace fal::cuda
