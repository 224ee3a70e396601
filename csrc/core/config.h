// Host + device annotations. core/ compiles with plain g++ -std=c++17 and with nvcc.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FAL_HOST_DEVICE inline
#endif
