// Attention of a few query rows over many keys: FlashAttention-2 with the keys split over thread
// blocks ("Flash-Decoding", Dao, Haziza, Massa and Sizov, 2023), then combine.cu.
//
//   part p of the keys:  m_p = max S    l_p = sum exp(S - m_p)    O_p = exp(S - m_p) V
//   together:            m = max m_p    l = sum exp(m_p - m) l_p  O = sum exp(m_p - m) O_p / l
//
// Bound by reading K and V, so the rows of all query heads that share a K/V head, times the few
// query tokens, are one tile: every element is read once. One thread block computes kTileM rows of
// one K/V head over a run of parts (decode_split.h). Its warps split the keys, 16 each of 64, and
// share nothing until a part ends: each has its own ring of tiles, filled by its own cp.async, and
// waits for no other.
//
// Shared memory:  tiles of each warp [2 stages][K, V][16 keys] | Q | O on its way between warps |
//                 softmax states | factors of quantised rows
//
//   step         K0      V0      K1      V1
//   computes     S=QK'   O+=PV   S=QK'   O+=PV
//   copy starts  V1      K2      V2      K3        (into the place that the last step left)
#pragma once

#include "../core/dispatch.h"
#include "decode_finish.cuh"
#include "launch.h"

namespace fal::cuda {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  using T = typename Config::Element;
  using Storage = typename Config::Storage;
  using Layout = typename Storage::Layout;
  using Smem = DecodeSmem<Config>;
  constexpr int kM = Config::kRowGroups, kDim = Config::kHeadDim, kTileM = Config::kTileM;
  static_assert(sizeof(Smem) <= kMaxSmemBytes);
  const ForwardProblem& problem = args.problem;
  const Shape& shape = problem.shape;

