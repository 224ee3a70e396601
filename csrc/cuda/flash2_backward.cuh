// FlashAttention-2, backward (Dao, 2023, algorithm 2):
//
//   P = exp(scale Q K^T - LSE)    dV = P^T dO     dP = dO V^T
//   dS = P * (dP - delta)         dK = scale dS^T Q     dQ = scale dS K
//
// with delta = rowsum(dO * O) - dLSE from backward_pieces.cu. One thread block computes dK and dV
// of kTileN keys of one K/V head, in registers, and passes over the tiles of query rows that see
// them, for each query head of the group in turn: a group's sum needs no second pass and no
// atomics. dQ is summed in device memory, or left to flash2_backward_rows.cuh when bits must
// repeat.
//
// The scores are computed transposed, four warps over the keys and two over the rows: dK and dV
// then accumulate over rows in each warp's own keys. P^T and dS^T pass through shared memory, where
// a pair of warps shares them: for dK and dV each has all rows and half of the columns.
//
// Shared memory:  K V [kTileN][kHeadDim] | kStages of Q, dO [kTileM][kHeadDim] and LSE, delta
//                 [kTileM] | P^T, dS^T [kTileN][kTileM] | the list of tiles and a tile's bits,
//                 where there is a list
//
// BandTiles and ListedTiles as in flash2_forward.cuh; here a mask's columns are walked.
#pragma once

#include "../core/dispatch.h"
#include "../core/kv.h"
#include "../core/tiles.h"
#include "alignment.h"
#include "backward_pieces.cuh"
#include "flash2.h"
#include "launch.h"
#include "mask_bits.cuh"
#include "nonfinite.cuh"
#include "softmax.cuh"
#include "tile_list.cuh"

namespace fal::cuda {

// Wide: 32 keys a warp, so that every fragment of Q and dO serves two products, of K and V too (32
// x 32 scores a warp). dK and dV take kHeadDim registers a thread then, which is too much beside
// the modified scores at 128 and beside anything above.
template <class T, int kHeadDim_, class ScoreMod_,
          bool kWideTile_ = kHeadDim_ <= (ScoreMod_::kGeneral ? 64 : 128), class Tiles = BandTiles>
struct Flash2BackwardConfig {
  using Element = T;
  using ScoreMod = ScoreMod_;
  static constexpr bool kListed = std::is_same_v<Tiles, ListedTiles>;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 256, "the swizzle's unit; the register file");

  static constexpr int kTileM = kBackwardRows;
  static constexpr bool kWideTile = kWideTile_;
  static constexpr int kTileN = kWideTile ? 128 : 64;
  static constexpr int kWarpsK = 4, kWarpsM = 2;  // over keys; over rows, later over columns
  static constexpr int kWarps = kWarpsK * kWarpsM;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kM = kTileN / 16 / kWarpsK;          // 16-key groups of a warp
  static constexpr int kRowsOfWarp = kTileM / kWarpsM;      // of S^T and dP^T
  static constexpr int kColumns8 = kHeadDim / 8 / kWarpsM;  // 8-column groups of dK and dV
  // Loads of the next tile run under this one's products; at 256 there is no room for a second.
  static constexpr int kStages = kHeadDim <= 192 ? 2 : 1;
  static_assert(kThreads == DqTile<kHeadDim>::kThreads, "dQ's sums are laid out for this block");
};

template <class Config>
struct Flash2BackwardTiles {
  using Element = typename Config::Element;
  struct Stage {
    Element q[Config::kTileM][Config::kHeadDim];
    Element dout[Config::kTileM][Config::kHeadDim];
    float lse[Config::kTileM], delta[Config::kTileM];
  };
  alignas(128) Element k[Config::kTileN][Config::kHeadDim];  // dK in the end
  alignas(128) Element v[Config::kTileN][Config::kHeadDim];  // dV in the end
  alignas(128) Stage stage[Config::kStages];
  alignas(128) Element p[Config::kTileN][Config::kTileM];  // transposed: [key][row]
  alignas(128) Element ds[Config::kTileN][Config::kTileM];
};
template <class Config>
struct Flash2BackwardListed {
  Flash2BackwardTiles<Config> tiles;
  TileList list;
  typename TileBits<Config::kTileM, Config::kTileN>::Words bits;
};
template <class Config>
using Flash2BackwardSmem =
    std::conditional_t<Config::kListed, Flash2BackwardListed<Config>, Flash2BackwardTiles<Config>>;

