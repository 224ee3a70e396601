// FlashAttention (1)'s row of the engine table: what it can run, and the order of its launches.
#include "alignment.h"
#include "backward_pieces.cuh"
#include "engine_checks.h"
#include "flash1.h"
#include "unused_rows.h"

namespace fal::cuda {
namespace {

// The head-dim class that the kernels are compiled for.
int32_t padded_dim(const Shape& shape) {
  const int32_t dim = max_int(shape.head_dim, shape.head_dim_v);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

}  // namespace

const char* flash1_supports_forward(const ForwardProblem& problem, int capability) {
  if (const char* reason = tensor_cores_cannot(problem, capability)) return reason;
  if (const char* reason = band_tiles_cannot(problem)) return reason;
  if (problem.kv.pages.block_table) return "FlashAttention (1) does not take paged K/V";
  if (padded_dim(problem.shape) > 64 && small_shared_memory(capability)) {
    return "head dims above 64 need 163 KB of shared memory; this device has 99 KB";
  }
  return nullptr;
}

int64_t flash1_forward_workspace_bytes(const ForwardProblem& problem) {
  return BackwardWorkspace::bytes(problem.shape, padded_dim(problem.shape), true);
}

cudaError_t flash1_forward(const ForwardProblem& problem, void* workspace, cudaStream_t stream) {
  const cudaError_t error = fill_unused_query_rows(problem, stream);
  if (error != cudaSuccess) return error;
  return problem.shape.dtype == DType::kFloat16
             ? flash1_forward_of<__half>(problem, workspace, stream)
             : flash1_forward_of<__nv_bfloat16>(problem, workspace, stream);
}

// ---- backward -----------------------------------------------------------------------------------
const char* flash1_supports_backward(const BackwardProblem& problem, int capability) {
  return flash1_supports_forward(problem.forward, capability);
}

int64_t flash1_backward_workspace_bytes(const BackwardProblem& problem) {
  const Shape& shape = problem.forward.shape;
  return BackwardWorkspace::bytes(shape, padded_dim(shape), true);
}

cudaError_t flash1_backward(const BackwardProblem& problem, void* workspace, cudaStream_t stream) {
  const Shape& shape = problem.forward.shape;
  const BackwardArgs args{problem,
                          BackwardWorkspace::make(workspace, shape, padded_dim(shape), true),
                          rows_aligned(problem)};
  cudaError_t error = backward_prepare(args, stream);
  if (error == cudaSuccess) {
    error = shape.dtype == DType::kFloat16 ? flash1_backward_of<__half>(args, stream)
                                           : flash1_backward_of<__nv_bfloat16>(args, stream);
  }
  if (error == cudaSuccess) error = backward_convert_dq(args, stream);
  if (error == cudaSuccess && problem.dsinks) error = backward_sinks(args, stream);
  return error;
}

}  // namespace fal::cuda