  // Heads of the same keys run side by side: their rows share memory pages.
  const int head_k = blockIdx.x / args.m_blocks, split = blockIdx.y, b = blockIdx.z;
  const int first_row = blockIdx.x % args.m_blocks * kTileM, first_head = head_k * args.group;
  const Sequence seq = problem.lengths.sequence(b);
  const int rows = min(kTileM, seq.seqlen_q * args.group - first_row);
  if (rows <= 0) return;
  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, problem.window);
  const DecodeParts parts = DecodeParts::make(band, args.group);
  const int run = ceil_div(parts.count, gridDim.y);
  const int first_part = split * run, last_part = min(first_part + run, parts.count);
  if (first_part >= last_part) return;

  // Keys of the run that some row of this tile sees, and in which steps of 64 they are.
  const Range tokens{first_row / args.group, (first_row + rows - 1) / args.group + 1};
  const int origin = parts.seen.begin + first_part * parts.size;
  const Range keys =
      intersect(band.keys_of_any(tokens), {origin, parts.seen.begin + last_part * parts.size});
  const Range seen_by_all = band.keys_of_all(tokens);
  const Range steps = keys.empty() ? Range{0, 0}
                                   : Range{(keys.begin - origin) / DecodeParts::kStep,
                                           ceil_div(keys.end - origin, DecodeParts::kStep)};

  FAL_DYNAMIC_SMEM(smem_bytes);
  const uint32_t smem = ptx::smem_address(smem_bytes);
  const uint32_t smem_q = smem + offsetof(Smem, q), smem_states = smem + offsetof(Smem, states);
  const uint32_t smem_exchange = smem + offsetof(Smem, exchange);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto smem_tile = [&](int step, int is_v) {
    return smem + offsetof(Smem, tiles) +
           ((warp * Config::kStages + step % 2) * 2 + is_v) * Smem::kTileBytes;
  };
  const auto smem_factors = [&](int step) {
    return smem + offsetof(Smem, factors) + (warp * Config::kStages + step % 2) * 2 * kWarpKeys * 4;
  };
  const auto first_key = [&](int step) {
    return origin + step * DecodeParts::kStep + warp * kWarpKeys;
  };

  const KvRows kv = KvRows::make(problem.kv, seq, b, head_k);
  const auto valid = [&](int step) {
    const int begin = first_key(step);
    return Range{keys.begin - begin, min(keys.end - begin, kWarpKeys)};
  };
  const auto load_k = [&](int step, KvPlace place) {
    if (step < steps.end) {
      load_keys<Layout, Storage::kBytes>(smem_tile(step, 0), problem.kv.k,
                                         kv.offset(problem.kv.k, place), valid(step),
                                         shape.head_dim, args.kv_aligned, lane);
      if constexpr (Storage::kQuantised) {
        const RowStats& scale = lane < kWarpKeys ? problem.kv.k_scale : problem.kv.v_scale;
        ptx::cp_async_small<4>(smem_factors(step) + lane * 4,
                               scale.at(place.block, head_k, place.row),
                               valid(step).contains(lane % kWarpKeys));
      }
    }
    ptx::cp_async_commit();
  };
  const auto load_v = [&](int step, KvPlace place) {
    if (step < steps.end) {
      load_keys<Layout, Storage::kBytes>(smem_tile(step, 1), problem.kv.v,
                                         kv.offset(problem.kv.v, place), valid(step),
                                         shape.head_dim_v, args.kv_aligned, lane);
    }
    ptx::cp_async_commit();
  };
  const auto find = [&](int step) {
    return steps.empty() ? KvPlace{0, 0} : kv.find(first_key(step), keys, lane);
  };

  load_tile<T, kDim, kTileM, Config::kThreads, true, /*kInLoop=*/false>(
      smem_q, {0, rows}, shape.head_dim, args.q_aligned,
      GroupedRows<T>{problem.q.as<const T>(), seq.row_q, b, first_head, args.group, first_row});
  ptx::cp_async_commit();
  const KvPlace place = find(steps.begin);
  KvPlace next = find(steps.begin + 1), after_next = find(steps.begin + 2);
  load_k(steps.begin, place);
  load_v(steps.begin, place);
  load_k(steps.begin + 1, next);
  ptx::cp_async_wait<3>();
  __syncthreads();  // Q has landed

  uint32_t frag_q[Config::kKeepsQ ? kDim / 64 : 1][4][kM][4];
  if constexpr (Config::kKeepsQ) {
#pragma unroll
    for (int block = 0; block < kDim / 64; ++block) {
      Storage::load_queries(frag_q[block], smem_q, block, lane);
    }
  }
  LaneRows<kM> lane_rows;
  const TileRows tile_rows{b, first_head, first_row, rows, args.group};
  lane_rows.init(problem.score, tile_rows, lane);
  const float scale_log2 = (args.general ? 1.f : problem.score.scale) * kLog2e;

  int step = steps.begin;
  for (int part = first_part; part < last_part; ++part) {
    const int step_end =
        min(steps.end, (part - first_part + 1) * (parts.size / DecodeParts::kStep));
    OnlineSoftmax<kM> softmax;
    softmax.init();
    ValueUnit<Config> value_unit;
    float acc_o[kM][kDim / 8][4];
    clear(acc_o);

    for (; step < step_end; ++step) {
      const int begin = first_key(step), key = begin + lane % 4 * 2;
      const bool any = begin < keys.end;  // else this warp has no key left
      const bool masked = begin < seen_by_all.begin || begin + kWarpKeys > seen_by_all.end;

      // K has landed, and all lanes are done with the place that the next copy overwrites.
      ptx::cp_async_wait<2>();
      __syncwarp();
      load_v(step + 1, next);
      FragmentsA<kM, 1> frag_p;
      if (any) {
        float s[kM][2][4];
        clear(s);
        Storage::with_elements(problem.kv.dtype, [&](auto elements) {
#pragma unroll
          for (int block = 0; block < kDim / 64; ++block) {
            if constexpr (!Config::kKeepsQ) {
              Storage::load_queries(frag_q[0], smem_q, block, lane);
            }
            elements.add_scores(s, frag_q[Config::kKeepsQ ? block : 0], smem_tile(step, 0), block,
                                lane);
          }
        });
        float2 value_factor[2];
        if constexpr (Storage::kQuantised) {
          float2 key_factor[2];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const uint32_t from = smem_factors(step) + (n * 8 + lane % 4 * 2) * 4;
            key_factor[n] = ptx::load_shared<float2>(from);
            value_factor[n] = ptx::load_shared<float2>(from + kWarpKeys * 4);
          }
          scale_keys(s, key_factor);
        }
        if (args.general) {
          modify_keys(s, problem.score, lane_rows, band.shift(), key);
          if (problem.score.bias.data) {
            add_bias<T>(s, problem.score.bias, band, lane_rows, tile_rows, key, lane);
          }
        }
        if (masked) mask_keys(s, band, lane_rows, key, -FAL_INFINITY);
        softmax.step(s, acc_o, scale_log2);
        if constexpr (Storage::kQuantised) {
          const float unit = value_unit.take(value_factor, acc_o);
#pragma unroll
          for (int n = 0; n < 2; ++n) value_factor[n].x *= unit, value_factor[n].y *= unit;
          scale_keys(s, value_factor);
          if (masked) mask_keys(s, band, lane_rows, key, 0.f);  // a hidden factor may be NaN
        }
        pack_fragments<T>(frag_p, s);
      }

      // The same for V.
      ptx::cp_async_wait<2>();
      __syncwarp();
      load_k(step + 2, after_next);
      next = after_next;
      after_next = find(step + 3);
      if (any) {
        Storage::with_elements(problem.kv.dtype, [&](auto elements) {
          if (masked && tokens.size() > 1 && elements.holds_nonfinite(smem_tile(step, 1), lane)) {
            add_seen_values<Config>(acc_o, elements, frag_p, smem_tile(step, 1), band, lane_rows,
                                    begin, lane);
          } else {
            add_values<Config>(acc_o, elements, frag_p, smem_tile(step, 1), lane);
          }
        });
      }
    }

    finish_part<Config>(args, softmax, acc_o, value_unit.unit, scale_log2, smem_states,
                        smem_exchange, {b, head_k, first_row, rows, part, parts.count}, seq.row_q);
  }
  ptx::cp_async_wait<0>();  // the last groups are empty
}

