// Rotary embedding and cache appending on the emulator, for Python: one struct per call, as flat
// integers (addresses, strides, sizes) in the order that emulated_ops.py gives them.
#include "csrc/cuda/append.h"
#include "simt_binding.h"

namespace py = pybind11;

namespace fal::cuda {
namespace {

class Reader {
 public:
  explicit Reader(const py::list& values) : values_(values) {}
  int64_t integer() { return values_[next_++].cast<int64_t>(); }
  int32_t small() { return static_cast<int32_t>(integer()); }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }
  // address, batch, row and head strides
  AnyView view() {
    void* data = pointer<void>();
    const int64_t batch = integer(), row = integer(), head = integer();
    return {data, batch, row, head};
  }
  // The same order; RowStats has its head stride before its row stride.
  RowStats stats() {
    float* data = pointer<float>();
    const int64_t batch = integer(), row = integer(), head = integer();
    return {data, batch, head, row};
  }
  Rotary rotary() {
    Rotary r{};
    r.cos = pointer<void>();
    r.sin = pointer<void>();
    r.row_stride = integer();
    r.pairs = small();
    r.positions = small();
    r.interleaved = integer() != 0;
    r.dtype = static_cast<DType>(small());
    return r;
  }

 private:
  const py::list& values_;
  size_t next_ = 0;
};

int rotate_values(const py::list& values) {
  Reader in(values);
  RotateProblem p{};
  p.batch = in.small();
  p.seqlen = in.small();
  p.heads = in.small();
  p.head_dim = in.small();
  p.dtype = static_cast<DType>(in.small());
  p.x = in.view();
  p.out = in.view();
  p.offsets = in.pointer<const int32_t>();
  p.advance = in.integer() != 0;
  p.rotary = in.rotary();
  return rotate(p, nullptr);
}

int append_values(const py::list& values) {
  Reader in(values);
  AppendProblem p{};
  p.batch = in.small();
  p.seqlen = in.small();
  p.heads_k = in.small();
  p.head_dim = in.small();
  p.head_dim_v = in.small();
  p.dtype = static_cast<DType>(in.small());
  p.k = in.view();
  p.v = in.view();
  p.cache_seqlens = in.pointer<const int32_t>();
  p.cache.k = in.view();
  p.cache.v = in.view();
  p.cache.dtype = static_cast<DType>(in.small());
  p.cache.pages.block_table = in.pointer<const int32_t>();
  p.cache.pages.table_stride = in.integer();
  p.cache.pages.page_size = in.small();
  p.cache.k_scale = in.stats();
  p.cache.v_scale = in.stats();
  p.rotary = in.rotary();
  return append(p, nullptr);
}

}  // namespace

PYBIND11_MODULE(append_kernels, m) {
  simt::bind(m);
  m.def("rotate", &rotate_values);
  m.def("append", &append_values);
}

}  // namespace fal::cuda
