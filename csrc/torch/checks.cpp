#include "checks.h"

#include <stdlib.h>

namespace fal::torch_binding {

std::string dtype_text(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == aoti_torch_dtype_float8_e4m3fn()) return "float8_e4m3fn";
  if (dtype == aoti_torch_dtype_int8()) return "int8";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  if (dtype == aoti_torch_dtype_int16()) return "int16";
  if (dtype == aoti_torch_dtype_uint8()) return "uint8";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  if (dtype == aoti_torch_dtype_float8_e5m2()) return "float8_e5m2";
  if (dtype == aoti_torch_dtype_complex64()) return "complex64";
  if (dtype == aoti_torch_dtype_complex128()) return "complex128";
  return "dtype number " + std::to_string(dtype);
}

bool known_dtype(int32_t torch_dtype, DType* dtype) {
  if (torch_dtype == aoti_torch_dtype_float32()) return *dtype = DType::kFloat32, true;
  if (torch_dtype == aoti_torch_dtype_float16()) return *dtype = DType::kFloat16, true;
  if (torch_dtype == aoti_torch_dtype_bfloat16()) return *dtype = DType::kBFloat16, true;
  if (torch_dtype == aoti_torch_dtype_int8()) return *dtype = DType::kInt8, true;
  if (torch_dtype == aoti_torch_dtype_float8_e4m3fn()) return *dtype = DType::kFloat8E4M3, true;
  return false;
}

std::string sizes_text(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

std::string shape_text(const Tensor& t) { return sizes_text(sizes_of(t)); }

bool same_device(const Tensor& a, const Tensor& b) {
  return a.device_type() == b.device_type() && a.device_index() == b.device_index();
}

bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

bool contents_checked_on_cuda() {
  static const bool checked = [] {
    const char* value = getenv("FAL_CHECK");
    return value && value[0] == '1';
  }();
  return checked;
}

void Checker::on_device(const char* name, const Tensor& t) const {
  if (!same_device(t, *anchor_)) bad(name, " is on another device than the other tensors");
}

void Checker::has_shape(const char* name, const Tensor& t,
                        const std::vector<int64_t>& sizes) const {
  on_device(name, t);
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == sizes[d];
  if (!same) bad(name, " has shape ", shape_text(t), "; it must be ", sizes_text(sizes));
}

void Checker::has_dtype(const char* name, const Tensor& t, int32_t dtype) const {
  if (t.dtype() != dtype) {
    bad(name, " is ", dtype_text(t.dtype()), "; it must be ", dtype_text(dtype));
  }
}

DType Checker::float_dtype(const char* name, const Tensor& t) const {
  DType dtype;
  if (!known_dtype(t.dtype(), &dtype) || !is_float(dtype)) {
    bad(name, " is ", dtype_text(t.dtype()), "; it must be float32, float16 or bfloat16");
  }
  return dtype;
}

void Checker::unit_last_stride(const char* name, const Tensor& t) const {
  const int64_t last = t.dim() - 1;
  if (last >= 0 && t.size(last) > 1 && t.stride(last) != 1 && t.numel() > 0) {
    bad(name, " must have unit stride in its last dimension; call .contiguous() on it");
  }
}

const int32_t* Checker::index_vector(const char* name, const std::optional<Tensor>& t,
                                     int64_t size) const {
  if (!t) return nullptr;
  has_dtype(name, *t, aoti_torch_dtype_int32());
  has_shape(name, *t, {size});
  unit_last_stride(name, *t);
  return static_cast<const int32_t*>(t->data());
}

const float* Checker::float_vector(const char* name, const std::optional<Tensor>& t) const {
  if (!t) return nullptr;
  has_dtype(name, *t, aoti_torch_dtype_float32());
  on_device(name, *t);
  unit_last_stride(name, *t);
  return static_cast<const float*>(t->data());
}

Pages Checker::pages(const Tensor& block_table, int64_t batch, int64_t page_size) const {
  has_dtype("block_table", block_table, aoti_torch_dtype_int32());
  on_device("block_table", block_table);
  if (block_table.dim() != 2 || block_table.size(0) != batch) {
    bad("block_table has shape ", shape_text(block_table), "; it must be (", batch, ", max_pages)");
  }
  unit_last_stride("block_table", block_table);
  if (page_size < 1) bad("page_size is 0; a page must hold at least one token");
  if (page_size > Band::kMaxLength || block_table.size(1) * page_size > Band::kMaxLength) {
    bad("block_table addresses ", block_table.size(1), " pages of ", page_size,
        " tokens; a sequence may have up to 2^30 tokens");
  }
  return {static_cast<const int32_t*>(block_table.data()), block_table.stride(0),
          static_cast<int32_t>(page_size)};
}

void Checker::cumulative(const char* name, const int32_t* cu, int64_t batch, int64_t rows,
                         const char* tensor, const char* max_name, int64_t max_seqlen) const {
  if (cu[0] != 0) bad(name, " starts at ", cu[0], "; it must start at 0");
  for (int64_t b = 0; b < batch; ++b) {
    if (cu[b + 1] < cu[b]) {
      bad(name, " falls from ", cu[b], " to ", cu[b + 1], " at entry ", b + 1,
          "; it must not fall");
    }
  }
  if (cu[batch] > rows) bad(name, " ends at ", cu[batch], " but ", tensor, " has ", rows, " rows");
  for (int64_t b = 0; b < batch; ++b) {
    if (cu[b + 1] - cu[b] > max_seqlen) {
      bad(max_name, " is ", max_seqlen, " but sequence ", b, " of ", name, " has ",
          cu[b + 1] - cu[b], " rows");
    }
  }
}

void Checker::within_lengths(const char* name, const int32_t* values, const int32_t* cu,
                             int64_t batch, int64_t limit) const {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cu ? cu[b + 1] - cu[b] : limit;
    if (values[b] < 0 || values[b] > length) {
      bad(name, "[", b, "] is ", values[b], "; it must be 0 to ", length,
          ", the length of that sequence");
    }
  }
}

void Checker::table_entries(const char* lengths_name, const int32_t* lengths, const int32_t* table,
                            int64_t table_stride, int64_t batch, int64_t max_pages,
                            int64_t page_size, int64_t num_pages) const {
  for (int64_t b = 0; b < batch; ++b) {
    if (lengths[b] < 0) bad(lengths_name, "[", b, "] is ", lengths[b], "; it must be >= 0");
    const int64_t used = (lengths[b] + page_size - 1) / page_size;
    if (used > max_pages) {
      bad(lengths_name, "[", b, "] is ", lengths[b],
          ", more than block_table can address: ", max_pages, " pages of ", page_size,
          " tokens; it must be at most ", max_pages * page_size);
    }
    for (int64_t p = 0; p < used; ++p) {
      const int32_t page = table[b * table_stride + p];
      if (page < 0 || page >= num_pages) {
        bad("block_table[", b, ", ", p, "] is ", page, " but the cache has ", num_pages, " pages");
      }
    }
  }
}

}  // namespace fal::torch_binding
