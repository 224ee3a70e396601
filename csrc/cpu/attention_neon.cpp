// The kernels for NEON (AArch64).
#define FAL_CPU_ISA neon
#include "attention_backward.h"
#include "attention_forward.h"

namespace fal::cpu {

const IsaKernels kernels_neon{"neon", &neon::forward, &neon::backward};

}  // namespace fal::cpu
