// What one instruction set offers to the engine. Each attention_<isa>.cpp compiles the same
// templates with its own flags inside its own namespace and defines one such table.
//
// Code that is compiled more than once must leave no function that the linker could merge with
// another object's copy (an AVX-512 copy would then run on every machine): everything lives in
// namespace FAL_CPU_ISA or is always inlined, and no std:: template is instantiated. A test reads
// the objects' symbol tables.
#pragma once

#include <stddef.h>

#include "engine.h"

#define FAL_INLINE inline __attribute__((always_inline))
#define FAL_NOINLINE __attribute__((noinline))

namespace fal::cpu {

struct IsaKernels {
  const char* name;
  void (*forward)(const ForwardProblem& problem, const ThreadPool& pool);
  void (*backward)(const BackwardProblem& problem, const ThreadPool& pool);
  int64_t (*fma_peak)(int64_t flops);
};

#if defined(__x86_64__)
extern const IsaKernels kernels_amx, kernels_avx512_bf16, kernels_avx512, kernels_avx2,
    kernels_baseline;
#elif defined(__aarch64__)
extern const IsaKernels kernels_neon;
#else
extern const IsaKernels kernels_baseline;
#endif

#if defined(__x86_64__)
// True when processor and kernel let this process use AMX; asks the kernel for permission.
bool request_amx();
#endif

}  // namespace fal::cpu
