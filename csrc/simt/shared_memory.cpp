// A block's shared memory: one arena that holds the dynamic part and the static variables, red
// zones between them, and the shadow that finds races, uninitialised reads and reads of what an
// asynchronous copy has yet to deliver.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace fal::simt {

intptr_t CompactPc::base() { return intptr_t(&shared_in_bounds); }

namespace {

constexpr uint32_t kRedZone = 256;  // between static variables

SharedCell* cell_at(Block& block, uint32_t address) {
  return &block.shadow[(address - kSharedBase) / SharedCell::kBytes];
}

// The bytes of the cell that holds `byte` which [begin, end) touches, as a mask.
uint32_t touched(uint32_t cell_begin, uint32_t begin, uint32_t end) {
  uint32_t mask = 0;
  for (int i = 0; i < SharedCell::kBytes; i++)
    if (cell_begin + i >= begin && cell_begin + i < end) mask |= 1u << i;
  return mask;
}

// "thread 8 (warp 0) at kernel.cu:12"
std::string describe_agent(const Block& block, uint32_t agent, CompactPc pc) {
  char text[64];
  if (int(agent) < block.threads)
    std::snprintf(text, sizeof text, "thread %u (warp %u) at ", agent, agent / kWarpSize);
  else
    std::snprintf(text, sizeof text, "a TMA load on mbarrier %u at ", agent - block.threads);
  return text + where(pc.get());
}

// "offset 128 of 'row'": where an address lies.
std::string describe_address(const Block& block, uint32_t address) {
  const uint32_t offset = address - kSharedBase;
  char text[160];
  for (const SharedRegion& region : block.regions) {
    if (offset < region.begin || offset >= region.end) continue;
    std::snprintf(text, sizeof text, "offset %u of %s", offset - region.begin, region.name);
    return text;
  }
  std::snprintf(text, sizeof text, "shared offset %d", int(offset));
  return text;
}

struct Cells {  // walks the cells that [address, address + bytes) touches
  Block& block;
  uint32_t begin, end;
  Cells(Block& b, uint32_t address, int bytes)
      : block(b), begin(address), end(address + uint32_t(bytes)) {}

  template <class Visit>  // visit(cell, address, mask) returns false to stop
  void each(Visit visit) const {
    uint32_t at = begin & ~uint32_t(SharedCell::kBytes - 1);
    for (SharedCell* cell = cell_at(block, at); at < end; at += SharedCell::kBytes, cell++) {
      const bool whole = at >= begin && at + SharedCell::kBytes <= end;
      if (!visit(*cell, at, whole ? 3u : touched(at, begin, end))) return;
    }
  }
};

void record_write(SharedCell& cell, uint32_t mask, uint32_t agent, uint32_t time, CompactPc pc,
                  uint8_t flags) {
  cell.write_pc = pc;
  cell.write_time = time;
  cell.writer = uint16_t(agent);
  cell.write_mask = uint8_t(mask);
  cell.flags = uint8_t((cell.flags & (SharedCell::kWritten0 | SharedCell::kWritten1)) | flags);
  if (!(flags & SharedCell::kPending)) cell.flags |= uint8_t(mask);  // kWritten0, kWritten1
  for (SharedCell::Reader& reader : cell.readers) reader.time = 0;
}

// Reports what makes a write by `thread` wrong; true if it did.
bool write_conflict(Block& block, const SharedCell& cell, uint32_t address, uint32_t mask,
                    uint32_t thread, bool atomic, Pc pc, const char* what) {
  if (cell.flags & SharedCell::kPending) {
    report(pc, "async-in-flight", "%s writes %s while an asynchronous copy into it is in flight",
           what, describe_address(block, address).c_str());
    return true;
  }
  if (cell.async_reads) {
    report(pc, "async-read-in-flight",
           "%s overwrites %s, which a wgmma or TMA store not yet waited for still reads", what,
           describe_address(block, address).c_str());
    return true;
  }
  if (atomic && (cell.flags & mask) != mask) {
    report(pc, "uninitialised-smem", "%s updates %s, which nobody has written", what,
           describe_address(block, address).c_str());
    return true;
  }
  const bool both_atomic = atomic && (cell.flags & SharedCell::kAtomic);
  if (cell.write_time && (cell.write_mask & mask) && !both_atomic &&
      !block.happened_before(thread, cell.writer, cell.write_time)) {
    report(pc, "race", "%s overwrites %s, written by %s with no synchronisation between", what,
           describe_address(block, address).c_str(),
           describe_agent(block, cell.writer, cell.write_pc).c_str());
    return true;
  }
  for (const SharedCell::Reader& reader : cell.readers) {
    if (!reader.time || !(reader.mask & mask)) continue;
    if (block.happened_before(thread, reader.thread, reader.time)) continue;
    report(pc, "race", "%s overwrites %s, read by %s with no synchronisation since", what,
           describe_address(block, address).c_str(),
           describe_agent(block, reader.thread, reader.pc).c_str());
    return true;
  }
  return false;
}

}  // namespace

