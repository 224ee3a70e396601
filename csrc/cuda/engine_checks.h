// Reasons that engines share for not running a problem: null, or a sentence.
#pragma once

#include "../core/problem.h"

namespace fal::cuda {

// Devices of these capabilities offer a block 99 KB of shared memory; others 163 KB or more.
inline bool small_shared_memory(int capability) {
  return capability == 86 || capability == 89 || capability >= 120;
}

// What every kernel built on mma.sync m16n8k16 and 16-bit inputs cannot do.
inline const char* tensor_cores_cannot(const ForwardProblem& problem, int capability) {
  const Shape& shape = problem.shape;
  if (capability < 80) return "the device's compute capability is below 8.0";
  if (shape.dtype != DType::kFloat16 && shape.dtype != DType::kBFloat16) {
    return "q is not float16 or bfloat16";
  }
  if (problem.kv.dtype != shape.dtype) return "k and v are quantised";
  if (shape.head_dim > 256 || shape.head_dim_v > 256) {
    return "the head dim is above 256: latent attention decodes on the CPU engine alone";
  }
  if (problem.score.bias.data) {
    return "an additive bias is given, which the CPU engine and, forward, decode take";
  }
  if (shape.batch > 65535 - 1 || shape.heads_q > 65535) {
    return "the batch or the number of heads is above a CUDA grid's 65535";
  }
  return nullptr;
}

// Of kernels that walk the band's tiles alone.
inline const char* band_tiles_cannot(const ForwardProblem& problem) {
  return problem.block_mask.given()
             ? "a block_mask is given, which flash2 and the CPU engine alone take"
             : nullptr;
}

}  // namespace fal::cuda
