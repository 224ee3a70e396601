// FlashAttention-2 for the engine table: what each function means is said in engine.h.
#pragma once

#include "../core/problem.h"
#include "device.cuh"

namespace fal::cuda {

const char* flash2_supports_forward(const ForwardProblem& problem, int capability);
int64_t flash2_forward_workspace_bytes(const ForwardProblem& problem);
cudaError_t flash2_forward(const ForwardProblem& problem, void* workspace, cudaStream_t stream);

// One per element type, each in a file of its own so that they compile side by side.
template <class T>
cudaError_t flash2_forward_of(const ForwardProblem& problem, cudaStream_t stream);

}  // namespace fal::cuda
