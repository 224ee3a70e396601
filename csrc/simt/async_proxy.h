// What TMA and wgmma share: the swizzle of shared-memory tiles, and reads by the asynchronous
// proxy, which last from issue to wait.
#pragma once

#include "state.h"

namespace fal::simt {

// The hardware's permutation of 16-byte chunks, a function of the shared address alone.
inline uint32_t swizzled(uint32_t address, Swizzle mode) {
  switch (mode) {
    case Swizzle::k128B:
      return address ^ (address >> 3 & 0x70);
    case Swizzle::k64B:
      return address ^ (address >> 3 & 0x30);
    case Swizzle::k32B:
      return address ^ (address >> 3 & 0x10);
    case Swizzle::kNone:
      break;
  }
  return address;
}

// The width of the rows that the pattern permutes, in bytes.
inline uint32_t swizzle_width(Swizzle mode) { return 16u << uint32_t(mode); }

// An asynchronous read of [address, address + bytes) begins: the bytes must be written, ordered
// before this thread, and if ordinary stores wrote them, behind a fence.proxy.async.
void begin_async_read(Block& block, uint32_t address, int bytes, Pc pc, const char* what);
void end_async_read(Block& block, uint32_t address, int bytes, Pc pc, const char* what);

}  // namespace fal::simt
