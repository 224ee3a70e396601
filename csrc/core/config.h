// Host + device annotations. core/ compiles with plain g++ -std=c++17 and with nvcc.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined, so that no object file holds a copy: the CPU engine compiles these headers once
// per instruction set, and the linker would keep any one of the copies for all of them.
#define FAL_HOST_DEVICE inline __attribute__((always_inline))
#endif
