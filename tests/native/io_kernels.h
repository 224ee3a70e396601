// Forward passes whose traffic is counted, by sequence length and tile size: see io_kernels.cu.
#pragma once

#include "csrc/core/problem.h"
#include "csrc/cuda/device.cuh"

namespace fal::cuda {

inline constexpr int kStandardMaxSeqlen = 2048;  // a row of S fits a warp's registers

// Device memory beside the tensors: S for "standard"; O, m and l for "flash1".
int64_t io_workspace_bytes(const ForwardProblem& problem, const char* which);
cudaError_t io_standard(const ForwardProblem& problem, void* workspace);
cudaError_t io_flash1(const ForwardProblem& problem, void* workspace, int tile_of_keys);
cudaError_t io_flash2(const ForwardProblem& problem, int tile_of_rows);

}  // namespace fal::cuda
