// What backward needs before its main pass, row by row: the plan, delta = rowsum(dO * O) - dlse,
// the LSE in base 2, the sinks' gradient, and zeros wherever an output element gets no
// contribution.
#pragma once

#include "../core/online_softmax.h"
#include "attention_forward.h"

namespace fal::cpu::FAL_CPU_ISA {

struct BackwardPlan {
  BackwardProblem problem;
  int tile_rows;
  int tile_keys, block_keys;  // of a tile, of the whole tiles of an item
  int scratch_keys;           // room of a block: its tiles' sizes rounded up to what products need
  int64_t row_blocks, key_blocks;  // per (batch entry, head)
  double flops;
  bool can_sum_delta;
  // Shared by all threads.
  float *lse, *delta;  // [heads_q][rows_q]; lse in base 2, +inf for a row that sees nothing
  float* dq_sum;       // [heads_q][rows_q][head_dim, whole vectors]; null when no row needs it
  int32_t* turn;       // [batch][heads_q][row_blocks]: key blocks that have added their dQ
  double* sink_part;   // [batch][heads_q][row_blocks]; null unless sinks need a gradient

  FAL_INLINE const Shape& shape() const { return problem.forward.shape; }
  FAL_INLINE int64_t row_items() const {
    return static_cast<int64_t>(shape().batch) * shape().heads_q * row_blocks;
  }
  FAL_INLINE int64_t key_items() const {
    return static_cast<int64_t>(shape().batch) * shape().heads_k * key_blocks;
  }
  // Where row j of a key block is in scratch memory: each tile begins at a multiple of what it
  // holds at most.
  FAL_INLINE int scratch_offset(int j) const {
    return j / tile_keys * (scratch_keys / (block_keys / tile_keys)) + j % tile_keys;
  }
  FAL_INLINE int64_t row_item(int b, int h, int64_t block) const {
    return (static_cast<int64_t>(b) * shape().heads_q + h) * row_blocks + block;
  }
  // O comes rounded, which delta = rowsum(dO * O) inherits; rowsum(P * dP) is the same in exact
  // arithmetic. It is known before the first dS where one tile holds all keys.
  FAL_INLINE bool sums_delta(const Sequence& seq) const {
    return can_sum_delta && seq.seqlen_k <= tile_keys;
  }
  // Of row i of a sequence within arrays [heads_q][rows_q].
  FAL_INLINE int64_t stat_index(int b, int h, int32_t i) const {
    const Lengths& lengths = problem.forward.lengths;
    const int64_t first =
        lengths.cu_seqlens_q ? lengths.cu_seqlens_q[b] : static_cast<int64_t>(b) * lengths.seqlen_q;
    return h * shape().rows_q + first + i;
  }

  template <class Product>
  FAL_INLINE static BackwardPlan make(const BackwardProblem& problem) {
    BackwardPlan plan{};
    plan.problem = problem;
    const ForwardProblem& f = problem.forward;
    int64_t longest_q = f.lengths.seqlen_q, longest_k = 0;
    for (int b = 0; b < f.shape.batch; ++b) {
      const Sequence seq = f.lengths.sequence(b);
      const int64_t allocated = f.lengths.allocated_q(b);
      if (allocated > longest_q) longest_q = allocated;
      if (seq.seqlen_k > longest_k) longest_k = seq.seqlen_k;
      plan.flops += 5.0 * f.shape.heads_q * (f.shape.head_dim + f.shape.head_dim_v) * allocated *
                    (seq.seqlen_k + 1.0);
    }
    const int most = Product::max_tile_rows(f.shape);
    plan.tile_rows = even_tile_rows(longest_q, most);
    plan.scratch_keys = Product::block_keys(f.shape, longest_k);
    plan.tile_keys = min_int(Product::kTileKeys, plan.scratch_keys);
    plan.block_keys = plan.scratch_keys;
    if (f.block_mask.given()) {
      const int tiles = plan.block_keys / plan.tile_keys;
      plan.tile_rows = sparse_tile_rows(longest_q, most, f.block_mask.block_q);
      plan.tile_keys = tile_of_blocks(plan.tile_keys, f.block_mask.block_k, 16);
      plan.block_keys = tiles * plan.tile_keys;
    }
    plan.can_sum_delta = Product::kCanSumDelta;
    plan.row_blocks = (longest_q + plan.tile_rows - 1) / plan.tile_rows;
    plan.key_blocks = (longest_k + plan.block_keys - 1) / plan.block_keys;
    return plan;
  }

  // Places the shared arrays at `memory`, or only returns their size when it is null.
  FAL_INLINE size_t place_shared(char* memory) {
    ScratchCursor cursor{memory};
    const int64_t stats = shape().heads_q * shape().rows_q;
    lse = cursor.take<float>(stats);
    delta = cursor.take<float>(stats);
    dq_sum =
        key_blocks > 1 ? cursor.take<float>(stats * round_up(shape().head_dim, kLanes)) : nullptr;
    turn = cursor.take<int32_t>(row_items());
    sink_part = problem.dsinks ? cursor.take<double>(row_items()) : nullptr;
    return cursor.used;
  }
};

template <class T>
FAL_INLINE float row_dot(const T* a, const T* b, int n) {
  Float total = set1(0.f);
  for (int d = 0; d < n; d += kLanes) total = fma(load_dims(a, d, n), load_dims(b, d, n), total);
  return sum(total);
}

// Zeros for rows x all columns of the bias gradient of one (batch entry, head).
static FAL_NOINLINE void clear_dbias(const Bias& dbias, int b, int h, Range rows, int columns) {
  dispatch_element(dbias.dtype, [&](auto element) {
    using T = decltype(element);
    T* base = static_cast<T*>(dbias.data) + b * dbias.batch + h * dbias.head;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      T* row = base + i * dbias.row;
      if (dbias.col == 1) {
        zero_row(row, columns);
      } else {
        for (int64_t j = 0; j < columns; ++j) zero_row(row + j * dbias.col, 1);
      }
    }
  });
}

