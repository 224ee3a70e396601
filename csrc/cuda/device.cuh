// The CUDA language as kernels see it, from either compiler: nvcc with its own headers, or g++ with
// the SIMT emulator's (FAL_SIMT is then defined). Kernels include this or ptx.cuh and nothing else
// of CUDA.
//
// Rules that keep one source valid for both:
//   - inline asm only in ptx.cuh and ptx_sm90.cuh, one instruction per function;
//   - launches only through launch.h, no <<<>>>;
//   - shared memory only through the two macros below;
//   - 8- and 16-byte accesses, and everything asynchronous, through the wrappers of ptx.cuh;
//   - waiting is always a wrapper (barrier, mbarrier), never a spin loop on memory;
//   - accumulators are local arrays; no dynamic allocation, recursion, printf or assert.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

// The block's dynamic shared memory, as bytes. Aligned for 128-byte-swizzled TMA tiles.
#define FAL_DYNAMIC_SMEM(name) extern __shared__ __align__(1024) uint8_t name[]
// A static shared variable. An array type needs an alias: using Row = float[32].
#define FAL_SHARED(type, name) __shared__ type name

#else

#define FAL_SIMT 1
#include "../simt/cuda_names.h"

#define FAL_DYNAMIC_SMEM(name) uint8_t* const name = ::fal::simt::dynamic_smem()
#define FAL_SHARED(type, name)                               \
  struct FalSharedTag_##name {};                             \
  type& name = *static_cast<type*>(::fal::simt::static_smem( \
      ::fal::simt::StaticSite<FalSharedTag_##name>::id, sizeof(type), alignof(type), #name))

#endif
