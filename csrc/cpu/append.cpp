#include "append.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/convert.h"

namespace fal::cpu {
namespace {

float element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return float16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

void set_element(void* data, DType dtype, int64_t index, float x) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_float16(x);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_bfloat16(x);
      break;
    default:
      static_cast<float*>(data)[index] = x;
  }
}

int64_t offset_of(const AnyView& view, int64_t b, int64_t row, int64_t head) {
  return b * view.batch + row * view.row + head * view.head;
}

void load_row(const AnyView& view, DType dtype, int64_t offset, int32_t dim, float* out) {
  for (int32_t d = 0; d < dim; ++d) out[d] = element(view.data, dtype, offset + d);
}

void rotate_row(const Rotary& rotary, int64_t position, float* row) {
  const int64_t angles = position * rotary.row_stride;
  for (int32_t p = 0; p < rotary.pairs; ++p) {
    const RotaryPair pair = rotary_pair(rotary, p);
    const float c = element(rotary.cos, rotary.dtype, angles + p);
    const float s = element(rotary.sin, rotary.dtype, angles + p);
    const float a = row[pair.first], b = row[pair.second];
    row[pair.first] = a * c - b * s;
    row[pair.second] = a * s + b * c;
  }
}

// Stores one row as the cache keeps it; quantised types get a scale of max |x| / the type's largest
// value.
void store_row(const AnyView& view, DType dtype, int64_t offset, int32_t dim, const float* row,
               float* scale) {
  if (!scale) {
    for (int32_t d = 0; d < dim; ++d) set_element(view.data, dtype, offset + d, row[d]);
    return;
  }
  float largest = 0.f;
  for (int32_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(row[d]));
  const float limit = dtype == DType::kInt8 ? 127.f : kFloat8E4M3Max;
  *scale = largest / limit;
  const float inverse = largest > 0.f ? limit / largest : 0.f;
  uint8_t* out = static_cast<uint8_t*>(view.data) + offset;
  for (int32_t d = 0; d < dim; ++d) {
    out[d] = dtype == DType::kInt8
                 ? static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(row[d] * inverse)))
                 : float_to_float8_e4m3(row[d] * inverse);
  }
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
    float row[256];
    for (int32_t h = 0; h < p.heads; ++h) {
      load_row(p.x, p.dtype, offset_of(p.x, b, first + i, h), p.head_dim, row);
      rotate_row(p.rotary, position, row);
      store_row(p.out, p.dtype, offset_of(p.out, b, first + i, h), p.head_dim, row, nullptr);
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
    float row[256];
    for (int32_t h = 0; h < p.heads_k; ++h) {
      load_row(p.k, p.dtype, offset_of(p.k, b, first + i, h), p.head_dim, row);
      if (p.rotary.cos) rotate_row(p.rotary, position, row);
      store_row(cache.k, cache.dtype, offset_of(cache.k, block, slot, h), p.head_dim, row,
                cache.k_scale.data ? cache.k_scale.at(block, h, slot) : nullptr);
      load_row(p.v, p.dtype, offset_of(p.v, b, first + i, h), p.head_dim_v, row);
      store_row(cache.v, cache.dtype, offset_of(cache.v, block, slot, h), p.head_dim_v, row,
                cache.v_scale.data ? cache.v_scale.at(block, h, slot) : nullptr);
    }
  });
}

}  // namespace fal::cpu
