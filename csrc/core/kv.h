// KV addressing policies: where row j of one (batch entry, K/V head) lives. A policy is made once
// per work item and asked once per row, so that no loop above it knows whether K/V is contiguous or
// paged. Rows count from the start of the sequence, after left padding.
#pragma once

#include "problem.h"

namespace fal {

template <class T>
struct ContiguousKv {
  const T* k;  // row 0 of this sequence and head
  const T* v;
  int64_t k_stride, v_stride;

  FAL_HOST_DEVICE static ContiguousKv make(const KeyValue& kv, const Sequence& s, int32_t b,
                                           int32_t head_k) {
    return {kv.k.as<const T>().at(b, s.row_k, head_k), kv.v.as<const T>().at(b, s.row_k, head_k),
            kv.k.row, kv.v.row};
  }
  FAL_HOST_DEVICE const T* k_row(int32_t j) const { return k + j * k_stride; }
  FAL_HOST_DEVICE const T* v_row(int32_t j) const { return v + j * v_stride; }
};

// Entries of the block table beyond the last page in use are never read, nor are unused slots of
// that page.
template <class T>
struct PagedKv {
  const T* k;  // slot 0 of physical page 0, this head
  const T* v;
  int64_t k_page, v_page, k_stride, v_stride;
  const int32_t* table;  // this sequence's row of the block table
  int32_t page_size;
  int32_t first_slot;  // left padding, in tokens

  FAL_HOST_DEVICE static PagedKv make(const KeyValue& kv, const Sequence& s, int32_t b,
                                      int32_t head_k) {
    return {kv.k.as<const T>().at(0, 0, head_k),
            kv.v.as<const T>().at(0, 0, head_k),
            kv.k.batch,
            kv.v.batch,
            kv.k.row,
            kv.v.row,
            kv.pages.block_table + b * kv.pages.table_stride,
            kv.pages.page_size,
            static_cast<int32_t>(s.row_k)};
  }
  FAL_HOST_DEVICE const T* k_row(int32_t j) const {
    const int32_t slot = first_slot + j;
    return k + table[slot / page_size] * k_page + (slot % page_size) * k_stride;
  }
  FAL_HOST_DEVICE const T* v_row(int32_t j) const {
    const int32_t slot = first_slot + j;
    return v + table[slot / page_size] * v_page + (slot % page_size) * v_stride;
  }
};

}  // namespace fal
