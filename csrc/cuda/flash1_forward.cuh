// FlashAttention, forward (Dao, Fu, Ermon, Rudra and Re, "FlashAttention: Fast and Memory-Efficient
// Exact Attention with IO-Awareness", 2022, algorithms 1 and 2):
//
//   for every tile of K and V:        read once, kept in shared memory
//     for every tile of Q:            O, m and l read, rescaled and written each time
//       S = scale Q K^T    m~ = rowmax(S)    P~ = exp(S - m~)    l~ = rowsum(P~)
//       m' = max(m, m~)    l' = e^(m - m') l + e^(m~ - m') l~
//       O  = (l e^(m - m') O + e^(m~ - m') P~ V) / l'
//
// One thread block computes one query head of one batch entry, whole: nothing else is parallel. O
// is always normalised, as in the paper; it is float32 in the workspace between two tiles of keys
// and goes to `out` at the last tile that the rows see, with LSE.
//
// Warps split the keys of a tile (split-K): each has all rows, so row maxima, row sums and partial
// products P~ V meet in shared memory. There O comes in slices of kSlice columns, so that neither
// the registers nor the exchange grow with the head dim. Warp w then owns rows 16 w to 16 w + 15.
//
// Shared memory:   K [kTileN][kHeadDim] | V [kTileN][kHeadDim] | 2 x Q, later O [kTileM][kHeadDim]
//                  | 2 x partial P~ V [kWarps][kTileM][kSlice], as fragments
//                  | partial m~, l~ [kTileM][kWarps]
#pragma once

#include "../core/dispatch.h"
#include "../core/kv.h"
#include "../core/tiles.h"
#include "alignment.h"
#include "backward_pieces.cuh"
#include "flash1.h"
#include "launch.h"
#include "nonfinite.cuh"
#include "softmax.cuh"

namespace fal::cuda {

template <class T, int kHeadDim_, class ScoreMod_>
struct Flash1ForwardConfig {
  using Element = T;
  using ScoreMod = ScoreMod_;
  static constexpr int kHeadDim = kHeadDim_;  // of Q, K, V and O, padded on load
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 256, "the swizzle's unit; shared memory");

  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kTileM = 64;
  static_assert(kTileM == 16 * kWarps, "a warp owns 16 rows of O");
  static_assert(kTileM == kBackwardRows, "the workspace's tiles");
  static constexpr int kRowGroups = kTileM / 16;
  // The larger, the fewer passes over Q and O: M / 4d in the paper. 128 keys of 256 do not fit.
  static constexpr int kTileN = kHeadDim <= 128 ? 128 : 64;
  static constexpr int kKeysOfWarp = kTileN / kWarps;
  static_assert(kKeysOfWarp % 16 == 0, "the k of one mma");
  static constexpr int kSlice = 16;  // columns of O that are exchanged at a time
  static_assert(kKeysOfWarp * 2 <= kSlice * 4, "a warp's P~ fits where its partial product is");
};

template <class Config>
struct Flash1ForwardSmem {
  using Element = typename Config::Element;
  // The accumulators of one slice: every lane's four floats, fragment by fragment.
  using Partial = float4[Config::kRowGroups][Config::kSlice / 8][kWarpSize];
  using TileOfQ = Element[Config::kTileM][Config::kHeadDim];
  alignas(128) Element k[Config::kTileN][Config::kHeadDim];
  alignas(128) Element v[Config::kTileN][Config::kHeadDim];
  alignas(128) TileOfQ q[2];
  alignas(128) Partial partial[2][Config::kWarps];
  alignas(128) float max[Config::kTileM][Config::kWarps];
  alignas(128) float sum[Config::kTileM][Config::kWarps];
};

// What is kept in device memory between tiles of keys, for every query row: the same shapes as a
// backward's LSE, delta and dQ, in tiles of kBackwardRows rows.
struct Flash1State {
  BackwardWorkspace memory;

  // m, in the unit of the scores, and l.
  FAL_HOST_DEVICE float* max(int64_t tile, int32_t h) const {
    return memory.lse + memory.stats_offset(tile, h);
  }
  FAL_HOST_DEVICE float* sum(int64_t tile, int32_t h) const {
    return memory.delta + memory.stats_offset(tile, h);
  }
  // O, as fragments: [slice][8-column half][warp][lane] of four floats.
  FAL_HOST_DEVICE float* out(int64_t tile, int32_t h) const { return memory.dq_tile(tile, h); }
};

