// Plain loads and stores. Kernels are compiled with -fsanitize=thread, which puts a call to one of
// these functions before every memory access; the sanitiser's own library is never linked. Locals
// on the fiber's stack are let through at once.
//
// The access itself follows the call, so an access out of bounds can only be prevented by
// abandoning the block.
#include "device_memory.h"
#include "state.h"

namespace fal::simt {
namespace {

inline void access(const void* p, int bytes, bool write, int alignment, Pc pc) {
  Block* block = current_block;
  if (!block) return;  // host code
  Fiber& fiber = *block->current;
  if (fiber.in_runtime || &fiber == &block->host) return;
  const char* address = static_cast<const char*>(p);
  if (address >= fiber.stack.low() && address < fiber.stack.high()) return;
  fiber.in_runtime++;
  const char* what = write ? "store" : "load";
  const uintptr_t offset = uintptr_t(p) - uintptr_t(block->arena);
  AccessKind kind;
  uint64_t logged = uint64_t(p);
  if (offset < kArenaBytes) {
    const uint32_t target = uint32_t(offset) + kSharedBase;
    if (!shared_in_bounds(*block, target, bytes, pc, what, alignment)) abandon_block();
    if (write)
      note_shared_write(*block, target, bytes, fiber.index, pc, what);
    else
      note_shared_read(*block, target, bytes, fiber.index, pc, what);
    kind = write ? AccessKind::kSharedStore : AccessKind::kSharedLoad;
    logged = target;
  } else {
    if (!check_global(*block, p, bytes, write, pc, what, false, alignment, true)) abandon_block();
    kind = write ? AccessKind::kGlobalStore : AccessKind::kGlobalLoad;
    if (!block->last_buffer ||
        uintptr_t(p) - block->last_buffer->begin >= block->last_buffer->bytes())
      logged = 0;  // a parameter or a constant: no traffic
  }
  if (config().account && logged)
    block->warp_of(fiber).log.push_back({pc, logged, uint8_t(fiber.lane), uint8_t(bytes), kind});
  fiber.in_runtime--;
}

inline void access_range(const void* p, unsigned long bytes, bool write, Pc pc) {
  const char* at = static_cast<const char*>(p);
  while (bytes) {
    const int step = uintptr_t(at) % 4 == 0 && bytes >= 4 ? 4 : 1;
    access(at, step, write, step, pc);
    at += step;
    bytes -= step;
  }
}

}  // namespace
}  // namespace fal::simt

#define FAL_SIMT_HOOKS(n)                                                                     \
  extern "C" void __tsan_read##n(void* p) { fal::simt::access(p, n, false, n, FAL_SIMT_PC); } \
  extern "C" void __tsan_write##n(void* p) { fal::simt::access(p, n, true, n, FAL_SIMT_PC); } \
  extern "C" void __tsan_unaligned_read##n(void* p) {                                         \
    fal::simt::access(p, n, false, 1, FAL_SIMT_PC);                                           \
  }                                                                                           \
  extern "C" void __tsan_unaligned_write##n(void* p) {                                        \
    fal::simt::access(p, n, true, 1, FAL_SIMT_PC);                                            \
  }
FAL_SIMT_HOOKS(1)
FAL_SIMT_HOOKS(2)
FAL_SIMT_HOOKS(4)
FAL_SIMT_HOOKS(8)
FAL_SIMT_HOOKS(16)
extern "C" void __tsan_read_range(void* p, unsigned long bytes) {
  fal::simt::access_range(p, bytes, false, FAL_SIMT_PC);
}
extern "C" void __tsan_write_range(void* p, unsigned long bytes) {
  fal::simt::access_range(p, bytes, true, FAL_SIMT_PC);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
// The guard of a function-local static, in host code beside a kernel.
extern "C" uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
