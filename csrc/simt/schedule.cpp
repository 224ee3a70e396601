// Running a grid: blocks are handed to OS threads, a block's threads are fibers that run until they
// must wait. Under seed 0 they run in order; another seed picks the next fiber at random. When none
// can run and nothing is in flight, the block is deadlocked, and the report says who waits where.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

#include "device_memory.h"
#include "results.h"
#include "state.h"

namespace fal::simt {

__thread Block* current_block = nullptr;

namespace {
Block& running_block(const char* what) {
  if (!current_block || current_block->current == &current_block->host) {
    std::fprintf(stderr, "simt: %s used outside of a kernel\n", what);
    std::abort();
  }
  return *current_block;
}
}  // namespace

Entry::Entry(const char* what) : block(running_block(what)), fiber(*block.current) {
  fiber.in_runtime++;
}

Block::Block() {
  void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::fputs("simt: no memory for a block's shared memory\n", stderr);
    std::abort();
  }
  arena = static_cast<uint8_t*>(memory);
  host.block = this;
  current = &host;
}

Block::~Block() { munmap(arena, kArenaBytes); }

uint32_t Block::random(uint32_t n) {
  if (config().seed == 0) return 0;
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 33) % n;
}

// ---- choosing who runs
// -------------------------------------------------------------------------------

namespace {

void switch_to(Block& block, Fiber& next) {
  Fiber& previous = *block.current;
  if (&previous == &next) return;
  block.counters.switches++;
  block.current = &next;
  switch_context(previous.context, next.context);
}

// Leaves a fiber that cannot go on. Returns when it is chosen again.
void run_others(Block& block) {
  const Fiber& me = *block.current;
  const uint32_t warps = block.warps.size();
  for (;;) {
    uint32_t first = &me == &block.host ? 0 : me.warp;
    if (config().seed && (!block.warps[first].ready || block.random(8) == 0))
      first = block.random(warps);
    if (!config().async_late && block.random(4) == 0) land_one_load(block);
    for (uint32_t i = 0; i < warps; i++) {
      const uint32_t w = (first + i) % warps;
      const uint32_t ready = block.warps[w].ready;
      if (!ready) continue;
      const uint32_t shift = block.random(kWarpSize);
      const uint32_t rotated = ready >> shift | (shift ? ready << (kWarpSize - shift) : 0);
      const uint32_t lane = (__builtin_ctz(rotated) + shift) % kWarpSize;
      switch_to(block, block.fibers[w * kWarpSize + lane]);
      return;
    }
    // Copies take their time: they land when nobody can run.
    if (block.alive && land_one_load(block)) continue;
    switch_to(block, block.host);  // finished, or deadlocked
    return;
  }
}

void exit_fiber(Block& block, Fiber& fiber) {
  fiber.in_runtime++;
  Warp& warp = block.warp_of(fiber);
  for (const auto& group : fiber.copy_groups) {  // empty groups are nothing in flight
    fiber.open_copies.insert(fiber.open_copies.begin(), group.begin(), group.end());
  }
  if (!fiber.open_copies.empty()) {
    report(fiber.open_copies[0].pc, "cp.async-unwaited",
           "the thread exits with this copy in flight");
  }
  if (!fiber.open_stores.empty())
    report(fiber.open_stores[0].pc, "tma-uncommitted",
           "the thread exits before committing this store");
  if (!warp.wgmma.groups.empty() || !warp.wgmma.open.empty()) {
    const WgmmaOp& op = warp.wgmma.groups.empty() ? warp.wgmma.open[0] : warp.wgmma.groups[0][0];
    report(op.pc, "wgmma-unwaited", "the warp exits with this wgmma in flight");
  }
  if (!fiber.store_groups.empty() && !fiber.store_groups[0].empty())
    report(fiber.store_groups[0][0].pc, "tma-unwaited",
           "the thread exits with this store in flight, which still reads shared memory");
  fiber.state = FiberState::kDone;
  const uint32_t bit = 1u << fiber.lane;
  warp.alive &= ~bit;
  warp.ready &= ~bit;
  block.alive--;
  if (!warp.alive) flush_log(warp.log, block.counters, block.sites);
  if (block.alive) complete_barrier_if_full(block, 0);
}

[[noreturn]] void fiber_main() {
  Block& block = *current_block;
  block.launch->run(block.launch->call);
  exit_fiber(block, *block.current);
  run_others(block);
  std::abort();  // a finished fiber is never chosen
}

}  // namespace

