// Attention of a few query rows over many keys: FlashAttention-2's decoding with split keys
// ("Flash-Decoding"). Bound by reading K/V, so the query rows of all heads that share a K/V head
// (and of the few tokens of a speculative step) are folded into one tile, and all heads of a tile
// of keys are walked together: each element of K and V is loaded and converted once, in the order
// of memory.
//
// An item is some heads of one part of the keys of one batch entry. Parts depend on the number of
// visible keys alone, never on threads or on the rest of the batch, whoever finishes a sequence's
// last part merges them in order, and how heads are gathered changes nothing: results are the same
// bits for any number of threads and any batch around a sequence.
#pragma once

#include "../core/online_softmax.h"
#include "decode_plan.h"
#include "parallel.h"
#include "score_panel.h"

namespace fal::cpu::FAL_CPU_ISA {

// What modifies each column's scores, repeated up to whole vectors.
static FAL_NOINLINE void fill_columns(const DecodeItem& item, const DecodeScratch& s) {
  const int columns = item.columns();
  for (int at = 0; at < item.passes * item.column_ld(); ++at) {
    const int c = at % item.column_ld() % columns, h = c / item.m;
    const int r = at / item.column_ld() * item.m + c % item.m;
    const bool real = r < item.rows;
    s.position[at] = real ? item.token(r) + item.band.shift() : 0;
    s.slope[at] = real ? item.plan.problem.score.alibi_slope(item.b, item.head_q(h, r)) : 0.f;
  }
}

// What each column sees of a tile: bit t is key tile.begin + t. Repeated up to whole vectors.
static FAL_NOINLINE void fill_visible(const DecodeItem& item, const DecodeScratch& s, Range tile) {
  const int columns = item.columns();
  int token = -1;
  uint32_t word = 0;
  for (int r = 0; r < item.passes * item.m; ++r) {
    if (r >= item.rows) {
      word = 0;
    } else if (item.token(r) != token) {
      token = item.token(r);
      const Range seen = intersect(item.band.keys_of(token), tile);
      word = low_bits(seen.end - tile.begin) & ~low_bits(seen.begin - tile.begin);
      if (item.mask) word &= item.mask->visible_word(token, tile.begin);
    }
    int32_t* pass = s.visible + r / item.m * item.column_ld() + r % item.m;
    for (int at = 0; at < columns; at += item.m) pass[at] = static_cast<int32_t>(word);
  }
  for (int pass = 0; pass < item.passes; ++pass) {
    int32_t* visible = s.visible + pass * item.column_ld();
    for (int at = columns; at < item.column_ld(); ++at) visible[at] = visible[at - columns];
  }
}

// From products to softmax arguments in base 2, the twin of modify_panel().
static FAL_NOINLINE void decode_modify(const DecodeItem& item, const DecodeScratch& s, int pass,
                                       int begin, int n, float* scores) {
  const ScoreOptions& score = item.plan.problem.score;
  const Bias& bias = score.bias;
  const int columns = item.columns(), shift = item.column_shift();
  for (int at = 0; at < n * columns; at += kLanes) {
    const int c = at & (item.column_ld() - 1), lanes = pass * item.column_ld() + c;
    const Int key = (iota() >> shift) + (begin + (at >> shift));
    Float x = load(scores + at) * score.scale;
    if (score.softcap > 0.f) x = tanh(x * (1.f / score.softcap)) * score.softcap;
    if (bias.data) {
      float values[kLanes] = {};
      dispatch_element(bias.dtype, [&](auto element) {
        const auto* data = static_cast<const decltype(element)*>(bias.data) + item.b * bias.batch;
        for (int l = 0; l < kLanes; ++l) {
          const int column = (c + l) & (columns - 1), j = key[l];
          const int r = pass * item.m + column % item.m;
          if (r >= item.rows || j >= begin + n) continue;
          values[l] = load_one(data + item.head_q(column / item.m, r) * bias.head +
                               item.token(r) * bias.row + j * bias.col);
        }
      });
      x += load(values);
    }
    x -= abs(to_float(load(s.position + lanes) - key)) * load(s.slope + lanes);
    store(scores + at, select(less(key, set1(begin + n)), x * kLog2E, set1(-FAL_INFINITY)));
  }
}

FAL_INLINE void decode_mask(const DecodeItem& item, const DecodeScratch& s, int pass, int n,
                            float* scores) {
  const int columns = item.columns(), shift = item.column_shift();
  for (int at = 0; at < n * columns; at += kLanes) {
    const int lanes = pass * item.column_ld() + (at & (item.column_ld() - 1));
    const Int visible = (load(s.visible + lanes) >> ((iota() >> shift) + (at >> shift))) & 1;
    store(scores + at, select(less(set1(0), visible), load(scores + at), set1(-FAL_INFINITY)));
  }
}

// A tile of keys.
template <class E>
struct DecodeTile {
  DecodeKeys<E> keys;
  Range range;
  bool full;  // all rows see all of it