// Walks the tiles of rows of every query head of a group: the same tiles for each.
struct GroupTiles {
  DenseTilesOfKeys tiles;
  int32_t first_begin, head, head_end;

  __device__ __forceinline__ static GroupTiles make(const DenseTilesOfKeys& tiles, int head,
                                                    int head_end) {
    return {tiles, tiles.next_begin, head, tiles.count() > 0 ? head_end : head};
  }
  // Also the head that the tile is of.
  __device__ __forceinline__ bool next(Tile* tile, int* tile_head) {
    if (head == head_end) return false;
    tiles.next(tile);
    *tile_head = head;
    if (tiles.next_begin >= tiles.end) {
      tiles.next_begin = first_begin;
      ++head;
    }
    return true;
  }
};

// What turns S^T and dP^T into P^T (dropped and rescaled, for dV) and dS^T, element by element.
// Accumulator (m, n, e) is key m * 16 + e / 2 * 8 + g and row n * 8 + 2c + e % 2 of the warp's
// tile.
template <class ScoreMod>
struct Flash2BackwardScores {
  ScoreMod mod;
  Dropout dropout;
  uint32_t batch_head;
  float scale, keep_scale;

  template <int kM, int kN8>
  __device__ __forceinline__ void apply(float (&s)[kM][kN8][4], float (&dp)[kM][kN8][4],
                                        uint32_t smem_lse, uint32_t smem_delta, int row, int key,
                                        int lane) const {
    // The transposed fragment has two rows and two keys of 16 x 16 elements, which lie in two of
    // Philox's blocks: half of each block's draws are other lanes'.
    PhiloxBits bits[kM][2] = {};
#pragma unroll
    for (int n = 0; n < kN8; ++n) {
      const uint32_t offset = (n * 8 + lane % 4 * 2) * sizeof(float);
      const float2 lse2 = ptx::load_shared<float2>(smem_lse + offset);
      const float2 delta2 = ptx::load_shared<float2>(smem_delta + offset);
      const float lse[2] = {lse2.x, lse2.y}, delta[2] = {delta2.x, delta2.y};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (ScoreMod::kGeneral && dropout.threshold && n % 2 == 0) {
          bits[m][0] = dropout.block(batch_head, row + n * 8, key + m * 16);
          bits[m][1] = dropout.block(batch_head, row + n * 8 + 1, key + m * 16);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = n * 8 + e % 2, j = m * 16 + e / 2 * 8;
          float p, p_dropped, dp_dropped = dp[m][n][e], derivative = 1.f;
          if constexpr (!ScoreMod::kGeneral) {
            p = p_dropped = ptx::ex2(fmaf(s[m][n][e], scale, -lse[e % 2]));
          } else {
            const float scaled = s[m][n][e] * scale;
            const float score = mod.value(scaled, row + i, key + j, 0.f);
            derivative = mod.derivative(scaled);
            p = ptx::ex2(fmaf(score, kLog2e, -lse[e % 2]));
            const uint32_t word = bits[m][e % 2].word[n % 2 * 2 + e / 2];
            const bool keep = (word >> (16 * (key & 1)) & 0xffffu) >= dropout.threshold;
            dp_dropped = keep ? dp_dropped * keep_scale : 0.f;
            p_dropped = keep ? p * keep_scale : 0.f;
          }
          s[m][n][e] = p_dropped;
          dp[m][n][e] = p * (dp_dropped - delta[e % 2]) * derivative;
        }
      }
    }
  }
};

