// TMA: boxes of a tensor between device and shared memory. A load lands at any moment until its
// mbarrier's phase ends, by default when no thread can run otherwise; a store reads shared memory
// until its group is waited for.
#include <algorithm>
#include <cstring>

#include "async_proxy.h"

namespace fal::simt {

namespace {

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (uint32_t d = 0; d < map.rank; d++) bytes *= map.box[d];
  return bytes;
}

// Calls row(offset in the box, device address, first, count): one innermost row of the box of which
// elements [first, first + count) lie inside the tensor; count 0: none.
template <class Row>
void each_row(const TensorMap& map, const int* coords, Row row) {
  const uint32_t inner = map.box[0], rows = box_bytes(map) / (inner * map.element_bytes);
  for (uint32_t r = 0; r < rows; r++) {
    uint32_t rest = r;
    int64_t address = int64_t(map.base) + int64_t(coords[0]) * map.element_bytes;
    bool inside = true;
    for (uint32_t d = 1; d < map.rank; d++) {
      const int64_t x = int64_t(coords[d]) + rest % map.box[d];
      rest /= map.box[d];
      inside &= x >= 0 && x < int64_t(map.dim[d]);
      address += x * int64_t(map.stride[d]);
    }
    const int64_t first = std::clamp<int64_t>(-int64_t(coords[0]), 0, inner);
    const int64_t end = std::clamp<int64_t>(int64_t(map.dim[0]) - coords[0], first, inner);
    row(r * inner * map.element_bytes, uint64_t(address), uint32_t(first),
        inside ? uint32_t(end - first) : 0u);
  }
}

bool valid_copy(Block& block, const TensorMap& map, uint32_t address, int rank, Pc pc,
                const char* what) {
  const uint32_t inner = map.box[0] * map.element_bytes, bytes = box_bytes(map);
  if (int(map.rank) != rank) {
    report(pc, "tma", "%s with %d coordinates, the tensor map has %u dimensions", what, rank,
           map.rank);
    return false;
  }
  if (map.base % 16 || inner % 16) {
    report(pc, "tma", "%s: tensor at %p and rows of %u bytes; both must be multiples of 16", what,
           reinterpret_cast<void*>(map.base), inner);
    return false;
  }
  for (uint32_t d = 0; d < map.rank; d++) {
    if (map.box[d] >= 1 && map.box[d] <= 256 && (d == 0 || map.stride[d] % 16 == 0)) continue;
    report(pc, "tma", "%s: dimension %u has box %u (1 to 256) and stride %llu (a multiple of 16)",
           what, d, map.box[d], static_cast<unsigned long long>(map.stride[d]));
    return false;
  }
  if (map.swizzle != Swizzle::kNone) {
    const uint32_t width = swizzle_width(map.swizzle);
    if (inner > width)
      report(pc, "tma", "%s: rows of %u bytes under a swizzle of %u bytes", what, inner, width);
    if ((address - kSharedBase) % (8 * width))
      report(pc, "tma", "%s: shared offset %u is not aligned to %u: the swizzle would be rotated",
             what, address - kSharedBase, 8 * width);
  }
  return shared_in_bounds(block, address, int(bytes), pc, what, 128);
}

}  // namespace

void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, const int* coords, int rank) {
  Entry entry("a TMA load");
  Block& block = entry.block;
  const Pc pc = FAL_SIMT_PC;
  const int index = find_mbarrier(block, barrier, entry.fiber, pc, "TMA load");
  if (!valid_copy(block, *map, to, rank, pc, "TMA load")) abandon_block();
  PendingLoad load{*map, to, box_bytes(*map), index, {}, pc};
  std::copy(coords, coords + rank, load.coords);
  each_row(*map, coords, [&](uint32_t, uint64_t address, uint32_t first, uint32_t count) {
    if (count)
      check_global(block, reinterpret_cast<void*>(address + first * map->element_bytes),
                   int(count * map->element_bytes), false, pc, "TMA load");
  });
  note_async_begin(block, to, int(load.bytes), entry.fiber.index, pc, "TMA load",
                   block.threads + index);
  std::memset(block.shared(to), 0xff, load.bytes);
  block.loads.push_back(load);
}

bool land_one_load(Block& block) {
  if (block.loads.empty()) return false;
  const uint32_t pick = block.random(uint32_t(block.loads.size()));
  const PendingLoad load = block.loads[pick];
  block.loads.erase(block.loads.begin() + pick);
  const TensorMap& map = load.map;
  const uint32_t size = map.element_bytes;
  each_row(map, load.coords,
           [&](uint32_t offset, uint64_t address, uint32_t first, uint32_t count) {
             for (uint32_t i = 0; i < map.box[0]; i++) {
               uint8_t* target = block.shared(swizzled(load.to + offset + i * size, map.swizzle));
               if (i >= first && i < first + count)
                 std::memcpy(target, reinterpret_cast<const void*>(address + i * size), size);
               else
                 std::memset(target, 0, size);
             }
           });
  Mbarrier& barrier = block.mbarriers[load.mbarrier];
  if (config().check) {
    const uint32_t agent = block.threads + load.mbarrier;
    const uint32_t time = ++block.clock(agent);
    note_async_landed(block, load.to, int(load.bytes), agent, time, false);
    barrier.clock.resize(block.agents, 0);
    barrier.clock[agent] = time;
  }
  barrier.bytes -= load.bytes;
  end_phase_if_complete(block, barrier);
  return true;
}

void tma_store(const TensorMap* map, uint32_t from, const int* coords, int rank) {
  Entry entry("a TMA store");
  Block& block = entry.block;
  const Pc pc = FAL_SIMT_PC;
  if (!valid_copy(block, *map, from, rank, pc, "TMA store")) abandon_block();
  PendingStore store{*map, from, {}, pc};
  std::copy(coords, coords + rank, store.coords);
  begin_async_read(block, from, int(box_bytes(*map)), pc, "TMA store");
  each_row(*map, coords, [&](uint32_t, uint64_t address, uint32_t first, uint32_t count) {
    if (count && !check_global(block, reinterpret_cast<void*>(address + first * map->element_bytes),
                               int(count * map->element_bytes), true, pc, "TMA store"))
      abandon_block();
  });
  entry.fiber.open_stores.push_back(store);
}

void tma_store_commit() {
  Entry entry("cp.async.bulk.commit_group");
  entry.fiber.store_groups.push_back(std::move(entry.fiber.open_stores));
  entry.fiber.open_stores.clear();
}

void tma_store_wait(int groups_left) {
  Entry entry("cp.async.bulk.wait_group");
  Block& block = entry.block;
  auto& groups = entry.fiber.store_groups;
  const int done = int(groups.size()) - groups_left;
  if (done <= 0) return;
  for (int g = 0; g < done; g++) {
    for (const PendingStore& store : groups[g]) {
      const TensorMap& map = store.map;
      const uint32_t size = map.element_bytes;
      each_row(map, store.coords,
               [&](uint32_t offset, uint64_t address, uint32_t first, uint32_t count) {
                 for (uint32_t i = first; i < first + count; i++)
                   std::memcpy(reinterpret_cast<void*>(address + i * size),
                               block.shared(swizzled(store.from + offset + i * size, map.swizzle)),
                               size);
               });
      end_async_read(block, store.from, int(box_bytes(map)), store.pc, "TMA store");
    }
  }
  groups.erase(groups.begin(), groups.begin() + done);
}

}  // namespace fal::simt
