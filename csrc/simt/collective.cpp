// Warp collectives: every lane of the mask leaves its arguments and waits; the last one to arrive
// does the work for all. Lanes that are found at two different collectives have diverged.
#include <algorithm>

#include "state.h"

namespace fal::simt {

void collective(Entry& entry, Pc pc, const char* name, CollectiveBody body, void* arg,
                uint32_t mask, bool aligned) {
  Block& block = entry.block;
  Fiber& fiber = entry.fiber;
  Warp& warp = block.warp_of(fiber);
  const uint32_t bit = 1u << fiber.lane;
  if (!(mask & bit)) {
    report(pc, "bad-mask", "%s: the calling lane is not in its mask %08x", name, mask);
    abandon_block();
  }
  const int lanes = std::min(kWarpSize, block.threads - int(fiber.warp) * kWarpSize);
  if (lanes < kWarpSize && mask >> lanes) {
    report(pc, "bad-mask", "%s: mask %08x names lanes that the block of %d threads does not have",
           name, mask, block.threads);
    abandon_block();
  }
  if (!warp.arrived) {
    warp.body = body;
    warp.name = name;
    warp.mask = mask;
    warp.pc = pc;
  } else if (warp.body != body || warp.mask != mask) {
    report(pc, "divergent-collective",
           "lane %u is at %s (mask %08x) while lanes %08x wait in %s (mask %08x) at %s", fiber.lane,
           name, mask, warp.arrived, warp.name, warp.mask, where(warp.pc).c_str());
    abandon_block();
  } else if (aligned && warp.pc != pc && !same_place(warp.pc, pc)) {
    report(pc, "divergent-collective", "%s: lanes %08x of the warp wait in it elsewhere, at %s",
           name, warp.arrived, where(warp.pc).c_str());
  }
  warp.arrived |= bit;
  warp.args[fiber.lane] = arg;
  if ((warp.arrived & mask) != mask) {
    block_current(name, pc);
    return;
  }
  block.counters.collectives++;
  if (mask == kFullMask) flush_log(warp.log, block.counters, block.sites);
  body(block, warp.args, mask);
  warp.arrived = 0;
  for (uint32_t others = mask & ~bit; others; others &= others - 1)
    wake(block, fiber.warp * kWarpSize + __builtin_ctz(others));
}

// ---- shuffles and votes
// --------------------------------------------------------------------------------

namespace {
struct Shuffle {
  uint32_t value, source, result;
};
}  // namespace

uint32_t shuffle(uint32_t mask, uint32_t value, uint32_t source_lane) {
  Entry entry("a shuffle");
  check_initialised(value, FAL_SIMT_PC, "the shuffled value");
  Shuffle mine{value, source_lane, 0};
  collective(
      entry, FAL_SIMT_PC, "shfl.sync",
      [](Block& block, void** args, uint32_t lanes) {
        for (uint32_t l = lanes; l; l &= l - 1) {
          auto& s = *static_cast<Shuffle*>(args[__builtin_ctz(l)]);
          if (lanes >> s.source & 1) {
            s.result = static_cast<Shuffle*>(args[s.source])->value;
          } else {
            report(block.warp_of(*block.current).pc, "shuffle-inactive",
                   "reads from lane %u, which is not in the mask %08x", s.source, lanes);
            s.result = kFullMask;
          }
        }
      },
      &mine, mask, false);
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  Entry entry("a vote");
  uint32_t mine = predicate;
  collective(
      entry, FAL_SIMT_PC, "vote.sync",
      [](Block&, void** args, uint32_t lanes) {
        uint32_t votes = 0;
        for (uint32_t l = lanes; l; l &= l - 1)
          votes |= *static_cast<uint32_t*>(args[__builtin_ctz(l)]) << __builtin_ctz(l);
        for (uint32_t l = lanes; l; l &= l - 1)
          *static_cast<uint32_t*>(args[__builtin_ctz(l)]) = votes;
      },
      &mine, mask, false);
  return mine;
}

}  // namespace fal::simt
