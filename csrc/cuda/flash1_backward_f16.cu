#include "flash1_backward.cuh"

namespace fal::cuda {

template cudaError_t flash1_backward_of<__half>(const BackwardArgs&, cudaStream_t);

}  // namespace fal::cuda
