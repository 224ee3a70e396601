// Rotary embedding and appending to a KV cache on the CPU. Bound by memory: one generic
// implementation.
#pragma once

#include "../core/rotary.h"
#include "engine.h"

namespace fal::cpu {

void rotate(const RotateProblem& problem, const ThreadPool& pool);
void append(const AppendProblem& problem, const ThreadPool& pool);

}  // namespace fal::cpu
