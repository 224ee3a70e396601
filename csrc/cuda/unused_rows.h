// Rows that belong to an output tensor and to no sequence: beyond seqused, before leftpad_k, behind
// the last entry of cu_seqlens. Kernels never visit them, and no element of an output may be left
// unset: here they become 0, and their LSE -inf.
#pragma once

#include "../core/problem.h"
#include "device.cuh"

namespace fal::cuda {

struct UnusedRowsArgs {
  Lengths lengths;
  int32_t batch;
  int64_t rows_total;  // of the tensor, over all batch entries
  AnyView tensor;      // of 16-bit elements
  int32_t dim;
  RowStats lse;  // data null when there is none
  bool of_keys;  // rows are keys, not queries
};

cudaError_t fill_unused_rows(const UnusedRowsArgs& args, int32_t heads, cudaStream_t stream);

// Of a forward's outputs.
cudaError_t fill_unused_query_rows(const ForwardProblem& problem, cudaStream_t stream);

}  // namespace fal::cuda