struct Flash1ForwardArgs {
  ForwardProblem problem;
  Flash1State state;
  bool aligned;  // every row of q, k, v and out is a whole number of aligned 16-byte chunks
};

// ---- steps --------------------------------------------------------------------------------------
// One number per row and warp in shared memory, [row][warp]: each warp puts what its own keys give,
// and after a barrier anyone gets a row of all warps'.
struct WarpsOfRow {
  uint32_t smem;

  __device__ __forceinline__ void put(int row, int warp, float value) const {
    ptx::store_shared(smem + (row * 4 + warp) * 4, value);
  }
  __device__ __forceinline__ float max(int row) const {
    const float4 v = ptx::load_shared<float4>(smem + row * 16);
    return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w));
  }
  __device__ __forceinline__ float sum(int row) const {
    const float4 v = ptx::load_shared<float4>(smem + row * 16);
    return (v.x + v.y) + (v.z + v.w);
  }
};

// S -> P~ = exp(S - m~) of the warp's keys. Afterwards `maxima` holds the tile's m~, and `sums` the
// warps' shares of l~ once the block has met again.
template <int kM, int kN8>
__device__ __forceinline__ void softmax_of_tile(float (&s)[kM][kN8][4], float scale_log2,
                                                WarpsOfRow maxima, WarpsOfRow sums, int warp,
                                                int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = -FAL_INFINITY;
#pragma unroll
      for (int n = 0; n < kN8; ++n) {
        max = fmaxf(max, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      }
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
      if (lane % 4 == 0) maxima.put(m * 16 + half * 8 + lane / 4, warp, max);
    }
  }
  __syncthreads();  // every warp's maxima are there; nobody reads this tile of Q any more
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      const float offset = -softmax_reference(maxima.max(row)) * scale_log2;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kN8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[m][n][e] = ptx::ex2(fmaf(s[m][n][e], scale_log2, offset));
          sum += s[m][n][e];
        }
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (lane % 4 == 0) sums.put(row, warp, sum);
    }
  }
}

// m and l of a lane's two rows. In device memory the four lanes that share them hold one number
// each: m of the first row, m of the second, l of the first, l of the second.
struct RowState {
  float max[2], sum[2];

  __device__ __forceinline__ static RowState unpack(float one, int lane) {
    const int first = lane / 4 * 4;
    return {{__shfl_sync(kAllLanes, one, first), __shfl_sync(kAllLanes, one, first + 1)},
            {__shfl_sync(kAllLanes, one, first + 2), __shfl_sync(kAllLanes, one, first + 3)}};
  }
  __device__ __forceinline__ float pack(int lane) const {
    const float m = lane % 2 ? max[1] : max[0], l = lane % 2 ? sum[1] : sum[0];
    return lane % 4 < 2 ? m : l;
  }
};

// What O so far and the tile's P~ V are multiplied by, for a lane's two rows.
struct MergeFactors {
  float old[2], tile[2];
};

