#include "flash2_backward_rows.cuh"

namespace fal::cuda {

template cudaError_t flash2_backward_rows_of<__half>(const BackwardArgs&, cudaStream_t);

}  // namespace fal::cuda
