// Attention of a few query rows over many keys: FlashAttention-2's decoding with split keys
// ("Flash-Decoding"). Bound by reading K/V, so the query rows of all heads that share a K/V head
// (and of the few tokens of a speculative step) are folded into one tile: each element of K and V
// is loaded and converted once.
//
// An item is one part of the keys of one (batch entry, K/V head). Parts depend on the number of
// visible keys alone, never on threads or on the rest of the batch, and whoever finishes a
// sequence's last part merges them in order: results are the same bits for any number of threads
// and any batch around a sequence.
#pragma once

#include "../core/online_softmax.h"
#include "decode_tile.h"
#include "parallel.h"
#include "score_panel.h"
#include "scratch.h"

namespace fal::cpu::FAL_CPU_ISA {

// Sequences of at most so many query tokens, and rows with their group folded in, decode; for more
// the prefill path's register tiles win.
constexpr int kDecodeTokens = 8, kDecodeRows = 32;
constexpr int kDecodePart = 512;  // keys of a part, at least: a part's set-up is then under 2 %
constexpr int kDecodeParts = 64;  // of one sequence, at most

// By the tokens in use, so that padding a sequence does not change its bits.
FAL_INLINE bool decodes(const ForwardProblem& p, int64_t seqlen_q) {
  if (p.score.dropout_threshold || p.block_mask.given() || p.shape.heads_k == 0) return false;
  const int group = p.shape.heads_q / p.shape.heads_k;
  return seqlen_q >= 1 && seqlen_q <= kDecodeTokens && seqlen_q * group <= kDecodeRows;
}

struct DecodeParts {
  Range seen;  // keys that some row sees
  int size, count;

  FAL_INLINE static DecodeParts make(const ForwardProblem& p, const Sequence& seq) {
    if (seq.seqlen_q < 1) return {{0, 0}, kDecodePart, 1};
    const Range seen =
        Band::make(seq.seqlen_q, seq.seqlen_k, p.window).keys_of_any({0, seq.seqlen_q});
    const int keys = seen.size();
    const int size = max_int(kDecodePart, round_up(ceil_div(keys, kDecodeParts), kDecodeKeys));
    return {seen, size, max_int(1, ceil_div(keys, size))};
  }
};

struct DecodePlan {
  ForwardProblem problem;
  int group, rows;  // query heads of a K/V head; most rows of an item, in whole groups
  int out_ld;
  bool general;         // a score modification is on
  int64_t* first_item;  // (batch + 1)
  int32_t* parts_left;  // (batch, heads_k)
  float* partial;       // (items, partial_size()): max, sum [rows], out [rows][out_ld]
  FAL_INLINE int64_t partial_size() const { return static_cast<int64_t>(rows) * (2 + out_ld); }
};

// The state of an item's rows: maximum (base 2), sum and unnormalised output.
struct DecodeState {
  float *max, *sum, *out;

  FAL_INLINE static DecodeState at(float* memory, int rows) {
    return {memory, memory + rows, memory + 2 * rows};
  }
};

struct DecodeScratch {
  float *q, *scores, *state;

  FAL_INLINE static DecodeScratch place(ScratchCursor* cursor, const DecodePlan& plan) {
    DecodeScratch s;
    s.q = cursor->take<float>(plan.rows * round_up(plan.problem.shape.head_dim, kLanes));
    s.scores = cursor->take<float>((kDecodeKeys + kLanes) * kDecodeGroup);
    s.state = cursor->take<float>(plan.partial_size());
    return s;
  }
};

// M of the rows, and the options as their lanes use them. Row r is query token r / group of head
// r % group.
template <int M>
struct DecodeLanes {
  Int begin, end;  // keys that the row sees
  Int position;    // i + shift, where ALiBi's distance is 0
  Float slope;
  Range seen[M];

