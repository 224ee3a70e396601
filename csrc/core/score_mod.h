// Score modifications: from scale * q.k to the softmax's argument, value and derivative side by
// side. Masking is the band's business (band.h) and dropout the generator's (philox.h); this is
// what happens to a visible score.
#pragma once

#include <math.h>

#include "problem.h"

namespace fal {

// scale only: the inner loop of most calls.
struct NoScoreMod {
  static constexpr bool kGeneral = false;

  FAL_HOST_DEVICE float value(float scaled, int32_t, int32_t, float) const { return scaled; }
  FAL_HOST_DEVICE float derivative(float) const { return 1.f; }
};

// Every optional modification behind uniform branches, for one (batch entry, query head).
struct GeneralScoreMod {
  static constexpr bool kGeneral = true;

  float softcap, inverse_softcap;  // 0 = off
  float slope;                     // 0 = off
  int32_t shift;                   // seqlen_k - seqlen_q

  FAL_HOST_DEVICE static GeneralScoreMod make(const ScoreOptions& options, int32_t b, int32_t h,
                                              int32_t shift) {
    return {options.softcap, options.softcap > 0.f ? 1.f / options.softcap : 0.f,
            options.alibi_slope(b, h), shift};
  }
  // The softmax's argument. scaled = scale * q.k, bias = the additive bias of this element (0 if
  // none).
  FAL_HOST_DEVICE float value(float scaled, int32_t i, int32_t j, float bias) const {
    if (softcap > 0.f) scaled = softcap * tanhf(scaled * inverse_softcap);
    scaled += bias;
    if (slope != 0.f) scaled -= slope * fabsf(static_cast<float>(i + shift - j));
    return scaled;
  }
  // d value / d scaled. Only the cap bends: 1 - tanh^2, from the capped score before bias and
  // slope.
  FAL_HOST_DEVICE float derivative(float scaled) const {
    if (softcap <= 0.f) return 1.f;
    const float t = tanhf(scaled * inverse_softcap);
    return 1.f - t * t;
  }
};

}  // namespace fal
