// THE visibility rule: which keys may a query attend to. Stated here for C++, in reference.py for
// Python, in docs/semantics.md for people, and nowhere else.
//
// Query row i (0 <= i < seqlen_q) sees key j (0 <= j < seqlen_k) iff
//
//     i + shift - left <= j <= i + shift + right,      shift = seqlen_k - seqlen_q.
//
// kUnbounded removes a side. Causal is {kUnbounded, 0}; full attention is {kUnbounded, kUnbounded}.
// Ragged ends need no rule of their own: a row or key beyond its sequence's length is in no range.
#pragma once

#include "config.h"

namespace fal {

// Half-open [begin, end); empty when begin >= end.
struct Range {
  int32_t begin, end;

  FAL_HOST_DEVICE int32_t size() const { return end > begin ? end - begin : 0; }
  FAL_HOST_DEVICE bool empty() const { return begin >= end; }
  FAL_HOST_DEVICE bool contains(int32_t x) const { return begin <= x && x < end; }
};

FAL_HOST_DEVICE int32_t min_int(int32_t a, int32_t b) { return a < b ? a : b; }
FAL_HOST_DEVICE int32_t max_int(int32_t a, int32_t b) { return a > b ? a : b; }
FAL_HOST_DEVICE int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
FAL_HOST_DEVICE Range intersect(Range a, Range b) {
  return {max_int(a.begin, b.begin), min_int(a.end, b.end)};
}

enum class TileKind : int32_t { kSkip, kFull, kPartial };

// Two integers say every mask that is a band: see the top of this file. Both sides are inclusive.
struct Window {
  static constexpr int32_t kUnbounded = -1;
  int32_t left, right;
};

struct Band {
  // Lengths are at most 2^30 (checked where tensors enter). With sides below the lengths, every sum
  // below then fits 32 bits.
  static constexpr int32_t kMaxLength = 1 << 30;

  int32_t seqlen_q, seqlen_k;
  int32_t left, right;  // Window::kUnbounded, or left < seqlen_k and right < seqlen_q

  FAL_HOST_DEVICE static Band make(int32_t seqlen_q, int32_t seqlen_k, Window window) {
    // The last row sees to the left of key seqlen_k - 1, the first row to the right of key
    // seqlen_k - seqlen_q: sides this long hide nothing.
    return {seqlen_q, seqlen_k, window.left >= seqlen_k ? Window::kUnbounded : window.left,
            window.right >= seqlen_q ? Window::kUnbounded : window.right};
  }

  FAL_HOST_DEVICE int32_t shift() const { return seqlen_k - seqlen_q; }
  FAL_HOST_DEVICE bool bounded() const { return left >= 0 || right >= 0; }

  // Keys that one query row sees.
  FAL_HOST_DEVICE Range keys_of(int32_t i) const {
    const int32_t begin = left < 0 ? 0 : max_int(0, i + shift() - left);
    const int32_t end = right < 0 ? seqlen_k : min_int(seqlen_k, i + shift() + right + 1);
    return {begin, end};
  }

  FAL_HOST_DEVICE bool visible(int32_t i, int32_t j) const { return keys_of(i).contains(j); }

  // Keys that some row of a non-empty tile of query rows sees (an interval: bands move by one per
  // row).
  FAL_HOST_DEVICE Range keys_of_any(Range rows) const {
    return {keys_of(rows.begin).begin, keys_of(rows.end - 1).end};
  }

  // Keys that every row of a non-empty tile of query rows sees.
  FAL_HOST_DEVICE Range keys_of_all(Range rows) const {
    return {keys_of(rows.end - 1).begin, keys_of(rows.begin).end};
  }

  // Query rows that see some key of a non-empty tile of keys.
  FAL_HOST_DEVICE Range rows_of_any(Range keys) const {
    const int32_t begin = right < 0 ? 0 : max_int(0, keys.begin - shift() - right);
    const int32_t end = left < 0 ? seqlen_q : min_int(seqlen_q, keys.end - shift() + left);
    return {begin, end};
  }

  // Query rows that see every key of a non-empty tile of keys.
  FAL_HOST_DEVICE Range rows_of_all(Range keys) const {
    return {rows_of_any({keys.end - 1, keys.end}).begin,
            rows_of_any({keys.begin, keys.begin + 1}).end};
  }

  // kFull is exact; kSkip is never wrong; what is neither is kPartial and needs visible() per
  // element.
  FAL_HOST_DEVICE TileKind classify(Range rows, Range keys) const {
    const Range any = keys_of_any(rows), all = keys_of_all(rows);
    if (rows.empty() || intersect(any, keys).empty()) return TileKind::kSkip;
    return all.begin <= keys.begin && keys.end <= all.end ? TileKind::kFull : TileKind::kPartial;
  }
};

}  // namespace fal
