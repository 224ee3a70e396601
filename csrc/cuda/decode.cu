// Decoding's row of the engine table: what it takes, its workspace, and the order of its launches.
#include "alignment.h"
#include "decode.h"
#include "decode_split.h"
#include "engine_checks.h"
#include "launch.h"
#include "unused_rows.h"

namespace fal::cuda {
namespace {

// Calls of more query tokens, or of more rows a K/V head, are FlashAttention-2's: its tiles of 128
// rows read K and V from L2 more often and feed the tensor cores better.
constexpr int32_t kDecodeTokens = 16;

int32_t group_of(const Shape& shape) {
  return shape.heads_k > 0 ? max_int(1, shape.heads_q / shape.heads_k) : 1;
}

bool quantised(const ForwardProblem& problem) {
  return problem.kv.dtype == DType::kInt8 || problem.kv.dtype == DType::kFloat8E4M3;
}

// Every row of K or V starts at a multiple of 16 bytes and holds whole chunks of 16.
bool chunks_aligned(const AnyView& view, int64_t batch, int64_t heads, int64_t dim, int64_t bytes) {
  const auto aligned = [&](int64_t elements) { return elements * bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && aligned(view.row) && aligned(dim) &&
         (batch == 1 || aligned(view.batch)) && (heads == 1 || aligned(view.head));
}

}  // namespace

const char* decode_supports_forward(const ForwardProblem& problem, int capability) {
  const Shape& shape = problem.shape;
  const bool has_bias = problem.score.bias.data != nullptr;
  ForwardProblem plain = problem;
  if (quantised(problem)) plain.kv.dtype = shape.dtype;
  plain.score.bias.data = nullptr;
  if (const char* reason = tensor_cores_cannot(plain, capability)) return reason;
  if (const char* reason = band_tiles_cannot(problem)) return reason;
  if (problem.score.dropout_threshold) return "decoding has no dropout";
  const DType bias_dtype = problem.score.bias.dtype;
  if (has_bias && bias_dtype != DType::kFloat32 && bias_dtype != shape.dtype) {
    return "the bias is neither float32 nor of q's dtype";
  }
  const int32_t group = group_of(shape), tokens = problem.lengths.seqlen_q;
  // What FlashAttention-2 does not take, decoding takes at any length.
  if (!quantised(problem) && !has_bias &&
      (tokens > kDecodeTokens || tokens * group > DecodeParts::kRows)) {
    return "q has more than 16 tokens of a sequence, or more than 256 rows for a K/V head";
  }
  if (int64_t(shape.heads_k) * tokens * group > Band::kMaxLength) {
    return "q has more than 2^30 rows of one sequence";
  }
  const int head_dim = max_int(shape.head_dim, shape.head_dim_v);
  if (head_dim > 128 && !quantised(problem) && small_shared_memory(capability)) {
    return "head dims above 128 need 142 KB of shared memory; this device has 99 KB";
  }
  return nullptr;
}

const char* decode_supports_backward(const BackwardProblem&, int) {
  return "decoding has no backward";
}

DecodeWorkspace DecodeWorkspace::make(const ForwardProblem& problem, void* memory) {
  const Shape& shape = problem.shape;
  const Lengths& lengths = problem.lengths;
  const int32_t group = group_of(shape);
  DecodeWorkspace w{};
  w.parts = DecodeParts::most(lengths.seqlen_q, lengths.seqlen_k, problem.window, group);
  w.rows = min_int(lengths.seqlen_q, DecodeParts::kRows / group) * group;
  w.out_ld = ceil_div(shape.head_dim_v, 4) * 4;
  // Rows of floats first: they are read 16 bytes at a time.
  w.out = static_cast<float*>(memory);
  if (memory) {
    w.states = reinterpret_cast<float2*>(w.out + w.row(shape, shape.batch, 0, 0, 0) * w.out_ld);
  }
  return w;
}

int64_t DecodeWorkspace::bytes(const ForwardProblem& problem) {
  const DecodeWorkspace w = make(problem, nullptr);
  if (w.parts == 1) return 0;
  const int64_t rows = w.row(problem.shape, problem.shape.batch, 0, 0, 0);
  return rows * static_cast<int64_t>(w.out_ld * sizeof(float) + sizeof(float2));
}

int64_t decode_forward_workspace_bytes(const ForwardProblem& problem) {
  return DecodeWorkspace::bytes(problem);
}

cudaError_t decode_forward(const ForwardProblem& problem, void* workspace, cudaStream_t stream) {
  const Shape& shape = problem.shape;
  cudaError_t error = fill_unused_query_rows(problem, stream);
  const bool nothing = problem.lengths.seqlen_q == 0 || shape.heads_q == 0;
  if (error != cudaSuccess || nothing) return error;
  const int64_t kv_batch = problem.kv.pages.block_table ? 2 : shape.batch;  // pages, not sequences
  const int64_t bytes = quantised(problem) ? 1 : 2;
  DecodeArgs args{};
  args.problem = problem;
  args.workspace = DecodeWorkspace::make(problem, workspace);
  args.group = group_of(shape);
  args.general = !problem.score.plain() || !(problem.score.scale > 0.f);
  args.q_aligned = rows_aligned(problem.q, shape.batch, shape.heads_q, shape.head_dim) &&
                   rows_aligned(problem.out, shape.batch, shape.heads_q, shape.head_dim_v);
  args.kv_aligned = chunks_aligned(problem.kv.k, kv_batch, shape.heads_k, shape.head_dim, bytes) &&
                    chunks_aligned(problem.kv.v, kv_batch, shape.heads_k, shape.head_dim_v, bytes);
  error = shape.dtype == DType::kFloat16 ? decode_kernel_of<__half>(args, stream)
                                         : decode_kernel_of<__nv_bfloat16>(args, stream);
  return error == cudaSuccess ? combine_parts(args, stream) : error;
}

}  // namespace fal::cuda
