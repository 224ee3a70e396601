// dQ, dK, dV (and the gradients of bias and sinks) from dO and the LSE: FlashAttention-2, algorithm
// 2, on the transposed scores.
//
//   P^T  = exp2(K Q^T - lse)      dV += P^T dO
//   dP^T = V dO^T                 dS^T = P^T (dP^T - delta),   delta = rowsum(dO * O) - dlse
//   dK  += scale * dS^T Q         dQ  += scale * dS K
//
// One item is a block of keys of one (batch entry, K/V head): K and V are packed once, dK and dV
// stay in scratch memory while the query tiles of every head of the group pass by. dQ of a query
// tile gets one contribution from each key block that it sees; they are added in ascending order of
// the key blocks, each item waiting for its turn (items are handed out key block by key block over
// all heads, so one seldom waits). The result does not depend on the number of threads, and memory
// is linear in length: two floats a row, and for 16-bit types one fp32 copy of dQ.
#pragma once

#include "gradient_panel.h"

namespace fal::cpu::FAL_CPU_ISA {

// Words of a row of K or V of `dims` elements, as S and dP read it.
template <class Word>
FAL_INLINE int row_words(int dims) {
  return round_up(words<Word>(dims), kLanes);
}

template <class Word>
struct BackwardScratch {
  // A key block: rows and panels of K, rows of V, the gradients.
  Word *k, *k_panels, *v;
  float *dk, *dv;
  // A query tile: transposed panels and panels of Q and dO, dQ.
  Word *q_transposed, *dout_transposed, *q_panels, *dout_panels;
  float* dq;
  // A score tile [key][kScoreStride]: S and dP become P and dS, words of query rows. Words of keys,
  // the other operand that dS is, need memory of their own where a word is a pair.
  float *p, *ds, *bend, *bias;
  Word* ds_of_keys;
  int32_t* keep;
  bool k_finite, q_finite, dout_finite;  // of the block and of the tile that are packed

