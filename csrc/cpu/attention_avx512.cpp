// The kernels for AVX-512 (F, BW, VL, DQ).
#define FAL_CPU_ISA avx512
#include "attention_backward.h"
#include "attention_forward.h"

namespace fal::cpu {

const IsaKernels kernels_avx512{"avx512", &avx512::forward, &avx512::backward};

}  // namespace fal::cpu
