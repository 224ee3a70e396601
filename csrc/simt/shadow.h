// What the emulator remembers of each piece of memory: who wrote it last and when, who has read it
// since, and whether an asynchronous copy is in flight.
#pragma once

#include <cstdint>

namespace fal::simt {

// A call site in four bytes, as its distance from the emulator's code, which is in the same
// program.
class CompactPc {
 public:
  CompactPc() = default;
  explicit CompactPc(const void* pc) : distance_(int32_t(intptr_t(pc) - base())) {}
  const void* get() const { return reinterpret_cast<const void*>(base() + distance_); }

 private:
  static intptr_t base();
  int32_t distance_;
};

// Two bytes of shared memory. Accesses to one byte of the two are told apart by masks.
struct SharedCell {
  static constexpr int kBytes = 2;
  static constexpr int kReaders = 4;
  enum Flag : uint8_t {
    kWritten0 = 1,  // byte 0 holds a value
    kWritten1 = 2,
    kPending = 4,  // an asynchronous copy into it is in flight
    kGeneric = 8,  // last written by ordinary stores: needs fence.proxy.async before wgmma or TMA
    kAtomic = 16,  // last written by an atomic
  };
  struct Reader {
    uint32_t time;  // 0: none
    uint16_t thread;
    uint16_t mask;
    CompactPc pc;
  };
  uint32_t write_time;  // 0: never written
  uint16_t writer;      // agent
  uint8_t flags;
  uint8_t write_mask;
  CompactPc write_pc;
  uint32_t async_reads;  // wgmma or TMA stores that still may read it
  Reader readers[kReaders];
};

// Four bytes of device memory, within one launch: the last write and reads by two different blocks
// (two, so that whichever block writes next, one of the readers is another).
struct GlobalCell {
  static constexpr int kBytes = 4;
  struct Access {
    uint32_t block, time;
    uint16_t thread;
    uint8_t mask;  // bytes touched; 0: none
    bool atomic;
    CompactPc pc;
  };
  uint32_t launch;
  Access write;
  Access reads[2];
};

}  // namespace fal::simt
