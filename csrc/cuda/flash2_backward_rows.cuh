// FlashAttention-2, dQ alone, for a backward whose bits must repeat:
//
//   P = exp(scale Q K^T - LSE)    dP = dO V^T    dS = P * (dP - delta)    dQ = scale dS K
//
// One thread block computes kTileM query rows of one head, dQ in registers, and passes over the
// visible tiles of keys in order: no sums in device memory, so no order of addition but this one.
// Scores are computed twice then (here and in flash2_backward.cuh): seven products for five.
//
// Shared memory:  Q, later dQ, and dO [kTileM][kHeadDim] | kStages of K, V [kTileN][kHeadDim] |
//                 with modified scores: the list of tiles
//
// The kernel for modified scores takes block masks too: ListedTiles in flash2_forward.cuh's words.
#pragma once

#include "../core/dispatch.h"
#include "../core/kv.h"
#include "../core/tiles.h"
#include "backward_pieces.cuh"
#include "flash2.h"
#include "launch.h"
#include "mask_bits.cuh"
#include "nonfinite.cuh"
#include "softmax.cuh"
#include "tile_list.cuh"

namespace fal::cuda {

template <class T, int kHeadDim_, class ScoreMod_>
struct Flash2BackwardRowsConfig {
  using Element = T;
  using ScoreMod = ScoreMod_;
  static constexpr bool kListed = ScoreMod::kGeneral;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 256, "the swizzle's unit; the register file");

  // dQ takes kHeadDim / 2 registers (128 at 256), scores kTileN / 2 twice.
  static constexpr int kTileN = kHeadDim <= (ScoreMod::kGeneral ? 128 : 192) ? 64 : 32;
  static constexpr int kWarps = kHeadDim <= 192 ? 8 : 4;  // Q and dO of 128 rows fill 128 KB at 256
  static constexpr int kTileM = kWarps * 16;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStages = kHeadDim == 192 && kTileN == 64 ? 1 : 2;  // what fits
};