  FAL_INLINE void fetch(const DecodeItem& item, const KvRuns& runs, int begin, int end) {
    int n = min_int(kDecodeKeys, end - begin);
    // Of one block, so that no row of a block that nobody sees is touched.
    if (item.mask) n = min_int(n, item.mask->block_k - begin % item.mask->block_k);
    range = {begin, begin + n};
    const Range all = item.band.keys_of_all(item.tokens());
    full = all.begin <= range.begin && range.end <= all.end &&
           (!item.mask || item.mask->all_full(item.tokens(), range));
    keys.fetch(runs, item.heads, begin, n);
  }
};

// Is V read in memory's order, as K is? O then passes through L1 for every key, while head by head
// it stays in registers: that pays for one query row a head, if there are enough heads for a row of
// O to have arrived when the next key wants it. What comes from memory in short pieces is faster
// head by head, which asks for V ahead.
template <class E, int M>
FAL_INLINE bool streams(const DecodeItem& item) {
  return M == 1 && !DecodeKeys<E>::kQuantised && item.heads.count >= kDecodeStreamHeads &&
         !item.plan.in_pieces;
}

// S = K Q^T of a tile. Where V is to be read a head at a time, it is prefetched meanwhile.
template <class E, int M>
static FAL_NOINLINE void decode_tile_scores(const DecodeItem& item, const DecodeScratch& s,
                                            const DecodeTile<E>& tile) {
  using Product = DecodeProduct<E>;
  const DecodePlan& plan = item.plan;
  const int dims = plan.problem.shape.head_dim, dims_v = plan.problem.shape.head_dim_v;
  const int q_ld = round_up(dims, Product::kStep), columns = item.columns();
  // Unless it is in Q; decode_modify() applies it to the scores that it modifies.
  const float scale = plan.general ? 1.f : plan.problem.score.scale * kLog2E;
  const bool prefetch = plan.from_memory && !streams<E, M>(item);
  // Of 16-bit rows from memory without loops, prefetches come faster than they are taken.
  const int known = dims != dims_v || (sizeof(E) == 2 && prefetch) ? 0 : dims;
  for (int pass = 0; pass < item.passes; ++pass) {
    const auto* q = reinterpret_cast<const typename Product::Query*>(s.q) +
                    static_cast<int64_t>(pass) * columns * q_ld;
    with_known_dims(known, [&](auto d) {
      decode_scores<E, M, decltype(d)::value>(tile.keys, item.heads, q, q_ld, dims, dims_v,
                                              prefetch && pass == 0, scale,
                                              s.scores + pass * kDecodeKeys * columns);
    });
  }
}

// O += P V of a tile.
template <class E, int M>
static FAL_NOINLINE void decode_tile_values(const DecodeItem& item, const DecodeScratch& s,
                                            const DecodeState& state, const DecodeTile<E>& tile) {
  const DecodePlan& plan = item.plan;
  const int dims = plan.problem.shape.head_dim_v, ld = plan.out_ld, columns = item.columns();
  for (int pass = 0; pass < item.passes; ++pass) {
    float* out = state.out + static_cast<int64_t>(pass) * columns * ld;
    const float* p = s.scores + pass * kDecodeKeys * columns;
    const int lanes = pass * item.column_ld();
    decode_shrink(s.alpha + lanes, columns, out, ld);
    if (!tile.full) {
      decode_values_exactly<E, M>(tile.keys, item.heads, s.visible + lanes, p, dims, out, ld);
    } else if (!streams<E, M>(item)) {
      decode_values<E, M>(tile.keys, item.heads, p, dims, out, ld);
    } else {
      with_known_dims(dims, [&](auto d) {
        decode_values_in_order<E, decltype(d)::value>(tile.keys, item.heads, p, dims, out, ld);
      });
    }
  }
}

// From a tile's products to probabilities.
template <class E, int M>
static FAL_NOINLINE void decode_probabilities(const DecodeItem& item, const DecodeScratch& s,
                                              const DecodeState& state, const DecodeTile<E>& tile) {
  const int columns = item.columns(), n = tile.range.size();
  if (!tile.full) fill_visible(item, s, tile.range);
  for (int pass = 0; pass < item.passes; ++pass) {
    float* scores = s.scores + pass * kDecodeKeys * columns;
    const int lanes = pass * item.column_ld();
    hide_rest(n, columns, scores);
    if (item.plan.general) decode_modify(item, s, pass, tile.range.begin, n, scores);
    if (!tile.full) decode_mask(item, s, pass, n, scores);
    decode_softmax<DecodeKeys<E>::kQuantised>(tile.keys.v_scale, columns, __builtin_ctz(M), scores,
                                              state.max + lanes, state.sum + lanes,
                                              s.alpha + lanes);
  }
}

// All rows of the item's heads against the keys of one part.
template <class E, int M>
static FAL_NOINLINE void decode_part(const DecodeItem& item, const DecodeScratch& s,
                                     const DecodeState& state, const KvRuns& runs, Range keys) {
  const DecodePlan& plan = item.plan;
  const Shape& shape = plan.problem.shape;
  const int lanes = item.passes * item.column_ld();
  for (int at = 0; at < lanes; at += kLanes) {
    store(state.max + at, set1(-FAL_INFINITY));
    store(state.sum + at, set1(0.f));
  }
  memset(state.out, 0, sizeof(float) * item.passes * item.columns() * plan.out_ld);
  if (plan.general) fill_columns(item, s);

  DecodeTile<E> tile;
  for (int begin = item.next_key(keys.begin, keys.end); begin < keys.end;) {
    tile.fetch(item, runs, begin, keys.end);
    begin = item.next_key(tile.range.end, keys.end);
    if (plan.from_memory && begin < keys.end) {
      prefetch_pages_of_tile<E>(runs, item.heads, begin, shape.head_dim, shape.head_dim_v);
    }
    decode_tile_scores<E, M>(item, s, tile);
    decode_probabilities<E, M>(item, s, state, tile);
    if (plan.from_memory && !streams<E, M>(item) && begin < keys.end) {
      prefetch_first_rows<E>(runs, item.heads, begin, shape.head_dim);
    }
    decode_tile_values<E, M>(item, s, state, tile);
  }
}

// Adds the next part's state to the first's.
static FAL_NOINLINE void merge_part(const DecodeItem& item, const DecodeState& into,
                                    const DecodeState& part) {
  const int columns = item.columns(), ld = item.plan.out_ld;
  for (int at = 0; at < item.passes * columns; ++at) {
    const int c = at / columns * item.column_ld() + at % columns;
    const float top = part.max[c] > into.max[c] ? part.max[c] : into.max[c];
    const float reference = softmax_reference(top);
    const float a = exp2(set1(into.max[c] - reference))[0];
    const float b = exp2(set1(part.max[c] - reference))[0];
    into.max[c] = top;
    into.sum[c] = into.sum[c] * a + part.sum[c] * b;
    float* out = into.out + static_cast<int64_t>(at) * ld;
    const float* more = part.out + static_cast<int64_t>(at) * ld;
    for (int d = 0; d < ld; d += kLanes) {
      store(out + d, fma(load(more + d), set1(b), load(out + d) * set1(a)));
    }
  }
}

// One row of Q; what lies behind it is zeros already.
template <class T>
FAL_INLINE void load_query(const T* row, int dims, float scale, float* to) {
  for (int d = 0; d < dims; d += kLanes) store(to + d, load_dims(row, d, dims) * scale);
}
FAL_INLINE void load_query(const BFloat16* row, int dims, float, BFloat16* to) {
  memcpy(to, row, sizeof *to * dims);
}

// [pass][column][dim], scaled if the product wants it so; rows that do not exist are zeros.
template <class T, class Product>
static void load_queries(const DecodeItem& item, float* memory) {
  auto* q = reinterpret_cast<typename Product::Query*>(memory);
  const ForwardProblem& p = item.plan.problem;
  const int dims = p.shape.head_dim, ld = round_up(dims, Product::kStep);
  const float scale = item.plan.general ? 1.f : p.score.scale * kLog2E;
  const View<const T> view = p.q.as<const T>();
  for (int h = 0; h < item.heads.count; ++h) {
    for (int r = 0; r < item.passes * item.m; ++r) {
      auto* to =
          q + (static_cast<int64_t>(r / item.m) * item.columns() + h * item.m + r % item.m) * ld;
      memset(to, 0, sizeof *to * ld);  // 0 times what is not a number is none either
      if (r >= item.rows) continue;
      const T* row = view.at(item.b, item.seq.row_q + item.token(r), item.head_q(h, r));
      load_query(row, dims, scale, to);
    }
  }
}

// Normalises the item's rows and clears the tokens that belong to no sequence.
template <class T>
static void finish_rows(const DecodeItem& item, const DecodeState& state) {
  const ForwardProblem& p = item.plan.problem;
  for (int h = 0; h < item.heads.count; ++h) {
    for (int r = 0; r < p.lengths.allocated_q(item.b) * item.plan.group; ++r) {
      const int head = item.head_q(h, r);
      const int64_t row = item.seq.row_q + item.token(r);
      T* out = p.out.as<T>().at(item.b, row, head);
      if (r >= item.rows) {
        zero_row(out, p.shape.head_dim_v);
        if (p.lse.data) *p.lse.at(item.b, head, row) = -FAL_INFINITY;
        continue;
      }
      const int pass = r / item.m, column = h * item.m + r % item.m;
      const int c = pass * item.column_ld() + column;
      SoftmaxState softmax{state.max[c] * kLn2, state.sum[c]};
      float factor = 1.f;
      if (p.score.sinks) factor = softmax.absorb_sink(p.score.sinks[head]);
      store_row(out,
                state.out + static_cast<int64_t>(pass * item.columns() + column) * item.plan.out_ld,
                p.shape.head_dim_v, factor * softmax.inverse_sum());
      if (p.lse.data) *p.lse.at(item.b, head, row) = softmax.lse();
    }
  }
}

// T: of q and out; E: of K and V as stored.
template <class T, class E>
static void decode_item(const void* arg, int64_t index, char* memory) {
  const DecodePlan& plan = *static_cast<const DecodePlan*>(arg);
  const ForwardProblem& p = plan.problem;
  int b = 0;
  for (int end = p.shape.batch; end - b > 1;) {
    const int middle = (b + end) / 2;
    (plan.first_item[middle] <= index ? b : end) = middle;
  }
  const Sequence seq = p.lengths.sequence(b);
  const DecodeCut cut = plan.cut(seq);
  const int64_t within = index - plan.first_item[b];
  // Heads of the same keys follow each other: their rows share memory pages.
  const int part = static_cast<int>(within / cut.items), i = static_cast<int>(within % cut.items);
  const Range heads = cut.heads(p.shape.heads_k, i);
  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, p.window);
  HeadMask mask{};
  if (p.block_mask.given()) mask = HeadMask::make(p.block_mask, b, 0, band);
  const DecodeItem item{plan,
                        seq,
                        band,
                        p.block_mask.given() ? &mask : nullptr,
                        b,
                        cut.rows,
                        cut.m,
                        cut.passes,
                        {heads.begin, heads.size(), p.kv.k.head, p.kv.v.head}};

