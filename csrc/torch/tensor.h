// A thin owning tensor over the stable C interface, and the errors that the torch-facing code
// raises.
#pragma once

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../core/problem.h"
#include "stable_abi.h"

namespace fal::torch_binding {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Raises with the given parts unless the condition holds; they are only formatted on failure.
#define FAL_CHECK(condition, ...)                                                   \
  do {                                                                              \
    if (__builtin_expect(!(condition), 0)) ::fal::torch_binding::fail(__VA_ARGS__); \
  } while (0)

[[noreturn]] inline void torch_call_failed(const char* call) {
  if (torch_exception_get_what_without_backtrace) {
    fail("flashattn_lite: PyTorch says: ", torch_exception_get_what_without_backtrace());
  }
  fail("flashattn_lite: ", call, " failed (PyTorch printed the reason to stderr)");
}

#define FAL_TORCH(call)                                                                   \
  do {                                                                                    \
    if (__builtin_expect((call) != 0, 0)) ::fal::torch_binding::torch_call_failed(#call); \
  } while (0)

class Tensor {  // owns one reference; move-only
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorOpaque* handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorOpaque* handle() const { return handle_; }
  AtenTensorOpaque* release() { return std::exchange(handle_, nullptr); }

  void* data() const {
    void* p;
    FAL_TORCH(aoti_torch_get_data_ptr(handle_, &p));
    return p;
  }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int64_t size(int64_t d) const { return get<int64_t*>(aoti_torch_get_sizes)[d]; }
  int64_t stride(int64_t d) const { return get<int64_t*>(aoti_torch_get_strides)[d]; }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  bool is_cpu() const { return device_type() == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type() == aoti_torch_device_type_cuda(); }

 private:
  template <class T, class F>
  T get(F function) const {
    T value;
    FAL_TORCH(function(handle_, &value));
    return value;
  }

  AtenTensorOpaque* handle_ = nullptr;
};

// Uninitialised, contiguous.
inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_type,
                    int32_t device_index) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i--;) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorOpaque* handle;
  FAL_TORCH(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                     strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_on(const Tensor& device_of, const std::vector<int64_t>& sizes, int32_t dtype) {
  return empty(sizes, dtype, device_of.device_type(), device_of.device_index());
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = t.size(d);
  return sizes;
}

// A contiguous copy on the same device (or on the CPU; that waits for the device).
inline Tensor copy(const Tensor& t, bool to_host = false) {
  Tensor result = to_host ? empty(sizes_of(t), t.dtype(), aoti_torch_device_type_cpu(), 0)
                          : empty_on(t, sizes_of(t), t.dtype());
  FAL_TORCH(aoti_torch_copy_(result.handle(), t.handle(), 0));
  return result;
}

std::string shape_text(const Tensor& t);  // "(2, 128, 8, 64)"
std::string dtype_text(int32_t dtype);    // "float16", ...
bool known_dtype(int32_t torch_dtype, DType* dtype);

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index) { FAL_TORCH(aoti_torch_create_device_guard(index, &guard_)); }
  ~DeviceGuard() { aoti_torch_delete_device_guard(guard_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardOpaque* guard_;
};

}  // namespace fal::torch_binding
