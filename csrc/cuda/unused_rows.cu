// Clears the rows of an output that belong to no sequence: see unused_rows.h.
#include "../core/online_softmax.h"
#include "launch.h"
#include "unused_rows.h"

namespace fal::cuda {
namespace {

struct UnusedRows {
  int64_t first_row;  // within the view, of what `before` and `after` count from
  Range before, after;
};

__device__ __forceinline__ UnusedRows unused_rows(const UnusedRowsArgs& args, int b) {
  const Lengths& lengths = args.lengths;
  const int32_t* cu_seqlens = args.of_keys ? lengths.cu_seqlens_k : lengths.cu_seqlens_q;
  if (b == args.batch) {  // behind the last sequence
    if (!cu_seqlens) return {0, {0, 0}, {0, 0}};
    return {cu_seqlens[b], {0, 0}, {0, static_cast<int32_t>(args.rows_total - cu_seqlens[b])}};
  }
  const Sequence seq = lengths.sequence(b);
  if (!args.of_keys) return {seq.row_q, {0, 0}, {seq.seqlen_q, lengths.allocated_q(b)}};
  const int64_t first_row = cu_seqlens ? cu_seqlens[b] : 0;
  const int32_t allocated = lengths.allocated_k(b);
  const int32_t begin = min_int(static_cast<int32_t>(seq.row_k - first_row), allocated);
  return {first_row, {0, begin}, {min_int(begin + seq.seqlen_k, allocated), allocated}};
}

// blockIdx = (which share of the rows, head, batch entry; one entry more for the tail).
__global__ void __launch_bounds__(128)
    fill_unused_rows_kernel(const __grid_constant__ UnusedRowsArgs args) {
  const int h = blockIdx.y, b = blockIdx.z;
  const UnusedRows unused = unused_rows(args, b);
  const int batch_index = b == args.batch ? 0 : b;  // varlen views have no batch stride
  const View<uint16_t> tensor = args.tensor.as<uint16_t>();
  const int before = unused.before.size(), count = before + unused.after.size();
  for (int r = blockIdx.x; r < count; r += gridDim.x) {
    const int64_t row =
        unused.first_row + (r < before ? unused.before.begin + r : unused.after.begin + r - before);
    for (int d = threadIdx.x; d < args.dim; d += blockDim.x) tensor.at(batch_index, row, h)[d] = 0;
    if (args.lse.data && threadIdx.x == 0) *args.lse.at(batch_index, h, row) = -FAL_INFINITY;
  }
}

}  // namespace

cudaError_t fill_unused_rows(const UnusedRowsArgs& args, int32_t heads, cudaStream_t stream) {
  const Lengths& l = args.lengths;
  const bool may_exist =
      args.of_keys ? l.cu_seqlens_k || l.seqused_k || l.leftpad_k : l.cu_seqlens_q || l.seqused_q;
  if (!may_exist || args.rows_total == 0) return cudaSuccess;
  const dim3 grid(min_int(64, args.of_keys ? l.seqlen_k + 1 : l.seqlen_q + 1), heads,
                  args.batch + 1);
  return launch(fill_unused_rows_kernel, grid, 128, 0, stream, args);
}

cudaError_t fill_unused_query_rows(const ForwardProblem& p, cudaStream_t stream) {
  return fill_unused_rows({p.lengths, p.shape.batch, p.shape.rows_q, p.out, p.shape.head_dim_v,
                           p.lse, /*of_keys=*/false},
                          p.shape.heads_q, stream);
}

}  // namespace fal::cuda
