// The kernels around a backward's main kernel: what each is for is said in backward_pieces.cuh.
#include "../core/dispatch.h"
#include "backward_pieces.cuh"
#include "launch.h"
#include "softmax.cuh"
#include "unused_rows.h"

namespace fal::cuda {
namespace {

// ---- prepare ----------------------------------------------------------------------------------
inline constexpr int kPrepareThreads = 256;

template <class T>
__device__ __forceinline__ void load_chunk(const T* row, int chunk, int dim, bool aligned,
                                           float (&value)[kChunkElements]) {
  uint32_t word[4] = {0, 0, 0, 0};
  const T* source = row + chunk * kChunkElements;
  if (aligned) {
    const uint4 v = ptx::load_global<uint4>(source);
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(source);
#pragma unroll
    for (int e = 0; e < kChunkElements; ++e) {
      if (chunk * kChunkElements + e < dim) {
        word[e / 2] |= static_cast<uint32_t>(bits[e]) << (16 * (e & 1));
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kChunkElements; ++e) {
    value[e] = Mma<T>::to_float(static_cast<uint16_t>(word[e / 2] >> (16 * (e & 1))));
  }
}

// blockIdx = (tile of rows, query head, batch entry). A row is summed by the smallest power of two
// of lanes that covers its chunks, in a fixed order.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads)
    backward_prepare_kernel(const __grid_constant__ BackwardArgs args) {
  const ForwardProblem& forward = args.problem.forward;
  const int h = blockIdx.y, b = blockIdx.z;
  const Sequence seq = forward.lengths.sequence(b);
  const int row_begin = blockIdx.x * kBackwardRows;
  if (row_begin >= seq.seqlen_q) return;
  const int64_t tile = args.workspace.first_tile(forward.lengths, b) + blockIdx.x;

  const int dim = forward.shape.head_dim_v, chunks = ceil_div(dim, kChunkElements);
  int lanes = 1;
  while (lanes < chunks) lanes *= 2;
  const View<const T> out = forward.out.as<const T>(), dout = args.problem.dout.as<const T>();
  const int lane = threadIdx.x % lanes;
  for (int r = threadIdx.x / lanes; r < kBackwardRows; r += kPrepareThreads / lanes) {
    const int row = row_begin + r;
    const bool valid = row < seq.seqlen_q;
    float delta = 0.f;
    if (valid && lane < chunks) {
      float o[kChunkElements], d[kChunkElements];
      load_chunk(out.at(b, seq.row_q + row, h), lane, dim, args.aligned, o);
      load_chunk(dout.at(b, seq.row_q + row, h), lane, dim, args.aligned, d);
#pragma unroll
      for (int e = 0; e < kChunkElements; ++e) delta = fmaf(o[e], d[e], delta);
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
      delta += __shfl_xor_sync(kAllLanes, delta, step);
    }
    if (lane != 0) continue;
    float lse = FAL_INFINITY;  // rows behind the sequence: exp2(s - lse) = 0
    if (valid) {
      lse = lse_reference(*forward.lse.at(b, h, seq.row_q + row)) * kLog2e;
      if (args.problem.dlse.data) delta -= *args.problem.dlse.at(b, h, seq.row_q + row);
    }
    const int64_t index = args.workspace.stats_offset(tile, h) + r;
    args.workspace.lse[index] = lse;
    args.workspace.delta[index] = valid ? delta : 0.f;
  }
  if (args.workspace.dq) {
    float* dq = args.workspace.dq_tile(tile, h);
    for (int i = threadIdx.x * 4; i < kBackwardRows * args.workspace.padded_dim;
         i += kPrepareThreads * 4) {
      ptx::store_global(dq + i, make_float4(0.f, 0.f, 0.f, 0.f));
    }
  }
}

// ---- convert dQ ---------------------------------------------------------------------------------
// blockIdx = (tile of rows, query head, batch entry).
template <class T, int kHeadDim>
__global__ void __launch_bounds__(DqTile<kHeadDim>::kThreads)
    backward_convert_dq_kernel(const __grid_constant__ BackwardArgs args) {
  using Dq = DqTile<kHeadDim>;
  const ForwardProblem& forward = args.problem.forward;
  const int h = blockIdx.y, b = blockIdx.z;
  const Sequence seq = forward.lengths.sequence(b);
  const int row_begin = blockIdx.x * kBackwardRows;
  if (row_begin >= seq.seqlen_q) return;
  const int64_t tile = args.workspace.first_tile(forward.lengths, b) + blockIdx.x;
  const float* sums = args.workspace.dq_tile(tile, h);

  FAL_DYNAMIC_SMEM(smem_bytes);
  const uint32_t smem_tile = ptx::smem_address(smem_bytes);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float acc[Dq::kM][Dq::kN8][4], factor[Dq::kM][2];
#pragma unroll
  for (int m = 0; m < Dq::kM; ++m) {
    factor[m][0] = factor[m][1] = forward.score.scale;
#pragma unroll
    for (int n = 0; n < Dq::kN8; ++n) Dq::load(sums, m * Dq::kN8 + n, acc[m][n]);
  }
  stage_rows<T, kHeadDim, Dq::kWarpsN>(smem_tile, warp / Dq::kWarpsN * Dq::kM * 16, acc, factor,
                                       lane, warp % Dq::kWarpsN);
  __syncthreads();
  const View<T> dq = args.problem.dq.as<T>();
  store_rows<T, kHeadDim, kBackwardRows, Dq::kThreads>(
      smem_tile, 0, seq.seqlen_q - row_begin, forward.shape.head_dim, args.aligned, threadIdx.x,
      [&](int r) { return dq.at(b, seq.row_q + row_begin + r, h); });
}

// ---- sinks --------------------------------------------------------------------------------------
inline constexpr int kSinkThreads = 512;

// blockIdx.x = query head. Every thread sums its rows in order, then the block sums the threads by
// halves: the same bits every time.
__global__ void __launch_bounds__(kSinkThreads)
    backward_sinks_kernel(const __grid_constant__ BackwardArgs args) {
  const ForwardProblem& forward = args.problem.forward;
  const int h = blockIdx.x;
  const float sink = forward.score.sinks[h] * kLog2e;
  float sum = 0.f;
  for (int b = 0; b < forward.shape.batch; ++b) {
    const int64_t begin =
        args.workspace.stats_offset(args.workspace.first_tile(forward.lengths, b), h);
    const int seqlen_q = forward.lengths.sequence(b).seqlen_q;
    for (int row = threadIdx.x; row < seqlen_q; row += kSinkThreads) {
      sum += ptx::ex2(sink - args.workspace.lse[begin + row]) * args.workspace.delta[begin + row];
    }
  }
  using Sums = float[kSinkThreads];
  FAL_SHARED(Sums, sums);
  sums[threadIdx.x] = sum;
  for (int half = kSinkThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) args.problem.dsinks[h] = -sums[0];
}

dim3 grid_of_rows(const ForwardProblem& forward) {
  return dim3(ceil_div(forward.lengths.seqlen_q, kBackwardRows), forward.shape.heads_q,
              forward.shape.batch);
}

template <class F>
void with_element_type(const ForwardProblem& forward, F&& f) {
  forward.shape.dtype == DType::kFloat16 ? f(TypeTag<__half>{}) : f(TypeTag<__nv_bfloat16>{});
}

}  // namespace

cudaError_t backward_prepare(const BackwardArgs& args, cudaStream_t stream) {
  const BackwardProblem& problem = args.problem;
  const ForwardProblem& forward = problem.forward;
  const Shape& shape = forward.shape;
  cudaError_t error = fill_unused_rows(
      {forward.lengths, shape.batch, shape.rows_q, problem.dq, shape.head_dim, {}, false},
      shape.heads_q, stream);
  const AnyView gradients[] = {problem.dk, problem.dv};
  const int32_t dims[] = {shape.head_dim, shape.head_dim_v};
  for (int i = 0; i < 2 && error == cudaSuccess; ++i) {
    error = fill_unused_rows(
        {forward.lengths, shape.batch, shape.rows_k, gradients[i], dims[i], {}, true},
        shape.heads_k, stream);
  }
  if (error != cudaSuccess) return error;
  with_element_type(forward, [&](auto tag) {
    using T = typename decltype(tag)::type;
    error =
        launch(backward_prepare_kernel<T>, grid_of_rows(forward), kPrepareThreads, 0, stream, args);
  });
  return error;
}

cudaError_t backward_convert_dq(const BackwardArgs& args, cudaStream_t stream) {
  const ForwardProblem& forward = args.problem.forward;
  cudaError_t error = cudaErrorInvalidValue;
  with_element_type(forward, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_int<64, 128, 192, 256>(args.workspace.padded_dim, [&](auto dim) {
      error =
          launch(backward_convert_dq_kernel<T, dim.value>, grid_of_rows(forward),
                 DqTile<dim.value>::kThreads, kBackwardRows * dim.value * sizeof(T), stream, args);
    });
  });
  return error;
}

cudaError_t backward_sinks(const BackwardArgs& args, cudaStream_t stream) {
  return launch(backward_sinks_kernel, args.problem.forward.shape.heads_q, kSinkThreads, 0, stream,
                args);
}

}  // namespace fal::cuda
