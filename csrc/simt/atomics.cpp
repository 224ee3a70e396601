// Atomics on shared and device memory, reductions, and __threadfence. Atomics never race with one
// another. A block that executes __threadfence and then an atomic publishes its writes to every
// block whose atomic on the same address comes later (the "last block to finish" pattern).
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "state.h"

namespace fal::simt {

namespace {

std::mutex atomic_lock;  // one atomic at a time, over all blocks
struct Published {
  uint32_t launch;
  std::vector<uint32_t> blocks;  // sorted
};
std::map<uintptr_t, Published> published;

void merge(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  std::vector<uint32_t> merged;
  std::set_union(into.begin(), into.end(), from.begin(), from.end(), std::back_inserter(merged));
  into = std::move(merged);
}

void exchange_fences(Block& block, const void* p) {
  Published& here = published[uintptr_t(p)];
  if (here.launch != block.launch->number) here = {block.launch->number, {}};
  merge(block.acquired, here.blocks);
  if (!block.fenced) return;
  merge(here.blocks, block.acquired);
  merge(here.blocks, {block.index});
}

template <class T>
T apply(AtomicOp op, T old, T value, T compare) {
  switch (op) {
    case AtomicOp::kAdd:
      return T(old + value);
    case AtomicOp::kMin:
      return value < old ? value : old;
    case AtomicOp::kMax:
      return old < value ? value : old;
    case AtomicOp::kExchange:
      return value;
    case AtomicOp::kCompareSwap:
      return old == compare ? value : old;
    default:
      break;
  }
  uint64_t a = 0, b = 0;  // the bitwise ones
  std::memcpy(&a, &old, sizeof(T));
  std::memcpy(&b, &value, sizeof(T));
  a = op == AtomicOp::kAnd ? (a & b) : op == AtomicOp::kOr ? (a | b) : (a ^ b);
  T result;
  std::memcpy(&result, &a, sizeof(T));
  return result;
}

template <class T>
uint64_t update(void* p, AtomicOp op, uint64_t value_bits, uint64_t compare_bits) {
  T old, value, compare;
  std::memcpy(&old, p, sizeof(T));
  std::memcpy(&value, &value_bits, sizeof(T));
  std::memcpy(&compare, &compare_bits, sizeof(T));
  const T now = apply(op, old, value, compare);
  std::memcpy(p, &now, sizeof(T));
  uint64_t result = 0;
  std::memcpy(&result, &old, sizeof(T));
  return result;
}

// Bounds, races and traffic of an atomic; false: do not perform it.
bool check_atomic(Entry& entry, void* p, int bytes, Pc pc) {
  Block& block = entry.block;
  const uintptr_t offset = uintptr_t(p) - uintptr_t(block.arena);
  if (offset < kArenaBytes) {
    const uint32_t address = shared_address(p);
    if (!shared_in_bounds(block, address, bytes, pc, "atomic", bytes)) return false;
    note_shared_write(block, address, bytes, entry.fiber.index, pc, "atomic", true);
    return true;
  }
  if (!check_global(block, p, bytes, true, pc, "atomic", true, bytes)) return false;
  block.counters.global_atomics++;
  return true;
}

}  // namespace

uint64_t atomic(void* p, AtomicType type, AtomicOp op, uint64_t value, uint64_t compare) {
  Entry entry("an atomic");
  const int bytes = type == AtomicType::kUint64 || type == AtomicType::kDouble ? 8 : 4;
  check_initialised(uint32_t(value), FAL_SIMT_PC, "the atomic's operand");
  if (!check_atomic(entry, p, bytes, FAL_SIMT_PC)) return ~0ull;
  std::lock_guard<std::mutex> guard(atomic_lock);
  if (uintptr_t(p) - uintptr_t(entry.block.arena) >= kArenaBytes) exchange_fences(entry.block, p);
  switch (type) {
    case AtomicType::kInt32:
      return update<int32_t>(p, op, value, compare);
    case AtomicType::kUint32:
      return update<uint32_t>(p, op, value, compare);
    case AtomicType::kUint64:
      return update<uint64_t>(p, op, value, compare);
    case AtomicType::kFloat:
      return update<float>(p, op, value, compare);
    case AtomicType::kDouble:
      return update<double>(p, op, value, compare);
  }
  return 0;
}

void reduce_add_f32(float* p, const float* values, int count) {
  Entry entry("red.global.add");
  if (uintptr_t(p) % (4 * count)) {
    report(FAL_SIMT_PC, "misaligned", "red.global.add of %d floats at %p", count,
           static_cast<void*>(p));
    return;
  }
  for (int i = 0; i < count; i++) {
    check_initialised(__float_as_uint(values[i]), FAL_SIMT_PC, "the added value");
    if (!check_atomic(entry, p + i, 4, FAL_SIMT_PC)) return;
    std::lock_guard<std::mutex> guard(atomic_lock);
    p[i] += values[i];
  }
}

void thread_fence() {
  Entry entry("__threadfence");
  entry.block.fenced = true;
}

}  // namespace fal::simt
