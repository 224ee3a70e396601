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

// Runs of rows at one stride, whatever the layout and the element type: for kernels that fetch the
// addresses of a tile of keys at once, and for quantised K/V. Strides count bytes; the factors of
// quantised rows count floats.
struct KvRun {
  const char *k, *v;               // the first row
  const float *k_scale, *v_scale;  // its factors; null unless quantised
  int32_t rows;                    // how many follow at the strides below, itself included
};

struct KvRuns {
  KeyValue kv;
  int64_t element;  // bytes
  int64_t block;    // batch entry, when contiguous
  int32_t head;
  const int32_t* table;  // this sequence's row of the block table; null = contiguous
  int64_t first;         // row of key 0

  FAL_HOST_DEVICE static KvRuns make(const KeyValue& kv, const Sequence& s, int32_t b,
                                     int32_t head_k) {
    const int64_t element = kv.dtype == DType::kFloat32                                  ? 4
                            : kv.dtype == DType::kInt8 || kv.dtype == DType::kFloat8E4M3 ? 1
                                                                                         : 2;
    const Pages& pages = kv.pages;
    return {kv,
            element,
            b,
            head_k,
            pages.block_table ? pages.block_table + b * pages.table_stride : nullptr,
            s.row_k};
  }
  FAL_HOST_DEVICE int64_t k_stride() const { return kv.k.row * element; }
  FAL_HOST_DEVICE int64_t v_stride() const { return kv.v.row * element; }
  // The run that begins with key j.
  FAL_HOST_DEVICE KvRun at(int32_t j) const {
    int64_t where = block, row = first + j;
    int32_t rows = Band::kMaxLength;
    if (table) {
      where = table[row / kv.pages.page_size];
      row %= kv.pages.page_size;
      rows = kv.pages.page_size - static_cast<int32_t>(row);
    }
    const auto bytes = [&](const AnyView& view) {
      return static_cast<const char*>(view.data) +
             (where * view.batch + row * view.row + head * view.head) * element;
    };
    const auto factor = [&](const RowStats& scale) -> const float* {
      return scale.data ? scale.at(where, head, row) : nullptr;
    };
    return {bytes(kv.k), bytes(kv.v), factor(kv.k_scale), factor(kv.v_scale), rows};
  }
};

// Quantised K/V, contiguous or paged: a row is its stored bytes and the factor they are multiplied
// by.
struct QuantisedRow {
  const char* stored;
  float scale;
  bool int8;  // else fp8 e4m3
};

struct QuantisedKv {
  KvRuns runs;

  FAL_HOST_DEVICE static QuantisedKv make(const KeyValue& kv, const Sequence& s, int32_t b,
                                          int32_t head_k) {
    return {KvRuns::make(kv, s, b, head_k)};
  }
  FAL_HOST_DEVICE QuantisedRow k_row(int32_t j) const {
    const KvRun run = runs.at(j);
    return {run.k, *run.k_scale, runs.kv.dtype == DType::kInt8};
  }
  FAL_HOST_DEVICE QuantisedRow v_row(int32_t j) const {
    const KvRun run = runs.at(j);
    return {run.v, *run.v_scale, runs.kv.dtype == DType::kInt8};
  }
};

}  // namespace fal