// ---- the arena
// -----------------------------------------------------------------------------------------

uint8_t* dynamic_smem() { return current_block->arena; }

int next_static_site() {
  static int sites = 0;
  return sites++;
}

void* static_smem(int site, size_t bytes, size_t align, const char* name) {
  Entry entry("FAL_SHARED");
  Block& block = entry.block;
  const auto known = block.statics.find(site);
  if (known != block.statics.end()) return block.arena + known->second;
  const size_t alignment = std::max<size_t>(align, 16);
  const size_t begin = (block.arena_used + kRedZone + alignment - 1) / alignment * alignment;
  const size_t end = begin + bytes;
  size_t statics = bytes;
  for (size_t i = 1; i < block.regions.size(); i++)
    statics += block.regions[i].end - block.regions[i].begin;
  const size_t dynamic = block.regions[0].end;
  if (statics > 48 * 1024 || statics + dynamic > config().max_smem_bytes) {
    report(FAL_SIMT_PC, "launch",
           "%zu bytes of static and %zu of dynamic shared memory; the device has 48 KB and %zu",
           statics, dynamic, config().max_smem_bytes);
    abandon_block();
  }
  if (end > kArenaBytes) {
    report(FAL_SIMT_PC, "launch", "too many static shared variables");
    abandon_block();
  }
  block.statics.emplace(site, uint32_t(begin));
  block.regions.push_back({uint32_t(begin), uint32_t(end), name});
  block.arena_used = uint32_t(end);
  std::memset(block.arena + begin, 0xff, bytes);
  if (config().check)
    block.shadow.resize((end + SharedCell::kBytes - 1) / SharedCell::kBytes, SharedCell());
  return block.arena + begin;
}

uint32_t shared_address(const void* p) {
  const Block& block = *current_block;
  return uint32_t(static_cast<const uint8_t*>(p) - block.arena) + kSharedBase;
}

bool shared_in_bounds(Block& block, uint32_t address, int bytes, Pc pc, const char* what,
                      int alignment) {
  const uint32_t offset = address - kSharedBase;
  const SharedRegion* nearest = &block.regions[0];
  for (const SharedRegion& region : block.regions) {
    if (address >= kSharedBase && offset >= region.begin && offset + bytes <= region.end) {
      if (offset % alignment == 0) return true;
      report(pc, "misaligned", "%s of %d bytes at %s: must be aligned to %d", what, bytes,
             describe_address(block, address).c_str(), alignment);
      return false;
    }
    if (offset >= region.begin) nearest = &region;
  }
  report(pc, "smem-out-of-bounds", "%s of %d bytes at offset %d of %s, which has %u bytes", what,
         bytes, int(offset - nearest->begin), nearest->name, nearest->end - nearest->begin);
  return false;
}

// ---- the shadow
// ----------------------------------------------------------------------------------------

