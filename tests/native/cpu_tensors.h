// Test tensors for the CPU engine: memory between guard pages, everything that no element owns
// filled with a NaN pattern, elements rounded to the storage type, read back as doubles.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#include "../../csrc/core/problem.h"

namespace fal::test {

inline size_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
// Half an ulp of 1.
inline double epsilon_of(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

inline double half_to_double(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? ldexp(mantissa, -24)
                                           : ldexp(1024 + mantissa, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

inline double read_element(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::kFloat16) return half_to_double(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

// Rounds to nearest even in double arithmetic: `bits` mantissa bits, subnormal below
// 2^min_exponent.
inline double round_to(double x, DType dtype) {
  if (!isfinite(x) || x == 0.0) return x;
  const int bits = dtype == DType::kFloat32 ? 24 : dtype == DType::kFloat16 ? 11 : 8;
  const int min_exponent = dtype == DType::kFloat16 ? -14 : -126;
  int exponent;
  frexp(x, &exponent);
  const int unit = (exponent - 1 < min_exponent ? min_exponent : exponent - 1) - (bits - 1);
  const double rounded = ldexp(nearbyint(ldexp(x, -unit)), unit);
  const double largest = dtype == DType::kFloat16    ? 65504.0
                         : dtype == DType::kBFloat16 ? 3.3895313892515355e38
                                                     : 3.4028234663852886e38;
  return fabs(rounded) > largest ? copysign(INFINITY, x) : rounded;
}

inline void write_element(void* data, int64_t i, DType dtype, double x) {
  x = round_to(x, dtype);
  const float f = static_cast<float>(x);
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = f;
    return;
  }
  uint32_t wide;
  memcpy(&wide, &f, 4);
  uint16_t bits = static_cast<uint16_t>(wide >> 16);
  if (dtype == DType::kFloat16) {
    const uint16_t sign = bits & 0x8000;
    if (isnan(x)) {
      bits = sign | 0x7e00;
    } else if (isinf(x)) {
      bits = sign | 0x7c00;
    } else if (fabs(x) < 0x1p-14) {
      bits = sign | static_cast<uint16_t>(ldexp(fabs(x), 24));
    } else {
      int exponent;
      const double m = frexp(fabs(x), &exponent);
      bits = sign | static_cast<uint16_t>(((exponent + 14) << 10) + (ldexp(m, 11) - 1024));
    }
  }
  static_cast<uint16_t*>(data)[i] = bits;
}

// Memory whose last byte touches an inaccessible page (and whose first byte does when the size is a
// multiple of the page).
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) {
    page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inner_ = (bytes + page_ - 1) / page_ * page_;
    void* map = mmap(nullptr, inner_ + 2 * page_, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) abort();
    map_ = static_cast<char*>(map);
    if (inner_ && mprotect(map_ + page_, inner_, PROT_READ | PROT_WRITE)) abort();
    data_ = map_ + page_ + inner_ - bytes;
  }
  ~GuardedMemory() { munmap(map_, inner_ + 2 * page_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  void* data() const { return data_; }

 private:
  size_t page_, inner_;
  char *map_, *data_;
};

// A (batch, row, head, dim) tensor with chosen strides. Starts as a NaN pattern everywhere.
class Tensor {
 public:
  Tensor(DType dtype, int64_t batch, int64_t rows, int64_t heads, int64_t dim, int layout)
      : dtype_(dtype), extent_{batch, rows, heads, dim} {
    // 0: (b, s, h, d) contiguous; 1: (b, h, s, d); 2: (b, s, h, d) with gaps between heads and
    // rows.
    const int64_t gap = layout == 2 ? 3 : 0;
    if (layout == 1) {
      row = dim;
      head = rows * row;
      this->batch = heads * head;
    } else {
      head = dim + gap;
      row = heads * head + gap;
      this->batch = rows * row;
    }
    count_ = batch && rows && heads && dim
                 ? (batch - 1) * this->batch + (rows - 1) * row + (heads - 1) * head + dim
                 : 0;
    memory_ = new GuardedMemory(count_ * bytes_of(dtype));
    poison();
  }
  ~Tensor() { delete memory_; }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  void poison() { memset(memory_->data(), 0xff, count_ * bytes_of(dtype_)); }
  AnyView view() const { return {memory_->data(), batch, row, head}; }
  int64_t index(int64_t b, int64_t r, int64_t h, int64_t d) const {
    return b * batch + r * row + h * head + d;
  }
  double get(int64_t b, int64_t r, int64_t h, int64_t d) const {
    return read_element(memory_->data(), index(b, r, h, d), dtype_);
  }
  void set(int64_t b, int64_t r, int64_t h, int64_t d, double x) {
    write_element(memory_->data(), index(b, r, h, d), dtype_, x);
  }
  std::vector<char> bytes() const {
    const char* p = static_cast<const char*>(memory_->data());
    return std::vector<char>(p, p + count_ * bytes_of(dtype_));
  }
  // True when every byte outside the elements still holds the pattern.
  bool gaps_untouched() const {
    std::vector<char> owned(count_, 0);
    for (int64_t b = 0; b < extent_[0]; ++b)
      for (int64_t r = 0; r < extent_[1]; ++r)
        for (int64_t h = 0; h < extent_[2]; ++h)
          for (int64_t d = 0; d < extent_[3]; ++d) owned[index(b, r, h, d)] = 1;
    const std::vector<char> raw = bytes();
    const size_t size = bytes_of(dtype_);
    for (int64_t i = 0; i < count_; ++i)
      for (size_t byte = 0; byte < size; ++byte)
        if (!owned[i] && raw[i * size + byte] != static_cast<char>(0xff)) return false;
    return true;
  }
  int64_t extent(int i) const { return extent_[i]; }
  DType dtype() const { return dtype_; }

  int64_t batch, row, head;

 private:
  DType dtype_;
  int64_t extent_[4];
  int64_t count_;
  GuardedMemory* memory_;
};

// A small generator of its own: cases are the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2862933555777941757ull + 3037000493ull) {}
  // Roughly normal, |x| < 3.5.
  double normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return (sum - 6.0) * 0.58;
  }
  double uniform() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<double>(state_ >> 11) * 0x1p-53;
  }

 private:
  uint64_t state_;
};

}  // namespace fal::test
