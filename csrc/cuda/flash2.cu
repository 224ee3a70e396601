// FlashAttention-2's row of the engine table: what it can run, and the order of its launches.
#include "engine_checks.h"
#include "flash2.h"
#include "unused_rows.cuh"

namespace fal::cuda {

const char* flash2_supports_forward(const ForwardProblem& problem, int capability) {
  if (const char* reason = tensor_cores_cannot(problem, capability)) return reason;
  const int head_dim = max_int(problem.shape.head_dim, problem.shape.head_dim_v);
  if (head_dim > 128 && small_shared_memory(capability)) {
    return "head dims above 128 need 160 KB of shared memory; this device has 99 KB";
  }
  return nullptr;
}

int64_t flash2_forward_workspace_bytes(const ForwardProblem&) { return 0; }

cudaError_t flash2_forward(const ForwardProblem& problem, void*, cudaStream_t stream) {
  const cudaError_t error = fill_unused_query_rows(problem, stream);
  if (error != cudaSuccess) return error;
  return problem.shape.dtype == DType::kFloat16 ? flash2_forward_of<__half>(problem, stream)
                                                : flash2_forward_of<__nv_bfloat16>(problem, stream);
}

}  // namespace fal::cuda
