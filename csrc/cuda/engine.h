// The CUDA engines' interface, as the torch-facing code sees it: plain data in, an error code out.
// No CUDA header and no torch header is needed to include it.
#pragma once

#include "../core/problem.h"

namespace fal::cuda {

enum class Algorithm : int32_t { kFlash1 = 0, kFlash2 = 1, kDecode = 2 };
constexpr int kAlgorithmCount = 3;
const char* name(Algorithm algorithm);  // "flash1", "flash2", "decode"

// Null when the engine can run the problem on a device of this compute capability (major * 10 +
// minor), else a sentence that says why not (static storage).
const char* supports_forward(Algorithm algorithm, const ForwardProblem& problem, int capability);
const char* supports_backward(Algorithm algorithm, const BackwardProblem& problem, int capability);

// Device scratch memory that a call needs, in bytes; uninitialised, 256-byte aligned. It depends on
// shapes only.
int64_t forward_workspace_bytes(Algorithm algorithm, const ForwardProblem& problem);
int64_t backward_workspace_bytes(Algorithm algorithm, const BackwardProblem& problem);

// Enqueue on the stream (a cudaStream_t) of the current device; never synchronise. 0, or a
// cudaError_t. All pointers are device pointers.
int forward(Algorithm algorithm, const ForwardProblem& problem, void* workspace, void* stream);
int backward(Algorithm algorithm, const BackwardProblem& problem, void* workspace, void* stream);

const char* error_string(int error);
// Compute capability of a device (major * 10 + minor), cached; negative when it cannot be asked.
int device_capability(int device);
const char* compiled_architectures();  // e.g. "80,90a,compute_80"

}  // namespace fal::cuda
