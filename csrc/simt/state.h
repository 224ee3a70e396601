// The emulator's own state: what it keeps per thread (Fiber), per warp, per thread block. One Block
// is run by one OS thread at a time; only device memory and reports are shared between blocks.
//
// Time is kept by vector clocks. Every agent (a thread, or an mbarrier in whose name TMA copies
// land) has a clock; row t of the matrix says up to which time of every other agent thread t has
// synchronised. An access (agent, time) happened before now in thread t iff time <= row t [agent].
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "context.h"
#include "counters.h"
#include "host_api.h"
#include "kernel_api.h"
#include "shadow.h"
#include "wgmma.h"

namespace fal::simt {

using Pc = const void*;  // a call site in the kernel
#define FAL_SIMT_PC __builtin_return_address(0)

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = ~0u;
constexpr uint32_t kSharedBase = 1024;  // shared address of the arena's first byte
constexpr uint32_t kArenaBytes = 512 * 1024;
constexpr int kMaxMbarriers = 64;  // per block
constexpr int kNamedBarriers = 16;
// Automatic variables without an initialiser hold this (g++ -ftrivial-auto-var-init=pattern).
constexpr uint32_t kUninitialisedWord = 0xfefefefeu;
// Accumulators hold this while a wgmma owns them.
constexpr uint32_t kInFlightWord = 0xfff5fff5u;

struct Block;

// One cp.async: what has been promised and has not landed yet.
struct PendingCopy {
  uint32_t to;
  const void* from;
  int bytes, source_bytes;
  Pc pc;
};

// One TMA store: reads shared memory when its group is waited for.
struct PendingStore {
  TensorMap map;
  uint32_t from;
  int coords[5];
  Pc pc;
};

enum class FiberState : uint8_t { kReady, kBlocked, kDone };

struct Fiber {
  Context context;
  Stack stack;
  Block* block = nullptr;
  uint3 thread{};
  uint32_t index = 0, lane = 0, warp = 0;
  FiberState state = FiberState::kDone;
  const char* waits_in = "";
  Pc waits_at = nullptr;
  int in_runtime = 0;  // > 0: accesses are the emulator's own
  int barrier_result = 0;
  std::vector<PendingCopy> open_copies;
  std::vector<std::vector<PendingCopy>> copy_groups;
  std::vector<PendingStore> open_stores;
  std::vector<std::vector<PendingStore>> store_groups;
  uint32_t proxy_fence_clock = 0;  // own time of the last fence.proxy.async
};

using CollectiveBody = void (*)(Block& block, void** args, uint32_t mask);

struct Warp {
  uint32_t alive = 0, ready = 0;  // lanes
  // The collective that lanes are gathering for.
  uint32_t arrived = 0, mask = 0;
  CollectiveBody body = nullptr;
  const char* name = "";
  Pc pc = nullptr;
  void* args[kWarpSize] = {};
  AccessLog log;
  WgmmaState wgmma;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;  // expected 0: every thread still alive
  int all = 1, any = 0, count = 0;
  std::vector<uint32_t> waiters;
  std::vector<uint32_t> clock;
  struct WarpArrival {
    uint32_t warp, lanes;
    Pc pc;
  };
  std::vector<WarpArrival> warps;
  Pc pc = nullptr;
};

struct Mbarrier {
  uint32_t address = 0;
  int count = 0, pending = 0;
  int64_t bytes = 0;  // announced and not yet landed
  uint32_t phase = 0;
  std::vector<uint32_t> waiters;
  std::vector<uint32_t> clock;      // what this phase's arrivals knew
  std::vector<uint32_t> completed;  // what those of ended phases knew
};

// One TMA load in flight.
struct PendingLoad {
  TensorMap map;
  uint32_t to, bytes;
  int mbarrier;
  int coords[5];
  Pc pc;
};

// A named piece of the shared arena; gaps between the pieces are red zones.
struct SharedRegion {
  uint32_t begin, end;  // offsets in the arena
  const char* name;
};

struct Launch;
struct Buffer;

struct Block {
  const Launch* launch = nullptr;
  uint32_t index = 0;
  uint3 id{};
  int threads = 0, alive = 0;
  bool abandoned = false;
  Fiber* current = nullptr;             // the fiber that runs, or &host
  Fiber host;                           // the OS thread's own context
  const Fiber* on_behalf_of = nullptr;  // the lane that a collective's body is at, for reports
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;

  uint8_t* arena = nullptr;
  std::vector<SharedRegion> regions;  // [0] is the dynamic shared memory
  std::unordered_map<int, uint32_t> statics;
  uint32_t arena_used = 0;
  std::vector<SharedCell> shadow;

  int agents = 0;  // threads + mbarriers
  std::vector<uint32_t> clocks;

  NamedBarrier barriers[kNamedBarriers];
  std::vector<Mbarrier> mbarriers;
  std::vector<PendingLoad> loads;

