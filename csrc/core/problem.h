// What an attention kernel is asked to do: strided views, sequence lengths, and small structs by
// topic. All are plain data: they cross the C interface to the CPU and CUDA engines and are passed
// to kernels by value.
#pragma once

#include "block_mask.h"

namespace fal {

enum class DType : int32_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kInt8 = 3,
  kFloat8E4M3 = 4
};

// A (batch, row, head, dim) tensor of T; the last dimension has unit stride. Strides count elements
// and are 64-bit. A varlen tensor (total rows, head, dim) is the same with batch = 0: Lengths
// supplies the row.
template <class T>
struct View {
  T* data;
  int64_t batch, row, head;

  FAL_HOST_DEVICE T* at(int64_t b, int64_t r, int64_t h) const {
    return data + b * batch + r * row + h * head;
  }
};

// The same with the element type known only at run time.
struct AnyView {
  void* data;
  int64_t batch, row, head;

  template <class T>
  FAL_HOST_DEVICE View<T> as() const {
    return {static_cast<T*>(data), batch, row, head};
  }
};

// float32 (batch, head, row), for LSE, its gradient and delta. Any strides, batch = 0 when varlen.
struct RowStats {
  float* data;  // null when absent
  int64_t batch, head, row;

  FAL_HOST_DEVICE float* at(int64_t b, int64_t h, int64_t r) const {
    return data + b * batch + h * head + r * row;
  }
};

struct Shape {
  int32_t batch, heads_q, heads_k;
  int32_t head_dim;    // of q and k
  int32_t head_dim_v;  // of v and out
  DType dtype;         // of q, out and every gradient
  int64_t rows_q;      // rows that q holds over all batch entries: batch * seqlen_q, or total_q
  int64_t rows_k;      // rows that k holds; paged: the most that the block table can address

  // The K/V head that query head h reads.
  FAL_HOST_DEVICE int32_t kv_head(int32_t h) const { return h / (heads_q / heads_k); }
};

// One sequence of the batch: where its rows start and how many there are.
struct Sequence {
  int64_t row_q, row_k;  // first row within the views
  int32_t seqlen_q, seqlen_k;
};

// Dense, varlen, "used" lengths and left padding all become one Sequence per batch entry. Null =
// absent.
struct Lengths {
  int32_t seqlen_q, seqlen_k;   // dense: the lengths; varlen: the maxima that size the grid
  const int32_t* cu_seqlens_q;  // (batch + 1), varlen queries
  const int32_t* cu_seqlens_k;  // (batch + 1), varlen keys
  const int32_t* seqused_q;     // (batch), rows used of each sequence
  const int32_t* seqused_k;     // (batch), keys used of each sequence, counted from row 0
  const int32_t* leftpad_k;     // (batch), keys to skip at the start of each sequence
  // Rows of q, out and dq beyond seqused_q belong to the tensor but to no sequence: kernels write 0
  // there (and LSE -inf), so that no element of an output is ever left unset.

  FAL_HOST_DEVICE Sequence sequence(int32_t b) const {
    Sequence s{0, 0, seqlen_q, seqlen_k};
    if (cu_seqlens_q) {
      s.row_q = cu_seqlens_q[b];
      s.seqlen_q = cu_seqlens_q[b + 1] - cu_seqlens_q[b];
    }
    if (cu_seqlens_k) {
      s.row_k = cu_seqlens_k[b];
      s.seqlen_k = cu_seqlens_k[b + 1] - cu_seqlens_k[b];
    }
    if (seqused_q) s.seqlen_q = min_int(s.seqlen_q, seqused_q[b]);
    if (seqused_k) s.seqlen_k = min_int(s.seqlen_k, seqused_k[b]);
    if (leftpad_k) {
      s.row_k += leftpad_k[b];
      s.seqlen_k = max_int(0, s.seqlen_k - leftpad_k[b]);
    }
    return s;
  }

  // Rows of batch entry b that the tensors hold, used or not.
  FAL_HOST_DEVICE int32_t allocated_q(int32_t b) const {
    return cu_seqlens_q ? cu_seqlens_q[b + 1] - cu_seqlens_q[b] : seqlen_q;
  }
  FAL_HOST_DEVICE int32_t allocated_k(int32_t b) const {
    return cu_seqlens_k ? cu_seqlens_k[b + 1] - cu_seqlens_k[b] : seqlen_k;
  }
};

// Additive bias on the scores, (batch, heads_q, seqlen_q, seqlen_k), any strides (0 broadcasts), of
// `dtype`.
struct Bias {
  void* data;  // null when absent
  int64_t batch, head, row, col;
  DType dtype;
};

// Everything that turns q.k into the softmax's argument, in this order:
//   s = scale * q.k;   s = softcap * tanh(s / softcap);   s += bias;   s -= slope * |i + shift -
//   j|.
// Then the band masks with -inf, a sink joins the softmax's denominator, and dropout scales what
// survives by 1 / keep probability. The LSE includes the sink and not the dropout.
struct ScoreOptions {
  float scale;
  float softcap;              // 0 = off
  const float* alibi_slopes;  // (batch, heads_q) with alibi_batch_stride, or (heads_q) with stride
                              // 0; null = off
  int64_t alibi_batch_stride;
  const float* sinks;  // (heads_q), natural-log units like the scores; null = off
  Bias bias;
  uint64_t dropout_seed;
  uint32_t dropout_threshold;  // see philox.h; 0 = off

  FAL_HOST_DEVICE float alibi_slope(int32_t b, int32_t h) const {
    return alibi_slopes ? alibi_slopes[b * alibi_batch_stride + h] : 0.f;
  }
  // True when the plain score (scale and band only) is all there is. Sinks do not touch the scores.
  FAL_HOST_DEVICE bool plain() const {
    return softcap == 0.f && !alibi_slopes && !bias.data && dropout_threshold == 0;
  }
};

// K/V in pages instead of rows: k, v are (num_pages, page_size, heads_k, dim) views (View::batch
// strides pages) and block_table (batch, max pages per sequence) maps logical pages to physical
// ones.
struct Pages {
  const int32_t* block_table;  // null = contiguous K/V
  int64_t table_stride;        // entries from one batch entry's row to the next
  int32_t page_size;           // tokens
};

struct KeyValue {
  AnyView k, v;
  DType dtype;  // of k and v: Shape::dtype, or a quantised type
  Pages pages;
  RowStats k_scale, v_scale;  // quantised K/V: one factor per (token, head); otherwise null
};

struct ForwardProblem {
  Shape shape;
  Lengths lengths;
  Window window;
  BlockMask block_mask;  // what it hides is hidden beside the window; not given() when absent
  ScoreOptions score;
  AnyView q;
  KeyValue kv;
  AnyView out;
  RowStats lse;        // natural log; -inf for a row that sees nothing
  int32_t num_splits;  // workers that share a sequence's keys, where an engine splits them; 0: it
                       // chooses. Changes no bit
};

// Gradients of a forward call. dk and dv are (batch, row, heads_k, dim): a query group's sum.
struct BackwardProblem {
  ForwardProblem forward;  // out and lse hold the forward's results
  AnyView dout;
  RowStats dlse;  // gradient of the returned LSE; data null when it is not used
  AnyView dq, dk, dv;
  float* dsinks;  // (heads_q), overwritten; null unless sinks are given and need a gradient
  Bias dbias;     // like bias, no broadcasting (overwritten); data null unless needed. CPU only
  bool deterministic;
};

}  // namespace fal
