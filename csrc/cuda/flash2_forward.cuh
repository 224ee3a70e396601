// FlashAttention-2, forward (Dao, "FlashAttention-2: Faster Attention with Better Parallelism and
// Work Partitioning", 2023, algorithm 1):
//
//   S = scale Q K^T   P = softmax(S)   O = P V   LSE = log sum exp S
//
// One thread block computes kTileM query rows of one head. It holds Q in shared memory and O in
// registers, and passes once over the visible tiles of K and V; the softmax's denominator is
// applied once, at the end. Warps split the rows, so they share nothing but the tiles.
//
// Shared memory:   Q, later O [kTileM][kHeadDim] | ring of kSlots tiles [kTileN][kHeadDim]
// The ring is filled in the order of use, K0 V0 K1 V1 ..., two tiles ahead of the one in use:
//
//   step         K0      V0      K1      V1      K2
//   computes     S=QK'   O+=PV   S=QK'   O+=PV   S=QK'
//   copy starts  K1      V1      K2      V2      K3       (into the slot that the last step left)
#pragma once

#include "../core/dispatch.h"
#include "../core/kv.h"
#include "../core/tiles.h"
#include "alignment.h"
#include "flash2.h"
#include "launch.h"
#include "mma_sm80.cuh"
#include "nonfinite.cuh"
#include "softmax.cuh"

namespace fal::cuda {

template <class T, int kHeadDim_, class ScoreMod_, class Kv_>
struct Flash2ForwardConfig {
  using Element = T;
  using ScoreMod = ScoreMod_;
  using Kv = Kv_;
  static constexpr int kHeadDim = kHeadDim_;  // of Q, K, V and O, padded on load
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 256, "the swizzle's unit; the register file");

  static constexpr int kTileM = 128;
  static constexpr int kTileN = 64;
  // 32 rows a warp halve the reads of K and V from shared memory (each fragment serves two
  // products), which is what limits mma.sync there. O takes kHeadDim registers then, so the large
  // head dims have 16 rows a warp; so have the modified scores, whose arithmetic needs registers
  // and many warps more than it needs shared memory.
  static constexpr bool kWideWarps = kHeadDim <= 128 && !ScoreMod::kGeneral;
  static constexpr int kWarps = kWideWarps ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowGroups = kTileM / kWarps / 16;  // 16-row groups of a warp
  static_assert(kTileM == kRowGroups * 16 * kWarps, "warps share the rows evenly");
  static_assert(kTileN <= kHeadDim, "a warp's P fits where its rows of Q are");
  static constexpr int kSlots = 3;  // tiles in the ring: one in use, two in flight
  // Blocks that a multiprocessor holds, by registers a thread: 3 (168) or 2 (255) of 128 threads,
  // 2 (128) or 1 (255) of 256. Looking up pages takes registers.
  static constexpr bool kPaged = std::is_same_v<Kv, PagedKv<T>>;
  static constexpr int kBlocksPerSm = kHeadDim > 128            ? 1
                                      : kWideWarps              ? (kHeadDim <= 64 ? 3 : 2)
                                      : kPaged && kHeadDim > 64 ? 1
                                                                : 2;
  // Whether a tile is only partly visible is kept until its V is used, or asked of the cursor a
  // second time: what ptxas finds registers for. The other way spills 4 to 48 bytes each time.
  static constexpr bool kKeepsKind = ScoreMod::kGeneral ? kHeadDim > 64 : kPaged&& kHeadDim <= 64;
};

template <class Config>
struct Flash2ForwardSmem {
  using Element = typename Config::Element;
  alignas(128) Element q[Config::kTileM][Config::kHeadDim];  // O in the end
  alignas(128) Element ring[Config::kSlots][Config::kTileN][Config::kHeadDim];
};

struct Flash2ForwardArgs {
  ForwardProblem problem;
  bool aligned;  // every row of q, k, v and out is a whole number of aligned 16-byte chunks
};