  ScratchCursor cursor{memory};
  const DecodeScratch s = DecodeScratch::place(&cursor, plan);
  const auto state_of = [&](int other) {
    const int64_t at = plan.first_item[b] + static_cast<int64_t>(other) * cut.items + i;
    return DecodeState::at(plan.partial + at * plan.partial_size(), plan);
  };
  const DecodeState state = cut.parts > 1 ? state_of(part) : DecodeState::at(s.state, plan);
  // Of the parts that a block mask hides, the first is empty and the others are passed over.
  const auto sees = [&](int other) {
    const Range keys = cut.keys(other);
    return item.next_key(keys.begin, keys.end) < keys.end;
  };
  if (part == 0 || sees(part)) {
    load_queries<T, DecodeProduct<E>>(item, s.q);
    const KvRuns runs = KvRuns::make(p.kv, seq, b, heads.begin);
    const auto run = [&](auto m) {
      decode_part<E, decltype(m)::value>(item, s, state, runs, cut.keys(part));
    };
    if (cut.m == 1) {
      run(std::integral_constant<int, 1>{});
    } else if (cut.m == 2) {
      run(std::integral_constant<int, 2>{});
    } else if (cut.m == 4 || kDecodeGroup == 4) {
      run(std::integral_constant<int, 4>{});
    } else {
      run(std::integral_constant<int, kDecodeGroup>{});
    }
  }
  if (cut.parts > 1) {
    int32_t* left = plan.parts_left + static_cast<int64_t>(b) * p.shape.heads_k + i;
    if (__atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL) != 0) return;
    for (int other = 1; other < cut.parts; ++other) {
      if (sees(other)) merge_part(item, state_of(0), state_of(other));
    }
  }
  finish_rows<T>(item, cut.parts > 1 ? state_of(0) : state);
}

