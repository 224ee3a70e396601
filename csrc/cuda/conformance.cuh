// What the two conformance kernels share: sections, the recorder that writes result words, and the
// host code around a run.
#pragma once

#include <string>
#include <vector>

#include "conformance.h"
#include "launch.h"

namespace fal::cuda::conformance {

constexpr uint32_t kUnset = 0xdeadbeefu;  // words that the kernel should have written and did not

struct Section {
  const char* name;
  int rows;  // words per thread
  const char* compare;
};

// Writes a row of the output at a time: one word per thread.
struct Recorder {
  uint32_t* next;  // this thread's word of the next row
  int threads;

  __device__ void put(uint32_t word) {
    *next = word;
    next += threads;
  }
  __device__ void put(float x) { put(__float_as_uint(x)); }
  template <class T, int kCount>
  __device__ void put(const T (&values)[kCount]) {
    for (int i = 0; i < kCount; i++) put(values[i]);
  }
};

template <size_t kCount>
int total_words(const Section (&sections)[kCount], int threads) {
  int words = 0;
  for (const Section& section : sections) words += section.rows * threads;
  return words;
}

template <size_t kCount>
std::string describe(const Section (&sections)[kCount], int threads) {
  std::string text;
  for (const Section& section : sections)
    text += std::string(section.name) + " " + std::to_string(section.rows * threads) + " " +
            section.compare + "\n";
  return text;
}

// Device memory for the length of a run.
class DeviceArray {
 public:
  DeviceArray(const void* from, size_t bytes, const char* name) : bytes_(bytes) {
#ifdef FAL_SIMT
    data_ = simt::allocate(bytes, name);
#else
    (void)name;
    error_ = cudaMalloc(&data_, bytes);
#endif
    if (error_ == cudaSuccess) error_ = copy(data_, from);
  }
  ~DeviceArray() {
#ifdef FAL_SIMT
    simt::unregister_buffer(data_);
#else
    cudaFree(data_);
#endif
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  cudaError_t error() const { return error_; }
  // Waits for the device and copies everything back.
  cudaError_t read(void* to) const { return copy(to, data_); }

 private:
  cudaError_t copy(void* to, const void* from) const {
#ifdef FAL_SIMT
    memcpy(to, from, bytes_);
    return cudaSuccess;
#else
    return cudaMemcpy(to, from, bytes_, cudaMemcpyDefault);
#endif
  }
  void* data_ = nullptr;
  size_t bytes_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace fal::cuda::conformance
