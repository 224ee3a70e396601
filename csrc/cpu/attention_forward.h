// O = softmax(S) V with S = mod(scale * Q K^T) under the band, tile by tile with the online
// softmax: FlashAttention-2, algorithm 1, on the transposed scores.
//
// One item is one tile of query rows of one (batch entry, query head). It walks the tiles of keys
// that the band shows it:
//
//   pack K, V        rows -> fp32 tiles                     [key][dim], [dim / kPanel][key][kPanel]
//   scores           S^T = K Q^T, masked; running maximum   lanes are query rows: nothing is
//   softmax_panel    P^T = exp2(S^T - max), running sum     reduced across lanes
//   accumulate       O = diag(alpha) O + P V                P^T is the packed operand as it stands
//
// Q, K, V and P are words of fp32, or pairs of bf16 (simd.h): then P is rounded to bf16, and the
// scale is applied to S, because it would round Q.
//
// Scratch of one thread (fp32), head dim 128: Q 96 KiB, K 72, V 72, S 117, O 96.
#pragma once

#include "decode.h"
#include "pack_pairs.h"
#include "parallel.h"
#include "score_panel.h"
#include "scratch.h"
#include "tile_view.h"

namespace fal::cpu::FAL_CPU_ISA {

template <class Word>
struct ForwardScratch {
  Word *q, *k, *v;
  float *scores, *out, *max, *sum, *alpha, *bias;
  int32_t* keep;

  FAL_INLINE static ForwardScratch place(ScratchCursor* cursor, const ForwardProblem& p, int) {
    const int dim = round_up(words<Word>(p.shape.head_dim), kLanes),
              dim_v = round_up(p.shape.head_dim_v, kPanel);
    ForwardScratch s;
    s.q = cursor->take<Word>(kTileRows * dim);
    s.k = cursor->take<Word>(kTileKeys * dim);
    s.v = cursor->take<Word>(words<Word>(kTileKeys) * dim_v);
    s.scores = cursor->take<float>(kTileKeys * kScoreStride);
    s.out = cursor->take<float>(kTileRows * dim_v);
    s.max = cursor->take<float>(kTileRows);
    s.sum = cursor->take<float>(kTileRows);
    s.alpha = cursor->take<float>(kTileRows);
    s.bias = p.score.bias.data ? cursor->take<float>(kTileRows * kTileKeys) : nullptr;
    s.keep = p.score.dropout_threshold ? cursor->take<int32_t>(kTileKeys * kScoreStride) : nullptr;
    return s;
  }
};

struct ForwardPlan {
  ForwardProblem problem;
  int tile_rows;       // query rows of an item
  int tile_keys;       // keys of a tile, at most
  int64_t row_blocks;  // items of one (batch entry, head)
  int64_t items;       // the last one clears the rows beyond every sequence
  double flops;
};

// True where Q is packed with the scale in it.
template <class Word>
constexpr bool kScaledQ = kPerWord<Word> == 1;

// P^T of kPerWord keys, as the words that O = P V multiplies.
FAL_INLINE void store_words(float* to, const Float (&p)[1]) { store(to, p[0]); }
#if defined(__AVX512BF16__)
FAL_INLINE void store_words(Pair* to, const Float (&p)[2]) { store(to, make_pairs(p[0], p[1])); }
#endif

// P^T = exp2(scale S^T - max) over S^T (row r of words holds the keys from r * kPerWord on), the
// running sum, and alpha, by which earlier results shrink. The scale is 1 for words of fp32.
template <class Word>
FAL_INLINE void softmax_panel(float* scores, PanelRange range, Float scale,
                              const Float (&new_max)[kVectors], float* max, float* sum,
                              float* alpha) {
  constexpr int kKeys = kPerWord<Word>;
  Word* p_words = reinterpret_cast<Word*>(scores);
  Float reference[kVectors], total[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    // softmax_reference(): a row that has seen nothing subtracts 0.
    reference[v] = select(equal(new_max[v], set1(-FAL_INFINITY)), set1(0.f), new_max[v]);
    total[v] = set1(0.f);
  }
  for (int r = range.begin; r < range.end; r += kKeys) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Float p[kKeys];
#pragma GCC unroll 2
      for (int i = 0; i < kKeys; ++i) {
        const Float s = load(scores + (r + i) * kScoreStride + v * kLanes);
        p[i] = exp2(kScaledQ<Word> ? s - reference[v] : fma(s, scale, -reference[v]));
        total[v] += p[i];
      }
      store_words(p_words + r / kKeys * kScoreStride + v * kLanes, p);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Float shrink = exp2(load(max + v * kLanes) - reference[v]);
    store(alpha + v * kLanes, shrink);
    store(max + v * kLanes, new_max[v]);
    store(sum + v * kLanes, fma(load(sum + v * kLanes), shrink, total[v]));
  }
}

