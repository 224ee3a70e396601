// Kernels whose traffic is counted (tests/io_complexity.py): standard attention in three kernels,
// written plainly, and FlashAttention and FlashAttention-2 with other tile sizes than the
// library's. bfloat16, head dim 64; q, k, v, out (batch, seqlen, heads, 64), S and P (batch, heads,
// seqlen, seqlen); the sequence length is a multiple of 256.
#include "csrc/cuda/flash1_forward.cuh"
#include "csrc/cuda/flash2_forward.cuh"
#include "io_kernels.h"

namespace fal::cuda {
namespace {

using T = __nv_bfloat16;
constexpr int kDim = 64, kTile = 128, kWarps = 4, kThreads = kWarps * kWarpSize;

// ---- standard attention: S = scale Q K^T; P = softmax(S); O = P V -------------------------------
struct StandardArgs {
  ForwardProblem problem;
  T* scores;  // S, then P in its place

  __device__ __forceinline__ T* row(int b, int h, int64_t i) const {
    const int64_t n = problem.lengths.seqlen_k;
    return scores + ((b * problem.shape.heads_q + h) * n + i) * n;
  }
};

// blockIdx = (tile of keys, tile of rows, head of batch entry). Shared memory: Q | K | S.
__global__ void __launch_bounds__(kThreads)
    standard_scores_kernel(const __grid_constant__ StandardArgs args) {
  const ForwardProblem& problem = args.problem;
  const int h = blockIdx.z % problem.shape.heads_q, b = blockIdx.z / problem.shape.heads_q;
  const int row0 = blockIdx.y * kTile, key0 = blockIdx.x * kTile;
  FAL_DYNAMIC_SMEM(smem_bytes);
  const uint32_t smem_q = ptx::smem_address(smem_bytes), smem_k = smem_q + kTile * kDim * 2;
  const uint32_t smem_s = smem_k + kTile * kDim * 2;
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * 32;
  const View<const T> q = problem.q.as<const T>(), k = problem.kv.k.as<const T>();
  load_tile_async<T, kDim, kTile, kThreads>(smem_q, {0, kTile}, kDim,
                                            StridedRows<T>{q.at(b, row0, h), q.row});
  load_tile_async<T, kDim, kTile, kThreads>(smem_k, {0, kTile}, kDim,
                                            StridedRows<T>{k.at(b, key0, h), k.row});
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  float acc[2][kTile / 8][4];
  clear(acc);
  multiply_nt<T, kDim / 16>(acc, address_rows_first<kDim>(smem_q, warp_row, lane),
                            address_columns_first<kDim>(smem_k, 0, lane));
  const float scale = problem.score.scale, factor[2][2] = {{scale, scale}, {scale, scale}};
  const Band band = Band::make(problem.lengths.seqlen_q, problem.lengths.seqlen_k, problem.window);
  hide(acc, band, row0 + warp_row + lane / 4, key0 + lane % 4 * 2, -FAL_INFINITY);
  stage_rows<T, kTile>(smem_s, warp_row, acc, factor, lane);
  __syncwarp();
  store_rows<T, kTile, 32, kWarpSize>(smem_s, warp_row, kTile, kTile, true, lane,
                                      [&](int r) { return args.row(b, h, row0 + r) + key0; });
}

// A warp per row. blockIdx = (group of kWarps rows, head of batch entry).
__global__ void __launch_bounds__(kThreads)
    standard_softmax_kernel(const __grid_constant__ StandardArgs args) {
  const ForwardProblem& problem = args.problem;
  const int h = blockIdx.y % problem.shape.heads_q, b = blockIdx.y / problem.shape.heads_q;
  const int i = blockIdx.x * kWarps + threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  constexpr int kMostChunks = kStandardMaxSeqlen / kChunkElements / kWarpSize;
  const int chunks = problem.lengths.seqlen_k / kChunkElements / kWarpSize;
  T* row = args.row(b, h, i) + lane * kChunkElements;
  float value[kMostChunks][kChunkElements], max = -FAL_INFINITY, sum = 0.f;
  for (int c = 0; c < chunks; ++c) {
    const uint4 v = ptx::load_global<uint4>(row + c * kWarpSize * kChunkElements);
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
    for (int e = 0; e < kChunkElements; ++e) {
      value[c][e] = Mma<T>::to_float(static_cast<uint16_t>(word[e / 2] >> (16 * (e & 1))));
      max = fmaxf(max, value[c][e]);
    }
  }
  for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, step));
  for (int c = 0; c < chunks; ++c) {
    for (int e = 0; e < kChunkElements; ++e) {
      value[c][e] = ptx::ex2((value[c][e] - max) * kLog2e);
      sum += value[c][e];
    }
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  const SoftmaxState state{max, sum};
  const float inverse = state.inverse_sum();
  for (int c = 0; c < chunks; ++c) {
    uint32_t word[4];
    for (int e = 0; e < 4; ++e) {
      word[e] = Mma<T>::pack(value[c][2 * e] * inverse, value[c][2 * e + 1] * inverse);
    }
    ptx::store_global(row + c * kWarpSize * kChunkElements,
                      make_uint4(word[0], word[1], word[2], word[3]));
  }
  if (lane == 0) *problem.lse.at(b, h, i) = state.lse();
}

// blockIdx = (tile of rows, head of batch entry). Shared memory: P | V, later O.
__global__ void __launch_bounds__(kThreads)
    standard_output_kernel(const __grid_constant__ StandardArgs args) {
  const ForwardProblem& problem = args.problem;
  const int h = blockIdx.y % problem.shape.heads_q, b = blockIdx.y / problem.shape.heads_q;
  const int row0 = blockIdx.x * kTile;
  FAL_DYNAMIC_SMEM(smem_bytes);
  const uint32_t smem_p = ptx::smem_address(smem_bytes), smem_v = smem_p + kTile * kTile * 2;
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * 32;
  const View<const T> v = problem.kv.v.as<const T>();
  float acc[2][kDim / 8][4];
  clear(acc);
  for (int key0 = 0; key0 < problem.lengths.seqlen_k; key0 += kTile) {
    load_tile_async<T, kTile, kTile, kThreads>(
        smem_p, {0, kTile}, kTile,
        StridedRows<T>{args.row(b, h, row0) + key0, problem.lengths.seqlen_k});
    load_tile_async<T, kDim, kTile, kThreads>(smem_v, {0, kTile}, kDim,
                                              StridedRows<T>{v.at(b, key0, h), v.row});
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    FragmentsA<2, kTile / 16> frag_p;
    load_fragments(frag_p, address_rows_first<kTile>(smem_p, warp_row, lane));
    multiply_nn<T, kTile / 16>(acc, frag_p, address_rows_first<kDim>(smem_v, 0, lane));
    __syncthreads();  // nobody reads P and V any more
  }
  const float factor[2][2] = {{1.f, 1.f}, {1.f, 1.f}};
  stage_rows<T, kDim>(smem_v, warp_row, acc, factor, lane);
  __syncwarp();
  const View<T> out = problem.out.as<T>();
  store_rows<T, kDim, 32, kWarpSize>(smem_v, warp_row, kTile, kDim, true, lane,
                                     [&](int r) { return out.at(b, row0 + r, h); });
}

// ---- the library's kernels in other sizes -------------------------------------------------------
template <int kTileN_>
struct Flash1Tiled : Flash1ForwardConfig<T, kDim, NoScoreMod> {
  static constexpr int kTileN = kTileN_, kKeysOfWarp = kTileN / kWarps;
};

template <int kTileM_>
struct Flash2Tiled : Flash2ForwardConfig<T, kDim, NoScoreMod, ContiguousKv<T>, BandTiles> {
  static constexpr int kTileM = kTileM_, kWarps = kTileM / 32, kThreads = kWarps * kWarpSize;
};

}  // namespace

