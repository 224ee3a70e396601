// How one warp fetches a tile of 16 consecutive keys of one K/V head, contiguous or paged, of any
// page size and element type, into shared memory.
//
// Lane l looks up key l % 16: a page-table entry and a division, a tile ahead of their use. The
// copies, 16 bytes a lane, then get each row's address from the lane that looked it up.
#pragma once

#include "kv_storage.cuh"

namespace fal::cuda {

// Where a key's row is: rows count within the block (a page, or a batch entry).
struct KvPlace {
  int32_t block, row;
};

struct KvRows {
  const KeyValue& kv;
  const int32_t* table;  // this sequence's row of the block table; null = contiguous
  int32_t block;         // batch entry, when contiguous
  int32_t head;
  int32_t first;  // row of key 0

  __device__ __forceinline__ static KvRows make(const KeyValue& kv, const Sequence& seq, int b,
                                                int head_k) {
    const Pages& pages = kv.pages;
    return {kv, pages.block_table ? pages.block_table + b * pages.table_stride : nullptr, b, head_k,
            static_cast<int32_t>(seq.row_k)};
  }
  // Key begin + lane % 16, or the nearest one that somebody sees: the block table may hold anything
  // for the others.
  __device__ __forceinline__ KvPlace find(int begin, Range visible, int lane) const {
    const int key = min(max(begin + lane % kWarpKeys, visible.begin), visible.end - 1);
    const uint32_t row = first + key, page_size = kv.pages.page_size;
    if (!table) return {block, static_cast<int32_t>(row)};
    return {table[row / page_size], static_cast<int32_t>(row % page_size)};
  }
  // In elements.
  __device__ __forceinline__ int64_t offset(const AnyView& view, KvPlace place) const {
    return place.block * view.batch + place.row * view.row + head * view.head;
  }
};

// Copies the `valid` rows of a tile; what lies beyond, in rows or in dim, becomes 0 and is not
// read. `row_offset`, in elements, is that of row lane % 16. Layout::offset(row, chunk) places
// 16-byte chunks. Asynchronous where rows are whole aligned chunks; otherwise element by element,
// and done on return.
template <class Layout, int kBytes>
__device__ __forceinline__ void load_keys(uint32_t smem_tile, const AnyView& view,
                                          int64_t row_offset, Range valid, int dim, bool aligned,
                                          int lane) {
  const char* data = static_cast<const char*>(view.data);
  const int row_bytes = dim * kBytes;
  row_offset *= kBytes;
  if (aligned) {
    if constexpr (kWarpSize % Layout::kChunks == 0) {
      // A lane keeps its chunk, and rows move by a power of two: the swizzle is one XOR of
      // constants.
      constexpr int kStep = kWarpSize / Layout::kChunks, kRowBytes = Layout::kChunks * 16;
      const int first = lane / Layout::kChunks, chunk = lane % Layout::kChunks;
      const uint32_t to = smem_tile + Layout::offset(first, chunk);
      const uint32_t wanted = chunk * 16 < row_bytes ? valid.size() : 0;
      const uint32_t from_valid = first - valid.begin;
      data += chunk * 16;
#pragma unroll
      for (int row = 0; row < kWarpKeys; row += kStep) {
        const uint32_t swizzle = Layout::offset(row, 0) - row * kRowBytes;
        ptx::cp_async_16((to ^ swizzle) + row * kRowBytes,
                         data + __shfl_sync(0xffffffffu, row_offset, first + row),
                         from_valid + row < wanted);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWarpKeys * Layout::kChunks / kWarpSize; ++i) {
        const int id = i * kWarpSize + lane, row = id / Layout::kChunks;
        const int chunk = id % Layout::kChunks;
        ptx::cp_async_16(smem_tile + Layout::offset(row, chunk),
                         data + __shfl_sync(0xffffffffu, row_offset, row) + chunk * 16,
                         valid.contains(row) && chunk * 16 < row_bytes);
      }
    }
    return;
  }
#pragma unroll 1
  for (int id = lane; id < kWarpKeys * Layout::kChunks; id += kWarpSize) {
    const int row = id / Layout::kChunks, chunk = id % Layout::kChunks;
    const char* from = data + __shfl_sync(0xffffffffu, row_offset, row) + chunk * 16;
    uint32_t word[4] = {0, 0, 0, 0};
    const int bytes = valid.contains(row) ? min(16, row_bytes - chunk * 16) : 0;
#pragma unroll
    for (int e = 0; e < 16; e += kBytes) {
      if (e >= bytes) continue;
      const uint32_t element = kBytes == 2 ? *reinterpret_cast<const uint16_t*>(from + e)
                                           : *reinterpret_cast<const uint8_t*>(from + e);
      word[e / 4] |= element << (8 * (e % 4));
    }
    ptx::store_shared(smem_tile + Layout::offset(row, chunk),
                      make_uint4(word[0], word[1], word[2], word[3]));
  }
}

}  // namespace fal::cuda