// dK and dV of one tile of keys, and its share of dQ through DqSums (DqTile, or what is like it).
template <class Config, class DqSums>
__device__ __forceinline__ void backward_of_keys(const BackwardArgs& args, int key_begin,
                                                 int head_k, int b) {
  using T = typename Config::Element;
  using ScoreMod = typename Config::ScoreMod;
  using Smem = Flash2BackwardTiles<Config>;
  using Listed = Flash2BackwardListed<Config>;
  using Dq = DqSums;
  constexpr int kDim = Config::kHeadDim, kTileM = Config::kTileM, kTileN = Config::kTileN;
  constexpr int kThreads = Config::kThreads, kN8 = Config::kRowsOfWarp / 8;
  constexpr int kM = Config::kM;
  constexpr bool kGeneral = ScoreMod::kGeneral;
  static_assert(sizeof(Flash2BackwardSmem<Config>) <= kMaxSmemBytes);
  const BackwardProblem& problem = args.problem;
  const ForwardProblem& forward = problem.forward;
  const Shape& shape = forward.shape;

  const int group = shape.heads_q / shape.heads_k;
  const Sequence seq = forward.lengths.sequence(b);
  const Range keys{key_begin, min(key_begin + kTileN, seq.seqlen_k)};
  if (keys.empty()) return;

  FAL_DYNAMIC_SMEM(smem_bytes);
  const uint32_t smem = ptx::smem_address(smem_bytes);
  const uint32_t smem_k = smem + offsetof(Smem, k), smem_v = smem + offsetof(Smem, v);
  const uint32_t smem_ds = smem + offsetof(Smem, ds), smem_p = smem + offsetof(Smem, p);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_key = warp / Config::kWarpsM * kM * 16, share = warp % Config::kWarpsM;
  const int warp_row = share * Config::kRowsOfWarp;

  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, forward.window);
  const View<const T> q = forward.q.as<const T>(), dout = problem.dout.as<const T>();
  const BackwardWorkspace& workspace = args.workspace;
  const int64_t first_tile = workspace.first_tile(forward.lengths, b);
  const auto smem_stage = [&](int stage) {
    return smem + static_cast<uint32_t>(offsetof(Smem, stage)) +
           stage * static_cast<uint32_t>(sizeof(typename Smem::Stage));
  };
  const auto load_rows = [&](int stage, const Tile& tile, int h) {
    const uint32_t to = smem_stage(stage);
    const int64_t row = seq.row_q + tile.range.begin;
    load_tile<T, kDim, kTileM, kThreads, kGeneral>(
        to + offsetof(typename Smem::Stage, q), {0, tile.range.size()}, shape.head_dim,
        args.aligned, StridedRows<T>{q.at(b, row, h), q.row});
    load_tile<T, kDim, kTileM, kThreads, kGeneral>(
        to + offsetof(typename Smem::Stage, dout), {0, tile.range.size()}, shape.head_dim_v,
        args.aligned, StridedRows<T>{dout.at(b, row, h), dout.row});
    constexpr int kChunks = kTileM * sizeof(float) / 16;  // of LSE, then of delta
    if (threadIdx.x < 2 * kChunks) {
      const float* from = threadIdx.x < kChunks ? workspace.lse : workspace.delta;
      const int64_t offset = workspace.stats_offset(first_tile + tile.range.begin / kTileM, h);
      ptx::cp_async_16(to + offsetof(typename Smem::Stage, lse) + threadIdx.x * 16,
                       from + offset + threadIdx.x % kChunks * 4);
    }
  };

  const auto candidates = [&] {  // of a list
    return RowTileCandidates<kTileM>::of_block(forward, keys.begin, kTileN);
  };
  auto cursor = [&] {
    if constexpr (Config::kListed) {
      return ListCursor::make(smem + offsetof(Listed, list), candidates);
    } else {
      return GroupTiles::make(DenseTilesOfKeys::make(band, keys, kTileM), head_k * group,
                              (head_k + 1) * group);
    }
  }();
  Tile tile;
  int h = 0, next_h = 0;
  const auto next_tile = [&] {
    if constexpr (Config::kListed) {
      const ListedTile listed = cursor.next(candidates);
      next_h = listed.head;
      return listed.put(&tile);
    } else {
      return cursor.next(&tile, &next_h);
    }
  };
  bool more = next_tile();
  if (more) {
    const ContiguousKv<T> kv = ContiguousKv<T>::make(forward.kv, seq, b, head_k);
    load_tile<T, kDim, kTileN, kThreads, kGeneral>(
        smem_k, {0, keys.size()}, shape.head_dim, args.aligned,
        StridedRows<T>{kv.k_row(keys.begin), kv.k_stride});
    load_tile<T, kDim, kTileN, kThreads, kGeneral>(
        smem_v, {0, keys.size()}, shape.head_dim_v, args.aligned,
        StridedRows<T>{kv.v_row(keys.begin), kv.v_stride});
    load_rows(0, tile, next_h);
  }
  ptx::cp_async_commit();

  const Dropout dropout{forward.score.dropout_seed, forward.score.dropout_threshold};
  float acc_dk[kM][Config::kColumns8][4], acc_dv[kM][Config::kColumns8][4];
  clear(acc_dk);
  clear(acc_dv);
  int stage = 0;

  while (more) {
    // This tile has landed, and every warp is done with the last one's buffers and dS.
    ptx::cp_async_wait<0>();
    const uint32_t smem_q = smem_stage(stage) + offsetof(typename Smem::Stage, q);
    const uint32_t smem_dout = smem_stage(stage) + offsetof(typename Smem::Stage, dout);
    const uint32_t smem_lse = smem_stage(stage) + offsetof(typename Smem::Stage, lse);
    // Zeros behind the last key have scores too: exp(0 - LSE) may be anything.
    const bool masked = tile.kind == TileKind::kPartial || keys.size() < kTileN;
    const bool scattered = sync_and_find(masked, [&] {
      return copied_nonfinite<T, kDim, kTileM, kThreads>(smem_q) ||
             copied_nonfinite<T, kDim, kTileM, kThreads>(smem_dout) ||
             copied_nonfinite<T, kDim, kTileN, kThreads>(smem_k);
    });
    h = next_h;
    const int row_begin = tile.range.begin;
    const TileBits<kTileM, kTileN> bits{smem + static_cast<uint32_t>(offsetof(Listed, bits))};
    if constexpr (Config::kListed) {
      if (masked) {
        bits.template look<kThreads>(candidates().sight(h), tile.rule, row_begin, keys.begin);
      }
    }
    more = next_tile();
    if (Config::kStages == 2 && more) load_rows(stage ^ 1, tile, next_h);
    ptx::cp_async_commit();

    float acc_s[kM][kN8][4], acc_dp[kM][kN8][4];
    clear(acc_s);
    clear(acc_dp);
    multiply_nt<T, kDim / 16, 2>(acc_s, address_rows_first<kDim>(smem_k, warp_key, lane),
                                 address_columns_first<kDim>(smem_q, warp_row, lane));
    multiply_nt<T, kDim / 16, 2>(acc_dp, address_rows_first<kDim>(smem_v, warp_key, lane),
                                 address_columns_first<kDim>(smem_dout, warp_row, lane));

    const Flash2BackwardScores<ScoreMod> scores{
        make_score_mod<ScoreMod>(forward.score, b, h, band.shift()), dropout,
        static_cast<uint32_t>(b * shape.heads_q + h),
        kGeneral ? forward.score.scale : forward.score.scale * kLog2e,
        dropout.threshold ? dropout.keep_scale() : 1.f};
    scores.apply(acc_s, acc_dp, smem_lse + warp_row * sizeof(float),
                 smem_lse + (kTileM + warp_row) * sizeof(float),
                 row_begin + warp_row + lane % 4 * 2, keys.begin + warp_key + lane / 4, lane);
    // Not before: LSE, delta and dP may be NaN where P and dS are 0.
    if (masked) {
      if constexpr (Config::kListed) {
        __syncthreads();  // the tile's bits are there
        hide_transposed(acc_s, acc_dp, bits, warp_row, warp_key, lane);
      } else {
        hide_transposed(acc_s, acc_dp, band, row_begin + warp_row + lane % 4 * 2,
                        keys.begin + warp_key + lane / 4);
      }
    }
    float ones[kM][2];
    fill(ones, 1.f);
    stage_rows<T, kTileM>(smem_p, warp_key, acc_s, ones, lane, warp_row / 16);
    stage_rows<T, kTileM>(smem_ds, warp_key, acc_dp, ones, lane, warp_row / 16);
    __syncthreads();  // P^T and dS^T of all keys and rows are there

    const auto sees = [&](int row, int key) {
      if constexpr (Config::kListed) {
        return bits.sees(row, key);
      } else {
        return band.visible(row_begin + row, keys.begin + key);
      }
    };
    if (!scattered) {
      FragmentsA<kM, kTileM / 16> frag;
      load_fragments(frag, address_rows_first<kTileM>(smem_p, warp_key, lane));
      multiply_nn<T, kTileM / 16, Config::kWarpsM>(
          acc_dv, frag, address_rows_first<kDim>(smem_dout, 0, lane, share));
      load_fragments(frag, address_rows_first<kTileM>(smem_ds, warp_key, lane));
      multiply_nn<T, kTileM / 16, Config::kWarpsM>(
          acc_dk, frag, address_rows_first<kDim>(smem_q, 0, lane, share));
    } else {
      const auto seen = [&](int key, int row) { return sees(row, warp_key + key); };
      multiply_seen<T, kDim, Config::kWarpsM>(
          acc_dv, smem_dout, kTileM, lane, share, seen,
          [&](int key, int row) { return tile_element<T, kTileM>(smem_p, warp_key + key, row); });
      multiply_seen<T, kDim, Config::kWarpsM>(
          acc_dk, smem_q, kTileM, lane, share, seen,
          [&](int key, int row) { return tile_element<T, kTileM>(smem_ds, warp_key + key, row); });
    }
    if (workspace.dq) {
      float* sums = workspace.dq_tile(first_tile + row_begin / kTileM, h);
      float acc_dq[Dq::kM][Dq::kN8][4];
#pragma unroll
      for (int m = 0; m < Dq::kM; ++m) {
#pragma unroll
        for (int n = 0; n < Dq::kN8; ++n) Dq::begin(sums, m * Dq::kN8 + n, acc_dq[m][n]);
      }
      const int dq_group = warp / Dq::kWarpsN * Dq::kM;  // of 16 rows
      if (!scattered) {
        multiply_tn<T, kTileN / 16, Dq::kWarpsN>(
            acc_dq, address_columns_first<kTileM>(smem_ds, 0, lane, dq_group),
            address_rows_first<kDim>(smem_k, 0, lane, warp % Dq::kWarpsN));
      } else {
        multiply_seen<T, kDim, Dq::kWarpsN>(
            acc_dq, smem_k, kTileN, lane, warp % Dq::kWarpsN,
            [&](int row, int key) { return sees(dq_group * 16 + row, key); },
            [&](int row, int key) {
              return tile_element<T, kTileM>(smem_ds, key, dq_group * 16 + row);
            });
      }
#pragma unroll
      for (int m = 0; m < Dq::kM; ++m) {
#pragma unroll
        for (int n = 0; n < Dq::kN8; ++n) Dq::add(sums, m * Dq::kN8 + n, acc_dq[m][n]);
      }
    }
    if constexpr (Config::kStages == 1) {
      __syncthreads();  // nobody reads Q and dO any more
      if (more) load_rows(0, tile, next_h);
      ptx::cp_async_commit();
    } else {
      stage ^= 1;
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody reads K and V any more

  float dk_factor[kM][2], dv_factor[kM][2];
  fill(dk_factor, forward.score.scale);
  fill(dv_factor, 1.f);
  stage_rows<T, kDim, Config::kWarpsM>(smem_k, warp_key, acc_dk, dk_factor, lane, share);
  stage_rows<T, kDim, Config::kWarpsM>(smem_v, warp_key, acc_dv, dv_factor, lane, share);
  __syncthreads();
  const View<T> dk = problem.dk.as<T>(), dv = problem.dv.as<T>();
  const int64_t row_k = seq.row_k + keys.begin;
  store_rows<T, kDim, kTileN, kThreads>(smem_k, 0, keys.size(), shape.head_dim, args.aligned,
                                        threadIdx.x,
                                        [&](int r) { return dk.at(b, row_k + r, head_k); });
  store_rows<T, kDim, kTileN, kThreads>(smem_v, 0, keys.size(), shape.head_dim_v, args.aligned,
                                        threadIdx.x,
                                        [&](int r) { return dv.at(b, row_k + r, head_k); });
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    flash2_backward_kernel(const __grid_constant__ BackwardArgs args) {
  backward_of_keys<Config, DqTile<Config::kHeadDim>>(args, blockIdx.x * Config::kTileN, blockIdx.y,
                                                     blockIdx.z);
}

// ---- launcher -----------------------------------------------------------------------------------
template <class T>
cudaError_t flash2_backward_columns_of(const BackwardArgs& args, cudaStream_t stream) {
  const ForwardProblem& forward = args.problem.forward;
  return launch_backward<64, 128, 192, 256>(args, [&](auto dim, auto mod) {
    using Mod = decltype(mod);
    const auto run = [&](auto tiles) {
      constexpr bool kWideTile = dim.value <= (Mod::kGeneral ? 64 : 128);
      using Config = Flash2BackwardConfig<T, dim.value, Mod, kWideTile, decltype(tiles)>;
      const dim3 grid(ceil_div(forward.lengths.seqlen_k, Config::kTileN), forward.shape.heads_k,
                      forward.shape.batch);
      return launch(flash2_backward_kernel<Config>, grid, Config::kThreads,
                    sizeof(Flash2BackwardSmem<Config>), stream, args);
    };
    if constexpr (Mod::kGeneral) {
      return run(ListedTiles{});
    } else {
      return forward.block_mask.given() ? run(ListedTiles{}) : run(BandTiles{});
    }
  });
}

}  // namespace fal::cuda
