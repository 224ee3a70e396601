// The kernels for NEON (AArch64).
#define FAL_CPU_ISA neon
#include "attention_backward.h"
#include "attention_forward.h"
#include "fma_peak.h"

namespace fal::cpu {

const IsaKernels kernels_neon{"neon", &neon::forward, &neon::backward, &neon::fma_peak};

}  // namespace fal::cpu
