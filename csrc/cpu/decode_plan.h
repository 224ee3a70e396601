// Which calls decode, how their work is cut into items, and what an item works on. decode.h runs
// them.
#pragma once

#include "../core/head_dims.h"
#include "decode_tile.h"
#include "scratch.h"

namespace fal::cpu::FAL_CPU_ISA {

// Sequences of at most kDecodeTokens query tokens and so many rows, with their group folded in,
// decode; for more the prefill path's register tiles win. Wider heads than that takes have no
// limit.
constexpr int kDecodeRows = 32;
constexpr int kDecodePart = 512;    // keys of a part, at least: a part's set-up is then under 2 %
constexpr int kDecodeParts = 64;    // of one sequence, at most
constexpr int kDecodeFewParts = 8;  // the same for more than kDecodeRows rows: states are large
constexpr int64_t kDecodeCacheBytes = 4 << 20;  // of K and V that may be in a cache still
constexpr int kDecodeStreamHeads = 4;           // see streams()

// By the tokens in use, so that padding a sequence does not change its bits.
FAL_INLINE bool decodes(const ForwardProblem& p, int64_t seqlen_q) {
  const Shape& s = p.shape;
  if (p.score.dropout_threshold || s.heads_k == 0) return false;
  if (p.block_mask.given() && p.block_mask.heads > 1) return false;  // heads share their tiles
  if (seqlen_q < 1 || seqlen_q > kDecodeTokens) return false;
  const bool wide = s.head_dim > kMaxHeadDim || s.head_dim_v > kMaxHeadDim;
  return wide || seqlen_q * (s.heads_q / s.heads_k) <= kDecodeRows;
}

// How one sequence's work is cut.
struct DecodeCut {
  Range seen;             // keys that some row sees
  int part_keys, parts;   // by the number of those and of rows alone
  int rows;               // query rows of a K/V head, tokens outermost
  int m, passes;          // rows that share a load; rows / m, rounded up
  int most_heads, items;  // heads of an item, a power of two; items of one part

  FAL_INLINE static DecodeCut make(const ForwardProblem& p, const Sequence& seq, int most_heads) {
    DecodeCut cut{};
    cut.seen = Band::make(seq.seqlen_q, seq.seqlen_k, p.window).keys_of_any({0, seq.seqlen_q});
    const int keys = cut.seen.size();
    cut.rows = seq.seqlen_q * (p.shape.heads_q / p.shape.heads_k);
    const int most_parts = cut.rows <= kDecodeRows ? kDecodeParts : kDecodeFewParts;
    cut.part_keys = max_int(kDecodePart, round_up(ceil_div(keys, most_parts), kDecodeKeys));
    cut.parts = max_int(1, ceil_div(keys, cut.part_keys));
    cut.m = 1;
    while (cut.m < cut.rows && cut.m < kDecodeGroup) cut.m *= 2;
    cut.passes = ceil_div(cut.rows, cut.m);
    cut.most_heads = min_int(most_heads, kDecodeColumns / cut.m);
    cut.items =
        p.shape.heads_k / cut.most_heads + __builtin_popcount(p.shape.heads_k % cut.most_heads);
    return cut;
  }

  // The heads of item i of a part: as many as possible, what remains in smaller powers of two.
  FAL_INLINE Range heads(int heads_k, int i) const {
    int first = 0, count = most_heads;
    for (;; first += count, --i) {
      while (first + count > heads_k) count /= 2;
      if (i == 0) return {first, first + count};
    }
  }
  FAL_INLINE Range keys(int part) const {
    const int begin = seen.begin + part * part_keys;
    return {begin, min_int(begin + part_keys, seen.end)};
  }
};

struct DecodePlan {
  ForwardProblem problem;
  int group;  // query heads of a K/V head
  int out_ld;
  int most_heads;       // of an item
  int columns, lanes;   // of an item over all passes, at most; lanes: in whole vectors
  bool general;         // a score modification is on
  bool from_memory;     // K and V come from memory, not from a cache
  bool in_pieces;       // and in pieces too short for the processor's prefetchers
  int64_t* first_item;  // (batch + 1)
  int32_t* parts_left;  // (batch, heads_k)
  float* partial;       // (items, partial_size())

  FAL_INLINE DecodeCut cut(const Sequence& seq) const {
    return DecodeCut::make(problem, seq, most_heads);
  }
  FAL_INLINE int64_t partial_size() const {
    return 2 * lanes + static_cast<int64_t>(columns) * out_ld;
  }
};

// The state of an item's columns: maximum (base 2) and sum, [pass][column_ld]; unnormalised output,
// [pass][column][out_ld].
struct DecodeState {
  float *max, *sum, *out;

  FAL_INLINE static DecodeState at(float* memory, const DecodePlan& plan) {
    return {memory, memory + plan.lanes, memory + 2 * plan.lanes};
  }
};

struct DecodeScratch {
  float* scores;  // of a tile: [pass][key][column]
  float *q, *state, *alpha, *slope;
  int32_t *visible, *position;

  FAL_INLINE static DecodeScratch place(ScratchCursor* cursor, const DecodePlan& plan) {
    DecodeScratch s;
    s.q = cursor->take<float>(plan.columns * round_up(plan.problem.shape.head_dim, 2 * kLanes));
    s.scores = cursor->take<float>(kDecodeKeys * plan.columns);
    s.state = cursor->take<float>(plan.partial_size());
    s.alpha = cursor->take<float>(plan.lanes);
    s.slope = cursor->take<float>(plan.lanes);
    s.visible = cursor->take<int32_t>(plan.lanes);
    s.position = cursor->take<int32_t>(plan.lanes);
    return s;
  }
};

// What one item works on.
struct DecodeItem {
  const DecodePlan& plan;
  const Sequence& seq;
  const Band& band;
  const HeadMask* mask;  // null without a block mask
  int b, rows, m, passes;
  DecodeHeads heads;

  FAL_INLINE int columns() const { return heads.count * m; }
  FAL_INLINE int column_ld() const { return max_int(columns(), kLanes); }  // of a pass
  FAL_INLINE int column_shift() const { return __builtin_ctz(columns()); }

  FAL_INLINE Range tokens() const { return {0, band.seqlen_q}; }
  // The first key in [key, end) of a block that some row sees; at least `end` if there is none.
  FAL_INLINE int next_key(int key, int end) const {
    return mask && key < end ? mask->next_key(band, tokens(), key) : key;
  }

  // Row r of the item's head h is query token r / group of query head
  // (heads.first + h) * group + r % group: column h * m + r % m of pass r / m.
  FAL_INLINE int token(int r) const { return r / plan.group; }
  FAL_INLINE int head_q(int h, int r) const {
    return (heads.first + h) * plan.group + r % plan.group;
  }
};

}  // namespace fal::cpu::FAL_CPU_ISA
