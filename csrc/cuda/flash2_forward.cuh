// FlashAttention-2, forward (Dao, "FlashAttention-2: Faster Attention with Better Parallelism and
// Work Partitioning", 2023, algorithm 1):
//
//   S = scale Q K^T   P = softmax(S)   O = P V   LSE = log sum exp S
//
// One thread block computes kTileM query rows of one head. It holds Q in shared memory and O in
// registers, and passes once over the visible tiles of K and V; the softmax's denominator is
// applied once, at the end. Warps split the rows, so they share nothing but the tiles.
//
// Shared memory:   Q, later O [kTileM][kHeadDim] | ring of kSlots tiles [kTileN][kHeadDim] |
//                  the list of tiles, where there is one
// The ring is filled in the order of use, K0 V0 K1 V1 ..., two tiles ahead of the one in use:
//
//   step         K0      V0      K1      V1      K2
//   computes     S=QK'   O+=PV   S=QK'   O+=PV   S=QK'
//   copy starts  K1      V1      K2      V2      K3       (into the slot that the last step left)
//
// BandTiles: without a block mask, the tiles are the band's. ListedTiles: they are found in a list,
// a block mask may be given, and what it and the band hide becomes bits (tile_list.cuh,
// mask_bits.cuh). Beside the plain kernels for either, one takes whatever else there is with a
// block mask or pages.
#pragma once

#include "../core/dispatch.h"
#include "../core/kv.h"
#include "../core/tiles.h"
#include "alignment.h"
#include "flash2.h"
#include "launch.h"
#include "mask_bits.cuh"
#include "mma_sm80.cuh"
#include "nonfinite.cuh"
#include "softmax.cuh"
#include "tile_list.cuh"

namespace fal::cuda {

template <class T, int kHeadDim_, class ScoreMod_, class Kv_, class Tiles_>
struct Flash2ForwardConfig {
  using Element = T;
  using ScoreMod = ScoreMod_;
  using Kv = Kv_;
  static constexpr bool kListed = std::is_same_v<Tiles_, ListedTiles>;
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
  // 2 (128) or 1 (255) of 256. Looking up pages takes registers; a third block with a list of tiles
  // would spill 40 bytes.
  static constexpr bool kLooksUp = !std::is_same_v<Kv, ContiguousKv<T>>;
  static constexpr int kBlocksPerSm = kHeadDim > 128 ? 1
                                      : kWideWarps   ? (kHeadDim <= 64 && !kListed ? 3 : 2)
                                      : kLooksUp && kHeadDim > 64 ? 1
                                                                  : 2;
  // Whether a tile is only partly visible is kept until its V is used, or asked of the cursor a
  // second time: what ptxas finds registers for. The other way spills 4 to 48 bytes each time.
  static constexpr bool kKeepsKind = ScoreMod::kGeneral ? kHeadDim > 64 : kLooksUp&& kHeadDim <= 64;
};

template <class Config>
struct Flash2ForwardTiles {
  using Element = typename Config::Element;
  alignas(128) Element q[Config::kTileM][Config::kHeadDim];  // O in the end
  alignas(128) Element ring[Config::kSlots][Config::kTileN][Config::kHeadDim];
};
template <class Config>
using Flash2ForwardSmem =
    std::conditional_t<Config::kListed, WithTileList<Flash2ForwardTiles<Config>>,
                       Flash2ForwardTiles<Config>>;

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

// Paged K/V, or contiguous as one page.
template <class T>
struct AnyKv : PagedKv<T> {
  __device__ __forceinline__ static AnyKv make(const KeyValue& kv, const Sequence& s, int32_t b,
                                               int32_t head_k) {
    AnyKv any{PagedKv<T>::make(kv, s, b, head_k)};
    if (!kv.pages.block_table) {
      any.k = kv.k.as<const T>().at(b, s.row_k, head_k);
      any.v = kv.v.as<const T>().at(b, s.row_k, head_k);
      any.table = nullptr;
    }
    return any;
  }
  __device__ __forceinline__ const T* k_row(int32_t j) const {
    return this->table ? PagedKv<T>::k_row(j) : this->k + j * this->k_stride;
  }
  __device__ __forceinline__ const T* v_row(int32_t j) const {
    return this->table ? PagedKv<T>::v_row(j) : this->v + j * this->v_stride;
  }
};

// Each row of paged K/V is looked up. Rows that nobody sees ask for a visible one's page, since the
// block table may hold anything for them.
template <class Kv, bool kIsK>
struct PagedRows {
  const Kv& kv;
  int tile_begin;
  Range visible;

