// Python's way to the conformance kernels on the emulator.
#include "csrc/cuda/conformance.h"
#include "simt_binding.h"

namespace {

template <int32_t (*kRun)(uint32_t*, int32_t)>
std::vector<uint32_t> run(int32_t capacity) {
  std::vector<uint32_t> words(capacity);
  const int32_t count = kRun(words.data(), capacity);
  if (count < 0) throw std::runtime_error("CUDA error " + std::to_string(-count));
  words.resize(count);
  return words;
}

}  // namespace

PYBIND11_MODULE(simt_conformance, m) {
  fal::simt::bind(m);
  m.def("sections", &fal_cuda_conformance_sections);
  m.def("sections_sm90", &fal_cuda_conformance_sm90_sections);
  m.def("run", &run<fal_cuda_conformance>);
  m.def("run_sm90", &run<fal_cuda_conformance_sm90>);
}