  FAL_INLINE static BackwardScratch place(ScratchCursor* cursor, const BackwardProblem& problem,
                                          int block_keys, int) {
    const ForwardProblem& f = problem.forward;
    const int dim = round_up(f.shape.head_dim, kPanel),
              dim_v = round_up(f.shape.head_dim_v, kPanel);
    const int depth = row_words<Word>(f.shape.head_dim),
              depth_v = row_words<Word>(f.shape.head_dim_v);
    BackwardScratch s;
    s.k = cursor->take<Word>(block_keys * depth);
    s.k_panels = cursor->take<Word>(words<Word>(block_keys) * dim);
    s.v = cursor->take<Word>(block_keys * depth_v);
    s.dk = cursor->take<float>(block_keys * dim);
    s.dv = cursor->take<float>(block_keys * dim_v);
    s.q_transposed = cursor->take<Word>(kTileRows * depth);
    s.dout_transposed = cursor->take<Word>(kTileRows * depth_v);
    s.q_panels = cursor->take<Word>(words<Word>(kTileRows) * dim);
    s.dout_panels = cursor->take<Word>(words<Word>(kTileRows) * dim_v);
    s.dq = cursor->take<float>(kTileRows * dim);
    s.p = cursor->take<float>(kTileKeys * kScoreStride);
    s.ds = cursor->take<float>(kTileKeys * kScoreStride);
    if constexpr (kPerWord<Word> == 1) {
      s.ds_of_keys = s.ds;
    } else {
      s.ds_of_keys = cursor->take<Word>(words<Word>(kTileKeys) * kScoreStride);
    }
    s.bend = f.score.softcap > 0.f ? cursor->take<float>(kTileKeys * kScoreStride) : nullptr;
    s.bias = f.score.bias.data ? cursor->take<float>(kTileRows * kTileKeys) : nullptr;
    s.keep = f.score.dropout_threshold ? cursor->take<int32_t>(kTileKeys * kScoreStride) : nullptr;
    s.k_finite = s.q_finite = s.dout_finite = true;
    return s;
  }
};

// The five products of one (query tile, key tile). `offset` is the key tile's place in the key
// block.
template <class Word>
static FAL_NOINLINE void backward_tile(const BackwardTile& t, const BackwardScratch<Word>& s,
                                       Range keys, int offset, bool partial, bool first) {
  const ForwardProblem& f = t.plan->problem.forward;
  const Shape& shape = f.shape;
  const int dim = shape.head_dim, dim_v = shape.head_dim_v;
  const int ld = round_up(dim, kPanel), ld_v = round_up(dim_v, kPanel);
  const int depth = words<Word>(dim), depth_v = words<Word>(dim_v);
  const int k_ld = row_words<Word>(dim), v_ld = row_words<Word>(dim_v);
  const int rows = t.rows.size(), n = keys.size();
  const Word* k = s.k + static_cast<int64_t>(offset) * k_ld;
  const Word* v = s.v + static_cast<int64_t>(offset) * v_ld;
  Word *p = reinterpret_cast<Word*>(s.p), *ds = reinterpret_cast<Word*>(s.ds);
  // modify_panel leaves values in base 2.
  const float scale = kScaledQ<Word> || t.general ? 1.f : f.score.scale * kLog2E;
  if (s.bias) pack_bias(f.score.bias, t.batch, t.head, t.rows, keys, s.bias);
  if (s.keep) {
    fill_dropout<kScoreStride>(t.dropout, static_cast<uint32_t>(t.batch) * shape.heads_q + t.head,
                               t.rows, keys, s.keep);
  }

  const TileView view(t.band, t.mask, t.rows, keys);
  for (int row = 0; row < rows; row += kPanel) {
    const Range panel_rows = view.panel_rows(row);
    const PanelRange range = view.panel(row);
    alignas(64) int32_t mask_bits[mask_words(kTileKeys)];
    PanelMask mask;
    if (range.masked) mask = panel_mask(t.band, t.mask, panel_rows, keys, range, mask_bits);
    Float unused[kVectors] = {};
    score_panel<false, false>(k, k_ld, s.q_transposed + static_cast<int64_t>(row) * depth, depth,
                              range, mask, s.p + row, unused);
    score_panel<false, false>(v, v_ld, s.dout_transposed + static_cast<int64_t>(row) * depth_v,
                              depth_v, range, mask, s.ds + row, unused);
    const int at = range.begin * kScoreStride + row;
    const int32_t* keep = s.keep ? s.keep + at : nullptr;
    float* bend = s.bend ? s.bend + at : nullptr;
    if (t.general) {
      modify_panel<kScoreStride>(t.mod, panel_rows.begin, row, keys, range, mask, s.p + at, bend,
                                 unused);
    }
    // Lane 0 of the panel, in words along query rows; never beyond the fp32 that it came from.
    const int rows_at = range.begin * kScoreStride + row / kPerWord<Word>;
    const int keys_at = range.begin / kPerWord<Word> * kScoreStride + row;
    if (kPerWord<Word> == 1 || bend || t.plan->problem.dbias.data) {
      gradient_panel<kScoreStride>(t, row, range, mask, scale, s.p + at, s.ds + at, keep, s.p + at,
                                   s.ds + at, s.ds + at);
      finish_scores<kScoreStride>(t, row, keys, range, s.ds + at, bend);
      round_gradients(range, s.p + at, s.ds + at, p + rows_at, ds + rows_at,
                      s.ds_of_keys + keys_at);
    } else {
      gradient_panel<kScoreStride>(t, row, range, mask, scale, s.p + at, s.ds + at, keep,
                                   p + rows_at, ds + rows_at, s.ds_of_keys + keys_at);
    }
    fill_panel(range, s.ds_of_keys + row);
    if (t.mask) {  // the rows that see a key need not follow each other
      fill_rows(range, p + row / kPerWord<Word>);
      fill_rows(range, ds + row / kPerWord<Word>);
    }
  }

  const auto rows_of_group = [&](int r) { return view.rows_of_keys(r, r + kRows); };
  const auto rows_of_one = [&](int r) { return view.rows_of_keys(r, r + 1); };
  const auto keys_of_group = [&](int r) { return view.keys_of_rows(r, r + kRows); };
  const auto keys_of_one = [&](int r) { return view.keys_of_rows(r, r + 1); };
  const auto shows = [&](int row, int key) { return view.shows(row, key); };
  const auto shows_key = [&](int key, int row) { return view.shows(row, key); };
  const int vectors = (dim + kLanes - 1) / kLanes, vectors_v = (dim_v + kLanes - 1) / kLanes;
  float* dv = s.dv + static_cast<int64_t>(offset) * ld_v;
  float* dk = s.dk + static_cast<int64_t>(offset) * ld;
  const Word* k_panels = s.k_panels + static_cast<int64_t>(words<Word>(offset)) * ld;
  if (s.dout_finite || !partial) {
    accumulate<false>(dv, ld_v, n, vectors_v, p, kScoreStride, 1, s.dout_panels, kTileRows, false,
                      nullptr, rows_of_group);
  } else {
    accumulate_exactly(dv, ld_v, n, vectors_v, p, kScoreStride, 1, s.dout_panels, kTileRows, false,
                       nullptr, rows_of_one, shows_key);
  }
  if (s.q_finite || !partial) {
    accumulate<false>(dk, ld, n, vectors, ds, kScoreStride, 1, s.q_panels, kTileRows, false,
                      nullptr, rows_of_group);
  } else {
    accumulate_exactly(dk, ld, n, vectors, ds, kScoreStride, 1, s.q_panels, kTileRows, false,
                       nullptr, rows_of_one, shows_key);
  }
  if (s.k_finite || !partial) {
    accumulate<false>(s.dq, ld, rows, vectors, s.ds_of_keys, 1, kScoreStride, k_panels, kTileKeys,
                      first, nullptr, keys_of_group);
  } else {
    accumulate_exactly(s.dq, ld, rows, vectors, s.ds_of_keys, 1, kScoreStride, k_panels, kTileKeys,
                       first, nullptr, keys_of_one, shows);
  }
}

// Adds the tile's dQ, [row][head_dim, whole panels], when the key blocks before this one have added
// theirs.
template <class T>
FAL_INLINE void add_dq(const BackwardTile& t, const Sequence& seq, const float* tile_dq,
                       int64_t block, int32_t* turn) {
  const BackwardPlan& plan = *t.plan;
  const ForwardProblem& f = plan.problem.forward;
  const int dim = f.shape.head_dim, ld = round_up(dim, kPanel), sum_ld = round_up(dim, kLanes);
  const Range seen = t.band.keys_of_any(t.rows);
  int64_t first = seen.begin / plan.block_keys, last = (seen.end - 1) / plan.block_keys;
  int64_t next = block + 1;  // the key block that adds after this one
  if (t.mask) {
    first = t.mask->next_key(t.band, t.rows, 0) / plan.block_keys;
    const int32_t key = t.mask->next_key(t.band, t.rows, t.block.end);
    next = key / plan.block_keys;
    last = key == HeadMask::kNone ? block : next;
  }
  const View<T> dq = plan.problem.dq.as<T>();
  const int32_t place = static_cast<int32_t>(block - first);
  if (place > 0) wait_for_turn(turn, place);
  for (int r = 0; r < t.rows.size(); ++r) {
    const float* part = tile_dq + static_cast<int64_t>(r) * ld;
    T* row = dq.at(t.batch, seq.row_q + t.rows.begin + r, t.head);
    if (first == last) {
      store_row(row, part, dim, f.score.scale);
      continue;
    }
    float* sum = plan.dq_sum + plan.stat_index(t.batch, t.head, t.rows.begin + r) * sum_ld;
    for (int d = 0; d < sum_ld; d += kLanes) {
      const Float x = load(part + d);
      store(sum + d, block == first ? x : load(sum + d) + x);
    }
    if (block == last) store_row(row, sum, dim, f.score.scale);
  }
  if (block < last) pass_turn(turn, static_cast<int32_t>(next - first));
}

// Writes dK and dV of a key block, and zeros where the tensors hold rows that belong to no
// sequence.
template <class T>
FAL_INLINE void store_key_block(const BackwardPlan& plan, const float* dk_block,
                                const float* dv_block, const Sequence& seq, int b, int head_k,
                                Range block) {
  const ForwardProblem& f = plan.problem.forward;
  const int ld = round_up(f.shape.head_dim, kPanel), ld_v = round_up(f.shape.head_dim_v, kPanel);
  const View<T> dk = plan.problem.dk.as<T>(), dv = plan.problem.dv.as<T>();
  for (int j = 0; j < block.size(); ++j) {
    const int64_t row = seq.row_k + block.begin + j, at = plan.scratch_offset(j);
    store_row(dk.at(b, row, head_k), dk_block + at * ld, f.shape.head_dim, f.score.scale);
    store_row(dv.at(b, row, head_k), dv_block + at * ld_v, f.shape.head_dim_v, 1.f);
  }
}

// dO of a query tile, transposed.
template <class Rows>
FAL_INLINE void pack_gradients(const Rows& dout, int n, int dim_v, float* out) {
  pack_transposed(dout, n, dim_v, 1.f, out);
}
#if defined(__AVX512BF16__)
template <class Rows>
FAL_INLINE void pack_gradients(const Rows& dout, int n, int dim_v, Pair* out) {
  pack_transposed(dout, n, dim_v, out);
}
#endif

// The products of an item in vectors of words. Another product (amx_backward.h) has the same
// members.
template <class Word>
struct VectorBackward {
  using Scratch = BackwardScratch<Word>;
  static constexpr int kTileKeys = fal::cpu::FAL_CPU_ISA::kTileKeys;
  static constexpr bool kCanSumDelta = true;

