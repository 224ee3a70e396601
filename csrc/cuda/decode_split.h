// How decode cuts the work, in plain arithmetic that host and device share.
//
// The keys of a sequence are cut into parts. A part is the unit of arithmetic: its softmax starts
// afresh, its result is kept apart, and the combine kernel adds the parts in order. What the parts
// are depends on the sequence's own lengths alone, so its bits do not depend on the batch around
// it. A thread block walks a run of consecutive parts. How many blocks share a sequence (its
// splits) is chosen for the device and changes no bit.
#pragma once

#include "../core/problem.h"

namespace fal::cuda {

struct DecodeParts {
  static constexpr int kKeys = 256;  // of a part, at least: a part's partial result is 1.6 % of it
                                     // at four rows a K/V head, written once and read once
  static constexpr int kMost = 64;   // of a sequence: bounds the workspace
  static constexpr int kStep = 64;   // keys that a block takes at a time; parts are multiples of it
  static constexpr int kRows = 256;  // sequences of more rows a K/V head are one part: they fill
                                     // the device without, and their partial results are large

  Range seen;  // keys that some row of the sequence sees
  int32_t size, count;

  FAL_HOST_DEVICE static DecodeParts make(const Band& band, int32_t group) {
    if (band.seqlen_q < 1) return {{0, 0}, kKeys, 1};
    const Range seen = band.keys_of_any({0, band.seqlen_q});
    const int32_t keys = seen.size();
    if (band.seqlen_q > kRows / group) return {seen, ceil_div(keys, kStep) * kStep, 1};
    const int32_t size = max_int(kKeys, ceil_div(ceil_div(keys, kMost), kStep) * kStep);
    return {seen, size, max_int(1, ceil_div(keys, size))};
  }

  // No sequence of at most these lengths has more parts.
  FAL_HOST_DEVICE static int32_t most(int32_t seqlen_q, int32_t seqlen_k, Window window,
                                      int32_t group) {
    const int32_t tokens = min_int(seqlen_q, kRows / group);
    if (tokens < 1) return 1;
    int64_t keys = seqlen_k;
    if (window.left >= 0 && window.right >= 0) {
      const int64_t seen = static_cast<int64_t>(window.left) + window.right + tokens;
      keys = seen < keys ? seen : keys;
    }
    const int32_t parts = ceil_div(static_cast<int32_t>(keys), kKeys);
    return max_int(1, parts < kMost ? parts : kMost);
  }
};

// Blocks that share a sequence's parts: `forced`, if it is not 0; else enough for `waves` rounds of
// the device, so that ragged lengths and the last round cost little; with few sequences, a block
// for every part. Never more than there are parts.
inline int32_t decode_splits(int64_t tiles, int32_t most_parts, int32_t multiprocessors,
                             int32_t blocks_per_multiprocessor, int32_t forced) {
  if (forced > 0) return min_int(forced, most_parts);
  constexpr int64_t kWaves = 16;
  const int64_t wanted = kWaves * multiprocessors * blocks_per_multiprocessor;
  const int64_t splits = tiles > 0 ? (wanted + tiles - 1) / tiles : 1;
  return static_cast<int32_t>(splits < most_parts ? splits : most_parts);
}

}  // namespace fal::cuda
