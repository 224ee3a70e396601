// Conformance of the PTX wrappers: each one runs once on fixed inputs and its raw result words come
// back, so that the emulator's words (tests/data/ptx_conformance.json) and a GPU's can be compared.
// Plain C, for ctypes.
#pragma once

#include <stdint.h>

#define FAL_CONFORMANCE_API extern "C" __attribute__((visibility("default")))

// The sections in order, one per line: name, words, how to compare ("exact", "ulp 2" = floats at
// most 2 units in the last place apart, "abs 0.001").
FAL_CONFORMANCE_API const char* fal_cuda_conformance_sections();
FAL_CONFORMANCE_API const char* fal_cuda_conformance_sm90_sections();

// Runs on the current device and fills `words`, which has room for `capacity` of them. Returns the
// number of words, or minus a cudaError_t. The second needs a device of compute capability 9.0.
FAL_CONFORMANCE_API int32_t fal_cuda_conformance(uint32_t* words, int32_t capacity);
FAL_CONFORMANCE_API int32_t fal_cuda_conformance_sm90(uint32_t* words, int32_t capacity);