// ---- launcher -----------------------------------------------------------------------------------
template <class Config>
cudaError_t launch_decode(DecodeArgs args, cudaStream_t stream) {
  const Shape& shape = args.problem.shape;
  args.m_blocks = ceil_div(args.problem.lengths.seqlen_q * args.group, Config::kTileM);
  const int64_t tiles = static_cast<int64_t>(shape.batch) * shape.heads_k * args.m_blocks;
  const int32_t splits = decode_splits(tiles, args.workspace.parts, multiprocessors(),
                                       Config::kBlocksPerSm, args.problem.num_splits);
  const dim3 grid(shape.heads_k * args.m_blocks, splits, shape.batch);
  return launch(decode_kernel<Config>, grid, Config::kThreads, sizeof(DecodeSmem<Config>), stream,
                args);
}

// The kernel for a problem whose q is of T: the smallest head-dim class that holds both head dims,
// and tiles of 32 rows where that halves the reads of K and V.
template <class T>
cudaError_t decode_kernel_of(const DecodeArgs& args, cudaStream_t stream) {
  const Shape& shape = args.problem.shape;
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_at_least<64, 128, 192, 256>(max_int(shape.head_dim, shape.head_dim_v), [&](auto dim) {
    constexpr int kDim = dim.value;
    const auto run = [&](auto groups, auto storage) {
      using Storage = typename decltype(storage)::type;
      error = launch_decode<DecodeConfig<T, kDim, groups.value, Storage>>(args, stream);
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, kDim <= 128 ? 2 : 1>;
    if (args.problem.kv.dtype != args.problem.shape.dtype) {
      run(One{}, TypeTag<QuantisedKvTile<T, kDim>>{});
    } else if (args.problem.lengths.seqlen_q > 16 / args.group) {
      run(Two{}, TypeTag<PlainKvTile<T, kDim>>{});
    } else {
      run(One{}, TypeTag<PlainKvTile<T, kDim>>{});
    }
  });
  return error;
}

}  // namespace fal::cuda
