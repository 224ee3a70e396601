#include "flash1_forward.cuh"

namespace fal::cuda {

template cudaError_t flash1_forward_of<__nv_bfloat16>(const ForwardProblem&, void*, cudaStream_t);

}  // namespace fal::cuda
