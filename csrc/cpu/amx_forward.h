// O = softmax(S) V in bf16 on AMX: attention_forward.h with other products. Masks, score
// modifications, dropout, sinks, lengths and addressing are that file's and score_panel.h's.
//
// A panel of 32 query rows (lanes) passes a tile of keys in blocks of 32:
//
//   S^T = K Q^T       A = row tiles of K, B = pair tiles of Q; fp32 block [32 keys][32 lanes]
//   P^T = exp2(S^T)   vertical, written as bf16 pairs: for keys 2p, 2p + 1 the 32-bit lane of a
//   query is
//                     (P[2p + 1] << 16) | P[2p], which is the row of B that the next product wants
//   O^T += V^T P^T    A = depth tiles of V; fp32 O^T [dim][32 lanes] in scratch
//
// The tile unit and the vector units work at the same time when their instructions alternate: while
// block b is multiplied, P of block b - 2 is computed; block b - 1 is masked and its maximum taken
// between the two. (Loads of what a tilestored has just written wait for it: hence the distance.)
//
// The reference that scores are subtracted from follows the maximum only when that is more than 2^8
// ahead, so O^T is seldom rescaled: P is at most 2^8, in bf16 as accurate as below 1, and the final
// division undoes any common factor.
//
// Scratch of one thread, head dim 128: Q 128 KiB, K 64, V 64, O 256 (L2); S 12, P 16 (L1).
#pragma once

#include "amx_pack.h"
#include "attention_forward.h"

namespace fal::cpu::FAL_CPU_ISA {

constexpr int kAmxTileKeys = 256;
constexpr int kAmxMaxTileRows = 512;
constexpr int kAmxMinTileRows = 64;
constexpr int kScoreBlocks = 3;  // blocks of S^T alive: multiplied, masked, exponentiated
constexpr int kScoreBlockSize = kBlock * kBlock;
constexpr int kPairBlockBytes = kBlock / 2 * kBlock * 4;  // of P^T: 16 pairs x 32 lanes
constexpr float kReferenceLag = 8.f;

struct AmxForwardScratch {
  char *q, *k, *v, *p;
  float *scores, *out, *out_rows, *max, *sum, *bias;
  int32_t* keep;
  int32_t* started;  // per panel: O^T holds something

  FAL_INLINE static AmxForwardScratch place(ScratchCursor* cursor, const ForwardProblem& problem,
                                            int tile_rows) {
    const int dim = round_up(problem.shape.head_dim, kTileDepth);
    const int dim_v = round_up(problem.shape.head_dim_v, kBlock);
    AmxForwardScratch s;
    s.q = cursor->take<char>(tile_rows * dim * 2);
    s.k = cursor->take<char>(kAmxTileKeys * dim * 2);
    s.v = cursor->take<char>(kAmxTileKeys * dim_v * 2);
    s.p = cursor->take<char>(kAmxTileKeys / kBlock * kPairBlockBytes);
    s.scores = cursor->take<float>(kScoreBlocks * kScoreBlockSize);
    s.out = cursor->take<float>(tile_rows * dim_v);
    s.out_rows = cursor->take<float>(kPanel * dim_v);
    s.max = cursor->take<float>(tile_rows);
    s.sum = cursor->take<float>(tile_rows);
    s.bias = problem.score.bias.data ? cursor->take<float>(kPanel * kAmxTileKeys) : nullptr;
    s.keep =
        problem.score.dropout_threshold ? cursor->take<int32_t>(kPanel * kAmxTileKeys) : nullptr;
    s.started = cursor->take<int32_t>(tile_rows / kPanel);
    return s;
  }
};

// The softmax state of a panel's lanes while they pass a tile.
struct SoftmaxLanes {
  Float scale;                // from S^T to base 2
  Float reference[kVectors];  // base 2; -inf until a key is visible
  Float minus[kVectors];      // -softmax_reference(reference)
  Float sum[kVectors];

  FAL_INLINE void refer_to(int v, Float x) {
    reference[v] = x;
    minus[v] = select(equal(x, set1(-FAL_INFINITY)), set1(0.f), -x);
  }
  // P^T of two keys: scores [2][32 lanes] -> one row of pairs.
  FAL_INLINE void exponentiate(const float* scores, char* pairs) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Float even = exp2_by_scalef(fma(load(scores + v * kLanes), scale, minus[v]));
      const Float odd = exp2_by_scalef(fma(load(scores + kPanel + v * kLanes), scale, minus[v]));
      sum[v] += even + odd;
      _mm512_store_si512(pairs + v * 64, (__m512i)make_pairs(even, odd).lanes);
    }
  }
};

