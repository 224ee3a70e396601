// Block and named barriers, __syncwarp, and the vector clocks they join.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace fal::simt {

// ---- vector clocks
// -------------------------------------------------------------------------------------

// What `thread` knows goes into `to`; its later accesses belong to a new time.
void release_clock(Block& block, uint32_t thread, std::vector<uint32_t>& to) {
  if (!config().check) return;
  const uint32_t* row = block.clock_row(thread);
  to.resize(block.agents, 0);
  for (int i = 0; i < block.agents; i++) to[i] = std::max(to[i], row[i]);
  block.clock(thread)++;
}

void acquire_clock(Block& block, uint32_t thread, const std::vector<uint32_t>& from) {
  if (!config().check || from.empty()) return;
  uint32_t* row = block.clock_row(thread);
  for (int i = 0; i < block.agents; i++) row[i] = std::max(row[i], from[i]);
}

// ---- barriers
// ------------------------------------------------------------------------------------------

namespace {

// bar.sync and bar.arrive are executed by whole warps, all lanes at one place in the source.
void note_warp_arrival(Block& block, NamedBarrier& barrier, const Fiber& fiber, int id, Pc pc) {
  for (NamedBarrier::WarpArrival& arrival : barrier.warps) {
    if (arrival.warp != fiber.warp) continue;
    if (arrival.pc != pc && !same_place(arrival.pc, pc))
      report(pc, "divergent-barrier",
             "barrier %d: lanes %08x of warp %u wait at %s, this lane arrives elsewhere", id,
             arrival.lanes, arrival.warp, where(arrival.pc).c_str());
    arrival.lanes |= 1u << fiber.lane;
    return;
  }
  barrier.warps.push_back({fiber.warp, 1u << fiber.lane, pc});
  (void)block;
}

void arrive(Block& block, Fiber& fiber, int id, int threads, int value, Pc pc) {
  NamedBarrier& barrier = block.barriers[id];
  if (threads % kWarpSize != 0)
    report(pc, "barrier-count", "barrier %d for %d threads: not a multiple of 32", id, threads);
  if (threads > block.threads)
    report(pc, "barrier-count", "barrier %d for %d threads, the block has %d", id, threads,
           block.threads);
  if (barrier.arrived && barrier.expected != threads)
    report(pc, "barrier-count",
           "barrier %d: this thread expects %d threads, one that waits at %s expects %d", id,
           threads, where(barrier.pc).c_str(), barrier.expected);
  note_warp_arrival(block, barrier, fiber, id, pc);
  barrier.expected = threads;
  barrier.arrived++;
  barrier.all &= value != 0;
  barrier.any |= value != 0;
  barrier.count += value != 0;
  barrier.pc = pc;
  release_clock(block, fiber.index, barrier.clock);
}

bool valid_id(int id, Pc pc) {
  if (id >= 0 && id < kNamedBarriers) return true;
  report(pc, "barrier-count", "barrier %d: there are barriers 0 to 15", id);
  return false;
}

int sync(Entry& entry, int id, int threads, int value, BarrierReduction op, Pc pc) {
  if (!valid_id(id, pc)) abandon_block();
  Block& block = entry.block;
  Fiber& fiber = entry.fiber;
  arrive(block, fiber, id, threads, value, pc);
  block.barriers[id].waiters.push_back(fiber.index);
  fiber.barrier_result = int(op);
  fiber.state = FiberState::kBlocked;
  complete_barrier_if_full(block, id);
  if (fiber.state == FiberState::kBlocked)
    block_current(id == 0 ? "barrier 0 (__syncthreads)" : "a named barrier", pc);
  return fiber.barrier_result;
}

}  // namespace

void complete_barrier_if_full(Block& block, int id) {
  NamedBarrier& barrier = block.barriers[id];
  const int expected = barrier.expected ? barrier.expected : block.alive;
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  if (barrier.arrived > expected)
    report(barrier.pc, "barrier-count", "barrier %d: %d arrivals, %d expected", id, barrier.arrived,
           expected);
  for (const NamedBarrier::WarpArrival& arrival : barrier.warps) {
    const uint32_t missing = block.warps[arrival.warp].alive & ~arrival.lanes;
    if (missing)
      report(arrival.pc, "divergent-barrier", "barrier %d: warp %u arrives without its lanes %08x",
             id, arrival.warp, missing);
  }
  block.counters.barriers++;
  for (Warp& warp : block.warps) flush_log(warp.log, block.counters, block.sites);
  const std::vector<uint32_t> waiters = std::move(barrier.waiters);
  for (uint32_t thread : waiters) {
    Fiber& fiber = block.fibers[thread];
    acquire_clock(block, thread, barrier.clock);
    const auto op = BarrierReduction(fiber.barrier_result);
    fiber.barrier_result = op == BarrierReduction::kAnd  ? barrier.all
                           : op == BarrierReduction::kOr ? barrier.any
                                                         : barrier.count;
    wake(block, thread);
  }
  barrier = NamedBarrier();
}

void barrier_sync(int id, int threads) {
  Entry entry("a barrier");
  sync(entry, id, threads, 0, BarrierReduction::kCount, FAL_SIMT_PC);
}

int barrier_reduce(int value, BarrierReduction op) {
  Entry entry("a barrier");
  return sync(entry, 0, 0, value, op, FAL_SIMT_PC);
}

void barrier_arrive(int id, int threads) {
  Entry entry("a barrier");
  if (!valid_id(id, FAL_SIMT_PC)) abandon_block();
  arrive(entry.block, entry.fiber, id, threads, 0, FAL_SIMT_PC);
  complete_barrier_if_full(entry.block, id);
}

void sync_warp(uint32_t mask) {
  Entry entry("__syncwarp");
  collective(
      entry, FAL_SIMT_PC, "__syncwarp",
      [](Block& block, void**, uint32_t lanes) {
        if (!config().check) return;
        std::vector<uint32_t> joined;
        const uint32_t base = block.current->warp * kWarpSize;
        for (uint32_t l = lanes; l; l &= l - 1)
          release_clock(block, base + __builtin_ctz(l), joined);
        for (uint32_t l = lanes; l; l &= l - 1)
          acquire_clock(block, base + __builtin_ctz(l), joined);
      },
      nullptr, mask, false);
}

}  // namespace fal::simt
