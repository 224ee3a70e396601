#include "flash2_backward.cuh"

namespace fal::cuda {

template cudaError_t flash2_backward_columns_of<__nv_bfloat16>(const BackwardArgs&, cudaStream_t);

}  // namespace fal::cuda