  FAL_INLINE static DecodeLanes make(const DecodePlan& plan, const Band& band, int b, int hk,
                                     int first_row, int rows) {
    DecodeLanes lanes{};
    for (int i = 0; i < M; ++i) {
      const int row = first_row + i, token = row / plan.group;
      const bool real = row < rows;
      lanes.seen[i] = real ? band.keys_of(token) : Range{0, 0};
      const float slope =
          real ? plan.problem.score.alibi_slope(b, hk * plan.group + row % plan.group) : 0.f;
      for (int l = i; l < kLanes; l += M) {
        lanes.begin[l] = lanes.seen[i].begin;
        lanes.end[l] = lanes.seen[i].end;
        lanes.position[l] = token + band.shift();
        lanes.slope[l] = slope;
      }
    }
    return lanes;
  }
};

// From products to softmax arguments in base 2, the twin of modify_panel().
template <int M>
FAL_INLINE void decode_modify(const DecodePlan& plan, const DecodeLanes<M>& lanes, int b, int hk,
                              int first_row, int rows, int begin, int n, float* scores) {
  const ScoreOptions& score = plan.problem.score;
  const Bias& bias = score.bias;
  for (int r = 0; r < n; r += kLanes / M) {
    const Int key = lane_key<M>() + (begin + r);
    Float x = load(scores + r * M) * score.scale;
    if (score.softcap > 0.f) x = tanh(x * (1.f / score.softcap)) * score.softcap;
    if (bias.data) {
      float values[kLanes] = {};
      dispatch_element(bias.dtype, [&](auto element) {
        const auto* data = static_cast<const decltype(element)*>(bias.data) + b * bias.batch;
        for (int l = 0; l < kLanes; ++l) {
          const int row = first_row + l % M, j = begin + r + l / M;
          if (row >= rows || r + l / M >= n) continue;
          const int64_t head = hk * plan.group + row % plan.group;
          values[l] =
              load_one(data + head * bias.head + row / plan.group * bias.row + j * bias.col);
        }
      });
      x += load(values);
    }
    x -= abs(to_float(lanes.position - key)) * lanes.slope;
    store(scores + r * M, select(less(key, set1(begin + n)), x * kLog2E, set1(-FAL_INFINITY)));
  }
}

// All rows against the keys of one part.
template <class E, int M>
static FAL_NOINLINE void decode_part(const DecodePlan& plan, const DecodeScratch& s,
                                     const DecodeState& state, const Band& band, const KvRuns& runs,
                                     int b, int hk, int rows, Range keys) {
  const Shape& shape = plan.problem.shape;
  const int q_ld = round_up(shape.head_dim, kLanes);
  const int groups = ceil_div(rows, M);
  float max_lanes[kDecodeRows][kLanes], sum_lanes[kDecodeRows][kLanes], alpha[kLanes];
  for (int g = 0; g < groups; ++g) {
    store(max_lanes[g], set1(-FAL_INFINITY));
    store(sum_lanes[g], set1(0.f));
  }
  memset(state.out, 0, sizeof(float) * plan.rows * plan.out_ld);
  const Range all = band.keys_of_all({0, band.seqlen_q});

  DecodeRows<E> tiles[2];
  int n = min_int(kDecodeKeys, keys.size());
  if (n > 0) tiles[0].fetch(runs, keys.begin, n);
  for (int begin = keys.begin, turn = 0; begin < keys.end; turn ^= 1) {
    const DecodeRows<E>& tile = tiles[turn];
    const int next_n = min_int(kDecodeKeys, keys.end - begin - n);
    if (next_n > 0) tiles[turn ^ 1].fetch(runs, begin + n, next_n);
    const bool full = all.begin <= begin && begin + n <= all.end;
    for (int g = 0; g < groups; ++g) {
      const float* q = s.q + g * M * q_ld;
      if (g == 0) {
        decode_scores<E, M, true>(tile, n, q, q_ld, shape.head_dim, shape.head_dim_v, s.scores);
      } else {
        decode_scores<E, M, false>(tile, n, q, q_ld, shape.head_dim, shape.head_dim_v, s.scores);
      }
      DecodeLanes<M> lanes;
      if (plan.general || !full) lanes = DecodeLanes<M>::make(plan, band, b, hk, g * M, rows);
      if (plan.general) decode_modify<M>(plan, lanes, b, hk, g * M, rows, begin, n, s.scores);
      if (!full) {
        for (int r = 0; r < n; r += kLanes / M) {
          const Int key = lane_key<M>() + (begin + r);
          const Mask visible = less_equal(lanes.begin, key) & less(key, lanes.end);
          float* at = s.scores + r * M;
          store(at, select(visible, load(at), set1(-FAL_INFINITY)));
        }
      }
      decode_softmax<E, M>(tile, n, s.scores, max_lanes[g], sum_lanes[g], alpha);
      float* out = state.out + static_cast<int64_t>(g) * M * plan.out_ld;
      if (full) {
        decode_values<E, M>(tile, n, s.scores, alpha, shape.head_dim_v, out, plan.out_ld,
                            g == 0 && next_n > 0 ? &tiles[turn ^ 1] : nullptr, next_n,
                            shape.head_dim);
      } else {
        Range seen[M];
        for (int i = 0; i < M; ++i) {
          const Range visible = intersect(lanes.seen[i], {begin, begin + n});
          seen[i] =
              visible.empty() ? Range{0, 0} : Range{visible.begin - begin, visible.end - begin};
        }
        decode_values_exactly<E, M>(tile, seen, s.scores, alpha, shape.head_dim_v, out,
                                    plan.out_ld);
      }
    }
    begin += n;
    n = next_n;
  }
  for (int r = 0; r < rows; ++r) {
    state.max[r] = max_lanes[r / M][r % M];
    float total = 0.f;
    for (int l = r % M; l < kLanes; l += M) total += sum_lanes[r / M][l];
    state.sum[r] = total;
  }
}

// Adds the next part's state to the first's.
static FAL_NOINLINE void merge_part(const DecodeState& into, const DecodeState& part, int rows,
                                    int ld) {
  for (int r = 0; r < rows; ++r) {
    const float top = part.max[r] > into.max[r] ? part.max[r] : into.max[r];
    const float reference = softmax_reference(top);
    const float a = exp2(set1(into.max[r] - reference))[0];
    const float b = exp2(set1(part.max[r] - reference))[0];
    into.max[r] = top;
    into.sum[r] = into.sum[r] * a + part.sum[r] * b;
    for (int d = 0; d < ld; d += kLanes) {
      float* out = into.out + static_cast<int64_t>(r) * ld + d;
      store(out,
            fma(load(part.out + static_cast<int64_t>(r) * ld + d), set1(b), load(out) * set1(a)));
    }
  }
}

template <class T>
static void load_queries(const DecodePlan& plan, const Sequence& seq, int b, int hk, int rows,
                         float* q) {
  const ForwardProblem& p = plan.problem;
  const int dims = p.shape.head_dim, ld = round_up(dims, kLanes);
  const Float scale = set1(plan.general ? 1.f : p.score.scale * kLog2E);
  const View<const T> view = p.q.as<const T>();
  for (int r = 0; r < rows; ++r) {
    const T* row = view.at(b, seq.row_q + r / plan.group, hk * plan.group + r % plan.group);
    for (int d = 0; d < dims; d += kLanes) store(q + r * ld + d, load_dims(row, d, dims) * scale);
  }
  memset(q + static_cast<int64_t>(rows) * ld, 0, sizeof(float) * (plan.rows - rows) * ld);
}

// Normalises rows [0, rows) and clears the tokens that belong to no sequence.
template <class T>
static void finish_rows(const DecodePlan& plan, const DecodeState& state, const Sequence& seq,
                        int b, int hk, int rows) {
  const ForwardProblem& p = plan.problem;
  for (int r = 0; r < p.lengths.allocated_q(b) * plan.group; ++r) {
    const int head = hk * plan.group + r % plan.group;
    const int64_t row = seq.row_q + r / plan.group;
    T* out = p.out.as<T>().at(b, row, head);
    if (r >= rows) {
      zero_row(out, p.shape.head_dim_v);
      if (p.lse.data) *p.lse.at(b, head, row) = -FAL_INFINITY;
      continue;
    }
    SoftmaxState softmax{state.max[r] * kLn2, state.sum[r]};
    float factor = 1.f;
    if (p.score.sinks) factor = softmax.absorb_sink(p.score.sinks[head]);
    store_row(out, state.out + static_cast<int64_t>(r) * plan.out_ld, p.shape.head_dim_v,
              factor * softmax.inverse_sum());
    if (p.lse.data) *p.lse.at(b, head, row) = softmax.lse();
  }
}

// T: of q and out; E: of K and V as stored.
template <class T, class E>
static void decode_item(const void* arg, int64_t item, char* memory) {
  const DecodePlan& plan = *static_cast<const DecodePlan*>(arg);
  const ForwardProblem& p = plan.problem;
  int b = 0;
  for (int end = p.shape.batch; end - b > 1;) {
    const int middle = (b + end) / 2;
    (plan.first_item[middle] <= item ? b : end) = middle;
  }
  const Sequence seq = p.lengths.sequence(b);
  const DecodeParts parts = DecodeParts::make(p, seq);
  const int64_t within = item - plan.first_item[b];
  // Heads of the same keys follow each other: their rows share memory pages.
  const int hk = static_cast<int>(within % p.shape.heads_k);
  const int part = static_cast<int>(within / p.shape.heads_k);
  const int rows = seq.seqlen_q * plan.group;

  ScratchCursor cursor{memory};
  const DecodeScratch s = DecodeScratch::place(&cursor, plan);
  const auto state_of = [&](int other) {
    const int64_t index = plan.first_item[b] + static_cast<int64_t>(other) * p.shape.heads_k + hk;
    return DecodeState::at(plan.partial + index * plan.partial_size(), plan.rows);
  };
  const DecodeState state = parts.count > 1 ? state_of(part) : DecodeState::at(s.state, plan.rows);
  if (rows > 0) {
    load_queries<T>(plan, seq, b, hk, rows, s.q);
    const int begin = parts.seen.begin + part * parts.size;
    const Range keys{begin, min_int(begin + parts.size, parts.seen.end)};
    const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, p.window);
    const KvRuns runs = KvRuns::make(p.kv, seq, b, hk);
    const auto run = [&](auto m) {
      decode_part<E, decltype(m)::value>(plan, s, state, band, runs, b, hk, rows, keys);
    };
    if (rows == 1) {
      run(std::integral_constant<int, 1>{});
    } else if (rows == 2) {
      run(std::integral_constant<int, 2>{});
    } else if (rows <= 4 || kDecodeGroup == 4) {
      run(std::integral_constant<int, 4>{});
    } else {
      run(std::integral_constant<int, kDecodeGroup>{});
    }
  }
  if (parts.count > 1) {
    int32_t* left = plan.parts_left + static_cast<int64_t>(b) * p.shape.heads_k + hk;
    if (__atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL) != 0) return;
    for (int other = 1; other < parts.count; ++other) {
      merge_part(state_of(0), state_of(other), rows, plan.out_ld);
    }
  }
  finish_rows<T>(plan, parts.count > 1 ? state_of(0) : state, seq, b, hk, rows);
}

