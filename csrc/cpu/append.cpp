#include "append.h"

#include <algorithm>
#include <cmath>

#include "../core/head_dims.h"

namespace fal::cpu {
namespace {

int64_t offset_of(const AnyView& view, int64_t b, int64_t row, int64_t head) {
  return b * view.batch + row * view.row + head * view.head;
}

// Stores one row as the cache keeps it.
void store_row(const AnyView& view, DType dtype, int64_t offset, int32_t dim, const float* row,
               float* scale) {
  if (!scale) {
    for (int32_t d = 0; d < dim; ++d) store_element(view.data, dtype, offset + d, row[d]);
    return;
  }
  float largest = 0.f;
  for (int32_t d = 0; d < dim; ++d) largest = larger_or_nan(largest, std::fabs(row[d]));
  const float limit = quantised_limit(dtype), inverse = largest > 0.f ? limit / largest : 0.f;
  *scale = largest / limit;
  uint8_t* out = static_cast<uint8_t*>(view.data) + offset;
  for (int32_t d = 0; d < dim; ++d) out[d] = quantise(row[d] * inverse, dtype);
}

// Calls item(i) for every i in [0, count), split evenly over the pool when there is enough to do.
template <class Item>
void for_each_item(int64_t count, int64_t elements_per_item, const ThreadPool& pool, Item&& item) {
  constexpr int64_t kElementsPerThread = 1 << 15;
  const int64_t wanted = count * elements_per_item / kElementsPerThread;
  const int workers = static_cast<int>(std::clamp<int64_t>(wanted, 1, pool.threads));
  struct Job {
    Item* item;
    int64_t count;
    int workers;
  } job{&item, count, workers};
  const auto body = [](void* arg, int worker) {
    const Job& job = *static_cast<const Job*>(arg);
    const int64_t end = job.count * (worker + 1) / job.workers;
    for (int64_t i = job.count * worker / job.workers; i < end; ++i) (*job.item)(i);
  };
  if (workers == 1) return body(&job, 0);
  pool.run(pool.ctx, workers, body, &job);
}

}  // namespace

void rotate(const RotateProblem& p, const ThreadPool& pool) {
  const int64_t items = static_cast<int64_t>(p.batch) * p.seqlen;
  for_each_item(items, p.heads * p.head_dim, pool, [&](int64_t item) {
    const int64_t b = item / p.seqlen, i = item % p.seqlen;
    const int64_t first = p.cu_seqlens ? p.cu_seqlens[b] : 0;
    if (p.cu_seqlens && i >= p.cu_seqlens[b + 1] - first) return;
    const int64_t position = (p.offsets ? p.offsets[b] : 0) + (p.advance ? i : 0);
    for (int32_t h = 0; h < p.heads; ++h) {
      const int64_t from = offset_of(p.x, b, first + i, h), to = offset_of(p.out, b, first + i, h);
      for (int32_t d = 0; d < p.head_dim; ++d) {
        const float x = rotated_element(p.rotary, p.x.data, p.dtype, from, position, d);
        store_element(p.out.data, p.dtype, to + d, x);
      }
    }
  });
}

void append(const AppendProblem& p, const ThreadPool& pool) {
  const int64_t items = static_cast<int64_t>(p.batch) * p.seqlen;
  const KeyValue& cache = p.cache;
  for_each_item(items, p.heads_k * (p.head_dim + p.head_dim_v), pool, [&](int64_t item) {
    const int64_t b = item / p.seqlen, i = item % p.seqlen;
    const int64_t first = p.cu_seqlens ? p.cu_seqlens[b] : 0;
    if (p.cu_seqlens && i >= p.cu_seqlens[b + 1] - first) return;
    const int64_t position = p.cache_seqlens[b] + i;
    int64_t block = b, slot = position;
    if (cache.pages.block_table) {
      block =
          cache.pages.block_table[b * cache.pages.table_stride + position / cache.pages.page_size];
      slot = position % cache.pages.page_size;
    }
    float row[kMaxDecodeHeadDim];
    for (int32_t h = 0; h < p.heads_k; ++h) {
      const int64_t k_row = offset_of(p.k, b, first + i, h),
                    v_row = offset_of(p.v, b, first + i, h);
      for (int32_t d = 0; d < p.head_dim; ++d) {
        row[d] = rotated_element(p.rotary, p.k.data, p.dtype, k_row, position, d);
      }
      store_row(cache.k, cache.dtype, offset_of(cache.k, block, slot, h), p.head_dim, row,
                cache.k_scale.data ? cache.k_scale.at(block, h, slot) : nullptr);
      for (int32_t d = 0; d < p.head_dim_v; ++d)
        row[d] = load_element(p.v.data, p.dtype, v_row + d);
      store_row(cache.v, cache.dtype, offset_of(cache.v, block, slot, h), p.head_dim_v, row,
                cache.v_scale.data ? cache.v_scale.at(block, h, slot) : nullptr);
    }
  });
}

}  // namespace fal::cpu