// Heads of an item: all that a tile's columns hold, unless their rows lie further apart than the
// keys' (then there is nothing to gain), or threads would wait for the last items: reading rows in
// the order of memory is worth more than items to spare.
FAL_INLINE int heads_of_item(const ForwardProblem& p, int64_t parts, int threads) {
  int heads = 1;
  if (p.kv.k.head > p.kv.k.row || p.kv.v.head > p.kv.v.row) return heads;
  while (2 * heads <= p.shape.heads_k && heads < kDecodeColumns) heads *= 2;
  const auto busy = [&] {  // the threads, for 6 / 7 of the time at least
    const int64_t items = parts * ceil_div(p.shape.heads_k, heads);
    return 7 * items >= 6 * threads * ((items + threads - 1) / threads);
  };
  while (heads > 1 && !busy()) heads /= 2;
  return heads;
}

// Is a tile's K so short, or a key's row cut, that the processor's prefetchers start too often? Of
// 16 bits the arithmetic takes less of the time, and the starts more. A contiguous cache is judged
// as one of pages, which should not be much slower: docs/kernels/decode.md, Limits.
FAL_INLINE bool in_pieces(const ForwardProblem& p, int most_heads, int64_t element_bytes) {
  const int64_t enough = element_bytes > 2 ? 16 << 10 : 64 << 10;
  const int keys =
      p.kv.pages.block_table ? min_int(p.kv.pages.page_size, kDecodeKeys) : kDecodeKeys;
  const int64_t bytes = keys * element_bytes * p.shape.heads_k * p.shape.head_dim;
  return most_heads < p.shape.heads_k || bytes < enough;
}

