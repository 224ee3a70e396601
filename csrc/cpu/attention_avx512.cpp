// The kernels for AVX-512 (F, BW, VL, DQ).
#define FAL_CPU_ISA avx512
#include "attention_backward.h"
#include "attention_forward.h"
#include "fma_peak.h"

namespace fal::cpu {

const IsaKernels kernels_avx512{"avx512", &avx512::forward, &avx512::backward, &avx512::fma_peak};

}  // namespace fal::cpu