// P^T of one panel: dropped elements become 0.
FAL_INLINE void drop_panel(PanelRange range, const int32_t* keep, float* p) {
  for (int r = range.begin; r < range.end; ++r) {
    for (int v = 0; v < kPanel; v += kLanes) {
      const int at = r * kScoreStride + v;
      store(p + at, keep_bits(load(keep + at), load(p + at)));
    }
  }
}
#if defined(__AVX512BF16__)
FAL_INLINE void drop_panel(PanelRange range, const int32_t* keep, Pair* p) {
  for (int r = range.begin; r < range.end; r += 2) {
    for (int v = 0; v < kPanel; v += kLanes) {
      Pair* to = p + r / 2 * kScoreStride + v;
      const int32_t* even = keep + r * kScoreStride + v;
      const Int kept = (load(even) & 0xffff) | (load(even + kScoreStride) & -0x10000);
      store(to, Pairs{load(to).lanes & kept});
    }
  }
}
#endif

struct ForwardTile {
  const ForwardProblem* problem;
  Band band;
  const HeadMask* mask;  // null without a block mask
  Range rows;
  int batch, head;
  bool general;  // a score modification is on
  PanelScoreMod mod;
  Dropout dropout;

  FAL_INLINE uint32_t batch_head() const {
    return static_cast<uint32_t>(batch) * problem->shape.heads_q + head;
  }
};