void block_current(const char* why, Pc pc) {
  Block& block = *current_block;
  Fiber& fiber = *block.current;
  fiber.state = FiberState::kBlocked;
  fiber.waits_in = why;
  fiber.waits_at = pc;
  block.warp_of(fiber).ready &= ~(1u << fiber.lane);
  run_others(block);
}

void wake(Block& block, uint32_t thread) {
  Fiber& fiber = block.fibers[thread];
  fiber.state = FiberState::kReady;
  block.warps[fiber.warp].ready |= 1u << fiber.lane;
}

void abandon_block() {
  Block& block = *current_block;
  block.abandoned = true;
  switch_to(block, block.host);
  std::abort();  // an abandoned fiber is never chosen
}

// ---- one block
// -----------------------------------------------------------------------------------------

namespace {

void start_block(Block& block, const Launch& launch, uint32_t index) {
  const dim3 grid = launch.grid, shape = launch.block;
  const int threads = shape.x * shape.y * shape.z;
  block.launch = &launch;
  block.index = index;
  block.id = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
  block.threads = block.alive = threads;
  block.abandoned = false;
  block.random_state = (config().seed + 1) * 0x9e3779b97f4a7c15ull + index * 7919ull + 1;
  block.fenced = false;
  block.acquired.clear();
  block.last_buffer = nullptr;
  block.mbarriers.clear();
  block.loads.clear();
  for (NamedBarrier& barrier : block.barriers) barrier = NamedBarrier();

  block.statics.clear();
  block.regions.assign(1, {0, uint32_t(launch.smem_bytes), "dynamic shared memory"});
  block.arena_used = uint32_t(launch.smem_bytes);
  std::memset(block.arena, 0xff, launch.smem_bytes);  // NaN
  if (config().check) {
    block.shadow.assign((launch.smem_bytes + SharedCell::kBytes - 1) / SharedCell::kBytes, {});
    block.agents = threads + kMaxMbarriers;
    block.clocks.assign(size_t(block.agents) * block.agents, 0);
    for (int agent = 0; agent < block.agents; agent++) block.clock(agent) = 1;
  }

  block.warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp());
  while (int(block.fibers.size()) < threads) block.fibers.emplace_back();
  for (int t = 0; t < threads; t++) {
    Fiber& fiber = block.fibers[t];
    fiber.block = &block;
    fiber.thread = {t % shape.x, t / shape.x % shape.y, t / shape.x / shape.y};
    fiber.index = t;
    fiber.lane = t % kWarpSize;
    fiber.warp = t / kWarpSize;
    fiber.in_runtime = 0;
    fiber.proxy_fence_clock = 0;
    fiber.open_copies.clear();
    fiber.copy_groups.clear();
    fiber.open_stores.clear();
    fiber.store_groups.clear();
    fiber.stack.reserve(t);
    prepare(fiber.context, fiber.stack, fiber_main);
    block.warps[fiber.warp].alive |= 1u << fiber.lane;
    wake(block, t);
  }
}

