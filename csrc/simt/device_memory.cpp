// Device memory: buffers that the emulator allocates (NaN-filled, with red zones) or that the
// caller registers. Every access is checked against the buffers' bounds and counted; accesses to
// writable buffers are checked for races, within a block by its vector clocks and between the
// blocks of a launch, which only atomics (or atomics behind __threadfence) may order.
#include "device_memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "state.h"

namespace fal::simt {

namespace {

constexpr size_t kRedZone = 64 * 1024;

std::vector<std::unique_ptr<Buffer>> buffers;  // sorted by address
std::map<std::string, Traffic> past_traffic;   // of buffers that are gone

Buffer* find_buffer(uintptr_t address) {  // the last one that begins at or before the address
  const auto after =
      std::upper_bound(buffers.begin(), buffers.end(), address,
                       [](uintptr_t a, const std::unique_ptr<Buffer>& b) { return a < b->begin; });
  return after == buffers.begin() ? nullptr : std::prev(after)->get();
}

void insert_buffer(std::unique_ptr<Buffer> buffer) {
  const auto at =
      std::upper_bound(buffers.begin(), buffers.end(), buffer->begin,
                       [](uintptr_t a, const std::unique_ptr<Buffer>& b) { return a < b->begin; });
  buffers.insert(at, std::move(buffer));
}

void keep_traffic(const Buffer& buffer) {
  Traffic& past = past_traffic[buffer.name];
  past.read_bytes += buffer.read_bytes;
  past.written_bytes += buffer.written_bytes;
}

void release(Buffer& buffer) {
  keep_traffic(buffer);
  if (buffer.owned)
    munmap(reinterpret_cast<void*>(buffer.begin - kRedZone), buffer.bytes() + 2 * kRedZone);
}

size_t shadow_bytes(const Buffer& buffer) {
  return (buffer.bytes() / GlobalCell::kBytes + 2) * sizeof(GlobalCell);
}

}  // namespace

Buffer::~Buffer() {
  if (shadow) munmap(shadow, shadow_bytes(*this));
}

void prepare_buffers() {
  if (!config().check) return;
  for (const auto& buffer : buffers) {
    if (buffer->shadow || !buffer->writable) continue;
    void* memory = mmap(nullptr, shadow_bytes(*buffer), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
      report(nullptr, "launch", "no memory to watch buffer '%s' for races", buffer->name.c_str());
    else
      buffer->shadow = static_cast<GlobalCell*>(memory);
  }
}

// ---- buffers
// -------------------------------------------------------------------------------------------

void* allocate(size_t bytes, const std::string& name) {
  void* memory = mmap(nullptr, bytes + 2 * kRedZone, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  uint8_t* data = static_cast<uint8_t*>(memory) + kRedZone;
  std::memset(data, 0xff, bytes);
  insert_buffer(
      std::make_unique<Buffer>(uintptr_t(data), uintptr_t(data) + bytes, name, true, true));
  return data;
}

void register_buffer(void* data, size_t bytes, const std::string& name, bool writable) {
  unregister_buffer(data);
  const uintptr_t begin = uintptr_t(data), end = begin + bytes;
  for (const auto& other : buffers)
    if (begin < other->end && other->begin < end)
      report(
          nullptr, "launch",
          "buffers '%s' and '%s' overlap: unregister the one that is gone, or register both as one",
          name.c_str(), other->name.c_str());
  insert_buffer(std::make_unique<Buffer>(begin, end, name, writable, false));
}

void unregister_buffer(void* data) {
  for (auto it = buffers.begin(); it != buffers.end(); ++it) {
    if ((*it)->begin != uintptr_t(data)) continue;
    release(**it);
    buffers.erase(it);
    return;
  }
}

void free_buffers() {
  for (const auto& buffer : buffers) release(*buffer);
  buffers.clear();
}

cudaError_t fill_device(void* data, int value, size_t bytes) {
  const Buffer* buffer = find_buffer(uintptr_t(data));
  if (bytes == 0) return cudaSuccess;
  if (!buffer || uintptr_t(data) + bytes > buffer->end || !buffer->writable) {
    report(nullptr, "global-out-of-bounds", "fill of %zu bytes at %p: not inside a writable buffer",
           bytes, data);
    return cudaErrorInvalidValue;
  }
  std::memset(data, value, bytes);
  return cudaSuccess;
}

std::map<std::string, Traffic> traffic() {
  std::map<std::string, Traffic> result = past_traffic;
  for (const auto& buffer : buffers) {
    Traffic& sum = result[buffer->name];
    sum.read_bytes += buffer->read_bytes;
    sum.written_bytes += buffer->written_bytes;
  }
  return result;
}

void clear_traffic() {
  past_traffic.clear();
  for (const auto& buffer : buffers) buffer->read_bytes = buffer->written_bytes = 0;
}

// ---- races
// ---------------------------------------------------------------------------------------------

namespace {

// Blocks may run on several OS threads: cells are guarded by a few locks, picked by address.
std::mutex cell_locks[64];

struct Accessor {
  Block& block;
  uint32_t thread, time;
  bool write, atomic;
  Pc pc;
  const char* what;
};

// "block 3 (thread 8) at kernel.cu:12"
std::string describe(const Block& block, const GlobalCell::Access& access) {
  char text[64];
  if (access.block == block.index)
    std::snprintf(text, sizeof text, "thread %u of this block at ", access.thread);
  else
    std::snprintf(text, sizeof text, "block %u (thread %u) at ", access.block, access.thread);
  return text + where(access.pc.get());
}

bool ordered(const Accessor& now, const GlobalCell::Access& earlier) {
  if (earlier.block == now.block.index)
    return now.block.happened_before(now.thread, earlier.thread, earlier.time);
  const auto& seen = now.block.acquired;
  return std::binary_search(seen.begin(), seen.end(), earlier.block);
}

// Checks one cell and records the access; true: a race was reported.
bool touch_cell(GlobalCell& cell, uint32_t launch, uint8_t mask, const Accessor& now,
                const Buffer& buffer, uintptr_t address) {
  if (cell.launch != launch) cell = GlobalCell{launch, {}, {}};
  const GlobalCell::Access* conflict = nullptr;
  const char* verb = "written";
  if ((cell.write.mask & mask) && !(now.atomic && cell.write.atomic) && !ordered(now, cell.write))
    conflict = &cell.write;
  if (now.write && !conflict) {
    for (const GlobalCell::Access& read : cell.reads)
      if ((read.mask & mask) && !ordered(now, read)) {
        conflict = &read;
        verb = "read";
      }
  }
  if (conflict) {
    report(now.pc, "global-race", "%s of '%s'+%zu, %s by %s in the same launch, not synchronised%s",
           now.what, buffer.name.c_str(), size_t(address - buffer.begin), verb,
           describe(now.block, *conflict).c_str(),
           now.atomic != conflict->atomic ? " (only one of the two is atomic)" : "");
  }
  const GlobalCell::Access mine{now.block.index, now.time,         uint16_t(now.thread), mask,
                                now.atomic,      CompactPc(now.pc)};
  if (now.write) {
    const bool more = cell.write.block == mine.block && cell.write.thread == mine.thread &&
                      cell.write.time == mine.time && cell.write.atomic == mine.atomic;
    const uint8_t before = more ? cell.write.mask : 0;
    cell.write = mine;
    cell.write.mask |= before;
    cell.reads[0].mask = cell.reads[1].mask = 0;
  } else {
    GlobalCell::Access& first = cell.reads[0];
    const bool use_first = !first.mask || first.block == mine.block;
    GlobalCell::Access& slot = use_first ? first : cell.reads[1];
    const bool same = slot.mask && slot.block == mine.block && slot.thread == mine.thread;
    const uint8_t before = same ? slot.mask : 0;
    slot = mine;
    slot.mask |= before;
  }
  return conflict != nullptr;
}

void check_race(Buffer& buffer, uintptr_t address, int bytes, const Accessor& now) {
  const uint32_t launch = now.block.launch->number;
  for (uintptr_t at = address; at < address + bytes;) {
    const size_t index = (at - buffer.begin) / GlobalCell::kBytes;
    const int first = int((at - buffer.begin) % GlobalCell::kBytes);
    const int last = int(std::min<uintptr_t>(GlobalCell::kBytes, first + (address + bytes - at)));
    const uint8_t mask = uint8_t((1u << last) - (1u << first));
    bool reported;
    if (config().threads > 1) {
      std::lock_guard<std::mutex> guard(cell_locks[index / 16 % 64]);
      reported = touch_cell(buffer.shadow[index], launch, mask, now, buffer, at);
    } else {
      reported = touch_cell(buffer.shadow[index], launch, mask, now, buffer, at);
    }
    if (reported) return;
    at += last - first;
  }
}

// ---- what is not device memory, but may be read
// -----------------------------------------------------------

struct ImageSearch {
  uintptr_t address, begin, end;
};

int search_image(dl_phdr_info* info, size_t, void* data) {
  auto& search = *static_cast<ImageSearch*>(data);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr, end = begin + segment.p_memsz;
    if (search.address < begin || search.address >= end) continue;
    search.begin = begin;
    search.end = end;
    return 1;
  }
  return 0;
}

// Kernel parameters, and the program's constants.
bool readable_host_memory(Block& block, uintptr_t address, int bytes) {
  if (address >= block.launch->params && address + bytes <= block.launch->params_end) return true;
  if (address >= block.image_begin && address + bytes <= block.image_end) return true;
  ImageSearch search{address, 0, 0};
  if (!dl_iterate_phdr(search_image, &search)) return false;
  block.image_begin = search.begin;
  block.image_end = search.end;
  return true;
}

void report_stray(uintptr_t address, int bytes, const Buffer* before, Pc pc, const char* what) {
  const Buffer* after = nullptr;
  for (const auto& buffer : buffers)
    if (buffer->begin > address) {
      after = buffer.get();
      break;
    }
  const size_t past = before ? address - before->end : ~size_t(0);
  const size_t ahead = after ? after->begin - address : ~size_t(0);
  if (before && address < before->end)
    report(pc, "global-out-of-bounds",
           "%s of %d bytes at '%s'+%zu runs past the end of the buffer (%zu bytes)", what, bytes,
           before->name.c_str(), size_t(address - before->begin), before->bytes());
  else if (before && past <= ahead && past < (1u << 30))
    report(pc, "global-out-of-bounds",
           "%s of %d bytes, %zu bytes past the end of buffer '%s' (%zu bytes)", what, bytes, past,
           before->name.c_str(), before->bytes());
  else if (after && ahead < (1u << 30))
    report(pc, "global-out-of-bounds",
           "%s of %d bytes, %zu bytes before the start of buffer '%s' (%zu bytes)", what, bytes,
           ahead, after->name.c_str(), after->bytes());
  else
    report(pc, "global-out-of-bounds", "%s of %d bytes at %p, which is no device buffer", what,
           bytes, reinterpret_cast<void*>(address));
}

}  // namespace

bool check_global(Block& block, const void* p, int bytes, bool write, Pc pc, const char* what,
                  bool atomic, int alignment, bool may_be_host) {
  const uintptr_t address = uintptr_t(p);
  Buffer* buffer = block.last_buffer;
  if (!buffer || address < buffer->begin || address >= buffer->end) {
    buffer = find_buffer(address);
    if (!buffer || address >= buffer->end) {
      if (may_be_host && !write && readable_host_memory(block, address, bytes)) return true;
      report_stray(address, bytes, buffer, pc, what);
      return false;
    }
    block.last_buffer = buffer;
  }
  if (address + bytes > buffer->end) {
    report_stray(address, bytes, buffer, pc, what);
    return false;
  }
  if (alignment && address % alignment) {
    report(pc, "misaligned", "%s of %d bytes at '%s'+%zu (address %% %d = %d)", what, bytes,
           buffer->name.c_str(), size_t(address - buffer->begin), alignment,
           int(address % alignment));
    return false;
  }
  if (write && !buffer->writable) {
    report(pc, "read-only", "%s of %d bytes to '%s'+%zu, which is read-only", what, bytes,
           buffer->name.c_str(), size_t(address - buffer->begin));
    return false;
  }
  (write ? buffer->written_bytes : buffer->read_bytes).fetch_add(bytes, std::memory_order_relaxed);
  (write ? block.counters.global_store_bytes : block.counters.global_load_bytes) += bytes;
  if (config().check && buffer->shadow) {
    const uint32_t thread = block.current->index;
    check_race(*buffer, address, bytes,
               {block, thread, block.clock(thread), write, atomic, pc, what});
  }
  return true;
}

// ---- what kernels call
// ---------------------------------------------------------------------------------

void load_global(void* to, const void* from, int bytes) {
  Entry entry("a global load");
  if (!check_global(entry.block, from, bytes, false, FAL_SIMT_PC, "ld.global", false, bytes)) {
    std::memset(to, 0xff, bytes);
    return;
  }
  std::memcpy(to, from, bytes);
  if (config().account)
    entry.block.warp_of(entry.fiber)
        .log.push_back({FAL_SIMT_PC, uint64_t(from), uint8_t(entry.fiber.lane), uint8_t(bytes),
                        AccessKind::kGlobalLoad});
}

void store_global(void* to, const void* from, int bytes) {
  Entry entry("a global store");
  for (int i = 0; i + 4 <= bytes; i += 4) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(from) + i, 4);
    check_initialised(word, FAL_SIMT_PC, "the stored value");
  }
  if (!check_global(entry.block, to, bytes, true, FAL_SIMT_PC, "st.global", false, bytes)) return;
  std::memcpy(to, from, bytes);
  if (config().account)
    entry.block.warp_of(entry.fiber)
        .log.push_back({FAL_SIMT_PC, uint64_t(to), uint8_t(entry.fiber.lane), uint8_t(bytes),
                        AccessKind::kGlobalStore});
}

}  // namespace fal::simt
