// The kernels for AVX-512 with BF16: products of bf16 take pairs (vdpbf16ps, twice the arithmetic
// of a multiply-add), every other type is as on AVX-512.
#define FAL_CPU_ISA avx512_bf16
#include "attention_backward.h"
#include "attention_forward.h"

namespace fal::cpu {
namespace {

void run_forward(const ForwardProblem& problem, const ThreadPool& pool) {
  if (problem.shape.dtype != DType::kBFloat16 || problem.kv.dtype != DType::kBFloat16) {
    return kernels_avx512.forward(problem, pool);
  }
  avx512_bf16::forward_with<avx512_bf16::BFloat16, avx512_bf16::VectorForward<avx512_bf16::Pair>>(
      problem, pool);
}

void run_backward(const BackwardProblem& problem, const ThreadPool& pool) {
  if (problem.forward.shape.dtype != DType::kBFloat16) {
    return kernels_avx512.backward(problem, pool);
  }
  avx512_bf16::backward_with<avx512_bf16::BFloat16, avx512_bf16::VectorBackward<avx512_bf16::Pair>>(
      problem, pool);
}

// Of fp32, which every type is held against; bf16's own is twice that.
int64_t run_fma_peak(int64_t flops) { return kernels_avx512.fma_peak(flops); }

}  // namespace

const IsaKernels kernels_avx512_bf16{"avx512_bf16", &run_forward, &run_backward, &run_fma_peak};

}  // namespace fal::cpu
