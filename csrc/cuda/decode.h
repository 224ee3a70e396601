// Decoding for the engine table: what each function means is said in engine.h.
#pragma once

#include "../core/problem.h"
#include "device.cuh"

namespace fal::cuda {

const char* decode_supports_forward(const ForwardProblem& problem, int capability);
int64_t decode_forward_workspace_bytes(const ForwardProblem& problem);
cudaError_t decode_forward(const ForwardProblem& problem, void* workspace, cudaStream_t stream);

// It has none: the reason, for every problem.
const char* decode_supports_backward(const BackwardProblem& problem, int capability);

// The parts' partial results, kept apart until they are combined: for every row of the tile
// (sequence, K/V head, part) its softmax's maximum (base-2 log) and sum, and its unnormalised
// output.
struct DecodeWorkspace {
  float2* states;
  float* out;
  int32_t parts;   // of a sequence, at most; 1: nothing is kept
  int32_t rows;    // of a K/V head, at most
  int32_t out_ld;  // floats

  static DecodeWorkspace make(const ForwardProblem& problem, void* memory);
  static int64_t bytes(const ForwardProblem& problem);

  FAL_HOST_DEVICE int64_t row(const Shape& shape, int32_t b, int32_t head_k, int32_t part,
                              int32_t r) const {
    return ((static_cast<int64_t>(b) * shape.heads_k + head_k) * parts + part) * rows + r;
  }
};

struct DecodeArgs {
  ForwardProblem problem;
  DecodeWorkspace workspace;
  int32_t group;               // query heads of a K/V head
  int32_t m_blocks;            // tiles of rows of a K/V head, at most
  bool general;                // more than a positive scale and the band touches the scores
  bool q_aligned, kv_aligned;  // every row is a whole number of aligned 16-byte chunks
};

// One per element type of q, each in a file of its own so that they compile side by side.
template <class T>
cudaError_t decode_kernel_of(const DecodeArgs& args, cudaStream_t stream);

// Adds up the parts of sequences that have several (combine.cu).
cudaError_t combine_parts(const DecodeArgs& args, cudaStream_t stream);

}  // namespace fal::cuda
