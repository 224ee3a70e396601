#include "decode.cuh"

namespace fal::cuda {

template cudaError_t decode_kernel_of<__half>(const DecodeArgs&, cudaStream_t);

}  // namespace fal::cuda
