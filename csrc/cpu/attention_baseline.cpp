// The kernels for whatever the compiler assumes by default (SSE2 on x86-64).
#if !defined(__aarch64__)  // NEON is the least that AArch64 has
#define FAL_CPU_ISA baseline
#include "attention_backward.h"
#include "attention_forward.h"
#include "fma_peak.h"

namespace fal::cpu {

const IsaKernels kernels_baseline{"baseline", &baseline::forward, &baseline::backward,
                                  &baseline::fma_peak};

}  // namespace fal::cpu
#endif