// One tile of keys whose K and V are packed.
template <class Word>
static FAL_NOINLINE void forward_tile(const ForwardTile& t, const ForwardScratch<Word>& s,
                                      Tile tile, bool first, bool v_finite) {
  const Shape& shape = t.problem->shape;
  const Range keys = tile.range;
  const int depth = words<Word>(shape.head_dim), k_ld = round_up(depth, kLanes),
            rows = t.rows.size();
  // modify_panel leaves values in base 2.
  const Float scale = set1(kScaledQ<Word> || t.general ? 1.f : t.problem->score.scale * kLog2E);
  Word* p = reinterpret_cast<Word*>(s.scores);
  if (t.mod.bias) pack_bias(t.problem->score.bias, t.batch, t.head, t.rows, keys, s.bias);
  if (s.keep) {
    fill_dropout<kScoreStride>(t.dropout, t.batch_head(), t.rows, keys, s.keep);
  }

  const TileView view(t.band, t.mask, t.rows, keys);
  for (int row = 0; row < rows; row += kPanel) {
    const Range panel_rows = view.panel_rows(row);
    const PanelRange range = view.panel(row);
    const Word* q_panel = s.q + static_cast<int64_t>(row) * depth;
    float* scores = s.scores + row;
    PanelMask mask;
    alignas(64) int32_t words[mask_words(kTileKeys)];
    if (range.masked) mask = panel_mask(t.band, t.mask, panel_rows, keys, range, words);
    Float new_max[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      new_max[v] = kScaledQ<Word> ? load(s.max + row + v * kLanes) : set1(-FAL_INFINITY);
    }
    if (t.general) {
      score_panel<false, false>(s.k, k_ld, q_panel, depth, range, mask, scores, new_max);
      modify_panel<kScoreStride>(t.mod, panel_rows.begin, row, keys, range, mask,
                                 scores + range.begin * kScoreStride, nullptr, new_max);
    } else if (range.masked) {
      score_panel<true, true>(s.k, k_ld, q_panel, depth, range, mask, scores, new_max);
    } else {
      score_panel<false, true>(s.k, k_ld, q_panel, depth, range, mask, scores, new_max);
    }
    if constexpr (!kScaledQ<Word>) {
      for (int v = 0; v < kVectors; ++v) {
        new_max[v] = max(new_max[v] * scale, load(s.max + row + v * kLanes));
      }
    }
    softmax_panel<Word>(scores, range, scale, new_max, s.max + row, s.sum + row, s.alpha + row);
    fill_panel(range, p + row);
    if (s.keep) drop_panel(range, s.keep + row, p + row);
  }

  // Depth trimmed per row group to the keys that its rows see.
  const int ld = round_up(shape.head_dim_v, kPanel),
            vectors = (shape.head_dim_v + kLanes - 1) / kLanes;
  if (v_finite || tile.kind == TileKind::kFull) {
    accumulate<true>(s.out, ld, rows, vectors, p, 1, kScoreStride, s.v, kTileKeys, first, s.alpha,
                     [&](int r) { return view.keys_of_rows(r, r + kRows); });
  } else {
    accumulate_exactly(
        s.out, ld, rows, vectors, p, 1, kScoreStride, s.v, kTileKeys, first, s.alpha,
        [&](int r) { return view.keys_of_rows(r, r + 1); },
        [&](int r, int k) { return view.shows(r, k); });
  }
}

template <class T>
FAL_INLINE void clear_forward_row(const ForwardProblem& p, int b, int h, int64_t row) {
  zero_row(p.out.as<T>().at(b, row, h), p.shape.head_dim_v);
  if (p.lse.data) *p.lse.at(b, h, row) = -FAL_INFINITY;
}

// One finished row: its softmax state (max in base 2) and its output before normalisation, null
// when the row saw no tile.
template <class T>
FAL_INLINE void store_forward_row(const ForwardTile& t, const Sequence& seq, int r, float max,
                                  float sum, const float* accumulated) {
  const ForwardProblem& p = *t.problem;
  SoftmaxState state{max * kLn2, sum};
  float factor = 1.f;
  if (p.score.sinks) factor = state.absorb_sink(p.score.sinks[t.head]);
  factor *= state.inverse_sum();
  if (t.dropout.threshold) factor *= t.dropout.keep_scale();
  const int64_t row = seq.row_q + t.rows.begin + r;
  T* out = p.out.as<T>().at(t.batch, row, t.head);
  if (accumulated) {
    store_row(out, accumulated, p.shape.head_dim_v, factor);
  } else {
    zero_row(out, p.shape.head_dim_v);
  }
  if (p.lse.data) *p.lse.at(t.batch, t.head, row) = state.lse();
}

// Q of an item, transposed; in fp32 with the scale in it unless scores are modified.
template <class Rows>
FAL_INLINE void pack_queries(const Rows& q, int n, const ForwardProblem& p, float* out) {
  const bool general = modifies_scores(p.score);
  pack_transposed(q, n, p.shape.head_dim, general ? 1.f : p.score.scale * kLog2E, out);
}
#if defined(__AVX512BF16__)
template <class Rows>
FAL_INLINE void pack_queries(const Rows& q, int n, const ForwardProblem& p, Pair* out) {
  pack_transposed(q, n, p.shape.head_dim, out);
}
#endif

// The products of an item in vectors of words. Another product (amx_forward.h) has the same
// members.
template <class Word>
struct VectorForward {
  using Scratch = ForwardScratch<Word>;
  static constexpr int kTileKeys = fal::cpu::FAL_CPU_ISA::kTileKeys;
  static constexpr bool kReadsQuantised = kPerWord<Word> == 1;

