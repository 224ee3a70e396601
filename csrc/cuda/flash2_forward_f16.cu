#include "flash2_forward.cuh"

namespace fal::cuda {

template cudaError_t flash2_forward_of<__half>(const ForwardProblem&, cudaStream_t);

}  // namespace fal::cuda