  uint64_t random_state = 1;
  Counters counters;
  SiteTable sites;
  Buffer* last_buffer = nullptr;
  uintptr_t image_begin = 0, image_end = 0;  // the last program image that was read from
  bool fenced = false;                       // has executed __threadfence
  std::vector<uint32_t> acquired;            // blocks whose fenced writes are visible, sorted

  Block();
  ~Block();

  Warp& warp_of(const Fiber& fiber) { return warps[fiber.warp]; }
  uint32_t* clock_row(uint32_t agent) { return &clocks[size_t(agent) * agents]; }
  uint32_t& clock(uint32_t agent) { return clocks[size_t(agent) * agents + agent]; }
  bool happened_before(uint32_t thread, uint32_t agent, uint32_t time) const {
    return time <= clocks[size_t(thread) * agents + agent];
  }
  uint8_t* shared(uint32_t address) { return arena + (address - kSharedBase); }
  // A number below n; always 0 under seed 0.
  uint32_t random(uint32_t n);
};

struct Launch {
  void (*run)(void*);
  void* call;
  uintptr_t params, params_end;
  dim3 grid, block;
  size_t smem_bytes;
  uint32_t number;  // counts launches: shadow of device memory from older ones is void
};

// initial-exec: reached in one instruction, as every plain access of a kernel asks for it.
extern __attribute__((tls_model("initial-exec"))) __thread Block* current_block;

// The calling fiber, with plain accesses switched off while the emulator works for it.
class Entry {
 public:
  explicit Entry(const char* what);
  ~Entry() { fiber.in_runtime--; }
  Entry(const Entry&) = delete;
  Entry& operator=(const Entry&) = delete;

  Block& block;
  Fiber& fiber;
};

// ---- scheduling (schedule.cpp)
// -----------------------------------------------------------------------
void block_current(const char* why, Pc pc);  // until wake()
void wake(Block& block, uint32_t thread);
[[noreturn]] void abandon_block();  // after a report: this block cannot go on

// ---- vector clocks (barrier.cpp)
// ---------------------------------------------------------------------
void release_clock(Block& block, uint32_t thread, std::vector<uint32_t>& to);
void acquire_clock(Block& block, uint32_t thread, const std::vector<uint32_t>& from);
void complete_barrier_if_full(Block& block, int id);  // also when a thread exits

// ---- collectives (collective.cpp)
// -------------------------------------------------------------------- `aligned`: all lanes must
// come from the same place in the source.
void collective(Entry& entry, Pc pc, const char* name, CollectiveBody body, void* arg,
                uint32_t mask, bool aligned);

// ---- memory
// ------------------------------------------------------------------------------------------ Shared
// (shared_memory.cpp). `thread` is checked; the write is recorded as (agent, time).
bool shared_in_bounds(Block& block, uint32_t address, int bytes, Pc pc, const char* what,
                      int alignment);
void note_shared_read(Block& block, uint32_t address, int bytes, uint32_t thread, Pc pc,
                      const char* what);
void note_shared_write(Block& block, uint32_t address, int bytes, uint32_t thread, Pc pc,
                       const char* what, bool atomic = false);
void note_async_begin(Block& block, uint32_t address, int bytes, uint32_t thread, Pc pc,
                      const char* what, uint32_t agent);
void note_async_landed(Block& block, uint32_t address, int bytes, uint32_t agent, uint32_t time,
                       bool generic_proxy);
// Device memory (device_memory.cpp). False: out of bounds, already reported.
bool check_global(Block& block, const void* p, int bytes, bool write, Pc pc, const char* what,
                  bool atomic = false, int alignment = 0, bool may_be_host = false);

// ---- asynchronous machinery
// --------------------------------------------------------------------------
bool land_one_load(Block& block);                             // tma.cpp; false: none in flight
void end_phase_if_complete(Block& block, Mbarrier& barrier);  // mbarrier.cpp
// The number of the mbarrier at a shared address.
int find_mbarrier(Block& block, uint32_t address, const Fiber& fiber, Pc pc, const char* what);

// ---- reports (report.cpp)
// ----------------------------------------------------------------------------
void report(Pc pc, const char* kind, const char* format, ...) __attribute__((format(printf, 3, 4)));
std::string where(Pc pc);
std::vector<std::string> where_all(const std::vector<Pc>& pcs);
bool same_place(Pc a, Pc b);  // equal source lines: the compiler may have cloned a call
void report_poison(uint32_t word, Pc pc, const char* what);
inline void check_initialised(uint32_t word, Pc pc, const char* what) {
  if (word == kUninitialisedWord || word == kInFlightWord) report_poison(word, pc, what);
}

// A 16-bit matrix element.
inline float element_to_float(uint16_t bits, bool bf16) {
  return bf16 ? __bfloat162float({bits}) : __half2float({bits});
}

}  // namespace fal::simt