// What one panel needs of the tile.
struct AmxPanel {
  const char *q, *k, *v;  // this panel's pair tiles; the tile's row tiles and depth tiles
  float* out;             // O^T [dim_v][32]
  int32_t* started;
  int steps;         // of the depth: head_dim / 32, rounded up
  int dims_v;        // rounded up to 32
  PanelRange range;  // keys of the tile, multiples of 32
  Range all;         // keys of the tile that every row of the panel sees
  PanelMask mask;    // set when range.masked
  bool exact;        // V holds an infinity or a NaN where not every row sees it

  FAL_INLINE bool masked(int block) const {
    return range.masked && (block * kBlock < all.begin || (block + 1) * kBlock > all.end);
  }
};

// O^T += V^T P^T over blocks [begin, end), lane by lane: 0 * NaN of a masked key must not reach O.
static FAL_NOINLINE void accumulate_visible(const AmxPanel& panel, const char* pairs, int begin,
                                            int end) {
  const int tiles = kAmxTileKeys / kTileDepth;
  for (int r = begin * kBlock; r < end * kBlock; ++r) {
    Float p[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const char* pair = pairs + r / 2 * 128 + v * 64;
      p[v] = element(load(reinterpret_cast<const Pair*>(pair)), r % 2);
    }
    for (int d = 0; d < panel.dims_v; ++d) {
      const char* tile = panel.v + (static_cast<int64_t>(d / 16) * tiles + r / 32) * kTileBytes;
      uint16_t bits;
      memcpy(&bits, tile + d % 16 * 64 + r % 32 * 2, sizeof bits);
      const Float value = (Float)set1(static_cast<int32_t>(uint32_t{bits} << 16));
      for (int v = 0; v < kVectors; ++v) {
        float* out = panel.out + d * kPanel + v * kLanes;
        store(out, select(panel.mask.visible(v, r), fma(p[v], value, load(out)), load(out)));
      }
    }
  }
}

// O^T += V^T P^T over blocks [begin, end) of the tile's keys.
static FAL_NOINLINE void accumulate_panel(const AmxPanel& panel, const char* pairs, int begin,
                                          int end) {
  if (begin >= end) return;
  const bool started = *panel.started;
  *panel.started = 1;
  if (panel.exact) {
    if (!started) memset(panel.out, 0, sizeof(float) * panel.dims_v * kPanel);
    accumulate_visible(panel, pairs, begin, end);
    return;
  }
  constexpr int64_t kDepth = kAmxTileKeys / kTileDepth * kTileBytes;  // depth tiles of 16 dims
  for (int d = 0; d < panel.dims_v; d += kBlock) {
    float* out = panel.out + d * kPanel;
    const char* v = panel.v + d / 16 * kDepth;
    started ? load_block(out, kPanel) : clear_block();
    for (int b = begin; b < end; ++b) {
      const char* p = pairs + b * kPairBlockBytes;
      multiply_block(v + b * kTileBytes, v + kDepth + b * kTileBytes, 64, p, p + 64, 128);
    }
    store_block(out, kPanel);
  }
}

// Moves the reference up to `max` after adding what was computed under the old one.
static FAL_NOINLINE void raise_reference(const AmxPanel& panel, const char* pairs, int begin,
                                         int end, const Float (&max)[kVectors],
                                         SoftmaxLanes* lanes) {
  accumulate_panel(panel, pairs, begin, end);
  Float alpha[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const Float old = lanes->reference[v];
    lanes->refer_to(v, fal::cpu::FAL_CPU_ISA::max(old, max[v]));
    alpha[v] = exp2_by_scalef(old + lanes->minus[v]);
    lanes->sum[v] *= alpha[v];
  }
  if (!*panel.started) return;
  for (int d = 0; d < panel.dims_v; ++d) {
    for (int v = 0; v < kVectors; ++v) {
      float* out = panel.out + d * kPanel + v * kLanes;
      store(out, load(out) * alpha[v]);
    }
  }
}

// P^T of one block: dropped elements become 0.
static FAL_NOINLINE void drop_block(const int32_t* keep, char* pairs) {
  for (int r = 0; r < kBlock; r += 2) {
    for (int v = 0; v < kVectors; ++v) {
      int32_t* p = reinterpret_cast<int32_t*>(pairs + r / 2 * 128 + v * 64);
      const int32_t* even = keep + r * kPanel + v * kLanes;
      const Int kept = (load(even) & 0xffff) | (load(even + kPanel) & -0x10000);
      const Int x = load(p) & kept;
      memcpy(p, &x, sizeof x);
    }
  }
}