// dK and dV rows that the tensors hold and no sequence uses: left padding, rows beyond a length,
// rows past the last sequence.
template <class T>
static void clear_unused_keys(const BackwardPlan& plan) {
  const BackwardProblem& p = plan.problem;
  const Shape& shape = plan.shape();
  const Lengths& lengths = p.forward.lengths;
  const View<T> dk = p.dk.as<T>(), dv = p.dv.as<T>();
  const auto clear = [&](int b, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int h = 0; h < shape.heads_k; ++h) {
        zero_row(dk.at(b, row, h), shape.head_dim);
        zero_row(dv.at(b, row, h), shape.head_dim_v);
      }
    }
  };
  for (int b = 0; b < shape.batch; ++b) {
    const Sequence seq = lengths.sequence(b);
    const int64_t begin = lengths.cu_seqlens_k ? lengths.cu_seqlens_k[b] : 0;
    const int64_t end = begin + lengths.allocated_k(b);
    clear(b, begin, seq.row_k < end ? seq.row_k : end);
    clear(b, seq.row_k + seq.seqlen_k, end);
  }
  if (lengths.cu_seqlens_k) clear(0, lengths.cu_seqlens_k[shape.batch], shape.rows_k);
}

// One item is one tile of query rows of one (batch entry, query head); the last one clears what
// lies outside every sequence.
template <class T>
static void backward_row_item(const void* arg, int64_t item, char*) {
  const BackwardPlan& plan = *static_cast<const BackwardPlan*>(arg);
  const BackwardProblem& p = plan.problem;
  const ForwardProblem& f = p.forward;
  const Shape& shape = f.shape;
  const View<T> dq = p.dq.as<T>();
  if (item == plan.row_items()) {
    clear_unused_keys<T>(plan);
    if (!f.lengths.cu_seqlens_q) return;
    for (int64_t row = f.lengths.cu_seqlens_q[shape.batch]; row < shape.rows_q; ++row) {
      for (int h = 0; h < shape.heads_q; ++h) zero_row(dq.at(0, row, h), shape.head_dim);
    }
    return;
  }
  const int64_t batch_head = item / plan.row_blocks, block = item % plan.row_blocks;
  const int b = static_cast<int>(batch_head / shape.heads_q);
  const int h = static_cast<int>(batch_head % shape.heads_q);
  const Sequence seq = f.lengths.sequence(b);
  const Band band = Band::make(seq.seqlen_q, seq.seqlen_k, f.window);
  const int32_t begin = static_cast<int32_t>(block * plan.tile_rows);
  const auto clipped = [&](int32_t length) {
    return Range{begin, min_int(begin + plan.tile_rows, length)};
  };
  const Range rows = clipped(seq.seqlen_q), allocated = clipped(f.lengths.allocated_q(b));

  if (p.dbias.data) clear_dbias(p.dbias, b, h, clipped(f.lengths.seqlen_q), f.lengths.seqlen_k);
  // Rows that no key block will write.
  bool sees_keys = !rows.empty() && !band.keys_of_any(rows).empty();
  if (sees_keys && f.block_mask.given()) {
    sees_keys = HeadMask::make(f.block_mask, b, h, band).next_key(band, rows, 0) != HeadMask::kNone;
  }
  for (int32_t i = sees_keys ? rows.end : begin; i < allocated.end; ++i) {
    zero_row(dq.at(b, seq.row_q + i, h), shape.head_dim);
  }
  const bool sums_delta = plan.sums_delta(seq);
  double sink_sum = 0.0;
  for (int32_t i = rows.begin; i < rows.end; ++i) {
    const int64_t row = seq.row_q + i, stat = plan.stat_index(b, h, i);
    const float lse = lse_reference(*f.lse.at(b, h, row));
    float dot = 0.f;  // rowsum(dO * O)
    if (!sums_delta || plan.sink_part) {
      dot = row_dot(f.out.as<T>().at(b, row, h), p.dout.as<T>().at(b, row, h), shape.head_dim_v);
    }
    const float dlse = p.dlse.data ? *p.dlse.at(b, h, row) : 0.f;
    const float delta = dot - dlse;
    plan.lse[stat] = lse * kLog2E;
    plan.delta[stat] = sums_delta ? -dlse : delta;
    // The sink's value is 0: dsink = P_sink * (0 - delta).
    if (plan.sink_part) sink_sum -= static_cast<double>(expf(f.score.sinks[h] - lse)) * delta;
  }
  if (plan.sink_part) plan.sink_part[item] = sink_sum;
}

// Sums the sinks' gradient in a fixed order.
static void reduce_sinks(const BackwardPlan& plan) {
  if (!plan.problem.dsinks) return;
  for (int h = 0; h < plan.shape().heads_q; ++h) {
    double total = 0.0;
    for (int b = 0; b < plan.shape().batch; ++b) {
      for (int64_t i = 0; i < plan.row_blocks; ++i) total += plan.sink_part[plan.row_item(b, h, i)];
    }
    plan.problem.dsinks[h] = static_cast<float>(total);
  }
}

}  // namespace fal::cpu::FAL_CPU_ISA
