// The engine table: one row per algorithm. A new engine adds a header with these functions and its
// row here; nothing else knows how many there are.
#include "decode.h"
#include "engine.h"
#include "flash1.h"
#include "flash2.h"

namespace fal::cuda {
namespace {

struct Engine {
  const char* name;
  const char* (*supports_forward)(const ForwardProblem&, int capability);
  const char* (*supports_backward)(const BackwardProblem&, int capability);
  int64_t (*forward_workspace_bytes)(const ForwardProblem&);
  int64_t (*backward_workspace_bytes)(const BackwardProblem&);
  cudaError_t (*forward)(const ForwardProblem&, void* workspace, cudaStream_t);
  cudaError_t (*backward)(const BackwardProblem&, void* workspace, cudaStream_t);
};

// In the order of Algorithm.
constexpr Engine kEngines[kAlgorithmCount] = {
    {"flash1", &flash1_supports_forward, &flash1_supports_backward, &flash1_forward_workspace_bytes,
     &flash1_backward_workspace_bytes, &flash1_forward, &flash1_backward},
    {"flash2", &flash2_supports_forward, &flash2_supports_backward, &flash2_forward_workspace_bytes,
     &flash2_backward_workspace_bytes, &flash2_forward, &flash2_backward},
    {"decode", &decode_supports_forward, &decode_supports_backward, &decode_forward_workspace_bytes,
     nullptr, &decode_forward, nullptr},  // supports no backward
};

const Engine& engine(Algorithm algorithm) { return kEngines[static_cast<int>(algorithm)]; }

}  // namespace

const char* name(Algorithm algorithm) { return engine(algorithm).name; }

const char* supports_forward(Algorithm algorithm, const ForwardProblem& problem, int capability) {
  return engine(algorithm).supports_forward(problem, capability);
}

const char* supports_backward(Algorithm algorithm, const BackwardProblem& problem, int capability) {
  return engine(algorithm).supports_backward(problem, capability);
}

int64_t forward_workspace_bytes(Algorithm algorithm, const ForwardProblem& problem) {
  return engine(algorithm).forward_workspace_bytes(problem);
}

int64_t backward_workspace_bytes(Algorithm algorithm, const BackwardProblem& problem) {
  return engine(algorithm).backward_workspace_bytes(problem);
}

int forward(Algorithm algorithm, const ForwardProblem& problem, void* workspace, void* stream) {
  return engine(algorithm).forward(problem, workspace, static_cast<cudaStream_t>(stream));
}

int backward(Algorithm algorithm, const BackwardProblem& problem, void* workspace, void* stream) {
  return engine(algorithm).backward(problem, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace fal::cuda
