// What the CUDA run time says about devices and errors, for callers that include no CUDA header.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "engine.h"

#define FAL_STRING_OF(x) #x
#define FAL_STRING(x) FAL_STRING_OF(x)

namespace fal::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int device_capability(int device) {
  constexpr int kCached = 64;
  static int cache[kCached];  // 0: not asked yet. Racing threads write the same value.
  if (device >= 0 && device < kCached && cache[device] > 0) return cache[device];
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();  // a question that failed must not fail the next launch
    return -1;
  }
  const int capability = major * 10 + minor;
  if (device >= 0 && device < kCached) cache[device] = capability;
  return capability;
}

const char* compiled_architectures() {
  static const std::string list = [] {
    std::string s = FAL_STRING(FAL_CUDA_ARCHITECTURES);  // joined by '_' on the command line
    std::replace(s.begin(), s.end(), '_', ',');
#ifdef FAL_CUDA_PTX
    s += ",compute_" FAL_STRING(FAL_CUDA_PTX);
#endif
    return s;
  }();
  return list.c_str();
}

}  // namespace fal::cuda
