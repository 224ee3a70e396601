// Operators that tell about the library itself: what was built, which instruction set runs, what
// the machine can do at most, and whether a GPU executes the PTX wrappers as the emulator does.
#include "../cpu/engine.h"
#include "../cuda/conformance.h"
#include "engines.h"

namespace fal::torch_binding {
namespace {

void build_info_op(uint64_t* stack, uint64_t, uint64_t) { put_results(stack, build_info()); }

void cpu_isa(uint64_t* stack, uint64_t, uint64_t) {
  put_results(stack, std::string(cpu::active_isa()));
}

void set_cpu_isa(uint64_t* stack, uint64_t inputs, uint64_t) {
  std::string isa;
  StackReader(stack, inputs) >> isa;
  if (cpu::select_isa(isa.c_str())) return;
  std::string names;
  for (const char* const* name = cpu::available_isas(); *name; ++name)
    names += std::string(" ") + *name;
  fail("flashattn_lite::set_cpu_isa: isa is '", isa, "'; available here:", names);
}

void fma_peak_op(uint64_t* stack, uint64_t inputs, uint64_t) {
  int64_t flops;
  StackReader(stack, inputs) >> flops;
  FAL_CHECK(flops > 0, "flashattn_lite::fma_peak: flops is ", flops, "; it must be positive");
  put_results(stack, fma_peak(flops));
}

// The words of csrc/cuda/conformance.h as an int32 tensor on the CPU, from the current CUDA device.
void ptx_conformance(uint64_t* stack, uint64_t inputs, uint64_t) {
  bool sm90;
  StackReader(stack, inputs) >> sm90;
#ifdef FAL_WITH_CUDA
  std::vector<uint32_t> words(1 << 17);
  const auto run = sm90 ? fal_cuda_conformance_sm90 : fal_cuda_conformance;
  const int32_t count = run(words.data(), static_cast<int32_t>(words.size()));
  FAL_CHECK(count >= 0, "flashattn_lite::ptx_conformance: CUDA error ", -count);
  Tensor result = empty({count}, aoti_torch_dtype_int32(), aoti_torch_device_type_cpu(), 0);
  if (count) memcpy(result.data(), words.data(), sizeof(uint32_t) * count);
  put_results(stack, std::move(result));
#else
  (void)sm90;
  fail("flashattn_lite::ptx_conformance: this build has no CUDA kernels");
#endif
}

void ptx_conformance_sections(uint64_t* stack, uint64_t inputs, uint64_t) {
  bool sm90;
  StackReader(stack, inputs) >> sm90;
#ifdef FAL_WITH_CUDA
  put_results(stack, std::string(sm90 ? fal_cuda_conformance_sm90_sections()
                                      : fal_cuda_conformance_sections()));
#else
  (void)sm90;
  fail("flashattn_lite::ptx_conformance_sections: this build has no CUDA kernels");
#endif
}

const bool registered = [] {
  static Library definitions = Library::fragment("flashattn_lite");
  definitions.schema("build_info() -> str")
      .schema("cpu_isa() -> str")
      .schema("set_cpu_isa(str isa) -> ()")
      .schema("fma_peak(int flops) -> int")
      .schema("ptx_conformance(bool sm90) -> Tensor")
      .schema("ptx_conformance_sections(bool sm90) -> str");
  static Library anywhere = Library::implement("flashattn_lite", "CompositeExplicitAutograd");
  anywhere.function("build_info", build_info_op)
      .function("cpu_isa", cpu_isa)
      .function("set_cpu_isa", set_cpu_isa)
      .function("fma_peak", fma_peak_op)
      .function("ptx_conformance", ptx_conformance)
      .function("ptx_conformance_sections", ptx_conformance_sections);
  return true;
}();

}  // namespace
}  // namespace fal::torch_binding
