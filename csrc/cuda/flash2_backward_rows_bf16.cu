#include "flash2_backward_rows.cuh"

namespace fal::cuda {

template cudaError_t flash2_backward_rows_of<__nv_bfloat16>(const BackwardArgs&, cudaStream_t);

}  // namespace fal::cuda