template <class Config>
struct Flash2BackwardRowsTiles {
  using Element = typename Config::Element;
  struct Stage {
    Element k[Config::kTileN][Config::kHeadDim], v[Config::kTileN][Config::kHeadDim];
  };
  alignas(128) Element q[Config::kTileM][Config::kHeadDim];  // dQ in the end
  alignas(128) Element dout[Config::kTileM][Config::kHeadDim];
  alignas(128) Stage stage[Config::kStages];
};
template <class Config>
using Flash2BackwardRowsSmem =
    std::conditional_t<Config::kListed, WithTileList<Flash2BackwardRowsTiles<Config>>,
                       Flash2BackwardRowsTiles<Config>>;

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash2_backward_rows_kernel(const __grid_constant__ BackwardArgs args) {
  using T = typename Config::Element;
  using ScoreMod = typename Config::ScoreMod;
  using Smem = Flash2BackwardRowsTiles<Config>;
  constexpr int kDim = Config::kHeadDim, kTileM = Config::kTileM, kTileN = Config::kTileN;
  constexpr int kThreads = Config::kThreads, kN8 = kTileN / 8;
  constexpr bool kGeneral = ScoreMod::kGeneral;
  static_assert(sizeof(Flash2BackwardRowsSmem<Config>) <= kMaxSmemBytes);
  const BackwardProblem& problem = args.problem;
  const ForwardProblem& forward = problem.forward;
  const Shape& shape = forward.shape;

  // Heavy tiles first, as in the forward.
  const int m_block = gridDim.x - 1 - blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const Sequence seq = forward.lengths.sequence(b);
  const Range rows{m_block * kTileM, min((m_block + 1) * kTileM, seq.seqlen_q)};
  if (rows.empty()) return;

  FAL_DYNAMIC_SMEM(smem_bytes);
  const uint32_t smem = ptx::smem_address(smem_bytes);
  const uint32_t smem_q = smem + offsetof(Smem, q), smem_dout = smem + offsetof(Smem, dout);
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * 16;
  const int lane_row = rows.begin + warp_row + lane / 4;

  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, forward.window);
  const Range visible = band.keys_of_any(rows);
  const ContiguousKv<T> kv = ContiguousKv<T>::make(forward.kv, seq, b, shape.kv_head(h));
  const auto smem_stage = [&](int stage) {
    return smem + static_cast<uint32_t>(offsetof(Smem, stage)) +
           stage * static_cast<uint32_t>(sizeof(typename Smem::Stage));
  };
  const auto load_keys = [&](int stage, int begin, int first_visible) {
    const uint32_t to = smem_stage(stage);
    const Range valid{first_visible - begin, min(visible.end - begin, kTileN)};
    load_tile<T, kDim, kTileN, kThreads, kGeneral>(to + offsetof(typename Smem::Stage, k), valid,
                                                   shape.head_dim, args.aligned,
                                                   StridedRows<T>{kv.k_row(begin), kv.k_stride});
    load_tile<T, kDim, kTileN, kThreads, kGeneral>(to + offsetof(typename Smem::Stage, v), valid,
                                                   shape.head_dim_v, args.aligned,
                                                   StridedRows<T>{kv.v_row(begin), kv.v_stride});
  };

  const auto candidates = [&] {  // of a list
    return KeyTileCandidates<kTileN>::of_block(forward, rows.begin, kTileM);
  };
  auto cursor = [&] {
    if constexpr (Config::kListed) {
      return ListCursor::make(smem + offsetof(WithTileList<Smem>, list), candidates);
    } else {
      return DenseTilesOfRows::make(band, rows, kTileN);
    }
  }();
  const auto next_tile = [&](Tile* tile) {
    if constexpr (Config::kListed) {
      return cursor.next(candidates).put(tile);
    } else {
      return cursor.next(tile);
    }
  };
  Tile tile, next;
  bool more = next_tile(&tile);
  const auto rows_of_q = [&] {
    return StridedRows<T>{forward.q.as<const T>().at(b, seq.row_q + rows.begin, h), forward.q.row};
  };
  if (more) {
    const View<const T> dout = problem.dout.as<const T>();
    const int64_t row = seq.row_q + rows.begin;
    load_tile<T, kDim, kTileM, kThreads, kGeneral>(smem_q, {0, rows.size()}, shape.head_dim,
                                                   args.aligned, rows_of_q());
    load_tile<T, kDim, kTileM, kThreads, kGeneral>(smem_dout, {0, rows.size()}, shape.head_dim_v,
                                                   args.aligned,
                                                   StridedRows<T>{dout.at(b, row, h), dout.row});
    load_keys(0, tile.range.begin,
              Config::kListed ? max(tile.range.begin, visible.begin) : visible.begin);
  }
  ptx::cp_async_commit();

  // LSE and delta of the lane's two rows. Rows behind the sequence have P = 0.
  float lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_row + half * 8;
    const int64_t offset =
        args.workspace.stats_offset(args.workspace.first_tile(forward.lengths, b), h) + row;
    const bool valid = row < seq.seqlen_q;
    lse[half] = valid ? args.workspace.lse[offset] : FAL_INFINITY;
    delta[half] = valid ? args.workspace.delta[offset] : 0.f;
  }
  const ScoreMod mod = make_score_mod<ScoreMod>(forward.score, b, h, band.shift());
  const Dropout dropout{forward.score.dropout_seed, forward.score.dropout_threshold};
  const float scale = kGeneral ? forward.score.scale : forward.score.scale * kLog2e;
  const float keep_scale = dropout.threshold ? dropout.keep_scale() : 1.f;

  float acc_dq[1][kDim / 8][4];
  clear(acc_dq);
  int stage = 0;
  while (more) {
    // The tile has landed, and every warp is done with the buffers that the next copy overwrites.
    ptx::cp_async_wait<0>();
    const uint32_t smem_k = smem_stage(stage) + offsetof(typename Smem::Stage, k);
    const uint32_t smem_v = smem_stage(stage) + offsetof(typename Smem::Stage, v);
    const bool masked = tile.kind == TileKind::kPartial || tile.range.size() < kTileN;
    const bool scattered =
        sync_and_find(masked, [&] { return copied_nonfinite<T, kDim, kTileN, kThreads>(smem_k); });
    more = next_tile(&next);
    if (Config::kStages == 2 && more) load_keys(stage ^ 1, next.range.begin, next.range.begin);
    ptx::cp_async_commit();

    WarpBits<16, kTileN> bits;
    if constexpr (Config::kListed) {
      if (masked) {
        bits.look(candidates().sight, tile.rule, rows.begin + warp_row, tile.range.begin, lane);
      }
    }

    float acc_s[1][kN8][4], acc_dp[1][kN8][4];
    clear(acc_s);
    clear(acc_dp);
    multiply_nt<T, kDim / 16, 2>(acc_s, address_rows_first<kDim>(smem_q, warp_row, lane),
                                 address_columns_first<kDim>(smem_k, 0, lane));
    multiply_nt<T, kDim / 16, 2>(acc_dp, address_rows_first<kDim>(smem_dout, warp_row, lane),
                                 address_columns_first<kDim>(smem_v, 0, lane));

    const int key = tile.range.begin + lane % 4 * 2;
    if constexpr (kGeneral) {
      if (dropout.threshold) drop(acc_dp, dropout, b * shape.heads_q + h, lane_row, key);
    }
#pragma unroll
    for (int n = 0; n < kN8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (!kGeneral) {
          const float p = ptx::ex2(fmaf(acc_s[0][n][e], scale, -lse[e / 2]));
          acc_s[0][n][e] = p * (acc_dp[0][n][e] - delta[e / 2]);
        } else {
          const float scaled = acc_s[0][n][e] * scale;
          const float score = mod.value(scaled, lane_row + e / 2 * 8, key + n * 8 + e % 2, 0.f);
          const float p = ptx::ex2(fmaf(score, kLog2e, -lse[e / 2]));
          acc_s[0][n][e] =
              p * (acc_dp[0][n][e] * keep_scale - delta[e / 2]) * mod.derivative(scaled);
        }
      }
    }
    // Not before: LSE, delta and dP may be NaN where dS is 0.
    if (masked) {
      if constexpr (Config::kListed) {
        hide(acc_s, bits, lane, 0.f);
      } else {
        hide(acc_s, band, lane_row, key, 0.f);
      }
    }
    FragmentsA<1, kN8 / 2> frag_ds;
    pack_fragments<T>(frag_ds, acc_s);
    if (!scattered) {
      multiply_nn<T, kTileN / 16>(acc_dq, frag_ds, address_rows_first<kDim>(smem_k, 0, lane));
    } else {
      // dS takes the place of the warp's rows of Q, which nobody else reads, and Q is read again.
      const uint32_t smem_ds = smem_q + warp_row * TileLayout<kDim>::kRowBytes;
      __syncwarp();  // the warp is done with them
      stage_fragments(smem_ds, frag_ds, lane);
      __syncwarp();
      multiply_seen<T, kDim>(
          acc_dq, smem_k, kTileN, lane, 0,
          [&](int r, int k) {
            if constexpr (Config::kListed) {
              return bits.sees(r, k);
            } else {
              return band.visible(rows.begin + warp_row + r, tile.range.begin + k);
            }
          },
          [&](int r, int k) { return fragment_element<T, 1>(smem_ds, r, k); });
      __syncthreads();  // every warp is done with its dS
      if (more) {       // others see Q behind the next tile's barrier
        load_tile_elements<T, kDim, kTileM, kThreads>(smem_q, {0, rows.size()}, shape.head_dim,
                                                      rows_of_q());
      }
    }

    if constexpr (Config::kStages == 1) {
      __syncthreads();  // nobody reads K and V any more
      if (more) load_keys(0, next.range.begin, next.range.begin);
      ptx::cp_async_commit();
    } else {
      stage ^= 1;
    }
    tile = next;
  }
  ptx::cp_async_wait<0>();

  // A warp's rows of Q are read by that warp alone: dQ takes their place.
  const float factor[1][2] = {{forward.score.scale, forward.score.scale}};
  __syncwarp();
  stage_rows<T, kDim>(smem_q, warp_row, acc_dq, factor, lane);
  __syncwarp();
  const View<T> dq = problem.dq.as<T>();
  store_rows<T, kDim, 16, kWarpSize>(
      smem_q, warp_row, rows.size(), shape.head_dim, args.aligned, lane,
      [&](int r) { return dq.at(b, seq.row_q + rows.begin + r, h); });
}

// ---- launcher -----------------------------------------------------------------------------------
template <class T>
cudaError_t flash2_backward_rows_of(const BackwardArgs& args, cudaStream_t stream) {
  const ForwardProblem& forward = args.problem.forward;
  const bool plain = !forward.block_mask.given();
  return launch_backward<64, 128, 192, 256>(args, plain, [&](auto dim, auto mod) {
    using Config = Flash2BackwardRowsConfig<T, dim.value, decltype(mod)>;
    const dim3 grid(ceil_div(forward.lengths.seqlen_q, Config::kTileM), forward.shape.heads_q,
                    forward.shape.batch);
    return launch(flash2_backward_rows_kernel<Config>, grid, Config::kThreads,
                  sizeof(Flash2BackwardRowsSmem<Config>), stream, args);
  });
}

}  // namespace fal::cuda
