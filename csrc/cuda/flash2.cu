// FlashAttention-2's row of the engine table: what it can run, and the order of its launches.
#include "alignment.h"
#include "backward_pieces.cuh"
#include "engine_checks.h"
#include "flash2.h"
#include "unused_rows.h"

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

// ---- backward -----------------------------------------------------------------------------------
namespace {

// The head-dim class that the kernels are compiled for.
int32_t padded_dim(const Shape& shape) {
  return ceil_div(max_int(shape.head_dim, shape.head_dim_v), 64) * 64;
}

}  // namespace

const char* flash2_supports_backward(const BackwardProblem& problem, int capability) {
  const ForwardProblem& forward = problem.forward;
  if (const char* reason = tensor_cores_cannot(forward, capability)) return reason;
  if (forward.kv.pages.block_table) return "the backward does not take paged K/V";
  if (padded_dim(forward.shape) > 64 && small_shared_memory(capability)) {
    return "head dims above 64 need 163 KB of shared memory; this device has 99 KB";
  }
  return nullptr;
}

int64_t flash2_backward_workspace_bytes(const BackwardProblem& problem) {
  const Shape& shape = problem.forward.shape;
  return BackwardWorkspace::bytes(shape, padded_dim(shape), !problem.deterministic);
}

cudaError_t flash2_backward(const BackwardProblem& problem, void* workspace, cudaStream_t stream) {
  const Shape& shape = problem.forward.shape;
  const BackwardArgs args{
      problem, BackwardWorkspace::make(workspace, shape, padded_dim(shape), !problem.deterministic),
      rows_aligned(problem)};
  const bool f16 = shape.dtype == DType::kFloat16;
  cudaError_t error = backward_prepare(args, stream);
  if (error == cudaSuccess) {
    error = f16 ? flash2_backward_columns_of<__half>(args, stream)
                : flash2_backward_columns_of<__nv_bfloat16>(args, stream);
  }
  if (error == cudaSuccess && !problem.deterministic) error = backward_convert_dq(args, stream);
  if (error == cudaSuccess && problem.deterministic) {
    error = f16 ? flash2_backward_rows_of<__half>(args, stream)
                : flash2_backward_rows_of<__nv_bfloat16>(args, stream);
  }
  if (error == cudaSuccess && problem.dsinks) error = backward_sinks(args, stream);
  return error;
}

}  // namespace fal::cuda
