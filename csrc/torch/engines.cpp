#include "engines.h"

#include <dlfcn.h>

#include "../cpu/append.h"
#include "../cpu/engine.h"
#include "../cuda/append.h"
#include "../cuda/engine.h"

namespace fal::torch_binding {
namespace {

struct Row {
  Engine engine;
  const char* name;
};
// In order of preference.
constexpr Row kEngines[] = {{Engine::kCpu, "cpu"},
                            {Engine::kCudaDecode, "decode"},
                            {Engine::kCudaFlash2, "flash2"},
                            {Engine::kCudaFlash1, "flash1"}};

#ifdef FAL_WITH_CUDA
void check_cuda(int error) {
  FAL_CHECK(error == 0, "flashattn_lite: CUDA error ", error, ": ", cuda::error_string(error));
}

cuda::Algorithm algorithm(Engine engine) {
  return engine == Engine::kCudaDecode   ? cuda::Algorithm::kDecode
         : engine == Engine::kCudaFlash2 ? cuda::Algorithm::kFlash2
                                         : cuda::Algorithm::kFlash1;
}

void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = []() -> Function {
    if (aoti_torch_get_current_cuda_stream) return &aoti_torch_get_current_cuda_stream;
    // A torch whose libtorch.so does not name libtorch_cuda.so: it is loaded all the same.
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                              : nullptr);
  }();
  FAL_CHECK(function, "flashattn_lite: q is a CUDA tensor but this PyTorch has no CUDA support");
  void* stream = nullptr;
  FAL_TORCH(function(device, &stream));
  return stream;
}

template <class Bytes, class Launch>
void run_cuda(const Tensor& q, Bytes&& workspace_bytes, Launch&& launch) {
  DeviceGuard guard(q.device_index());
  const Tensor workspace = empty_on(q, {workspace_bytes()}, aoti_torch_dtype_int8());
  check_cuda(launch(workspace.data(), current_stream(q.device_index())));
}
#else
constexpr const char* kNoCuda =
    "this build has no CUDA kernels (install with nvcc on PATH, or with FAL_CUDA=1)";
#endif

// Null when the engine can run it.
template <class OnCpu, class OnCuda>
const char* reason_against(Engine engine, const Tensor& q, OnCpu&& on_cpu, OnCuda&& on_cuda) {
  if (engine == Engine::kCpu) return q.is_cpu() ? on_cpu() : "q is a CUDA tensor";
  if (!q.is_cuda()) return "q is not a CUDA tensor";
#ifdef FAL_WITH_CUDA
  const int capability = cuda::device_capability(q.device_index());
  if (capability < 0) return "the device's compute capability cannot be asked";
  return on_cuda(algorithm(engine), capability);
#else
  (void)on_cuda;
  return kNoCuda;
#endif
}

template <class OnCpu, class OnCuda>
Engine choose(const char* op, const std::string& backend, const Tensor& q, OnCpu&& on_cpu,
              OnCuda&& on_cuda) {
  bool known = backend == "auto" || backend == "cuda";
  std::string reasons;
  for (const Row& row : kEngines) {
    known = known || backend == row.name;
    const bool wanted = backend == "auto" || backend == row.name ||
                        (backend == "cuda" && row.engine != Engine::kCpu);
    if (wanted && !reason_against(row.engine, q, on_cpu, on_cuda)) return row.engine;
  }
  if (!known) {
    fail(op, ": backend is '", backend, "'; it must be auto, cpu, cuda, decode, flash2 or flash1");
  }
  for (const Row& row : kEngines) {
    const char* reason = reason_against(row.engine, q, on_cpu, on_cuda);
    reasons += std::string("\n  ") + row.name + ": " + (reason ? reason : "can run this call");
  }
  if (backend == "auto") fail(op, ": no engine can run this call:", reasons);
  fail(op, ": backend '", backend, "' cannot run this call:", reasons);
}

