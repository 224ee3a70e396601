// The softmax state as an algebra: init, absorb, merge, normalise, LSE; and the rules for rows that
// see nothing, once. Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018);
// FlashAttention, section 3.1.
//
// A row's state is (max, sum) with sum = sum_j exp(s_j - max); an output accumulated beside it is
// scaled the same way. Everything is in natural-log units here; kernels that work in base 2 convert
// at the edges.
#pragma once

#include <math.h>

#include "config.h"

namespace fal {

#define FAL_INFINITY (__builtin_huge_valf())

// exp(x - max) must not be NaN when the row has seen nothing (max = -inf): subtract 0 instead. A
// NaN max stays NaN.
FAL_HOST_DEVICE float softmax_reference(float max) { return max == -FAL_INFINITY ? 0.f : max; }

struct SoftmaxState {
  float max, sum;

  FAL_HOST_DEVICE static SoftmaxState empty() { return {-FAL_INFINITY, 0.f}; }

  // Natural-log normaliser; -inf for a row that saw nothing. A NaN sum is a NaN LSE, not an empty
  // row.
  FAL_HOST_DEVICE float lse() const { return sum == 0.f ? -FAL_INFINITY : max + logf(sum); }

  // What an accumulated output is multiplied by at the end: 0 for a row that saw nothing.
  FAL_HOST_DEVICE float inverse_sum() const { return sum == 0.f ? 0.f : 1.f / sum; }

  // A sink takes part in the denominator and has no value: only the sum (and perhaps the max)
  // changes. Returns what the accumulated output must be multiplied by.
  FAL_HOST_DEVICE float absorb_sink(float sink) {
    const float new_max = fmaxf(max, sink), reference = softmax_reference(new_max);
    const float alpha = expf(max - reference);
    sum = sum * alpha + expf(sink - reference);
    max = new_max;
    return alpha;
  }
};

// The factors by which two partial outputs, each normalised by its own LSE, are weighed when they
// are merged.
struct MergeWeights {
  float a, b, lse;
};

FAL_HOST_DEVICE MergeWeights merge_weights(float lse_a, float lse_b) {
  // +inf is how flash_attn 2.8 marks an empty partial result: it counts as -inf.
  if (lse_a == FAL_INFINITY) lse_a = -FAL_INFINITY;
  if (lse_b == FAL_INFINITY) lse_b = -FAL_INFINITY;
  const float max = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;
  const float reference = softmax_reference(max);
  const float weight_a = expf(lse_a - reference), weight_b = expf(lse_b - reference);
  const float sum = weight_a + weight_b;
  if (sum == 0.f) return {0.f, 0.f, -FAL_INFINITY};
  return {weight_a / sum, weight_b / sum, reference + logf(sum)};
}

// exp(s - lse) with an empty row's LSE: such a row has no visible key, but kernels evaluate masked
// elements too.
FAL_HOST_DEVICE float lse_reference(float lse) { return lse == -FAL_INFINITY ? FAL_INFINITY : lse; }

}  // namespace fal