  // Smaller tiles where there would be too few items to balance; no row's result depends on it.
  FAL_INLINE static int max_tile_rows(const Shape& shape, int64_t longest, int threads) {
    const int64_t heads = static_cast<int64_t>(shape.batch) * shape.heads_q;
    int rows = kTileRows;
    while (threads > 1 && rows > 64 && heads * ((longest + rows - 1) / rows) < 4 * threads) {
      rows -= 32;
    }
    return rows;
  }

  // One item for any tile cursor: Tiles has next(Tile*).
  template <class T, class Kv, class Tiles>
  FAL_INLINE static void rows(const ForwardTile& t, const Scratch& s, const Sequence& seq,
                              Tiles tiles) {
    const ForwardProblem& p = *t.problem;
    const Shape& shape = p.shape;
    const int padded = round_up(t.rows.size(), kPanel),
              k_ld = round_up(words<Word>(shape.head_dim), kLanes);
    for (int i = 0; i < padded; ++i) {
      s.max[i] = -FAL_INFINITY;
      s.sum[i] = 0.f;
    }
    const View<const T> q = p.q.as<const T>();
    const StridedRows<T> q_rows{q.at(t.batch, seq.row_q + t.rows.begin, t.head), q.row};
    const Kv kv = Kv::make(p.kv, seq, t.batch, shape.kv_head(t.head));

    bool first = true;
    for (Tile tile; tiles.next(&tile); first = false) {
      if (first) pack_queries(q_rows, t.rows.size(), p, s.q);
      const int n = tile.range.size(), begin = tile.range.begin;
      pack_rows([&](int r) { return kv.k_row(begin + r); }, n, round_up(n, kRows), shape.head_dim,
                k_ld, s.k);
      const bool v_finite = pack_panels([&](int r) { return kv.v_row(begin + r); }, n, kTileKeys,
                                        shape.head_dim_v, s.v);
      forward_tile(t, s, tile, first, v_finite);
    }
    const int ld = round_up(shape.head_dim_v, kPanel);
    for (int r = 0; r < t.rows.size(); ++r) {
      store_forward_row<T>(t, seq, r, s.max[r], s.sum[r], first ? nullptr : s.out + r * ld);
    }
  }
};

template <class Product, class T, class Kv>
static void forward_item(const void* arg, int64_t item, char* memory) {
  const ForwardPlan& plan = *static_cast<const ForwardPlan*>(arg);
  const ForwardProblem& p = plan.problem;
  const Shape& shape = p.shape;
  if (item == plan.items - 1) {
    if (!p.lengths.cu_seqlens_q) return;
    for (int64_t row = p.lengths.cu_seqlens_q[shape.batch]; row < shape.rows_q; ++row) {
      for (int h = 0; h < shape.heads_q; ++h) clear_forward_row<T>(p, 0, h, row);
    }
    return;
  }
  const int64_t batch_head = item / plan.row_blocks;
  const int b = static_cast<int>(batch_head / shape.heads_q);
  const int h = static_cast<int>(batch_head % shape.heads_q);
  const Sequence seq = p.lengths.sequence(b);
  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, p.window);
  // Later rows see more keys when the right side is bounded: the longest items come first.
  int64_t block = item % plan.row_blocks;
  if (band.right >= 0 && band.left < 0) block = plan.row_blocks - 1 - block;
  const int64_t begin = block * plan.tile_rows, allocated = p.lengths.allocated_q(b);
  if (decodes(p, seq.seqlen_q)) return;  // decode.h has them
  const int64_t end = min_int(begin + plan.tile_rows, allocated);
  if (begin >= end) return;
  for (int64_t i = begin > seq.seqlen_q ? begin : seq.seqlen_q; i < end; ++i) {
    clear_forward_row<T>(p, b, h, seq.row_q + i);
  }
  const Range rows{static_cast<int32_t>(begin), min_int(static_cast<int32_t>(end), seq.seqlen_q)};
  if (rows.empty()) return;

  ScratchCursor cursor{memory};
  const typename Product::Scratch scratch = Product::Scratch::place(&cursor, p, plan.tile_rows);
  const ScoreOptions& score = p.score;
  HeadMask mask{};
  if (p.block_mask.given()) mask = HeadMask::make(p.block_mask, b, h, band);
  const ForwardTile tile{
      &p,
      band,
      p.block_mask.given() ? &mask : nullptr,
      rows,
      b,
      h,
      modifies_scores(score),
      {GeneralScoreMod::make(score, b, h, band.shift()), score.scale, scratch.bias},
      {score.dropout_seed, score.dropout_threshold}};
  Product::template rows<T, Kv>(tile, scratch, seq,
                                TilesOfRows::make(band, tile.mask, rows, plan.tile_keys));
}

