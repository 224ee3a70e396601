// Splits one block of scratch memory into arrays, each 64-byte aligned. Run twice with the same
// code: once to learn the size, once to place the arrays.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fal::cpu {

struct ScratchCursor {
  char* base;  // null while sizes are counted
  size_t used = 0;

  template <class T>
  FAL_INLINE T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return base ? array : nullptr;
  }
};

}  // namespace fal::cpu