// The tile of the ring that is used next, by its shared address.
template <class Config>
struct TileRing {
  static constexpr uint32_t kTileBytes = Config::kTileN * Config::kHeadDim * 2;
  uint32_t begin, current;

  __device__ __forceinline__ void advance() {
    current += kTileBytes;
    if (current == begin + Config::kSlots * kTileBytes) current = begin;
  }
  // The slot in use before this one, free again once all warps have passed the step's barrier.
  __device__ __forceinline__ uint32_t previous() const {
    return current == begin ? begin + (Config::kSlots - 1) * kTileBytes : current - kTileBytes;
  }
};

// The rows of a tile of keys, as load_tile wants them.
template <class T>
__device__ __forceinline__ StridedRows<T> k_rows(const ContiguousKv<T>& kv, int tile_begin, Range) {
  return {kv.k_row(tile_begin), kv.k_stride};
}
template <class T>
__device__ __forceinline__ StridedRows<T> v_rows(const ContiguousKv<T>& kv, int tile_begin, Range) {
  return {kv.v_row(tile_begin), kv.v_stride};
}

// Each row of paged K/V is looked up. Rows that nobody sees ask for a visible one's page, since the
// block table may hold anything for them.
template <class T, bool kIsK>
struct PagedRows {
  const PagedKv<T>& kv;
  int tile_begin;
  Range visible;