// Rows of a tile: as even as possible, so that 256 rows become two tiles of 128 and not 192 + 64.
FAL_INLINE int even_tile_rows(int64_t longest, int most) {
  const int64_t tiles = longest > 0 ? (longest + most - 1) / most : 1;
  const int64_t rows = (longest + tiles - 1) / tiles;
  constexpr int kUnit = kPanel > 16 ? kPanel : 16;
  return round_up(rows > 1 ? static_cast<int>(rows) : 1, kUnit);
}

// The same where a block mask has edges to fall on.
FAL_INLINE int sparse_tile_rows(int64_t longest, int most, int block) {
  constexpr int kUnit = kPanel > 16 ? kPanel : 16;
  return min_int(tile_of_blocks(most, block, kUnit), even_tile_rows(longest, most));
}

template <class T, class Product>
static void forward_with(const ForwardProblem& problem, const ThreadPool& pool) {
  decode<T, Product::kReadsQuantised>(problem, pool);
  ForwardPlan plan{problem, 0, Product::kTileKeys, 0, 0, 0.0};
  const Shape& shape = problem.shape;
  int64_t longest = 0;
  for (int b = 0; b < shape.batch; ++b) {
    const Sequence seq = problem.lengths.sequence(b);
    const int64_t allocated = problem.lengths.allocated_q(b);
    if (decodes(problem, seq.seqlen_q)) continue;
    if (allocated > longest) longest = allocated;
    plan.flops += 2.0 * shape.heads_q * (shape.head_dim + shape.head_dim_v) * allocated *
                  (seq.seqlen_k + 1.0);
  }
  const int most = Product::max_tile_rows(shape, longest, pool.threads);
  plan.tile_rows = problem.block_mask.given()
                       ? sparse_tile_rows(longest, most, problem.block_mask.block_q)
                       : even_tile_rows(longest, most);
  if (problem.block_mask.given()) {
    plan.tile_keys = tile_of_blocks(Product::kTileKeys, problem.block_mask.block_k, 16);
  }
  plan.row_blocks = (longest + plan.tile_rows - 1) / plan.tile_rows;
  plan.items = static_cast<int64_t>(shape.batch) * shape.heads_q * plan.row_blocks + 1;
  auto* item = problem.kv.pages.block_table ? &forward_item<Product, T, PagedKv<T>>
                                            : &forward_item<Product, T, ContiguousKv<T>>;
  if constexpr (Product::kReadsQuantised) {
    if (problem.kv.dtype != problem.shape.dtype) item = &forward_item<Product, T, QuantisedKv>;
  }
  ScratchCursor size{nullptr};
  Product::Scratch::place(&size, problem, plan.tile_rows);
  run_items(pool, plan.items, plan.flops, size.used, item, &plan);
}

[[maybe_unused]] static void forward(const ForwardProblem& problem, const ThreadPool& pool) {
  dispatch_element(problem.shape.dtype, [&](auto element) {
    forward_with<decltype(element), VectorForward<float>>(problem, pool);
  });
}

}  // namespace fal::cpu::FAL_CPU_ISA
