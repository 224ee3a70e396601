// The processor's arithmetic ceiling: fused multiply-adds on registers alone, as many independent
// chains as the kernels' register tile has (more than latency x issue width on every processor we
// know of). Where the instruction set has no fused one, a multiplication and an addition.
#pragma once

#include "simd.h"

namespace fal::cpu::FAL_CPU_ISA {

constexpr int kChains = kRows * kVectors;
constexpr int kFlopsPerIteration = 2 * kLanes * kChains;

// Runs at least `flops` floating-point operations on the calling thread; says how many.
static FAL_NOINLINE int64_t fma_peak(int64_t flops) {
  // Values the compiler cannot know; x -> x * 0.5 + 1 stays finite and normal for ever.
  volatile float half = 0.5f, one = 1.f;
  const Float b = set1(half), c = set1(one);
  Float chain[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) chain[i] = set1(one * static_cast<float>(i));
  const int64_t iterations = (flops + kFlopsPerIteration - 1) / kFlopsPerIteration;
#pragma GCC unroll 1
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) chain[i] = fma(chain[i], b, c);
  }
  Float total = chain[0];
#pragma GCC unroll 32
  for (int i = 1; i < kChains; ++i) total = total + chain[i];
  volatile float sink = sum(total);
  (void)sink;
  return iterations * kFlopsPerIteration;
}

}  // namespace fal::cpu::FAL_CPU_ISA