  __device__ __forceinline__ const T* at(int row) const {
    const int j = min(max(tile_begin + row, visible.begin), visible.end - 1);
    return kIsK ? kv.k_row(j) : kv.v_row(j);
  }
  __device__ __forceinline__ const T* move(const T*, int row, int step) const {
    return at(row + step);
  }
};
template <class T>
__device__ __forceinline__ PagedRows<T, true> k_rows(const PagedKv<T>& kv, int tile_begin,
                                                     Range visible) {
  return {kv, tile_begin, visible};
}
template <class T>
__device__ __forceinline__ PagedRows<T, false> v_rows(const PagedKv<T>& kv, int tile_begin,
                                                      Range visible) {
  return {kv, tile_begin, visible};
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    flash2_forward_kernel(const __grid_constant__ Flash2ForwardArgs args) {
  using T = typename Config::Element;
  using ScoreMod = typename Config::ScoreMod;
  using Kv = typename Config::Kv;
  using Smem = Flash2ForwardSmem<Config>;
  constexpr int kDim = Config::kHeadDim, kTileN = Config::kTileN, kM = Config::kRowGroups;
  constexpr int kSteps = kDim / 16;
  static_assert(sizeof(Smem) <= kMaxSmemBytes);
  const ForwardProblem& problem = args.problem;
  const Shape& shape = problem.shape;

  // Heavy tiles first: under a causal mask the last rows see the most keys.
  const int m_block = gridDim.x - 1 - blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const Sequence seq = problem.lengths.sequence(b);
  const Range rows{m_block * Config::kTileM, min((m_block + 1) * Config::kTileM, seq.seqlen_q)};
  if (rows.empty()) return;

  FAL_DYNAMIC_SMEM(smem_bytes);
  const uint32_t smem_q = ptx::smem_address(smem_bytes) + offsetof(Smem, q);
  const uint32_t smem_ring = ptx::smem_address(smem_bytes) + offsetof(Smem, ring);
  TileRing<Config> ring{smem_ring, smem_ring};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp * kM * 16;                    // within the tile
  const int lane_row = rows.begin + warp_row + lane / 4;  // the lane's first row and key
  const int lane_key = lane % 4 * 2;

  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, problem.window);
  const Kv kv = Kv::make(problem.kv, seq, b, shape.kv_head(h));
  const View<const T> q = problem.q.as<const T>();
  const auto rows_of_q = [&](int64_t row_q) {
    return StridedRows<T>{q.at(b, row_q + rows.begin, h), q.row};
  };
  // Of a tile, only keys that some row sees are read; the others' places are zeros. Just the first
  // tile can begin before what is visible, and just the last can end behind it.
  const Range visible = band.keys_of_any(rows);
  const auto load_k = [&](uint32_t slot, int begin, int first_visible) {
    load_tile<T, kDim, kTileN, Config::kThreads, ScoreMod::kGeneral>(
        slot, {first_visible - begin, min(visible.end - begin, kTileN)}, shape.head_dim,
        args.aligned, k_rows(kv, begin, {first_visible, visible.end}));
  };
  const auto load_v = [&](uint32_t slot, int begin, int first_visible) {
    load_tile<T, kDim, kTileN, Config::kThreads, ScoreMod::kGeneral>(
        slot, {first_visible - begin, min(visible.end - begin, kTileN)}, shape.head_dim_v,
        args.aligned, v_rows(kv, begin, {first_visible, visible.end}));
  };

  DenseTilesOfRows cursor = DenseTilesOfRows::make(band, rows, kTileN);
  Tile tile;
  bool more = cursor.next(&tile);
  int tile_key = tile.range.begin;
  // Whether the tile holds something that some row may not see.
  bool partial = tile.kind == TileKind::kPartial || tile.range.size() < kTileN;
  const auto masked = [&] { return Config::kKeepsKind ? partial : !cursor.full(tile_key); };
  if (more) {
    load_tile<T, kDim, Config::kTileM, Config::kThreads, ScoreMod::kGeneral>(
        smem_q, {0, rows.size()}, shape.head_dim, args.aligned, rows_of_q(seq.row_q));
    load_k(ring.begin, tile_key, visible.begin);
  }
  ptx::cp_async_commit();
  if (more) load_v(ring.begin + TileRing<Config>::kTileBytes, tile_key, visible.begin);
  ptx::cp_async_commit();

  const auto address_q = address_rows_first<kDim>(smem_q, warp_row, lane);

  const ScoreMod mod = make_score_mod<ScoreMod>(problem.score, b, h, band.shift());
  const float scale_log2 = (ScoreMod::kGeneral ? 1.f : problem.score.scale) * kLog2e;
  const Dropout dropout{problem.score.dropout_seed, problem.score.dropout_threshold};

  OnlineSoftmax<kM> softmax;
  softmax.init();
  float acc_o[kM][kDim / 8][4];
  clear(acc_o);

  while (more) {
    // K has landed, and every warp is done with the slot that the next copy overwrites.
    ptx::cp_async_wait<1>();
    __syncthreads();
    more = cursor.next(&tile);
    if (more) load_k(ring.previous(), tile.range.begin, tile.range.begin);
    ptx::cp_async_commit();

    float acc_s[kM][kTileN / 8][4];
    clear(acc_s);
    const auto address_k = address_columns_first<kDim>(ring.current, 0, lane);
    multiply_nt<T, kSteps>(acc_s, address_q, address_k);
    ring.advance();

    const int key = tile_key + lane_key;
    if constexpr (ScoreMod::kGeneral) {
      modify_scores(acc_s, mod, problem.score.scale, lane_row, key);
    }
    if (masked()) hide(acc_s, band, lane_row, key, -FAL_INFINITY);
    softmax.step(acc_s, acc_o, scale_log2);
    if constexpr (ScoreMod::kGeneral) {
      if (dropout.threshold) drop(acc_s, dropout, b * shape.heads_q + h, lane_row, key);
    }
    FragmentsA<kM, kTileN / 16> frag_p;
    pack_fragments<T>(frag_p, acc_s);

    // The same for V.
    ptx::cp_async_wait<1>();
    const bool scattered = sync_and_find(masked(), [&] {
      return copied_nonfinite<T, kDim, kTileN, Config::kThreads>(ring.current);
    });
    if (more) load_v(ring.previous(), tile.range.begin, tile.range.begin);
    ptx::cp_async_commit();
    if (!scattered) {
      multiply_nn<T, kTileN / 16>(acc_o, frag_p, address_rows_first<kDim>(ring.current, 0, lane));
    } else {
      // P takes the place of the warp's rows of Q, which nobody else reads, and Q is read again.
      const uint32_t smem_p = smem_q + warp_row * TileLayout<kDim>::kRowBytes;
      stage_fragments(smem_p, frag_p, lane);
      __syncwarp();
      multiply_seen<T, kDim>(
          acc_o, ring.current, kTileN, lane, 0,
          [&](int r, int k) { return band.visible(rows.begin + warp_row + r, tile_key + k); },
          [&](int r, int k) { return fragment_element<T, kM>(smem_p, r, k); });
      __syncthreads();  // every warp is done with its P
      if (more) {       // others see Q behind the next step's barrier
        load_tile_elements<T, kDim, Config::kTileM, Config::kThreads>(
            smem_q, {0, rows.size()}, shape.head_dim, rows_of_q(problem.lengths.sequence(b).row_q));
      }
    }
    ring.advance();
    tile_key = tile.range.begin;
    partial = tile.kind == TileKind::kPartial || tile.range.size() < kTileN;
  }

  ptx::cp_async_wait<0>();  // the last groups are empty

  // Normalise, and write LSE. The sequence is looked up again rather than kept in registers.
  const int64_t row_q = problem.lengths.sequence(b).row_q;
  const float keep_scale = dropout.threshold ? dropout.keep_scale() : 1.f;
  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SoftmaxState state = softmax.finish(m, half, scale_log2 * kLn2);
      float rescale = keep_scale;
      if (problem.score.sinks) rescale *= state.absorb_sink(problem.score.sinks[h]);
      factor[m][half] = rescale * state.inverse_sum();
      const int row = lane_row + m * 16 + half * 8;
      if (lane % 4 == 0 && row < seq.seqlen_q) {
        *problem.lse.at(b, h, row_q + row) = state.lse();
      }
    }
  }

  // A warp's rows of Q are read by that warp alone, so O may take their place: only its lanes wait.
  __syncwarp();
  stage_rows<T, kDim>(smem_q, warp_row, acc_o, factor, lane);
  __syncwarp();
  const View<T> out = problem.out.as<T>();
  store_rows<T, kDim, kM * 16, kWarpSize>(
      smem_q, warp_row, rows.size(), shape.head_dim_v, args.aligned, lane,
      [&](int r) { return out.at(b, row_q + rows.begin + r, h); });
}

