// The emulator's host side for Python: what every module that runs emulated kernels offers beside
// its own functions. Buffers travel as integer addresses (tensor.data_ptr(), array.ctypes.data).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/simt/host_api.h"

namespace fal::simt {

inline void bind(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "configure",
      [](uint64_t seed, int threads, bool check, bool account, bool async_late, int max_reports,
         size_t max_smem_bytes, int multiprocessors) {
        Config c;
        c.seed = seed;
        c.threads = threads;
        c.check = check;
        c.account = account;
        c.async_late = async_late;
        c.max_reports = max_reports;
        c.max_smem_bytes = max_smem_bytes;
        c.multiprocessors = multiprocessors;
        configure(c);
      },
      py::kw_only(), py::arg("seed") = 0, py::arg("threads") = 1, py::arg("check") = true,
      py::arg("account") = true, py::arg("async_late") = true, py::arg("max_reports") = 32,
      py::arg("max_smem_bytes") = Config().max_smem_bytes,
      py::arg("multiprocessors") = Config().multiprocessors,
      "Sets how the following launches run; what is not named returns to its default.");
  m.def(
      "reports",
      [] {
        py::list result;
        for (const Report& r : reports()) result.append(py::make_tuple(r.kind, r.message, r.where));
        return result;
      },
      "[(kind, message, file:line)] since the last reset or clear_results.");
  m.def("counters", &counters, "Totals by name since the last reset or clear_results.");
  m.def(
      "traffic",
      [] {
        py::dict result;
        for (const auto& [name, t] : traffic())
          result[py::str(name)] = py::make_tuple(t.read_bytes, t.written_bytes);
        return result;
      },
      "{buffer name: (bytes read, bytes written)}.");
  m.def(
      "sites",
      [] {
        py::list result;
        for (const Site& s : sites()) {
          py::dict d;
          d["where"] = s.where;
          d["kind"] = s.kind;
          d["requests"] = s.requests;
          d["bytes"] = s.bytes;
          d["units"] = s.units;
          d["ideal"] = s.ideal;
          result.append(d);
        }
        return result;
      },
      "Per call site: requests, bytes, sectors or wavefronts (units), and the least possible "
      "(ideal).");
  m.def("summary", &summary, "Reports, traffic, counters and sites as text.");
  m.def(
      "register_buffer",
      [](uintptr_t data, size_t bytes, const std::string& name, bool writable) {
        register_buffer(reinterpret_cast<void*>(data), bytes, name, writable);
      },
      py::arg("data"), py::arg("bytes"), py::arg("name"), py::arg("writable"),
      "Lets kernels access memory that the caller owns and keeps alive.");
  m.def(
      "unregister_buffer", [](uintptr_t data) { unregister_buffer(reinterpret_cast<void*>(data)); },
      py::arg("data"));
  m.def(
      "allocate",
      [](size_t bytes, const std::string& name) {
        return reinterpret_cast<uintptr_t>(allocate(bytes, name));
      },
      py::arg("bytes"), py::arg("name"), "NaN-filled device memory with red zones, until reset().");
  m.def("clear_results", &clear_results, "Forgets reports and counters; buffers stay.");
  m.def("reset", &reset, "Forgets everything, frees and unregisters every buffer.");
}

}  // namespace fal::simt
