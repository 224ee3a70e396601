// Whether a problem's rows can be moved in 16-byte chunks. Chosen once per launch, on the host.
#pragma once

#include "../core/problem.h"

namespace fal::cuda {

// Every row of the view starts at a multiple of 16 bytes and holds whole chunks of 8 elements of 16
// bits. The stride of a dimension that has one entry does not matter.
inline bool rows_aligned(const AnyView& view, int64_t batch, int64_t heads, int32_t dim) {
  const auto aligned = [](int64_t elements) { return elements % 8 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && aligned(view.row) && aligned(dim) &&
         (batch == 1 || aligned(view.batch)) && (heads == 1 || aligned(view.head));
}

inline bool rows_aligned(const ForwardProblem& problem) {
  const Shape& s = problem.shape;
  const int64_t kv_batch = problem.kv.pages.block_table ? 2 : s.batch;  // pages, not sequences
  return rows_aligned(problem.q, s.batch, s.heads_q, s.head_dim) &&
         rows_aligned(problem.kv.k, kv_batch, s.heads_k, s.head_dim) &&
         rows_aligned(problem.kv.v, kv_batch, s.heads_k, s.head_dim_v) &&
         rows_aligned(problem.out, s.batch, s.heads_q, s.head_dim_v);
}

inline bool rows_aligned(const BackwardProblem& problem) {
  const Shape& s = problem.forward.shape;
  return rows_aligned(problem.forward) &&
         rows_aligned(problem.dout, s.batch, s.heads_q, s.head_dim_v) &&
         rows_aligned(problem.dq, s.batch, s.heads_q, s.head_dim) &&
         rows_aligned(problem.dk, s.batch, s.heads_k, s.head_dim) &&
         rows_aligned(problem.dv, s.batch, s.heads_k, s.head_dim_v);
}

}  // namespace fal::cuda
