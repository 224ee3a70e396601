// The warpgroup matrix multiplications that a warp has in flight (wgmma.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_api.h"

namespace fal::simt {

struct WgmmaOp {
  WgmmaShape shape;
  uint64_t desc_a, desc_b;
  bool a_in_registers, accumulate;
  std::vector<uint32_t> a;  // 4 words per lane, copied when issued
  int accumulator;          // index into WgmmaState::accumulators
  const void* pc;
};

// Accumulators are taken away from the kernel (filled with a NaN pattern) from issue to wait.
struct WgmmaAccumulator {
  float* registers[32];  // per lane
  int count;             // floats per lane
  std::vector<float> values;
};

struct WgmmaState {
  std::vector<WgmmaOp> open;
  std::vector<std::vector<WgmmaOp>> groups;
  std::vector<WgmmaAccumulator> accumulators;
  bool fenced = false;
};

}  // namespace fal::simt