// Masks and modifies one block of S^T in place; returns its maxima in base 2.
FAL_INLINE void finish_block(const ForwardTile& t, const AmxPanel& panel, int first_row, Range keys,
                             int block, Float scale, float* scores,
                             Float (&max_of_lane)[kVectors]) {
  const bool masked = panel.masked(block);
  const int begin = block * kBlock;
  for (int v = 0; v < kVectors; ++v) max_of_lane[v] = set1(-FAL_INFINITY);
  if (t.general) {
    modify_panel<kPanel>(t.mod, first_row, 0, keys, {begin, begin + kBlock, masked}, panel.mask,
                         scores, nullptr, max_of_lane);
    return;
  }
  if (masked) {
    for (int r = 0; r < kBlock; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float* s = scores + r * kPanel + v * kLanes;
        store(s, select(panel.mask.visible(v, begin + r), load(s), set1(-FAL_INFINITY)));
      }
    }
  }
  Float even[kVectors], odd[kVectors];
  for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = set1(-FAL_INFINITY);
#pragma GCC unroll 4
  for (int r = 0; r < kBlock; r += 2) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      even[v] = max(even[v], load(scores + r * kPanel + v * kLanes));
      odd[v] = max(odd[v], load(scores + (r + 1) * kPanel + v * kLanes));
    }
  }
  for (int v = 0; v < kVectors; ++v) max_of_lane[v] = max(even[v], odd[v]) * scale;
}

// One panel passes one tile.
static FAL_NOINLINE void forward_panel(const ForwardTile& t, const AmxForwardScratch& s,
                                       const AmxPanel& panel, int row, Range keys) {
  const int first = panel.range.begin / kBlock, last = panel.range.end / kBlock;
  const int steps = panel.steps;
  const int keys_per_step = (kBlock / steps) & ~1;  // whose P is computed beside one product step
  SoftmaxLanes lanes;
  lanes.scale = set1(t.general ? 1.f : t.problem->score.scale * kLog2E);
  for (int v = 0; v < kVectors; ++v) {
    lanes.refer_to(v, load(s.max + row + v * kLanes));
    lanes.sum[v] = load(s.sum + row + v * kLanes);
  }
  const auto scores_of = [&](int b) { return s.scores + b % kScoreBlocks * kScoreBlockSize; };
  int added = first;  // blocks whose P is in O^T
  for (int b = first; b < last + 2; ++b) {
    const int e = b - 2, m = b - 1;
    const float* scores = scores_of(e + kScoreBlocks);
    char* pairs = s.p + e * kPairBlockBytes;
    int key = e >= first ? 0 : kBlock;  // of block e, the next to exponentiate
    if (b < last) {
      const char* k = panel.k + static_cast<int64_t>(b) * 2 * steps * kTileBytes;
      clear_block();
      for (int step = 0; step < steps; ++step) {
        const char* q = panel.q + step * 2 * kTileBytes;
        multiply_block(k + step * kTileBytes, k + (steps + step) * kTileBytes, 64, q,
                       q + kTileBytes, 64);
        for (const int end = min_int(key + keys_per_step, kBlock); key < end; key += 2) {
          lanes.exponentiate(scores + key * kPanel, pairs + key / 2 * 128);
        }
      }
    }
    for (; key < kBlock; key += 2) {
      lanes.exponentiate(scores + key * kPanel, pairs + key / 2 * 128);
    }
    if (b < last) store_block(scores_of(b), kPanel);
    if (s.keep && e >= first) drop_block(s.keep + e * kBlock * kPanel, pairs);
    if (m < first || m >= last) continue;
    Float max_of_lane[kVectors];
    finish_block(t, panel, t.rows.begin + row, keys, m, lanes.scale, scores_of(m), max_of_lane);
    const Mask ahead = less(lanes.reference[0] + kReferenceLag, max_of_lane[0]) |
                       less(lanes.reference[1] + kReferenceLag, max_of_lane[1]);
    if (__builtin_expect(ahead != 0, 0)) {
      SoftmaxLanes moved = lanes;  // a copy, so that `lanes` itself can stay in registers
      raise_reference(panel, s.p, added, m, max_of_lane, &moved);
      lanes = moved;
      added = m;
    }
  }
  accumulate_panel(panel, s.p, added, last);
  for (int v = 0; v < kVectors; ++v) {
    store(s.max + row + v * kLanes, lanes.reference[v]);
    store(s.sum + row + v * kLanes, lanes.sum[v]);
  }
}

// O^T [dim][32] -> [32][dims].
FAL_INLINE void transpose_panel(const float* in, int dims, float* out) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    for (int d = 0; d < dims; d += kLanes) {
      Float block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(in + (d + i) * kPanel + lane);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (lane + i) * dims + d, block[i]);
    }
  }
}

