// Thread CPU time, and the length of a cycle of the core's clock, which other programs and the
// processor itself change all the time.
#pragma once

#include <time.h>

#include <algorithm>

#include "csrc/cpu/simd.h"

namespace fal::cpu::FAL_CPU_ISA {

constexpr int kSamples = 25;  // odd: a median is one of them

template <class Run>
double seconds(const Run& run) {
  timespec begin, end;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
  run();
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
  return end.tv_sec - begin.tv_sec + 1e-9 * (end.tv_nsec - begin.tv_nsec);
}

// Additions that wait for each other, one cycle each. (Registers only: some processors add a
// constant for nothing.)
inline void chain(int64_t steps) {
  int64_t sum = 0, one = 1;
  for (int64_t i = 0; i < steps; i += 64) {
    asm volatile(".rept 64\n\tadd %1, %0\n\t.endr" : "+r"(sum) : "r"(one));
  }
}

inline double seconds_of_a_cycle() {
  constexpr int64_t kSteps = 1 << 20;
  return seconds([] { chain(kSteps); }) / kSteps;
}

// Cycles that run() takes, each sample beside one of the clock: the median.
template <class Run>
double cycles(const Run& run) {
  double samples[kSamples];
  run();
  for (double& sample : samples) {
    const double cycle = seconds_of_a_cycle();
    sample = seconds(run) / cycle;
  }
  std::nth_element(samples, samples + kSamples / 2, samples + kSamples);
  return samples[kSamples / 2];
}

}  // namespace fal::cpu::FAL_CPU_ISA
