// The kernels for AMX (tiles of bf16) beside AVX-512: bf16 on the tile unit, every other type as on
// AVX-512.
#define FAL_CPU_ISA amx
#include "amx_backward.h"
#include "amx_forward.h"

namespace fal::cpu {
namespace {

void run_forward(const ForwardProblem& problem, const ThreadPool& pool) {
  if (problem.shape.dtype != DType::kBFloat16 || problem.kv.dtype != DType::kBFloat16) {
    return kernels_avx512.forward(problem, pool);
  }
  amx::forward_with<amx::BFloat16, amx::AmxForward>(problem, pool);
}

void run_backward(const BackwardProblem& problem, const ThreadPool& pool) {
  if (problem.forward.shape.dtype != DType::kBFloat16 || !amx::operands_finite(problem, pool)) {
    return kernels_avx512.backward(problem, pool);
  }
  amx::backward_with<amx::BFloat16, amx::AmxBackward>(problem, pool);
}

// Of the vector units: the peak that float32 is held against. The tile unit's is bf16's alone.
int64_t run_fma_peak(int64_t flops) { return kernels_avx512.fma_peak(flops); }

}  // namespace

const IsaKernels kernels_amx{"amx", &run_forward, &run_backward, &run_fma_peak};

}  // namespace fal::cpu