  FAL_INLINE static int max_tile_rows(const Shape&) { return kTileRows; }

  // Key blocks of 288 rows keep K, V, dK and dV of a block in a 2 MiB L2 cache at head dim
  // 128, and make what is repeated for every block (packing Q and dO, adding dQ) small. Fewer rows
  // where there would be too few items to share; never depending on the number of threads, because
  // the order of additions does.
  FAL_INLINE static int block_keys(const Shape& shape, int64_t longest) {
    constexpr int kFewItems = 16;
    int tiles = shape.head_dim + shape.head_dim_v > 256 ? 1 : 2;
    const int64_t heads = static_cast<int64_t>(shape.batch) * shape.heads_k;
    while (tiles > 1 &&
           heads * ((longest + tiles * kTileKeys - 1) / (tiles * kTileKeys)) < kFewItems) {
      --tiles;
    }
    return tiles * kTileKeys;
  }

  // K and V of the tile of keys that is `offset` rows into the block.
  template <class Rows>
  FAL_INLINE static void pack_keys(const Rows& k, const Rows& v, int n, int dim, int dim_v,
                                   int offset, int, Scratch* s) {
    const int ld = row_words<Word>(dim), ld_v = row_words<Word>(dim_v), padded = round_up(n, kRows);
    pack_rows(k, n, padded, dim, ld, s->k + static_cast<int64_t>(offset) * ld);
    pack_rows(v, n, padded, dim_v, ld_v, s->v + static_cast<int64_t>(offset) * ld_v);
    const int64_t panels = static_cast<int64_t>(words<Word>(offset)) * round_up(dim, kPanel);
    s->k_finite &= pack_panels(k, n, kTileKeys, dim, s->k_panels + panels);
  }

