// Device memory: named buffers, looked up by address (device_memory.cpp).
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "shadow.h"

namespace fal::simt {

struct Buffer {
  uintptr_t begin, end;
  std::string name;
  bool writable, owned;
  std::atomic<uint64_t> read_bytes{0}, written_bytes{0};
  GlobalCell* shadow = nullptr;  // one per 4 bytes, of writable buffers

  Buffer(uintptr_t begin_, uintptr_t end_, std::string name_, bool writable_, bool owned_)
      : begin(begin_), end(end_), name(std::move(name_)), writable(writable_), owned(owned_) {}
  ~Buffer();
  size_t bytes() const { return end - begin; }
};

// Before a launch: shadow for every writable buffer that has none.
void prepare_buffers();
void clear_traffic();
void free_buffers();

}  // namespace fal::simt
