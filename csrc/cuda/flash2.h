// FlashAttention-2 for the engine table: what each function means is said in engine.h.
#pragma once

#include "../core/problem.h"
#include "device.cuh"

namespace fal::cuda {

struct BackwardArgs;

const char* flash2_supports_forward(const ForwardProblem& problem, int capability);
int64_t flash2_forward_workspace_bytes(const ForwardProblem& problem);
cudaError_t flash2_forward(const ForwardProblem& problem, void* workspace, cudaStream_t stream);

const char* flash2_supports_backward(const BackwardProblem& problem, int capability);
int64_t flash2_backward_workspace_bytes(const BackwardProblem& problem);
cudaError_t flash2_backward(const BackwardProblem& problem, void* workspace, cudaStream_t stream);

// One per element type, each in a file of its own so that they compile side by side.
template <class T>
cudaError_t flash2_forward_of(const ForwardProblem& problem, cudaStream_t stream);
template <class T>
cudaError_t flash2_backward_columns_of(const BackwardArgs& args, cudaStream_t stream);
template <class T>
cudaError_t flash2_backward_rows_of(const BackwardArgs& args, cudaStream_t stream);

}  // namespace fal::cuda