cpu::ThreadPool torch_threads() {
  uint32_t threads = 1;
  FAL_TORCH(torch_get_num_threads(&threads));
  const auto run = [](void*, int workers, void (*body)(void*, int), void* arg) {
    struct Job {
      void (*body)(void*, int);
      void* arg;
    } job{body, arg};
    FAL_TORCH(torch_parallel_for(
        0, workers, 1,
        [](int64_t begin, int64_t end, void* ctx) {
          const Job& job = *static_cast<const Job*>(ctx);
          for (int64_t w = begin; w < end; ++w) job.body(job.arg, static_cast<int>(w));
        },
        &job));
  };
  return {static_cast<int>(threads), nullptr, run};
}

}  // namespace

Engine choose_forward(const char* op, const std::string& backend, const Tensor& q,
                      const ForwardProblem& problem) {
  return choose(
      op, backend, q, [&] { return cpu::supports_forward(problem); },
      [&](cuda::Algorithm a, int capability) {
        return cuda::supports_forward(a, problem, capability);
      });
}

Engine choose_backward(const char* op, const std::string& backend, const Tensor& q,
                       const BackwardProblem& problem) {
  return choose(
      op, backend, q, [&] { return cpu::supports_backward(problem); },
      [&](cuda::Algorithm a, int capability) {
        return cuda::supports_backward(a, problem, capability);
      });
}

void run_forward(Engine engine, const Tensor& q, const ForwardProblem& problem) {
  if (engine == Engine::kCpu) return cpu::forward(problem, torch_threads());
#ifdef FAL_WITH_CUDA
  run_cuda(
      q, [&] { return cuda::forward_workspace_bytes(algorithm(engine), problem); },
      [&](void* w, void* stream) { return cuda::forward(algorithm(engine), problem, w, stream); });
#else
  (void)q;
#endif
}

void run_backward(Engine engine, const Tensor& q, const BackwardProblem& problem) {
  if (engine == Engine::kCpu) return cpu::backward(problem, torch_threads());
#ifdef FAL_WITH_CUDA
  run_cuda(
      q, [&] { return cuda::backward_workspace_bytes(algorithm(engine), problem); },
      [&](void* w, void* stream) { return cuda::backward(algorithm(engine), problem, w, stream); });
#else
  (void)q;
#endif
}

void run_rotate(const char* op, const Tensor& anchor, const RotateProblem& problem) {
  if (anchor.is_cpu()) return cpu::rotate(problem, torch_threads());
#ifdef FAL_WITH_CUDA
  (void)op;
  DeviceGuard guard(anchor.device_index());
  check_cuda(cuda::rotate(problem, current_stream(anchor.device_index())));
#else
  fail(op, ": ", kNoCuda);
#endif
}

void run_append(const char* op, const Tensor& anchor, const AppendProblem& problem) {
  if (anchor.is_cpu()) return cpu::append(problem, torch_threads());
#ifdef FAL_WITH_CUDA
  (void)op;
  DeviceGuard guard(anchor.device_index());
  check_cuda(cuda::append(problem, current_stream(anchor.device_index())));
#else
  fail(op, ": ", kNoCuda);
#endif
}

int64_t fma_peak(int64_t flops) { return cpu::fma_peak(flops, torch_threads()); }

// ["a", "b"] of null-terminated names.
std::string json_list(const char* const* names) {
  std::string text = "[";
  for (const char* const* name = names; *name; ++name) {
    text += std::string(name == names ? "\"" : ", \"") + *name + "\"";
  }
  return text + "]";
}

std::string build_info() {
  std::string text = "{\"cpu\": {\"isas\": " + json_list(cpu::available_isas());
  text += ", \"omitted\": " + json_list(cpu::omitted_isas());
  text += std::string(", \"active\": \"") + cpu::active_isa() + "\"}, \"cuda\": ";
#ifdef FAL_WITH_CUDA
  text += std::string("{\"architectures\": \"") + cuda::compiled_architectures() + "\"}";
#else
  text += "null";
#endif
  text += ", \"engines\": [";
  for (const Row& row : kEngines)
    text += std::string(&row == kEngines ? "\"" : ", \"") + row.name + "\"";
  return text + "]}";
}

}  // namespace fal::torch_binding