template <class T, bool kReadsQuantised>
static void decode(const ForwardProblem& problem, const ThreadPool& pool) {
  const Shape& shape = problem.shape;
  DecodePlan plan{};
  plan.problem = problem;
  plan.group = shape.heads_q / shape.heads_k;
  plan.out_ld = round_up(shape.head_dim_v, kLanes);
  plan.general = modifies_scores(problem.score);

  int longest = 0, most_parts = 1;
  int64_t items = 0;
  double flops = 0;
  const auto parts_of = [&](int b) {
    const Sequence seq = problem.lengths.sequence(b);
    return decodes(problem, seq.seqlen_q) ? DecodeParts::make(problem, seq).count : 0;
  };
  for (int b = 0; b < shape.batch; ++b) {
    const int parts = parts_of(b);
    if (parts == 0) continue;
    const Sequence seq = problem.lengths.sequence(b);
    longest = max_int(longest, seq.seqlen_q);
    most_parts = max_int(most_parts, parts);
    items += static_cast<int64_t>(parts) * shape.heads_k;
    flops += 2.0 * shape.heads_q * (shape.head_dim + shape.head_dim_v) * seq.seqlen_q *
             (seq.seqlen_k + 1.0);
  }
  if (items == 0) return;
  plan.rows = round_up(longest * plan.group, kDecodeGroup);

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
    const int parts = parts_of(b);
    plan.first_item[b + 1] = plan.first_item[b] + static_cast<int64_t>(parts) * shape.heads_k;
    for (int h = 0; h < shape.heads_k; ++h) plan.parts_left[b * shape.heads_k + h] = parts;
  }
  ScratchCursor scratch{nullptr};
  DecodeScratch::place(&scratch, plan);
  const auto run = [&](auto stored) {
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