// (m, l) <- (m', l'). O is normalised by l' alone; finish() turns that into the row's result.
__device__ __forceinline__ MergeFactors merge_rows(RowState& state, WarpsOfRow maxima,
                                                   WarpsOfRow sums, int row, float scale_log2) {
  MergeFactors factors;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float tile_max = maxima.max(row + half * 8), tile_sum = sums.sum(row + half * 8);
    const float max = fmaxf(state.max[half], tile_max), reference = softmax_reference(max);
    const float old_weight = state.sum[half] * ptx::ex2((state.max[half] - reference) * scale_log2);
    const float tile_weight = ptx::ex2((tile_max - reference) * scale_log2);
    state.max[half] = max;
    state.sum[half] = fmaf(tile_weight, tile_sum, old_weight);
    const float inverse = SoftmaxState{max, state.sum[half]}.inverse_sum();
    factors.old[half] = old_weight * inverse;
    factors.tile[half] = tile_weight * inverse;
  }
  return factors;
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash1_forward_kernel(const __grid_constant__ Flash1ForwardArgs args) {
  using T = typename Config::Element;
  using ScoreMod = typename Config::ScoreMod;
  using Smem = Flash1ForwardSmem<Config>;
  constexpr int kDim = Config::kHeadDim, kTileM = Config::kTileM, kTileN = Config::kTileN;
  constexpr int kM = Config::kRowGroups, kN8 = Config::kKeysOfWarp / 8, kWarps = Config::kWarps;
  constexpr int kSlice8 = Config::kSlice / 8;
  const ForwardProblem& problem = args.problem;
  const Shape& shape = problem.shape;

  const int h = blockIdx.x, b = blockIdx.y;
  const Sequence seq = problem.lengths.sequence(b);
  if (seq.seqlen_q <= 0) return;

  FAL_DYNAMIC_SMEM(smem_bytes);
  const uint32_t smem = ptx::smem_address(smem_bytes);
  const uint32_t smem_k = smem + offsetof(Smem, k), smem_v = smem + offsetof(Smem, v);
  constexpr uint32_t kTileBytesQ = sizeof(typename Smem::TileOfQ);
  const uint32_t smem_q = smem + offsetof(Smem, q);  // the first of two tiles
  const WarpsOfRow maxima{smem + static_cast<uint32_t>(offsetof(Smem, max))};
  const WarpsOfRow sums{smem + static_cast<uint32_t>(offsetof(Smem, sum))};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_key = warp * Config::kKeysOfWarp;  // of S and P~
  const int warp_row = warp * 16;                   // of O

  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, problem.window);
  const ContiguousKv<T> kv = ContiguousKv<T>::make(problem.kv, seq, b, shape.kv_head(h));
  const View<const T> q = problem.q.as<const T>();
  const View<T> out = problem.out.as<T>();
  const int64_t first_tile = args.state.memory.first_tile(problem.lengths, b);
  const auto load_q = [&](uint32_t to, Range rows) {
    load_tile<T, kDim, kTileM, Config::kThreads, ScoreMod::kGeneral>(
        to, {0, rows.size()}, shape.head_dim, args.aligned,
        StridedRows<T>{q.at(b, seq.row_q + rows.begin, h), q.row});
  };

  const ScoreMod mod = make_score_mod<ScoreMod>(problem.score, b, h, band.shift());
  const float scale_log2 = (ScoreMod::kGeneral ? 1.f : problem.score.scale) * kLog2e;
  const Dropout dropout{problem.score.dropout_seed, problem.score.dropout_threshold};
  const float keep_scale = dropout.threshold ? dropout.keep_scale() : 1.f;
  const int slices = ceil_div(shape.head_dim_v, Config::kSlice);

  // Writes the LSE of the lane's rows. Returns what turns O, normalised by l, into the result: the
  // sink joins the denominator, and dropout's survivors grow.
  const auto finish = [&](const RowState& state, int row, int half) {
    SoftmaxState s{
        state.max[half] == -FAL_INFINITY ? -FAL_INFINITY : state.max[half] * (scale_log2 * kLn2),
        state.sum[half]};
    float factor = keep_scale;
    if (problem.score.sinks) {
      const float sum = s.sum, weight = s.absorb_sink(problem.score.sinks[h]);
      factor *= sum * weight * s.inverse_sum();
    }
    if (lane % 4 == 0 && row < seq.seqlen_q) *problem.lse.at(b, h, seq.row_q + row) = s.lse();
    return factor;
  };
  // Writes the warp's rows of O from a tile in shared memory.
  const auto store_out = [&](uint32_t from, Range rows) {
    __syncwarp();
    store_rows<T, kDim, 16, kWarpSize>(
        from, warp_row, rows.size(), shape.head_dim_v, args.aligned, lane,
        [&](int r) { return out.at(b, seq.row_q + rows.begin + r, h); });
  };

  // Keys that no row sees are not read; their places are zeros.
  const Range visible = band.keys_of_any({0, seq.seqlen_q});
  DenseTilesOfRows tiles_of_keys = DenseTilesOfRows::make(band, {0, seq.seqlen_q}, kTileN);
  Tile key_tile;
  while (tiles_of_keys.next(&key_tile)) {
    const Range keys = key_tile.range;
    DenseTilesOfKeys cursor = DenseTilesOfKeys::make(band, keys, kTileM);
    Tile tile, next;
    bool more = cursor.next(&tile);
    if (!more) continue;
    __syncthreads();  // nobody reads the last tiles of K, V and Q any more
    const Range valid{visible.begin - keys.begin, min(visible.end - keys.begin, kTileN)};
    load_tile<T, kDim, kTileN, Config::kThreads, ScoreMod::kGeneral>(
        smem_k, {max(valid.begin, 0), valid.end}, shape.head_dim, args.aligned,
        StridedRows<T>{kv.k_row(keys.begin), kv.k_stride});
    load_tile<T, kDim, kTileN, Config::kThreads, ScoreMod::kGeneral>(
        smem_v, {max(valid.begin, 0), valid.end}, shape.head_dim_v, args.aligned,
        StridedRows<T>{kv.v_row(keys.begin), kv.v_stride});
    load_q(smem_q, tile.range);
    ptx::cp_async_commit();

    for (int stage = 0; more; stage ^= 1, tile = next) {
      // This tile of Q has landed, and every warp is done with the last one.
      ptx::cp_async_wait<0>();
      const bool masked = tile.kind == TileKind::kPartial || keys.size() < kTileN;
      const bool scattered = sync_and_find(
          masked, [&] { return copied_nonfinite<T, kDim, kTileN, Config::kThreads>(smem_v); });
      more = cursor.next(&next);
      if (more) load_q(smem_q + (stage ^ 1) * kTileBytesQ, next.range);
      ptx::cp_async_commit();

      const uint32_t smem_tile = smem_q + stage * kTileBytesQ;
      const Range rows = tile.range, seen = band.keys_of_any(rows);
      const bool first = keys.begin <= seen.begin, last = seen.end <= keys.begin + kTileN;
      const int64_t state_tile = first_tile + rows.begin / kTileM;
      float* const old = args.state.out(state_tile, h) + (warp * kWarpSize + lane) * 4;
      float* const stats =
          (lane % 4 < 2 ? args.state.max(state_tile, h) : args.state.sum(state_tile, h)) +
          warp_row + lane % 2 * 8 + lane / 4;
      float stat = lane % 4 < 2 ? -FAL_INFINITY : 0.f;
      if (!first) stat = ptx::load_global<float>(stats);

      float acc_s[kM][kN8][4];
      clear(acc_s);
      multiply_nt<T, kDim / 16>(acc_s, address_rows_first<kDim>(smem_tile, 0, lane),
                                address_columns_first<kDim>(smem_k, warp_key, lane));
      const int lane_row = rows.begin + lane / 4;
      const int lane_key = keys.begin + warp_key + lane % 4 * 2;
      if constexpr (ScoreMod::kGeneral) {
        modify_scores(acc_s, mod, problem.score.scale, lane_row, lane_key);
      }
      if (masked) hide(acc_s, band, lane_row, lane_key, -FAL_INFINITY);
      softmax_of_tile(acc_s, scale_log2, maxima, sums, warp, lane);
      if constexpr (ScoreMod::kGeneral) {
        if (dropout.threshold) {
          drop(acc_s, dropout, b * shape.heads_q + h, lane_row, lane_key);
        }
      }
      FragmentsA<kM, kN8 / 2> frag_p;
      pack_fragments<T>(frag_p, acc_s);

      // O, slice by slice: every warp's share of P~ V meets in one of two buffers, each free again
      // once the other's barrier is passed. With scattered NaNs there is one buffer and a second
      // barrier instead, and each warp's P~ lies in its part of the other.
      constexpr uint32_t kPartialBytes = sizeof(typename Smem::Partial);
      const uint32_t partials = smem + offsetof(Smem, partial);
      const uint32_t smem_p = partials + (kWarps + warp) * kPartialBytes;
      if (scattered) {
        stage_fragments(smem_p, frag_p, lane);
        __syncwarp();
      }
      MergeFactors factors{};
      float unit[1][2] = {{1.f, 1.f}};
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
        float acc_o[1][kSlice8][4];
        clear(acc_o);
        if (!first) {
#pragma unroll
          for (int n = 0; n < kSlice8; ++n) {
            const float4 v =
                ptx::load_global<float4>(old + (slice * kSlice8 + n) * Config::kThreads * 4);
            acc_o[0][n][0] = v.x, acc_o[0][n][1] = v.y, acc_o[0][n][2] = v.z, acc_o[0][n][3] = v.w;
          }
        }
        float acc[kM][kSlice8][4];
        clear(acc);
        if (!scattered) {
          multiply_nn<T, kN8 / 2>(acc, frag_p,
                                  address_rows_first<kDim>(smem_v, warp_key, lane, slice));
        } else {
          multiply_seen<T, kDim>(
              acc, smem_v + warp_key * TileLayout<kDim>::kRowBytes, Config::kKeysOfWarp, lane,
              slice,
              [&](int r, int k) { return band.visible(rows.begin + r, keys.begin + warp_key + k); },
              [&](int r, int k) { return fragment_element<T, kM>(smem_p, r, k); });
        }
        const uint32_t partial =
            partials + (scattered ? 0 : slice % 2 * kWarps * kPartialBytes) + lane * sizeof(float4);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kSlice8; ++n) {
            ptx::store_shared(partial + warp * kPartialBytes + (m * kSlice8 + n) * 512,
                              make_float4(acc[m][n][0], acc[m][n][1], acc[m][n][2], acc[m][n][3]));
          }
        }
        __syncthreads();  // the slice's shares (and, the first time, those of l~) are there
        if (slice == 0) {
          RowState state = RowState::unpack(stat, lane);
          factors = merge_rows(state, maxima, sums, warp_row + lane / 4, scale_log2);
          if (last) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              unit[0][half] = finish(state, lane_row + warp_row + half * 8, half);
            }
          } else {
            ptx::store_global(stats, state.pack(lane));
          }
        }