  // Q and dO of a tile of query rows.
  template <class Rows>
  FAL_INLINE static void pack_queries(const Rows& q, const Rows& dout, int n,
                                      const ForwardProblem& f, Scratch* s) {
    const int dim = f.shape.head_dim, dim_v = f.shape.head_dim_v;
    fal::cpu::FAL_CPU_ISA::pack_queries(q, n, f, s->q_transposed);
    pack_gradients(dout, n, dim_v, s->dout_transposed);
    s->q_finite = pack_panels(q, n, kTileRows, dim, s->q_panels);
    s->dout_finite = pack_panels(dout, n, kTileRows, dim_v, s->dout_panels);
  }

  FAL_INLINE static void tile(const BackwardTile& t, const Scratch& s, Range keys, int offset,
                              bool partial, bool first) {
    backward_tile(t, s, keys, offset, partial, first);
  }
};

template <class Product, class T>
static void backward_item(const void* arg, int64_t item, char* memory) {
  const BackwardPlan& plan = *static_cast<const BackwardPlan*>(arg);
  const BackwardProblem& p = plan.problem;
  const ForwardProblem& f = p.forward;
  const Shape& shape = f.shape;
  const int64_t heads = static_cast<int64_t>(shape.batch) * shape.heads_k, index = item / heads;
  const int b = static_cast<int>(item % heads / shape.heads_k);
  const int head_k = static_cast<int>(item % heads % shape.heads_k);
  const Sequence seq = f.lengths.sequence(b);
  const int64_t begin = index * plan.block_keys;
  if (begin >= seq.seqlen_k) return;
  const Range block{static_cast<int32_t>(begin),
                    min_int(static_cast<int32_t>(begin) + plan.block_keys, seq.seqlen_k)};
  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, f.window);

