// The CUDA engines on the emulator, for Python: problems come as dicts of integers, addresses and
// strides that cuda_problem.py makes from tensors.
#include "csrc/cuda/decode_split.h"
#include "csrc/cuda/engine.h"
#include "simt_binding.h"

namespace py = pybind11;

namespace fal::cuda {
namespace {

template <class T>
T* pointer(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

// (address, batch stride, row stride, head stride)
AnyView view(const py::dict& d, const char* name) {
  const py::tuple t = d[name];
  return {pointer<void>(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

// (address, batch stride, head stride, row stride)
RowStats row_stats(const py::dict& d, const char* name) {
  const py::tuple t = d[name];
  return {pointer<float>(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

// The arrays lie one behind the other, as csrc/torch/block_mask.h tells: cuda_problem.py cuts them.
BlockMask block_mask(const py::dict& d) {
  const auto integer = [&](const char* name) { return d[name].cast<int32_t>(); };
  const auto array = [&](const char* name) { return pointer<const int32_t>(d[name]); };
  return {integer("seqlen_q"),
          integer("seqlen_k"),
          integer("block_q"),
          integer("block_k"),
          integer("batch"),
          integer("heads"),
          {array("row_start"), array("row_index"), array("row_rule")},
          {array("column_start"), array("column_index"), array("column_rule")},
          array("bands"),
          array("documents_q"),
          array("documents_k"),
          pointer<const uint32_t>(d["bitmaps"])};
}

ForwardProblem forward_problem(const py::dict& d) {
  ForwardProblem p{};
  const auto integer = [&](const char* name) { return d[name].cast<int32_t>(); };
  const auto indices = [&](const char* name) { return pointer<const int32_t>(d[name]); };
  p.shape = {integer("batch"),
             integer("heads_q"),
             integer("heads_k"),
             integer("head_dim"),
             integer("head_dim_v"),
             static_cast<DType>(integer("dtype")),
             d["rows_q"].cast<int64_t>(),
             d["rows_k"].cast<int64_t>()};
  p.lengths = {integer("seqlen_q"),     integer("seqlen_k"),  indices("cu_seqlens_q"),
               indices("cu_seqlens_k"), indices("seqused_q"), indices("seqused_k"),
               indices("leftpad_k")};
  p.window = {integer("window_left"), integer("window_right")};
  if (d.contains("block_mask")) p.block_mask = block_mask(d["block_mask"]);
  p.score.scale = d["scale"].cast<float>();
  p.score.softcap = d["softcap"].cast<float>();
  p.score.alibi_slopes = pointer<const float>(d["alibi_slopes"]);
  p.score.alibi_batch_stride = d["alibi_batch_stride"].cast<int64_t>();
  p.score.sinks = pointer<const float>(d["sinks"]);
  p.score.dropout_seed = d["dropout_seed"].cast<uint64_t>();
  p.score.dropout_threshold = d["dropout_threshold"].cast<uint32_t>();
  p.q = view(d, "q");
  p.kv.k = view(d, "k");
  p.kv.v = view(d, "v");
  p.kv.dtype = static_cast<DType>(integer("kv_dtype"));
  p.kv.k_scale = row_stats(d, "k_scale");
  p.kv.v_scale = row_stats(d, "v_scale");
  p.kv.pages = {indices("block_table"), d["table_stride"].cast<int64_t>(), integer("page_size")};
  p.out = view(d, "out");
  p.lse = row_stats(d, "lse");
  p.num_splits = integer("num_splits");
  const py::tuple bias = d["bias"];  // (address, batch, head, row and key strides, dtype)
  const auto stride = [&](int i) { return bias[i].cast<int64_t>(); };
  p.score.bias = {pointer<void>(bias[0]),
                  stride(1),
                  stride(2),
                  stride(3),
                  stride(4),
                  static_cast<DType>(bias[5].cast<int>())};
  return p;
}

BackwardProblem backward_problem(const py::dict& d) {
  BackwardProblem p{};
  p.forward = forward_problem(d);
  p.dout = view(d, "dout");
  p.dlse = row_stats(d, "dlse");
  p.dq = view(d, "dq");
  p.dk = view(d, "dk");
  p.dv = view(d, "dv");
  p.dsinks = pointer<float>(d["dsinks"]);
  p.deterministic = d["deterministic"].cast<bool>();
  return p;
}

py::object reason(const char* text) { return text ? py::object(py::str(text)) : py::none(); }

}  // namespace

PYBIND11_MODULE(cuda_engines, m) {
  simt::bind(m);
  py::enum_<Algorithm>(m, "Algorithm")
      .value("flash1", Algorithm::kFlash1)
      .value("flash2", Algorithm::kFlash2)
      .value("decode", Algorithm::kDecode);
  m.def("decode_splits", &decode_splits, py::kw_only(), py::arg("tiles"), py::arg("most_parts"),
        py::arg("multiprocessors"), py::arg("blocks_per_multiprocessor"), py::arg("forced") = 0);
  m.def("supports_forward", [](Algorithm a, const py::dict& d, int capability) {
    return reason(supports_forward(a, forward_problem(d), capability));
  });
  m.def("supports_backward", [](Algorithm a, const py::dict& d, int capability) {
    return reason(supports_backward(a, backward_problem(d), capability));
  });
  m.def("forward_workspace_bytes", [](Algorithm a, const py::dict& d) {
    return forward_workspace_bytes(a, forward_problem(d));
  });
  m.def("backward_workspace_bytes", [](Algorithm a, const py::dict& d) {
    return backward_workspace_bytes(a, backward_problem(d));
  });
  m.def("forward", [](Algorithm a, const py::dict& d, uintptr_t workspace) {
    return forward(a, forward_problem(d), reinterpret_cast<void*>(workspace), nullptr);
  });
  m.def("backward", [](Algorithm a, const py::dict& d, uintptr_t workspace) {
    return backward(a, backward_problem(d), reinterpret_cast<void*>(workspace), nullptr);
  });
}

}  // namespace fal::cuda