#pragma unroll
        for (int n = 0; n < kSlice8; ++n) {
          float tile_o[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            const float4 v =
                ptx::load_shared<float4>(partial + w * kPartialBytes + (warp * kSlice8 + n) * 512);
            tile_o[0] += v.x, tile_o[1] += v.y, tile_o[2] += v.z, tile_o[3] += v.w;
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc_o[0][n][e] =
                fmaf(acc_o[0][n][e], factors.old[e / 2], tile_o[e] * factors.tile[e / 2]);
          }
          if (!last) {
            ptx::store_global(
                old + (slice * kSlice8 + n) * Config::kThreads * 4,
                make_float4(acc_o[0][n][0], acc_o[0][n][1], acc_o[0][n][2], acc_o[0][n][3]));
          }
        }
        // Q's place is free since the maxima met.
        if (last) stage_rows<T, kDim>(smem_tile, warp_row, acc_o, unit, lane, slice);
        if (scattered) __syncthreads();  // the slice's shares are merged
      }
      if (last) store_out(smem_tile, rows);
    }
  }

  ptx::cp_async_wait<0>();  // the last group is empty

  // Tiles of rows that see no key: the loops above never came to them.
  for (int begin = 0; begin < seq.seqlen_q; begin += kTileM) {
    const Range rows{begin, min(begin + kTileM, seq.seqlen_q)};
    if (!band.keys_of_any(rows).empty()) continue;
    const RowState nothing{{-FAL_INFINITY, -FAL_INFINITY}, {0.f, 0.f}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      finish(nothing, begin + warp_row + half * 8 + lane / 4, half);
    }
    const float zero[1][kDim / 8][4] = {}, unit[1][2] = {};
    __syncwarp();  // the last such tile has been stored
    stage_rows<T, kDim>(smem_q, warp_row, zero, unit, lane);
    store_out(smem_q, rows);
  }
}

// ---- launcher -----------------------------------------------------------------------------------
// The smallest head-dim class that holds both head dims.
template <class T>
cudaError_t flash1_forward_of(const ForwardProblem& problem, void* workspace, cudaStream_t stream) {
  const Shape& shape = problem.shape;
  const bool aligned = rows_aligned(problem);
  const bool plain = plain_scores(problem.score, aligned);
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_at_least<64, 128, 256>(max_int(shape.head_dim, shape.head_dim_v), [&](auto dim) {
    const Flash1ForwardArgs args{
        problem, {BackwardWorkspace::make(workspace, shape, dim.value, true)}, aligned};
    const auto run = [&](auto mod) {
      using Config = Flash1ForwardConfig<T, dim.value, decltype(mod)>;
      error = launch(flash1_forward_kernel<Config>, dim3(shape.heads_q, shape.batch),
                     Config::kThreads, sizeof(Flash1ForwardSmem<Config>), stream, args);
    };
    if constexpr (dim.value <= 128) {
      if (plain) return run(NoScoreMod{});
    }
    run(GeneralScoreMod{});  // beside head dim 256 the plain kernel spilled 8 bytes on sm_90a
  });
  return error;
}

}  // namespace fal::cuda
