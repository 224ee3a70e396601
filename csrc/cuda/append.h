// Rotary embedding and appending to a KV cache on CUDA. Plain data in, 0 or a cudaError_t out.
#pragma once

#include "../core/rotary.h"

namespace fal::cuda {

int rotate(const RotateProblem& problem, void* stream);
int append(const AppendProblem& problem, void* stream);

}  // namespace fal::cuda
