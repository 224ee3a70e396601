// What kernels cost in the emulator: totals, and per call site how many 32-byte sectors or
// shared-memory wavefronts the warp's accesses took against the least possible.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace fal::simt {

using Pc = const void*;

enum class AccessKind : uint8_t {
  kGlobalLoad,
  kGlobalStore,
  kCopySource,  // the device-memory side of cp.async
  kSharedLoad,
  kSharedStore,
  kCopyTarget,  // the shared-memory side of cp.async
  kLdmatrix,
  kStmatrix,
  kCount
};
const char* name_of(AccessKind kind);
inline bool is_global(AccessKind kind) { return kind <= AccessKind::kCopySource; }

struct SiteCount {
  uint64_t requests = 0, bytes = 0;
  uint64_t units = 0, ideal = 0;

  void add(const SiteCount& other) {
    requests += other.requests;
    bytes += other.bytes;
    units += other.units;
    ideal += other.ideal;
  }
};
using SiteTable = std::map<std::pair<Pc, AccessKind>, SiteCount>;

struct Counters {
  uint64_t global_load_bytes = 0, global_store_bytes = 0, global_atomics = 0;
  uint64_t mma_flops = 0, ex2 = 0;
  uint64_t collectives = 0, barriers = 0, switches = 0, launches = 0;
  uint64_t units[int(AccessKind::kCount)] = {}, ideal[int(AccessKind::kCount)] = {};

  void add(const Counters& other);
};

// One lane's access. Lanes run one after another, so a warp-wide instruction is put together again
// afterwards: the k-th access of each lane at one call site since the warp last met.
struct LoggedAccess {
  Pc pc;
  uint64_t address;
  uint8_t lane, bytes;
  AccessKind kind;
};
using AccessLog = std::vector<LoggedAccess>;

void flush_log(AccessLog& log, Counters& counters, SiteTable& sites);

// Wavefronts that `lanes` addresses of `bytes` each take: the bank with the most different words
// decides. Lanes go in groups that move 128 bytes at a time. kNoAddress: an inactive lane.
constexpr uint64_t kNoAddress = ~0ull;
int wavefronts(const uint64_t* address, int lanes, int bytes, int* ideal);

}  // namespace fal::simt