void note_shared_read(Block& block, uint32_t address, int bytes, uint32_t thread, Pc pc,
                      const char* what) {
  if (!config().check) return;
  const uint32_t now = block.clock(thread);
  const CompactPc site(pc);
  Cells(block, address, bytes).each([&](SharedCell& cell, uint32_t at, uint32_t mask) {
    if (cell.flags & SharedCell::kPending) {
      report(pc, "async-in-flight",
             "%s reads %s while an asynchronous copy into it, issued by %s, "
             "is in flight",
             what, describe_address(block, at).c_str(),
             describe_agent(block, cell.writer, cell.write_pc).c_str());
      return false;
    }
    if ((cell.flags & mask) != mask) {
      report(pc, "uninitialised-smem", "%s reads %s, which nobody has written", what,
             describe_address(block, at).c_str());
      return false;
    }
    if ((cell.write_mask & mask) && !block.happened_before(thread, cell.writer, cell.write_time)) {
      report(pc, "race", "%s reads %s, written by %s with no synchronisation between", what,
             describe_address(block, at).c_str(),
             describe_agent(block, cell.writer, cell.write_pc).c_str());
      return false;
    }
    // Keep this read: in place of an older one of this thread, or of one that happened before.
    SharedCell::Reader* slot = nullptr;
    for (SharedCell::Reader& reader : cell.readers) {
      if (!reader.time || reader.thread == thread ||
          block.happened_before(thread, reader.thread, reader.time)) {
        slot = &reader;
        break;
      }
    }
    if (!slot) slot = &cell.readers[(at / SharedCell::kBytes + thread) % SharedCell::kReaders];
    const bool again = slot->time == now && slot->thread == thread;
    *slot = {now, uint16_t(thread), uint16_t(again ? slot->mask | mask : mask), site};
    return true;
  });
}

void note_shared_write(Block& block, uint32_t address, int bytes, uint32_t thread, Pc pc,
                       const char* what, bool atomic) {
  if (!config().check) return;
  const uint32_t now = block.clock(thread);
  bool reported = false;
  Cells(block, address, bytes).each([&](SharedCell& cell, uint32_t at, uint32_t mask) {
    if (!reported) reported = write_conflict(block, cell, at, mask, thread, atomic, pc, what);
    const uint32_t both = cell.write_time == now && cell.writer == thread ? cell.write_mask : 0;
    record_write(cell, mask | both, thread, now, CompactPc(pc),
                 SharedCell::kGeneric | (atomic ? SharedCell::kAtomic : 0));
    return true;
  });
}

// An asynchronous copy is issued by `thread`; it will write in the name of `agent`.
void note_async_begin(Block& block, uint32_t address, int bytes, uint32_t thread, Pc pc,
                      const char* what, uint32_t agent) {
  if (!config().check) return;
  bool reported = false;
  Cells(block, address, bytes).each([&](SharedCell& cell, uint32_t at, uint32_t mask) {
    if (!reported) reported = write_conflict(block, cell, at, mask, thread, false, pc, what);
    record_write(cell, mask, agent, block.clock(thread), CompactPc(pc), SharedCell::kPending);
    return true;
  });
}

void note_async_landed(Block& block, uint32_t address, int bytes, uint32_t agent, uint32_t time,
                       bool generic_proxy) {
  if (!config().check) return;
  Cells(block, address, bytes).each([&](SharedCell& cell, uint32_t, uint32_t mask) {
    // The site stays that of the copy's issue.
    record_write(cell, mask, agent, time, cell.write_pc, generic_proxy ? SharedCell::kGeneric : 0);
    return true;
  });
}

// ---- what kernels call
// ---------------------------------------------------------------------------------

void load_shared(void* to, uint32_t from, int bytes) {
  Entry entry("a shared load");
  Block& block = entry.block;
  if (!shared_in_bounds(block, from, bytes, FAL_SIMT_PC, "ld.shared", bytes)) {
    std::memset(to, 0xff, bytes);
    return;
  }
  note_shared_read(block, from, bytes, entry.fiber.index, FAL_SIMT_PC, "ld.shared");
  std::memcpy(to, block.shared(from), bytes);
  if (config().account)
    block.warp_of(entry.fiber)
        .log.push_back({FAL_SIMT_PC, from, uint8_t(entry.fiber.lane), uint8_t(bytes),
                        AccessKind::kSharedLoad});
}

void store_shared(uint32_t to, const void* from, int bytes) {
  Entry entry("a shared store");
  Block& block = entry.block;
  if (!shared_in_bounds(block, to, bytes, FAL_SIMT_PC, "st.shared", bytes)) return;
  for (int i = 0; i + 4 <= bytes; i += 4) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(from) + i, 4);
    check_initialised(word, FAL_SIMT_PC, "the stored value");
  }
  note_shared_write(block, to, bytes, entry.fiber.index, FAL_SIMT_PC, "st.shared");
  std::memcpy(block.shared(to), from, bytes);
  if (config().account)
    block.warp_of(entry.fiber)
        .log.push_back(
            {FAL_SIMT_PC, to, uint8_t(entry.fiber.lane), uint8_t(bytes), AccessKind::kSharedStore});
}

}  // namespace fal::simt
