// The kernels of io_kernels.cu for Python.
#include "io_kernels.h"
#include "simt_binding.h"

namespace py = pybind11;

namespace fal::cuda {
namespace {

// q, k, v, out: (batch, seqlen, heads, 64) bfloat16, contiguous; lse (batch, heads, seqlen).
int attention(const std::string& which, int tile, py::tuple addresses, int batch, int heads,
              int seqlen, bool causal) {
  constexpr int kDim = 64;
  const auto address = [&](int i) {
    return reinterpret_cast<void*>(addresses[i].cast<uintptr_t>());
  };
  const auto view = [&](int i) {
    return AnyView{address(i), int64_t{seqlen} * heads * kDim, int64_t{heads} * kDim, kDim};
  };
  ForwardProblem p{};
  const int64_t rows = int64_t{batch} * seqlen;
  p.shape = {batch, heads, heads, kDim, kDim, DType::kBFloat16, rows, rows};
  p.lengths.seqlen_q = p.lengths.seqlen_k = seqlen;
  p.window = {Window::kUnbounded, causal ? 0 : Window::kUnbounded};
  p.score.scale = 0.125f;
  p.q = view(0);
  p.kv.k = view(1);
  p.kv.v = view(2);
  p.kv.dtype = p.shape.dtype;
  p.out = view(3);
  p.lse = {static_cast<float*>(address(4)), int64_t{heads} * seqlen, seqlen, 1};
  if (which == "flash2") return io_flash2(p, tile);
  void* workspace = simt::allocate(io_workspace_bytes(p, which.c_str()), "workspace");
  return which == "flash1" ? io_flash1(p, workspace, tile) : io_standard(p, workspace);
}

}  // namespace

PYBIND11_MODULE(io_kernels, m) {
  simt::bind(m);
  m.def("attention", &attention, py::arg("which"), py::arg("tile"), py::arg("addresses"),
        py::kw_only(), py::arg("batch"), py::arg("heads"), py::arg("seqlen"), py::arg("causal"));
}

}  // namespace fal::cuda