// "warp 2, lanes 0000ffff wait in barrier at a.cu:12 (threads 64-79)", one entry per warp and
// place.
std::string describe_waiting(Block& block) {
  std::string text;
  for (uint32_t w = 0; w < block.warps.size(); w++) {
    uint32_t left = block.warps[w].alive & ~block.warps[w].ready;
    while (left) {
      const Fiber& first = block.fibers[w * kWarpSize + __builtin_ctz(left)];
      uint32_t same = 0;
      for (uint32_t lanes = left; lanes; lanes &= lanes - 1) {
        const Fiber& fiber = block.fibers[w * kWarpSize + __builtin_ctz(lanes)];
        if (fiber.waits_in == first.waits_in && fiber.waits_at == first.waits_at)
          same |= 1u << fiber.lane;
      }
      char head[96];
      std::snprintf(head, sizeof head, "\n  warp %u lanes %08x wait in %s", w, same,
                    first.waits_in);
      text += head + (" at " + where(first.waits_at));
      left &= ~same;
    }
    if (block.warps[w].alive && block.warps[w].arrived) {
      const uint32_t exited = block.warps[w].mask & ~block.warps[w].alive;
      char tail[64];
      std::snprintf(tail, sizeof tail, "; lanes %08x of its mask have exited", exited);
      if (exited) text += tail;
    }
  }
  for (int id = 0; id < kNamedBarriers; id++) {
    const NamedBarrier& barrier = block.barriers[id];
    if (!barrier.arrived) continue;
    char line[96];
    std::snprintf(line, sizeof line, "\n  barrier %d: %d of %d threads have arrived", id,
                  barrier.arrived, barrier.expected ? barrier.expected : block.alive);
    text += line;
  }
  for (const Mbarrier& barrier : block.mbarriers) {
    if (barrier.waiters.empty()) continue;
    char line[128];
    std::snprintf(
        line, sizeof line,
        "\n  mbarrier at shared offset %u: phase %u, %d of %d arrivals and %lld bytes missing",
        barrier.address - kSharedBase, barrier.phase, barrier.pending, barrier.count,
        static_cast<long long>(barrier.bytes));
    text += line;
  }
  return text;
}

void run_block(Block& block, const Launch& launch, uint32_t index) {
  start_block(block, launch, index);
  run_others(block);
  if (block.alive && !block.abandoned) {
    block.abandoned = true;
    Pc first = nullptr;
    for (const Fiber& fiber : block.fibers)
      if (fiber.state == FiberState::kBlocked && !first) first = fiber.waits_at;
    report(first, "deadlock", "block %u: %d threads are alive and none can run:%s", index,
           block.alive, describe_waiting(block).c_str());
  }
  if (!block.loads.empty() && !block.abandoned)
    report(block.loads[0].pc, "tma-unwaited", "block %u ends with %zu TMA loads in flight", index,
           block.loads.size());
}

bool valid_shape(const dim3& grid, const dim3& block, size_t smem_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024) {
    report(nullptr, "launch", "a block of %u x %u x %u threads; 1 to 1024 are possible", block.x,
           block.y, block.z);
    return false;
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    report(nullptr, "launch", "a grid of %u x %u x %u blocks; y and z are at most 65535", grid.x,
           grid.y, grid.z);
    return false;
  }
  if (smem_bytes > config().max_smem_bytes) {
    report(nullptr, "launch", "%zu bytes of dynamic shared memory; the device has %zu", smem_bytes,
           config().max_smem_bytes);
    return false;
  }
  return true;
}

}  // namespace

cudaError_t launch(void (*run)(void*), void* call, size_t call_bytes, dim3 grid, dim3 block_shape,
                   size_t smem_bytes) {
  static std::atomic<uint32_t> launches{0};
  if (!valid_shape(grid, block_shape, smem_bytes)) return cudaErrorInvalidConfiguration;
  const uintptr_t params = uintptr_t(call);
  const Launch launch{run,  call,        params,     params + call_bytes,
                      grid, block_shape, smem_bytes, ++launches};
  prepare_buffers();
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    Block block;
    current_block = &block;
    for (uint64_t i; !failed && (i = next++) < blocks;) {
      run_block(block, launch, uint32_t(i));
      if (block.abandoned) failed = true;
    }
    current_block = nullptr;
    add_results(block.counters, block.sites);
  };
  std::vector<std::thread> helpers;
  const int threads = int(std::min<uint64_t>(std::max(config().threads, 1), blocks));
  for (int i = 1; i < threads; i++) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  Counters one;
  one.launches = 1;
  add_results(one, {});
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

// ---- the running thread
// --------------------------------------------------------------------------------

uint3 thread_idx() { return current_block->current->thread; }
uint3 block_idx() { return current_block->id; }
dim3 block_dim() { return current_block->launch->block; }
dim3 grid_dim() { return current_block->launch->grid; }
uint32_t lane_id() { return current_block->current->lane; }

}  // namespace fal::simt
