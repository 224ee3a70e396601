// cp.async: a thread's copies land when it waits for their group, which is as late as the hardware
// may deliver them. Until then the target holds NaN and may not be touched.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace fal::simt {

namespace {

void land(Block& block, const Fiber& fiber, const PendingCopy& copy) {
  uint8_t* target = block.shared(copy.to);
  if (copy.source_bytes) std::memcpy(target, copy.from, copy.source_bytes);
  std::memset(target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  const uint32_t time = config().check ? block.clock(fiber.index) : 0;
  note_async_landed(block, copy.to, copy.bytes, fiber.index, time, true);
}

}  // namespace

void cp_async(uint32_t to, const void* from, int bytes, int source_bytes) {
  Entry entry("cp.async");
  Block& block = entry.block;
  Fiber& fiber = entry.fiber;
  const Pc pc = FAL_SIMT_PC;
  if (source_bytes < 0 || source_bytes > bytes) {
    report(pc, "cp.async-size", "%d source bytes for a copy of %d", source_bytes, bytes);
    source_bytes = std::clamp(source_bytes, 0, bytes);
  }
  if (!shared_in_bounds(block, to, bytes, pc, "cp.async", bytes)) return;
  if (source_bytes) {
    if (uintptr_t(from) % bytes) {
      report(pc, "misaligned", "the source %p of a cp.async of %d bytes", from, bytes);
      source_bytes = 0;
    } else if (!check_global(block, from, source_bytes, false, pc, "cp.async")) {
      source_bytes = 0;
    }
  }
  note_async_begin(block, to, bytes, fiber.index, pc, "cp.async", fiber.index);
  std::memset(block.shared(to), 0xff, bytes);
  fiber.open_copies.push_back({to, from, bytes, source_bytes, pc});
  if (!config().account) return;
  AccessLog& log = block.warp_of(fiber).log;
  if (source_bytes)
    log.push_back(
        {pc, uint64_t(from), uint8_t(fiber.lane), uint8_t(source_bytes), AccessKind::kCopySource});
  log.push_back({pc, to, uint8_t(fiber.lane), uint8_t(bytes), AccessKind::kCopyTarget});
}

void cp_async_commit() {
  Entry entry("cp.async.commit_group");
  Fiber& fiber = entry.fiber;
  fiber.copy_groups.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}

void cp_async_wait(int groups_left) {
  Entry entry("cp.async.wait_group");
  Fiber& fiber = entry.fiber;
  const int done = int(fiber.copy_groups.size()) - groups_left;
  if (done <= 0) return;
  for (int i = 0; i < done; i++)
    for (const PendingCopy& copy : fiber.copy_groups[i]) land(entry.block, fiber, copy);
  fiber.copy_groups.erase(fiber.copy_groups.begin(), fiber.copy_groups.begin() + done);
}

}  // namespace fal::simt