  ScratchCursor cursor{memory};
  typename Product::Scratch s =
      Product::Scratch::place(&cursor, p, plan.scratch_keys, plan.tile_rows);
  const int dim = shape.head_dim, dim_v = shape.head_dim_v;
  const int ld = round_up(dim, kPanel), ld_v = round_up(dim_v, kPanel);
  const int rows_k = plan.scratch_offset(block.size() - 1) + 1;  // not whole tiles: 36 KiB a head
  memset(s.dk, 0, sizeof(float) * rows_k * ld);
  memset(s.dv, 0, sizeof(float) * rows_k * ld_v);
  const ContiguousKv<T> kv = ContiguousKv<T>::make(f.kv, seq, b, head_k);
  const bool general = modifies_scores(f.score);

  bool packed = false;
  const int group = shape.heads_q / shape.heads_k;
  for (int h = head_k * group; h < (head_k + 1) * group; ++h) {
    HeadMask mask{};
    if (f.block_mask.given()) mask = HeadMask::make(f.block_mask, b, h, band);
    const HeadMask* given = f.block_mask.given() ? &mask : nullptr;
    TilesOfKeys tiles = TilesOfKeys::make(band, given, block, plan.tile_rows);
    for (Tile tile; tiles.next(&tile);) {
      if (!packed) {
        packed = true;
        for (int j = 0; j < block.size(); j += plan.tile_keys) {
          const int n = min_int(plan.tile_keys, block.size() - j);
          const StridedRows<T> k_rows{kv.k_row(block.begin + j), kv.k_stride};
          const StridedRows<T> v_rows{kv.v_row(block.begin + j), kv.v_stride};
          Product::pack_keys(k_rows, v_rows, n, dim, dim_v, plan.scratch_offset(j),
                             plan.scratch_keys, &s);
        }
      }
      const Range rows = tile.range;
      const StridedRows<T> q{f.q.as<T>().at(b, seq.row_q + rows.begin, h), f.q.row};
      const StridedRows<T> dout{p.dout.as<T>().at(b, seq.row_q + rows.begin, h), p.dout.row};
      Product::pack_queries(q, dout, rows.size(), f, &s);
      const int64_t stat = plan.stat_index(b, h, rows.begin);
      const BackwardTile t{
          &plan,
          band,
          given,
          rows,
          block,
          b,
          h,
          general,
          {GeneralScoreMod::make(f.score, b, h, band.shift()), f.score.scale, s.bias},
          {f.score.dropout_seed, f.score.dropout_threshold},
          plan.lse + stat,
          plan.delta + stat,
          plan.sums_delta(seq)};
      bool first = true;
      for (int j = 0; j < block.size(); j += plan.tile_keys) {
        const Range keys{block.begin + j, min_int(block.begin + j + plan.tile_keys, block.end)};
        const TileKind kind = given ? mask.classify(band, rows, keys) : band.classify(rows, keys);
        if (kind == TileKind::kSkip) continue;
        Product::tile(t, s, keys, plan.scratch_offset(j), kind == TileKind::kPartial, first);
        first = false;
      }
      add_dq<T>(t, seq, s.dq, index, plan.turn + plan.row_item(b, h, rows.begin / plan.tile_rows));
    }
  }
  store_key_block<T>(plan, s.dk, s.dv, seq, b, head_k, block);
}

template <class T, class Product>
static void backward_with(const BackwardProblem& problem, const ThreadPool& pool) {
  BackwardPlan plan = BackwardPlan::make<Product>(problem);
  void* memory = allocate_shared(plan.place_shared(nullptr));
  plan.place_shared(static_cast<char*>(memory));
  memset(plan.turn, 0, sizeof(int32_t) * plan.row_items());
  ScratchCursor size{nullptr};
  Product::Scratch::place(&size, problem, plan.scratch_keys, plan.tile_rows);
  try {
    run_items(pool, plan.row_items() + 1, plan.flops, 0, &backward_row_item<T>, &plan);
    run_items(pool, plan.key_items(), plan.flops, size.used, &backward_item<Product, T>, &plan);
  } catch (...) {
    free_shared(memory);
    throw;
  }
  reduce_sinks(plan);
  free_shared(memory);
}

[[maybe_unused]] static void backward(const BackwardProblem& problem, const ThreadPool& pool) {
  dispatch_element(problem.forward.shape.dtype, [&](auto element) {
    backward_with<decltype(element), VectorBackward<float>>(problem, pool);
  });
}

}  // namespace fal::cpu::FAL_CPU_ISA