int64_t io_workspace_bytes(const ForwardProblem& problem, const char* which) {
  const Shape& shape = problem.shape;
  if (which[0] == 's') return shape.heads_q * shape.rows_q * problem.lengths.seqlen_k * 2;
  return BackwardWorkspace::bytes(shape, kDim, true);
}

cudaError_t io_standard(const ForwardProblem& problem, void* workspace) {
  const StandardArgs args{problem, static_cast<T*>(workspace)};
  const int tiles = problem.lengths.seqlen_q / kTile;
  const int heads = problem.shape.heads_q * problem.shape.batch;
  cudaError_t error = launch(standard_scores_kernel, dim3(tiles, tiles, heads), kThreads,
                             (2 * kDim + kTile) * kTile * 2, nullptr, args);
  if (error != cudaSuccess) return error;
  error = launch(standard_softmax_kernel, dim3(problem.lengths.seqlen_q / kWarps, heads), kThreads,
                 0, nullptr, args);
  if (error != cudaSuccess) return error;
  return launch(standard_output_kernel, dim3(tiles, heads), kThreads, (kDim + kTile) * kTile * 2,
                nullptr, args);
}

cudaError_t io_flash1(const ForwardProblem& problem, void* workspace, int tile) {
  const Shape& shape = problem.shape;
  const Flash1ForwardArgs args{
      problem, {BackwardWorkspace::make(workspace, shape, kDim, true)}, true};
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<64, 128, 256>(tile, [&](auto n) {
    using Config = Flash1Tiled<n.value>;
    error = launch(flash1_forward_kernel<Config>, dim3(shape.heads_q, shape.batch),
                   Config::kThreads, sizeof(Flash1ForwardSmem<Config>), nullptr, args);
  });
  return error;
}

cudaError_t io_flash2(const ForwardProblem& problem, int tile) {
  const Shape& shape = problem.shape;
  const Flash2ForwardArgs args{problem, true};
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<64, 128, 256>(tile, [&](auto m) {
    using Config = Flash2Tiled<m.value>;
    const dim3 grid(ceil_div(problem.lengths.seqlen_q, Config::kTileM), shape.heads_q, shape.batch);
    error = launch(flash2_forward_kernel<Config>, grid, Config::kThreads,
                   sizeof(Flash2ForwardSmem<Config>), nullptr, args);
  });
  return error;
}

}  // namespace fal::cuda
