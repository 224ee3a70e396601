#include "decode.cuh"

namespace fal::cuda {

template cudaError_t decode_kernel_of<__nv_bfloat16>(const DecodeArgs&, cudaStream_t);

}  // namespace fal::cuda