  __device__ __forceinline__ auto at(int row) const {
    const int j = min(max(tile_begin + row, visible.begin), visible.end - 1);
    return kIsK ? kv.k_row(j) : kv.v_row(j);
  }
  template <class T>
  __device__ __forceinline__ const T* move(const T*, int row, int step) const {
    return at(row + step);
  }
};
template <template <class> class Kv, class T>
__device__ __forceinline__ PagedRows<Kv<T>, true> k_rows(const Kv<T>& kv, int tile_begin,
                                                         Range visible) {
  return {kv, tile_begin, visible};
}
template <template <class> class Kv, class T>
__device__ __forceinline__ PagedRows<Kv<T>, false> v_rows(const Kv<T>& kv, int tile_begin,
                                                          Range visible) {
  return {kv, tile_begin, visible};
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    flash2_forward_kernel(const __grid_constant__ Flash2ForwardArgs args) {
  using T = typename Config::Element;
  using ScoreMod = typename Config::ScoreMod;
  using Kv = typename Config::Kv;
  using Smem = Flash2ForwardTiles<Config>;
  constexpr int kDim = Config::kHeadDim, kTileN = Config::kTileN, kM = Config::kRowGroups;
  constexpr int kSteps = kDim / 16;
  static_assert(sizeof(Flash2ForwardSmem<Config>) <= kMaxSmemBytes);
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
  const auto load_k = [&](uint32_t slot, int begin, int first_visible, int end) {
    load_tile<T, kDim, kTileN, Config::kThreads, ScoreMod::kGeneral>(
        slot, {first_visible - begin, min(end - begin, kTileN)}, shape.head_dim, args.aligned,
        k_rows(kv, begin, {first_visible, end}));
  };
  const auto load_v = [&](uint32_t slot, int begin, int first_visible, int end) {
    load_tile<T, kDim, kTileN, Config::kThreads, ScoreMod::kGeneral>(
        slot, {first_visible - begin, min(end - begin, kTileN)}, shape.head_dim_v, args.aligned,
        v_rows(kv, begin, {first_visible, end}));
  };

  const auto candidates = [&] {  // of a list
    return KeyTileCandidates<kTileN>::of_block(problem, rows.begin, Config::kTileM);
  };
  auto cursor = [&] {
    if constexpr (Config::kListed) {
      return ListCursor::make(smem_q + offsetof(WithTileList<Smem>, list), candidates);
    } else {
      return DenseTilesOfRows::make(band, rows, kTileN);
    }
  }();
  // The tile that is loaded next, and the one in use: its first key, and what says whether it holds
  // something that some row may not see.
  Tile tile;
  int tile_key, rule = TileList::kShown;
  bool more, partial = false;
  const auto next_tile = [&] {
    if constexpr (Config::kListed) {
      cursor.next(candidates);
    } else {
      more = cursor.next(&tile);
    }
  };
  // The tile to be loaded, where it is needed: a list is read again rather than held.
  const auto look_up = [&] {
    if constexpr (Config::kListed) {
      const ListedTile listed = cursor.current();
      more = listed.valid();
      tile.range = {listed.begin, listed.begin + listed.size};
      tile.rule = listed.rule;
    }
  };
  const auto use_tile = [&] {
    look_up();
    tile_key = tile.range.begin;
    partial = tile.kind == TileKind::kPartial || tile.range.size() < kTileN;
    rule = tile.rule;
  };
  const auto visible_end = [&] { return Config::kListed ? tile.range.end : visible.end; };
  const auto masked = [&] {
    if constexpr (Config::kListed) {
      return rule != TileList::kShown;
    } else if constexpr (Config::kKeepsKind) {
      return partial;
    } else {
      return !cursor.full(tile_key);
    }
  };
  next_tile();
  use_tile();
  const int first_visible = Config::kListed ? max(tile_key, visible.begin) : visible.begin;
  if (more) {
    load_tile<T, kDim, Config::kTileM, Config::kThreads, ScoreMod::kGeneral>(
        smem_q, {0, rows.size()}, shape.head_dim, args.aligned, rows_of_q(seq.row_q));
    load_k(ring.begin, tile_key, first_visible, visible_end());
  }
  ptx::cp_async_commit();
  if (more) {
    load_v(ring.begin + TileRing<Config>::kTileBytes, tile_key, first_visible, visible_end());
  }
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
    next_tile();
    look_up();
    if (more) load_k(ring.previous(), tile.range.begin, tile.range.begin, visible_end());
    ptx::cp_async_commit();

    WarpBits<kM * 16, kTileN> bits;
    if constexpr (Config::kListed) {
      if (masked()) {
        bits.look(candidates().sight, rule, rows.begin + warp_row, tile_key, lane);
      }
    }
    float acc_s[kM][kTileN / 8][4];
    clear(acc_s);
    const auto address_k = address_columns_first<kDim>(ring.current, 0, lane);
    multiply_nt<T, kSteps>(acc_s, address_q, address_k);
    ring.advance();

    const int key = tile_key + lane_key;
    if constexpr (ScoreMod::kGeneral) {
      modify_scores(acc_s, mod, problem.score.scale, lane_row, key);
    }
    if (masked()) {
      if constexpr (Config::kListed) {
        hide(acc_s, bits, lane, -FAL_INFINITY);
      } else {
        hide(acc_s, band, lane_row, key, -FAL_INFINITY);
      }
    }
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
    look_up();
    if (more) load_v(ring.previous(), tile.range.begin, tile.range.begin, visible_end());
    ptx::cp_async_commit();
    if (!scattered) {
      multiply_nn<T, kTileN / 16>(acc_o, frag_p, address_rows_first<kDim>(ring.current, 0, lane));
    } else {
      // P takes the place of the warp's rows of Q, which nobody else reads, and Q is read again.
      const uint32_t smem_p = smem_q + warp_row * TileLayout<kDim>::kRowBytes;
      stage_fragments(smem_p, frag_p, lane);
      __syncwarp();
      if constexpr (Config::kListed) {  // made again rather than held
        bits.look(candidates().sight, rule, rows.begin + warp_row, tile_key, lane);
      }
      multiply_seen<T, kDim>(
          acc_o, ring.current, kTileN, lane, 0,
          [&](int r, int k) {
            if constexpr (Config::kListed) {
              return bits.sees(r, k);
            } else {
              return band.visible(rows.begin + warp_row + r, tile_key + k);
            }
          },
          [&](int r, int k) { return fragment_element<T, kM>(smem_p, r, k); });
      __syncthreads();  // every warp is done with its P
      if (more) {       // others see Q behind the next step's barrier
        load_tile_elements<T, kDim, Config::kTileM, Config::kThreads>(
            smem_q, {0, rows.size()}, shape.head_dim, rows_of_q(problem.lengths.sequence(b).row_q));
      }
    }
    ring.advance();
    use_tile();
  }

  ptx::cp_async_wait<0>();  // the last groups are empty

  // Normalise, and write LSE. The sequence is looked up again rather than kept in registers, and so
  // are the rows where a list of tiles needs them.
  const int64_t row_q = problem.lengths.sequence(b).row_q;
  int seqlen_q = seq.seqlen_q, first_row = lane_row, rows_valid = rows.size();
  if constexpr (Config::kListed) {
    const int thread = ptx::opaque(threadIdx.x);
    seqlen_q = problem.lengths.sequence(ptx::opaque(b)).seqlen_q;
    first_row = rows.begin + thread / kWarpSize * kM * 16 + thread % kWarpSize / 4;
    rows_valid = seqlen_q - rows.begin;
  }
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
      const int row = first_row + m * 16 + half * 8;
      if (lane % 4 == 0 && row < seqlen_q) {
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
      smem_q, warp_row, rows_valid, shape.head_dim_v, args.aligned, lane,
      [&](int r) { return out.at(b, row_q + rows.begin + r, h); });
}

// ---- launcher -----------------------------------------------------------------------------------
template <class T, int kHeadDim, class ScoreMod, class Kv, class Tiles>
cudaError_t launch_flash2_forward(const Flash2ForwardArgs& args, cudaStream_t stream) {
  using Config = Flash2ForwardConfig<T, kHeadDim, ScoreMod, Kv, Tiles>;
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
  const bool paged = problem.kv.pages.block_table, sparse = problem.block_mask.given();
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_at_least<64, 128, 192, 256>(max_int(shape.head_dim, shape.head_dim_v), [&](auto dim) {
    const auto run = [&](auto mod, auto kv, auto tiles) {
      error = launch_flash2_forward<T, dim.value, decltype(mod), typename decltype(kv)::type,
                                    decltype(tiles)>(args, stream);
    };
    constexpr TypeTag<ContiguousKv<T>> kContiguous{};
    if (sparse ? !plain || paged : !plain && paged) {
      run(GeneralScoreMod{}, TypeTag<AnyKv<T>>{}, ListedTiles{});
    } else if (!plain) {
      run(GeneralScoreMod{}, kContiguous, BandTiles{});
    } else if (sparse) {
      run(NoScoreMod{}, kContiguous, ListedTiles{});
    } else if (paged) {
      run(NoScoreMod{}, TypeTag<PagedKv<T>>{}, BandTiles{});
    } else {
      run(NoScoreMod{}, kContiguous, BandTiles{});
    }
  });
  return error;
}

}  // namespace fal::cuda
