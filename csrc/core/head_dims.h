// How wide the heads of a call may be.
#pragma once

#include <stdint.h>

namespace fal {

// More than kMaxHeadDim (latent attention: 576 for K, 512 for V) only on the CPU, and only where no
// sequence has more query tokens than decode takes.
constexpr int32_t kMaxHeadDim = 256, kMaxDecodeHeadDim = 576, kDecodeTokens = 8;

}  // namespace fal
