// How a part of the keys ends in decode.cuh: the warps' results are added up and written, to the
// workspace, or, when the part is the whole sequence, to the output.
#pragma once

#include "decode_steps.cuh"

namespace fal::cuda {

// The four warps' states of one row as one, in base-2 log.
template <class Config>
__device__ __forceinline__ SoftmaxState merged_state(uint32_t smem_states, int row) {
  float2 of_warp[Config::kWarps];
  float max = -FAL_INFINITY, sum = 0.f;
#pragma unroll
  for (int w = 0; w < Config::kWarps; ++w) {
    of_warp[w] = ptx::load_shared<float2>(smem_states + (w * Config::kTileM + row) * 8);
    max = fmaxf(max, of_warp[w].x);
  }
  const float reference = softmax_reference(max);
#pragma unroll
  for (int w = 0; w < Config::kWarps; ++w) sum += of_warp[w].y * ptx::ex2(of_warp[w].x - reference);
  return {max, sum};
}

// Where a thread writes its row of a part: the workspace, or, when the part is the whole sequence,
// the output.
template <class T>
struct DecodeTarget {
  float* partial;  // null: to out
  T* out;
  float factor;  // 1 / sum of the softmax, in out
  bool aligned;
  int32_t dim;

  __device__ __forceinline__ void store(int column, float2 x) const {
    if (column >= dim) return;
    if (partial) {
      ptx::store_global(partial + column, x);  // a row has room for whole pairs
      return;
    }
    const uint32_t pair = Mma<T>::pack(x.x * factor, x.y * factor);
    if (aligned) {
      ptx::store_global(out + column, pair);
      return;
    }
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
    to[column] = static_cast<uint16_t>(pair);
    if (column + 1 < dim) to[column + 1] = static_cast<uint16_t>(pair >> 16);
  }
};

// Which rows of which part.
struct PartOfRows {
  int32_t b, head_k, first_row, rows, part, parts;
};

// The target of row `row` of the tile, whose state is in base-2 log; `writes`: its thread also
// writes the state there, or the LSE.
template <class T>
__device__ __forceinline__ DecodeTarget<T> decode_target(const DecodeArgs& args, SoftmaxState state,
                                                         const PartOfRows& which, int row,
                                                         int64_t row_q, bool writes) {
  if (row >= which.rows) return {nullptr, nullptr, 0.f, false, 0};
  const ForwardProblem& problem = args.problem;
  const int r = which.first_row + row, dim = problem.shape.head_dim_v;
  if (which.parts > 1) {
    const int64_t index = args.workspace.row(problem.shape, which.b, which.head_k, which.part, r);
    if (writes) ptx::store_global(args.workspace.states + index, make_float2(state.max, state.sum));
    return {args.workspace.out + index * args.workspace.out_ld, nullptr, 1.f, true, dim};
  }
  const int token = r / args.group, head = which.head_k * args.group + r - token * args.group;
  state.max *= kLn2;
  float rescale = 1.f;
  if (problem.score.sinks) rescale = state.absorb_sink(problem.score.sinks[head]);
  if (writes) *problem.lse.at(which.b, head, row_q + token) = state.lse();
  return {nullptr, problem.out.as<T>().at(which.b, row_q + token, head),
          rescale * state.inverse_sum(), args.q_aligned, dim};
}

// Adds the warps' results up, and writes them. Warps exchange kSlice columns at a time; thread t
// then owns columns 2 (t % 8) of row t / 8 and, with two row groups, of the row 16 below.
template <class Config>
__device__ __forceinline__ void finish_part(
    const DecodeArgs& args, const OnlineSoftmax<Config::kRowGroups>& softmax,
    float (&acc_o)[Config::kRowGroups][Config::kHeadDim / 8][4], float value_unit, float scale_log2,
    uint32_t smem_states, uint32_t smem_exchange, const PartOfRows& which, int64_t row_q) {
  using T = typename Config::Element;
  constexpr int kM = Config::kRowGroups, kSlice = Config::kSlice;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  SoftmaxState own[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      own[m][half] = softmax.finish(m, half, scale_log2);
      const int row = m * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0) {
        ptx::store_shared(smem_states + (warp * Config::kTileM + row) * 8,
                          make_float2(own[m][half].max, own[m][half].sum));
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float max = merged_state<Config>(smem_states, m * 16 + half * 8 + lane / 4).max;
      const float factor = value_unit * ptx::ex2(own[m][half].max - softmax_reference(max));
#pragma unroll
      for (int d = 0; d < Config::kHeadDim / 8; ++d) {
        acc_o[m][d][2 * half] *= factor, acc_o[m][d][2 * half + 1] *= factor;
      }
    }
  }

  const int thread_row = threadIdx.x / 8, thread_column = threadIdx.x % 8 * 2;
  DecodeTarget<T> target[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int row = m * 16 + thread_row;
    target[m] = decode_target<T>(args, merged_state<Config>(smem_states, row), which, row, row_q,
                                 thread_column == 0);
  }
  // Eight columns of every second pair of rows swap places, so that no two rows share banks.
  const auto address = [&](int w, int row, int column) {
    return smem_exchange +
           ((w * Config::kTileM + row) * kSlice + (column ^ (row >> 1 & 1) << 3)) * 4;
  };
#pragma unroll
  for (int slice = 0; slice < Config::kHeadDim / kSlice; ++slice) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * 16 + half * 8 + lane / 4;
        const float (&left)[4] = acc_o[m][2 * slice];
        const float (&right)[4] = acc_o[m][2 * slice + 1];
        const int e = 2 * half;
        if constexpr (Config::Storage::kQuantised) {  // even and odd columns
          ptx::store_shared(address(warp, row, lane % 4 * 4),
                            make_float4(left[e], right[e], left[e + 1], right[e + 1]));
        } else {
          ptx::store_shared(address(warp, row, lane % 4 * 2), make_float2(left[e], left[e + 1]));
          ptx::store_shared(address(warp, row, 8 + lane % 4 * 2),
                            make_float2(right[e], right[e + 1]));
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float2 total = make_float2(0.f, 0.f);
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) {
        const float2 x = ptx::load_shared<float2>(address(w, m * 16 + thread_row, thread_column));
        total.x += x.x, total.y += x.y;
      }
      target[m].store(slice * kSlice + thread_column, total);
    }
    __syncthreads();
  }
}

}  // namespace fal::cuda
