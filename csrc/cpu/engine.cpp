// Chooses the instruction set and says which problems the engine takes.
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../core/head_dims.h"
#include "isa.h"

namespace fal::cpu {
namespace {

#if defined(__x86_64__)
// What __builtin_cpu_supports has no name for in every compiler.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
[[maybe_unused]] bool has_avx512_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}
#endif

constexpr int kMaxIsas = 5;

struct Available {
  const IsaKernels* kernels[kMaxIsas] = {};
  const char* names[kMaxIsas + 1] = {};
  int count = 0;

  void add(const IsaKernels& k) {
    kernels[count] = &k;
    names[count++] = k.name;
  }

  // Best first.
  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#ifndef FAL_WITHOUT_AMX
      if (request_amx()) add(kernels_amx);
#endif
#ifndef FAL_WITHOUT_AVX512_BF16
      if (has_avx512_bf16()) add(kernels_avx512_bf16);
#endif
      add(kernels_avx512);
    }
    if (avx2) add(kernels_avx2);
    add(kernels_baseline);
#elif defined(__aarch64__)
    add(kernels_neon);
#else
    add(kernels_baseline);
#endif
  }

  const IsaKernels* find(const char* name) const {
    for (int i = 0; i < count; ++i) {
      if (!strcmp(names[i], name)) return kernels[i];
    }
    return nullptr;
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

// FAL_CPU_ISA names the instruction set; a name that is not available is ignored (active_isa()
// tells).
const IsaKernels*& active() {
  static const IsaKernels* kernels = [] {
    const char* name = getenv("FAL_CPU_ISA");
    const IsaKernels* chosen = name ? available().find(name) : nullptr;
    return chosen ? chosen : available().kernels[0];
  }();
  return kernels;
}

const char* supports_shape(const ForwardProblem& p) {
  const Shape& s = p.shape;
  if (s.dtype != DType::kFloat32 && s.dtype != DType::kFloat16 && s.dtype != DType::kBFloat16) {
    return "the CPU engine computes in float32, float16 and bfloat16";
  }
  if (s.head_dim < 1 || s.head_dim_v < 1) return "the CPU engine needs a head dim of at least 1";
  if (p.score.bias.data && p.score.bias.dtype != DType::kFloat32 &&
      p.score.bias.dtype != DType::kFloat16 && p.score.bias.dtype != DType::kBFloat16) {
    return "the CPU engine takes a bias of float32, float16 or bfloat16";
  }
  return nullptr;
}

}  // namespace

const char* const* available_isas() { return available().names; }

const char* const* omitted_isas() {
  static const char* const names[] = {
#ifdef FAL_WITHOUT_AMX
      "amx",
#endif
#ifdef FAL_WITHOUT_AVX512_BF16
      "avx512_bf16",
#endif
      nullptr};
  return names;
}

const char* active_isa() { return active()->name; }

bool select_isa(const char* name) {
  const IsaKernels* kernels = available().find(name);
  if (kernels) active() = kernels;
  return kernels != nullptr;
}

const char* supports_forward(const ForwardProblem& problem) {
  const Shape& s = problem.shape;
  if (s.head_dim > kMaxHeadDim || s.head_dim_v > kMaxHeadDim) {
    if (problem.lengths.seqlen_q > kDecodeTokens) {
      return "the CPU engine takes head dims above 256 with at most 8 query tokens a sequence";
    }
    if (problem.score.dropout_threshold || problem.block_mask.given()) {
      return "the CPU engine takes head dims above 256 without dropout and block_mask";
    }
    if (s.head_dim > kMaxDecodeHeadDim || s.head_dim_v > kMaxDecodeHeadDim) {
      return "the CPU engine takes head dims up to 576";
    }
  }
  return supports_shape(problem);
}

const char* supports_backward(const BackwardProblem& problem) {
  if (const char* reason = supports_forward(problem.forward)) return reason;
  const Shape& s = problem.forward.shape;
  if (s.head_dim > kMaxHeadDim || s.head_dim_v > kMaxHeadDim) {
    return "the CPU engine has no backward for head dims above 256";
  }
  if (problem.forward.kv.dtype != problem.forward.shape.dtype) {
    return "the CPU engine has no backward for quantised K/V";
  }
  if (problem.forward.kv.pages.block_table) return "the CPU engine has no backward for paged K/V";
  const Bias& dbias = problem.dbias;
  if (dbias.data && dbias.dtype != DType::kFloat32 && dbias.dtype != DType::kFloat16 &&
      dbias.dtype != DType::kBFloat16) {
    return "the CPU engine writes a bias gradient of float32, float16 or bfloat16";
  }
  return nullptr;
}

void forward(const ForwardProblem& problem, const ThreadPool& pool) {
  active()->forward(problem, pool);
}

void backward(const BackwardProblem& problem, const ThreadPool& pool) {
  active()->backward(problem, pool);
}

int64_t fma_peak(int64_t flops, const ThreadPool& pool) {
  struct Job {
    int64_t flops, done;
  } job{flops, 0};
  pool.run(
      pool.ctx, pool.threads,
      [](void* arg, int) {
        Job& shared = *static_cast<Job*>(arg);
        __atomic_fetch_add(&shared.done, active()->fma_peak(shared.flops), __ATOMIC_RELAXED);
      },
      &job);
  return job.done;
}

}  // namespace fal::cpu
