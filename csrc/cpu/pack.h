// Rows of tensors -> fp32 tiles in the layouts of tile_gemm.h, and back. Only rows that belong to
// the sequence are read; the padding of a tile is zeros.
#pragma once

#include "../core/kv.h"
#include "tile_gemm.h"

namespace fal::cpu::FAL_CPU_ISA {

// Where the rows of a tensor are: row(r) = base + r * stride.
template <class T>
struct StridedRows {
  const T* base;
  int64_t stride;

  FAL_INLINE const T* operator()(int r) const { return base + r * stride; }
};

// Collects whether every value seen is finite, for one multiply-add a vector: 0 * x is 0 or NaN.
struct FiniteCheck {
  Float zeros = set1(0.f);

  FAL_INLINE void see(Float x) { zeros = fma(x, set1(0.f), zeros); }
  FAL_INLINE bool all_finite() const { return sum(zeros) == 0.f; }
};

template <class T>
FAL_INLINE Float load_dims(const T* row, int dim, int dims) {
  return dim + kLanes <= dims ? load(row + dim) : load_first(row + dim, dims - dim);
}

// A quantised row's elements are multiplied by its factor on the way.
FAL_INLINE Float load_dims(QuantisedRow row, int dim, int dims) {
  const Float x = row.int8 ? load_dims(reinterpret_cast<const Int8*>(row.stored), dim, dims)
                           : load_dims(reinterpret_cast<const Float8E4M3*>(row.stored), dim, dims);
  return x * row.scale;
}

// -> [row][ld], rows up to padded_rows and dims up to a whole vector zero. True if all is finite.
template <class Rows>
FAL_INLINE bool pack_rows(const Rows& rows, int n, int padded_rows, int dims, int ld, float* out) {
  FiniteCheck finite;
  for (int r = 0; r < n; ++r) {
    const auto row = rows(r);
    for (int d = 0; d < dims; d += kLanes) {
      const Float x = load_dims(row, d, dims);
      finite.see(x);
      store(out + r * ld + d, x);
    }
  }
  memset(out + static_cast<int64_t>(n) * ld, 0, sizeof(float) * (padded_rows - n) * ld);
  return finite.all_finite();
}

// -> [dim / kPanel][capacity][kPanel]. True if all is finite.
template <class Rows>
FAL_INLINE bool pack_panels(const Rows& rows, int n, int capacity, int dims, float* out) {
  FiniteCheck finite;
  for (int r = 0; r < n; ++r) {
    const auto row = rows(r);
    for (int d = 0; d < dims; d += kLanes) {
      const Float x = load_dims(row, d, dims);
      finite.see(x);
      store(out + static_cast<int64_t>(d / kPanel * kPanel) * capacity + r * kPanel + d % kPanel,
            x);
    }
  }
  return finite.all_finite();
}

// The transpose, scaled -> [row / kPanel][dims][kPanel]; rows up to a whole panel zero.
template <class Rows>
FAL_INLINE void pack_transposed(const Rows& rows, int n, int dims, float scale, float* out) {
  for (int r0 = 0; r0 < round_up(n, kPanel); r0 += kLanes) {
    float* panel = out + static_cast<int64_t>(r0 / kPanel * kPanel) * dims + r0 % kPanel;
    for (int d0 = 0; d0 < dims; d0 += kLanes) {
      Float block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = r0 + i < n ? load_dims(rows(r0 + i), d0, dims) * scale : set1(0.f);
      }
      transpose(block);
      const int width = min_int(kLanes, dims - d0);
      if (width == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + (d0 + i) * kPanel, block[i]);
      } else {
        for (int i = 0; i < width; ++i) store(panel + (d0 + i) * kPanel, block[i]);
      }
    }
  }
}

// One row of n elements <- x * scale, rounded to T.
template <class T>
FAL_INLINE void store_row(T* row, const float* x, int n, float scale) {
  int d = 0;
  for (; d + kLanes <= n; d += kLanes) store(row + d, load(x + d) * scale);
  if (d < n) store_first(row + d, load(x + d) * scale, n - d);
}

template <class T>
FAL_INLINE void zero_row(T* row, int n) {
  memset(row, 0, sizeof(T) * n);
}

// One element <-> float, for the rare path.
template <class T>
FAL_INLINE float load_one(const T* p) {
  return load_first(p, 1)[0];
}
template <class T>
FAL_INLINE void store_one(T* p, float x) {
  store_first(p, set1(x), 1);
}

// Calls f(T{}) with the storage type of an element.
template <class F>
FAL_INLINE void dispatch_element(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) f(float{});
  if (dtype == DType::kFloat16) f(Half{});
  if (dtype == DType::kBFloat16) f(BFloat16{});
}

}  // namespace fal::cpu::FAL_CPU_ISA
