// The engine table: who can run a problem, and who does.
#pragma once

#include "../core/rotary.h"
#include "arguments.h"

namespace fal::torch_binding {

enum class Engine { kCpu, kCudaDecode, kCudaFlash2, kCudaFlash1 };

// The engine that `backend` asks for ("auto", "cpu", "cuda", "decode", "flash2", "flash1"), or
// raises: the message lists every engine with its reason.
Engine choose_forward(const char* op, const std::string& backend, const Tensor& q,
                      const ForwardProblem& problem);
Engine choose_backward(const char* op, const std::string& backend, const Tensor& q,
                       const BackwardProblem& problem);

void run_forward(Engine engine, const Tensor& q, const ForwardProblem& problem);
void run_backward(Engine engine, const Tensor& q, const BackwardProblem& problem);

// The work of a cache update, on the device of `anchor`.
void run_rotate(const char* op, const Tensor& anchor, const RotateProblem& problem);
void run_append(const char* op, const Tensor& anchor, const AppendProblem& problem);

// cpu::fma_peak on torch's threads.
int64_t fma_peak(int64_t flops);

// JSON: what was compiled, and what this process can use of it.
std::string build_info();

}  // namespace fal::torch_binding
