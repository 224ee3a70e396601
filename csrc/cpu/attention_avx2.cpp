// The kernels for AVX2 with FMA and F16C.
#define FAL_CPU_ISA avx2
#include "attention_backward.h"
#include "attention_forward.h"
#include "fma_peak.h"

namespace fal::cpu {

const IsaKernels kernels_avx2{"avx2", &avx2::forward, &avx2::backward, &avx2::fma_peak};

}  // namespace fal::cpu