// ---- launcher -----------------------------------------------------------------------------------
template <class T, int kHeadDim, class ScoreMod, class Kv>
cudaError_t launch_flash2_forward(const Flash2ForwardArgs& args, cudaStream_t stream) {
  using Config = Flash2ForwardConfig<T, kHeadDim, ScoreMod, Kv>;
  const Shape& shape = args.problem.shape;
  const dim3 grid(ceil_div(args.problem.lengths.seqlen_q, Config::kTileM), shape.heads_q,
                  shape.batch);
  return launch(flash2_forward_kernel<Config>, grid, Config::kThreads,
                sizeof(Flash2ForwardSmem<Config>), stream, args);
}

// The kernel for a problem whose q is of T: the smallest head-dim class that holds both head dims.
template <class T>
cudaError_t flash2_forward_of(const ForwardProblem& problem, cudaStream_t stream) {
  const Shape& shape = problem.shape;
  const Flash2ForwardArgs args{problem, rows_aligned(problem)};
  const bool plain = plain_scores(problem.score, args.aligned);
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_at_least<64, 128, 192, 256>(max_int(shape.head_dim, shape.head_dim_v), [&](auto dim) {
    const auto with_kv = [&](auto kv_tag) {
      using Kv = typename decltype(kv_tag)::type;
      error = plain ? launch_flash2_forward<T, dim.value, NoScoreMod, Kv>(args, stream)
                    : launch_flash2_forward<T, dim.value, GeneralScoreMod, Kv>(args, stream);
    };
    problem.kv.pages.block_table ? with_kv(TypeTag<PagedKv<T>>{})
                                 : with_kv(TypeTag<ContiguousKv<T>>{});
  });
  return error;
}

}  // namespace fal::cuda
