// mbarriers: a phase ends when all arrivals and all announced bytes have come; waiting threads then
// know whatever the arrivals knew. Also fence.proxy.async and setmaxnreg.
#include <cstring>

#include "async_proxy.h"

namespace fal::simt {

namespace {

// An mbarrier's word in shared memory holds this and its number, so that overwriting it shows.
constexpr uint64_t kSignature = 0x6d62617272696572ull;

Mbarrier* find(Block& block, uint32_t address, const Fiber& fiber, Pc pc, const char* what) {
  if (!shared_in_bounds(block, address, 8, pc, what, 8)) abandon_block();
  uint64_t word;
  std::memcpy(&word, block.shared(address), 8);
  const uint64_t index = word ^ kSignature;
  if (index >= block.mbarriers.size() || block.mbarriers[index].address != address) {
    report(pc, "mbarrier",
           "%s at shared offset %u: no mbarrier was initialised there, or it was overwritten", what,
           address - kSharedBase);
    abandon_block();
  }
  note_shared_read(block, address, 8, fiber.index, pc, what);  // its init must have happened before
  return &block.mbarriers[index];
}

void arrive(uint32_t address, int64_t bytes, Entry& entry, Pc pc) {
  Mbarrier* barrier = find(entry.block, address, entry.fiber, pc, "mbarrier.arrive");
  if (barrier->pending == 0) {
    report(pc, "mbarrier", "more than %d arrivals in one phase", barrier->count);
    return;
  }
  release_clock(entry.block, entry.fiber.index, barrier->clock);
  barrier->bytes += bytes;
  barrier->pending--;
  end_phase_if_complete(entry.block, *barrier);
}

}  // namespace

void end_phase_if_complete(Block& block, Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = barrier.count;
  // What this phase's arrivals knew, on top of earlier phases'.
  barrier.completed.resize(barrier.clock.size(), 0);
  for (size_t i = 0; i < barrier.clock.size(); i++)
    barrier.completed[i] = std::max(barrier.completed[i], barrier.clock[i]);
  barrier.clock.clear();
  for (uint32_t thread : barrier.waiters) wake(block, thread);
  barrier.waiters.clear();
}

void mbarrier_init(uint32_t address, uint32_t count) {
  Entry entry("mbarrier.init");
  Block& block = entry.block;
  const Pc pc = FAL_SIMT_PC;
  if (!shared_in_bounds(block, address, 8, pc, "mbarrier.init", 8)) abandon_block();
  if (count == 0 || block.mbarriers.size() >= kMaxMbarriers) {
    report(pc, "mbarrier", "init with count %u as number %zu; the emulator has %d", count,
           block.mbarriers.size(), kMaxMbarriers);
    abandon_block();
  }
  note_shared_write(block, address, 8, entry.fiber.index, pc, "mbarrier.init");
  const uint64_t word = kSignature ^ block.mbarriers.size();
  std::memcpy(block.shared(address), &word, 8);
  Mbarrier barrier;
  barrier.address = address;
  barrier.count = barrier.pending = int(count);
  block.mbarriers.push_back(std::move(barrier));
}

void mbarrier_arrive(uint32_t barrier) {
  Entry entry("mbarrier.arrive");
  arrive(barrier, 0, entry, FAL_SIMT_PC);
}

void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  Entry entry("mbarrier.arrive.expect_tx");
  arrive(barrier, bytes, entry, FAL_SIMT_PC);
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  Entry entry("mbarrier.try_wait");
  Block& block = entry.block;
  const Mbarrier* found = find(block, address, entry.fiber, FAL_SIMT_PC, "mbarrier.try_wait");
  const size_t index = found - block.mbarriers.data();
  while ((block.mbarriers[index].phase & 1) == (parity & 1)) {
    block.mbarriers[index].waiters.push_back(entry.fiber.index);
    block_current(parity & 1 ? "mbarrier.try_wait, parity 1" : "mbarrier.try_wait, parity 0",
                  FAL_SIMT_PC);
  }
  acquire_clock(block, entry.fiber.index, block.mbarriers[index].completed);
}

int find_mbarrier(Block& block, uint32_t address, const Fiber& fiber, Pc pc, const char* what) {
  return int(find(block, address, fiber, pc, what) - block.mbarriers.data());
}

// ---- the asynchronous proxy
// ------------------------------------------------------------------------------

void fence_proxy_async() {
  Entry entry("fence.proxy.async");
  if (config().check) entry.fiber.proxy_fence_clock = entry.block.clock(entry.fiber.index);
}

void begin_async_read(Block& block, uint32_t address, int bytes, Pc pc, const char* what) {
  if (!config().check) return;
  note_shared_read(block, address, bytes, block.current->index, pc, what);
  const size_t first = (address - kSharedBase) / SharedCell::kBytes;
  const size_t last = (address - kSharedBase + bytes - 1) / SharedCell::kBytes;
  for (size_t i = first; i <= last; i++) {
    SharedCell& cell = block.shadow[i];
    cell.async_reads++;
    const bool by_thread = (cell.flags & SharedCell::kGeneric) && cell.writer < block.threads;
    if (by_thread && block.fibers[cell.writer].proxy_fence_clock < cell.write_time)
      report(pc, "missing-proxy-fence",
             "%s reads shared offset %zu, which thread %u wrote without a fence.proxy.async since",
             what, i * SharedCell::kBytes, cell.writer);
  }
}

void end_async_read(Block& block, uint32_t address, int bytes, Pc pc, const char* what) {
  if (!config().check) return;
  // Read as late as this: handing the buffer on before the wait is a race.
  note_shared_read(block, address, bytes, block.current->index, pc, what);
  const size_t first = (address - kSharedBase) / SharedCell::kBytes;
  const size_t last = (address - kSharedBase + bytes - 1) / SharedCell::kBytes;
  for (size_t i = first; i <= last; i++)
    if (block.shadow[i].async_reads) block.shadow[i].async_reads--;
}

void setmaxnreg(int registers) {
  Entry entry("setmaxnreg");
  const Pc pc = FAL_SIMT_PC;
  if (registers % 8 || registers < 24 || registers > 256)
    report(pc, "setmaxnreg", "%d registers; a multiple of 8 from 24 to 256 is possible", registers);
  collective(entry, pc, "setmaxnreg", [](Block&, void**, uint32_t) {}, nullptr, kFullMask, true);
}

}  // namespace fal::simt
