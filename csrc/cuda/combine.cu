// Adds up the parts that decode left in the workspace: for each row of queries
//
//   m = max m_p    l = sum exp(m_p - m) l_p    O = sum exp(m_p - m) O_p / l    LSE = m + log l
//
// over the sequence's parts in ascending order, whoever computed them. One warp a row; bound by
// reading the parts, most of them from L2.
#include "../core/online_softmax.h"
#include "decode.h"
#include "decode_split.h"
#include "launch.h"
#include "softmax.cuh"

namespace fal::cuda {
namespace {

constexpr int kCombineWarps = 4;
static_assert(DecodeParts::kMost <= 2 * kWarpSize, "a lane holds the weights of two parts");

template <class T>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize)
    combine_kernel(const __grid_constant__ DecodeArgs args) {
  const ForwardProblem& problem = args.problem;
  const Shape& shape = problem.shape;
  const DecodeWorkspace& workspace = args.workspace;
  const int lane = threadIdx.x % kWarpSize, b = blockIdx.y;
  const int item = blockIdx.x * kCombineWarps + threadIdx.x / kWarpSize;
  const int token = item / shape.heads_q, head = item % shape.heads_q;
  const Sequence seq = problem.lengths.sequence(b);
  if (token >= seq.seqlen_q) return;
  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, problem.window);
  const int parts = DecodeParts::make(band, args.group).count;
  if (parts == 1) return;  // written where it was computed

  const int head_k = head / args.group, r = token * args.group + head % args.group;
  const int64_t first = workspace.row(shape, b, head_k, 0, r);
  float max[2], sum[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int part = i * kWarpSize + lane;
    max[i] = -FAL_INFINITY, sum[i] = 0.f;
    if (part < parts) {
      const float2 state =
          ptx::load_global<float2>(workspace.states + first + int64_t(part) * workspace.rows);
      max[i] = state.x, sum[i] = state.y;
    }
  }
  SoftmaxState state{fmaxf(max[0], max[1]), 0.f};
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    state.max = fmaxf(state.max, __shfl_xor_sync(kAllLanes, state.max, step));
  }
  const float reference = softmax_reference(state.max);
  const float weight[2] = {ptx::ex2(max[0] - reference), ptx::ex2(max[1] - reference)};
  state.sum = weight[0] * sum[0] + weight[1] * sum[1];
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    state.sum += __shfl_xor_sync(kAllLanes, state.sum, step);
  }
  state.max *= kLn2;
  float factor = 1.f;
  if (problem.score.sinks) factor = state.absorb_sink(problem.score.sinks[head]);
  factor *= state.inverse_sum();
  const int64_t row_q = seq.row_q + token;
  if (lane == 0) *problem.lse.at(b, head, row_q) = state.lse();

  const float* from = workspace.out + first * workspace.out_ld;
  const int64_t part_stride = int64_t(workspace.rows) * workspace.out_ld;
  T* out = problem.out.as<T>().at(b, row_q, head);
  const int dim = shape.head_dim_v;
  for (int begin = 0; begin < dim; begin += kWarpSize * 4) {  // the same for all lanes
    const int d = begin + lane * 4;
    float total[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      const float w = __shfl_sync(kAllLanes, part < kWarpSize ? weight[0] : weight[1], part);
      if (d >= dim) continue;
      const float4 x = ptx::load_global<float4>(from + part * part_stride + d);
      total[0] += w * x.x, total[1] += w * x.y, total[2] += w * x.z, total[3] += w * x.w;
    }
    if (d >= dim) continue;
    const uint32_t pair[2] = {Mma<T>::pack(total[0] * factor, total[1] * factor),
                              Mma<T>::pack(total[2] * factor, total[3] * factor)};
    if (args.q_aligned) {
      ptx::store_global(out + d, make_uint2(pair[0], pair[1]));
      continue;
    }
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (d + e < dim) to[d + e] = static_cast<uint16_t>(pair[e / 2] >> (16 * (e % 2)));
    }
  }
}

}  // namespace

cudaError_t combine_parts(const DecodeArgs& args, cudaStream_t stream) {
  if (args.workspace.parts == 1) return cudaSuccess;
  const Shape& shape = args.problem.shape;
  const int32_t tokens = min_int(args.problem.lengths.seqlen_q, DecodeParts::kRows / args.group);
  const dim3 grid(ceil_div(tokens * shape.heads_q, kCombineWarps), shape.batch);
  const dim3 block(kCombineWarps * kWarpSize);
  return shape.dtype == DType::kFloat16
             ? launch(combine_kernel<__half>, grid, block, 0, stream, args)
             : launch(combine_kernel<__nv_bfloat16>, grid, block, 0, stream, args);
}

}  // namespace fal::cuda
