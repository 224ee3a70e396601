// The CPU engine's interface. It knows no torch: whoever calls it lends it a way to run work in
// parallel.
#pragma once

#include "../core/problem.h"

namespace fal::cpu {

// run(ctx, workers, body, arg) calls body(arg, w) once for each w in [0, workers), in parallel as
// far as the pool allows, and returns when all have returned.
struct ThreadPool {
  int threads;
  void* ctx;
  void (*run)(void* ctx, int workers, void (*body)(void* arg, int worker), void* arg);
};

// Instruction sets this file set was compiled for and this processor can run, best first, e.g.
// {"avx512", "avx2", "baseline"}; null-terminated.
const char* const* available_isas();
// Those that the compiler of this build could not compile; null-terminated.
const char* const* omitted_isas();
const char* active_isa();
bool select_isa(const char* name);  // false when it is not available; for tests and comparisons

// Null when the engine can run the problem, else a sentence that says why not (static storage).
const char* supports_forward(const ForwardProblem& problem);
const char* supports_backward(const BackwardProblem& problem);

// Every element of the outputs is written. Throws std::bad_alloc when scratch memory cannot be had.
void forward(const ForwardProblem& problem, const ThreadPool& pool);
void backward(const BackwardProblem& problem, const ThreadPool& pool);

// The arithmetic ceiling, for benchmarks: at least `flops` floating-point operations on each of the
// pool's threads, on registers alone. Returns how many there were in all.
int64_t fma_peak(int64_t flops, const ThreadPool& pool);

}  // namespace fal::cpu
