// Checks that several operators make, and the sentences they raise: what, where, which value, what
// would be right.
#pragma once

#include "tensor.h"

namespace fal::torch_binding {

std::string sizes_text(const std::vector<int64_t>& sizes);  // "(2, 128)"
bool same_device(const Tensor& a, const Tensor& b);
bool is_float(DType dtype);

// True when index contents are to be checked although the tensors are on a device (FAL_CHECK=1).
bool contents_checked_on_cuda();

// Speaks for one call of one operator; every tensor must be on the device of `anchor`.
class Checker {
 public:
  Checker(const char* op, const Tensor& anchor) : op_(op), anchor_(&anchor) {}

  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(op_, ": ", parts...);
  }
  void on_device(const char* name, const Tensor& t) const;
  // Also on the anchor's device.
  void has_shape(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const;
  void has_dtype(const char* name, const Tensor& t, int32_t dtype) const;
  DType float_dtype(const char* name, const Tensor& t) const;  // float32, float16 or bfloat16
  void unit_last_stride(const char* name, const Tensor& t) const;

  // int32 (size,), contiguous; null when absent.
  const int32_t* index_vector(const char* name, const std::optional<Tensor>& t, int64_t size) const;
  // float32 with unit last stride; null when absent.
  const float* float_vector(const char* name, const std::optional<Tensor>& t) const;
  // int32 (batch, max_pages) with unit last stride, for pages of page_size tokens.
  Pages pages(const Tensor& block_table, int64_t batch, int64_t page_size) const;

  // Contents. The pointers are host pointers.
  void cumulative(const char* name, const int32_t* cu, int64_t batch, int64_t rows,
                  const char* tensor, const char* max_name, int64_t max_seqlen) const;
  // 0 <= values[b] <= the length of sequence b: that of cu when given, else limit.
  void within_lengths(const char* name, const int32_t* values, const int32_t* cu, int64_t batch,
                      int64_t limit) const;
  // Every table entry that the first lengths[b] tokens of sequence b need exists and names a page.
  void table_entries(const char* lengths_name, const int32_t* lengths, const int32_t* table,
                     int64_t table_stride, int64_t batch, int64_t max_pages, int64_t page_size,
                     int64_t num_pages) const;

 private:
  const char* op_;
  const Tensor* anchor_;
};

// Host copies of index tensors, alive as long as this object; on the CPU the tensors themselves.
class HostReader {
 public:
  const int32_t* read(const std::optional<Tensor>& t) {
    if (!t) return nullptr;
    if (t->is_cpu()) return static_cast<const int32_t*>(t->data());
    copies_.push_back(copy(*t, /*to_host=*/true));
    return static_cast<const int32_t*>(copies_.back().data());
  }
  // The row stride of a matrix as read() returned it.
  static int64_t row_stride(const Tensor& t) { return t.is_cpu() ? t.stride(0) : t.size(1); }

 private:
  std::vector<Tensor> copies_;
};

}  // namespace fal::torch_binding
