// FlashAttention (1) for the engine table: what each function means is said in engine.h.
#pragma once

#include "../core/problem.h"
#include "device.cuh"

namespace fal::cuda {

struct BackwardArgs;

const char* flash1_supports_forward(const ForwardProblem& problem, int capability);
int64_t flash1_forward_workspace_bytes(const ForwardProblem& problem);
cudaError_t flash1_forward(const ForwardProblem& problem, void* workspace, cudaStream_t stream);

const char* flash1_supports_backward(const BackwardProblem& problem, int capability);
int64_t flash1_backward_workspace_bytes(const BackwardProblem& problem);
cudaError_t flash1_backward(const BackwardProblem& problem, void* workspace, cudaStream_t stream);

// One per element type, each in a file of its own so that they compile side by side.
template <class T>
cudaError_t flash1_forward_of(const ForwardProblem& problem, void* workspace, cudaStream_t stream);
template <class T>
cudaError_t flash1_backward_of(const BackwardArgs& args, cudaStream_t stream);

}  // namespace fal::cuda