struct AmxForward {
  using Scratch = AmxForwardScratch;
  static constexpr int kTileKeys = kAmxTileKeys;
  static constexpr bool kReadsQuantised = false;

  template <class T, class Kv, class Tiles>
  FAL_INLINE static void rows(const ForwardTile& t, const Scratch& s, const Sequence& seq,
                              Tiles tiles) {
    const ForwardProblem& p = *t.problem;
    const int dim = p.shape.head_dim, dim_v = p.shape.head_dim_v, dims_v = round_up(dim_v, kBlock);
    const int steps = round_up(dim, kTileDepth) / kTileDepth, rows = t.rows.size();
    for (int i = 0; i < round_up(rows, kPanel); ++i) {
      s.max[i] = -FAL_INFINITY;
      s.sum[i] = 0.f;
      s.started[i / kPanel] = 0;
    }
    const StridedRows<BFloat16> q{p.q.as<BFloat16>().at(t.batch, seq.row_q + t.rows.begin, t.head),
                                  p.q.row};
    const Kv kv = Kv::make(p.kv, seq, t.batch, p.shape.kv_head(t.head));
    const TileSession session;

    bool packed = false;
    for (Tile tile; tiles.next(&tile);) {
      if (!packed) pack_pair_tiles(q, rows, dim, s.q);
      packed = true;
      const Range keys = tile.range;
      const auto k_row = [&](int r) { return kv.k_row(keys.begin + r); };
      const auto v_row = [&](int r) { return kv.v_row(keys.begin + r); };
      pack_row_tiles(k_row, keys.size(), dim, s.k);
      pack_depth_tiles(v_row, keys.size(), kAmxTileKeys, dim_v, s.v);
      const bool v_finite = tile.kind == TileKind::kFull || rows_finite(v_row, keys.size(), dim_v);
      for (int row = 0; row < rows; row += kPanel) {
        const Range panel_rows{t.rows.begin + row,
                               min_int(t.rows.begin + row + kPanel, t.rows.end)};
        AmxPanel panel{};
        panel.range = panel_range(t.band, t.mask, panel_rows, keys, kBlock, 0);
        if (panel.range.begin >= panel.range.end) continue;
        panel.q = s.q + static_cast<int64_t>(row) * steps * kTileDepth * 2;
        panel.k = s.k;
        panel.v = s.v;
        panel.out = s.out + static_cast<int64_t>(row) * dims_v;
        panel.started = s.started + row / kPanel;
        panel.steps = steps;
        panel.dims_v = dims_v;
        const Range all = intersect(t.band.keys_of_all(panel_rows), keys);
        panel.all = {all.begin - keys.begin, all.end - keys.begin};
        panel.exact = panel.range.masked && !v_finite;
        alignas(64) int32_t words[mask_words(kAmxTileKeys)];
        if (panel.range.masked) {
          panel.mask = panel_mask(t.band, t.mask, panel_rows, keys, panel.range, words);
          if (panel.mask.words) panel.all = {0, 0};
        }
        if (s.bias) pack_bias(p.score.bias, t.batch, t.head, panel_rows, keys, s.bias);
        if (s.keep) fill_dropout<kPanel>(t.dropout, t.batch_head(), panel_rows, keys, s.keep);
        forward_panel(t, s, panel, row, keys);
      }
    }
    for (int row = 0; row < rows; row += kPanel) {
      const bool started = s.started[row / kPanel];
      if (started) {
        transpose_panel(s.out + static_cast<int64_t>(row) * dims_v, dims_v, s.out_rows);
      }
      for (int r = row; r < min_int(row + kPanel, rows); ++r) {
        store_forward_row<BFloat16>(t, seq, r, s.max[r], s.sum[r],
                                    started ? s.out_rows + (r - row) * dims_v : nullptr);
      }
    }
  }

  // Rows of a tile: many, so that packing K and V is shared by many, unless that leaves too few
  // items to share among the threads. Results do not depend on it.
  FAL_INLINE static int max_tile_rows(const Shape& shape, int64_t longest, int threads) {
    int rows = shape.head_dim + shape.head_dim_v > 256 ? kAmxMaxTileRows / 2 : kAmxMaxTileRows;
    const int64_t heads = static_cast<int64_t>(shape.batch) * shape.heads_q;
    while (threads > 1 && rows > kAmxMinTileRows &&
           heads * ((longest + rows - 1) / rows) < 4 * threads)
      rows /= 2;
    return rows;
  }
};

}  // namespace fal::cpu::FAL_CPU_ISA