template <class T, bool kReadsQuantised>
static void decode(const ForwardProblem& problem, const ThreadPool& pool) {
  const Shape& shape = problem.shape;
  DecodePlan plan{};
  plan.problem = problem;
  plan.group = shape.heads_k ? shape.heads_q / shape.heads_k : 0;
  plan.out_ld = round_up(shape.head_dim_v, kLanes);
  plan.general = modifies_scores(problem.score);
  plan.most_heads = 1;

  // The number of parts of batch entry b; 0 = it is not for this kernel.
  const auto decoding = [&](int b, DecodeCut* cut) {
    const Sequence seq = problem.lengths.sequence(b);
    if (!decodes(problem, seq.seqlen_q)) return false;
    *cut = plan.cut(seq);
    return true;
  };
  DecodeCut cut{};
  int64_t parts = 0;
  for (int b = 0; b < shape.batch; ++b) parts += decoding(b, &cut) ? cut.parts : 0;
  if (parts == 0) return;
  plan.most_heads = heads_of_item(problem, parts, pool.threads);

  int most_parts = 1;
  int64_t items = 0;
  double flops = 0;
  int64_t keys = 0;
  for (int b = 0; b < shape.batch; ++b) {
    if (!decoding(b, &cut)) continue;
    most_parts = max_int(most_parts, cut.parts);
    const int columns = cut.m * cut.most_heads;
    plan.columns = max_int(plan.columns, cut.passes * columns);
    plan.lanes = max_int(plan.lanes, cut.passes * max_int(columns, kLanes));
    items += static_cast<int64_t>(cut.parts) * cut.items;
    keys += cut.seen.size();
    flops += 2.0 * shape.heads_k * (shape.head_dim + shape.head_dim_v) * cut.rows *
             (cut.seen.size() + 1.0);
  }

  const int64_t counters = static_cast<int64_t>(shape.batch) * shape.heads_k;
  ScratchCursor size{nullptr};
  const auto place = [&](ScratchCursor* cursor) {
    plan.first_item = cursor->take<int64_t>(shape.batch + 1);
    plan.parts_left = cursor->take<int32_t>(counters);
    plan.partial = cursor->take<float>(most_parts > 1 ? items * plan.partial_size() : 0);
  };
  place(&size);
  ScratchCursor shared{static_cast<char*>(allocate_shared(size.used))};
  place(&shared);
  plan.first_item[0] = 0;
  for (int b = 0; b < shape.batch; ++b) {
    const bool here = decoding(b, &cut);
    plan.first_item[b + 1] =
        plan.first_item[b] + (here ? static_cast<int64_t>(cut.parts) * cut.items : 0);
    for (int i = 0; here && i < cut.items; ++i) plan.parts_left[b * shape.heads_k + i] = cut.parts;
  }
  ScratchCursor scratch{nullptr};
  DecodeScratch::place(&scratch, plan);
  const auto run = [&](auto stored) {
    const int64_t key_dims =
        static_cast<int64_t>(shape.heads_k) * (shape.head_dim + shape.head_dim_v);
    constexpr int64_t bytes = sizeof stored;
    plan.from_memory = keys * key_dims * bytes > kDecodeCacheBytes;
    plan.in_pieces = plan.from_memory && in_pieces(problem, plan.most_heads, bytes);
    run_items(pool, items, flops, scratch.used, &decode_item<T, decltype(stored)>, &plan);
  };
  try {
    if (problem.kv.dtype == problem.shape.dtype) {
      run(T{});
    } else if constexpr (kReadsQuantised) {
      if (problem.kv.dtype == DType::kInt8) run(Int8{});
      if (problem.kv.dtype == DType::kFloat8E4M3) run(Float8E4M3{});
    }
  } catch (...) {
    free_shared(shared.base);
    throw;
  }
  free_shared(shared.base);
}

}  // namespace fal::cpu::FAL_CPU_ISA
