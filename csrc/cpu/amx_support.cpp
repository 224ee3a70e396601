// Asks processor and kernel for AMX. Compiled for the baseline instruction set: it runs everywhere.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fal::cpu {

#if defined(__x86_64__)
bool request_amx() {
#if defined(FAL_AMX_TILES)  // amx.h
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__linux__)
  // cpuid leaf 7: AMX-BF16 is edx bit 22, AMX-TILE bit 24.
  constexpr unsigned kTileBits = 1u << 22 | 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kTileBits) != kTileBits) return false;
  // Linux hands out the 8 KiB of tile state on request only (Documentation/arch/x86/xstate.rst), to
  // the whole process, and refuses when an alternate signal stack is too small for it.
  constexpr long kRequestPermission = 0x1023, kGetPermission = 0x1022, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  uint64_t granted = 0;
  return syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && (granted >> kTileData & 1);
#else
  return false;
#endif
}
#endif

}  // namespace fal::cpu
