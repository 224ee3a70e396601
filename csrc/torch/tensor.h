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
  explicit Tensor(AtenTensorOpaque* handle) : Tensor() {
    handle_ = handle;
    shape_.dim = get<int64_t>(aoti_torch_get_dim);
    shape_.sizes = get<int64_t*>(aoti_torch_get_sizes);
    shape_.strides = get<int64_t*>(aoti_torch_get_strides);
  }
  Tensor(Tensor&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)), shape_(other.shape_) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(shape_, other.shape_);
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
  int64_t dim() const { return shape_.dim; }
  const int64_t* sizes() const { return shape_.sizes; }  // whatever set_heads_first says
  const int64_t* strides() const { return shape_.strides; }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int64_t size(int64_t d) const { return shape_.sizes[axis(d)]; }
  int64_t stride(int64_t d) const { return shape_.strides[axis(d)]; }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  bool is_cpu() const { return device_type() == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type() == aoti_torch_device_type_cuda(); }

  // A (batch, heads, seqlen, dim) tensor is from now on seen as (batch, seqlen, heads, dim); one of
  // another rank as it is.
  void set_heads_first(bool heads_first) { shape_.heads_first = heads_first && shape_.dim == 4; }
  bool heads_first() const { return shape_.heads_first; }

 private:
  int64_t axis(int64_t d) const { return shape_.heads_first && (d == 1 || d == 2) ? 3 - d : d; }

  template <class T, class F>
  T get(F function) const {
    T value;
    FAL_TORCH(function(handle_, &value));
    return value;
  }

  AtenTensorOpaque* handle_ = nullptr;
  struct {  // asked for once: a small call reads some 80 of them
    int64_t dim = 0;
    const int64_t *sizes = nullptr, *strides = nullptr;
    bool heads_first = false;
  } shape_;
};

constexpr int64_t kMostDims = 4;

// Uninitialised and dense: dimension order[i] is the i-th from the outermost one in memory.
inline Tensor empty_in_order(int64_t dims, const int64_t* sizes, const int64_t* order,
                             int32_t dtype, int32_t device_type, int32_t device_index) {
  int64_t strides[kMostDims], step = 1;
  for (int64_t i = dims; i--;) {
    strides[order[i]] = step;
    step *= sizes[order[i]] > 1 ? sizes[order[i]] : 1;
  }
  AtenTensorOpaque* handle;
  FAL_TORCH(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// Uninitialised, contiguous. heads_first: `sizes` are (batch, seqlen, heads, dim), and so is the
// memory; the tensor is (batch, heads, seqlen, dim).
inline Tensor empty(std::vector<int64_t> sizes, int32_t dtype, int32_t device_type,
                    int32_t device_index, bool heads_first = false) {
  int64_t order[kMostDims] = {0, 1, 2, 3};
  FAL_CHECK(sizes.size() <= kMostDims, "flashattn_lite: a tensor of ", sizes.size(), " dimensions");
  if (heads_first) {
    std::swap(sizes[1], sizes[2]);
    std::swap(order[1], order[2]);
  }
  Tensor result = empty_in_order(static_cast<int64_t>(sizes.size()), sizes.data(), order, dtype,
                                 device_type, device_index);
  result.set_heads_first(heads_first);
  return result;
}

inline Tensor empty_on(const Tensor& device_of, std::vector<int64_t> sizes, int32_t dtype,
                       bool heads_first = false) {
  return empty(std::move(sizes), dtype, device_of.device_type(), device_of.device_index(),
               heads_first);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = t.size(d);
  return sizes;
}

// Uninitialised and dense, of t's dtype, device and shape, `last` wide, its dimensions in memory in
// the order of t's: as torch's and flash_attn's results are laid out. Where t does not tell, for
// its last dimension is no innermost one or another one is expanded, they are in their own order.
inline Tensor empty_laid_out_like(const Tensor& t, int64_t last) {
  const int64_t dims = t.dim(), *given = t.strides();
  FAL_CHECK(dims <= kMostDims, "flashattn_lite: a tensor of ", dims, " dimensions");
  int64_t sizes[kMostDims], order[kMostDims];
  bool tells = given[dims - 1] == 1;
  for (int64_t d = 0; d < dims; ++d) {
    sizes[d] = d + 1 < dims ? t.sizes()[d] : last;
    order[d] = d;
    tells = tells && given[d] != 0;
  }
  for (int64_t i = 1; tells && i + 1 < dims; ++i) {
    for (int64_t j = i; j && given[order[j - 1]] < given[order[j]]; --j) {
      std::swap(order[j - 1], order[j]);
    }
  }
  Tensor result = empty_in_order(dims, sizes, order, t.dtype(), t.device_type(), t.device_index());
  result.set_heads_first(t.heads_first());
  return result;
}

// Of the same shape, dtype and device.
inline Tensor empty_like(const Tensor& t) {
  return empty_on(t, sizes_of(t), t.dtype(), t.heads_first());
}

// A contiguous copy on the same device (or on the CPU; that waits for the device).
inline Tensor copy(const Tensor& t, bool to_host = false) {
  Tensor result =
      to_host ? empty(sizes_of(t), t.dtype(), aoti_torch_device_type_cpu(), 0) : empty_like(t);
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
