// wgmma: asynchronous matrix multiplication by a warpgroup. Each warp computes its own 16 of the 64
// rows. From issue to wait the accumulators hold a pattern that no kernel may read or overwrite;
// shared memory is read when the group is waited for, as late as the hardware may.
#include <algorithm>
#include <cstring>

#include "async_proxy.h"

namespace fal::simt {

namespace {

constexpr int kRows = 16, kDepth = 16;  // of one warp's part of one instruction
constexpr int kPiece = 16;              // bytes that are contiguous under every layout

struct Issue {
  float* d;
  const WgmmaShape* shape;
  const uint32_t* a;
  uint64_t desc_a, desc_b;
  bool accumulate;
};

Swizzle swizzle_of(uint64_t descriptor) {
  constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128B, Swizzle::k64B, Swizzle::k32B};
  return kModes[descriptor >> 62];
}

// Shared address of element (mn, k) of a 16-bit operand. K-major: rows of mn hold consecutive k;
// the transposed (MN-major) layout has consecutive mn in a row of the swizzle's width.
uint32_t operand_address(uint64_t descriptor, bool mn_major, int mn, int k) {
  const Swizzle mode = swizzle_of(descriptor);
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
  const uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t width = swizzle_width(mode);
  const int per_row = int(width) / 2;
  uint32_t address = start;
  if (mode == Swizzle::kNone) {
    const int row = mn_major ? k % 8 : mn % 8, column = mn_major ? mn % 8 : k % 8;
    address += mn / 8 * stride + k / 8 * leading + row * 16 + column * 2;
  } else if (mn_major) {
    address += mn / per_row * leading + mn % per_row * 2 + k / 8 * stride + k % 8 * width;
  } else {
    address += mn / 8 * stride + mn % 8 * width + k * 2;
  }
  return swizzled(address, mode);
}

// Visits the operand in contiguous 16-byte pieces.
template <class Visit>
void each_piece(uint64_t descriptor, bool mn_major, int mn_begin, int mn_end, Visit visit) {
  for (int mn = mn_begin; mn < mn_end; mn += mn_major ? 8 : 1)
    for (int k = 0; k < kDepth; k += mn_major ? 1 : 8)
      if (!visit(operand_address(descriptor, mn_major, mn, k))) return;
}

template <class Visit>
void each_operand_piece(const WgmmaOp& op, uint32_t warp, Visit visit) {
  const int row = int(warp % 4) * kRows;
  if (!op.a_in_registers) each_piece(op.desc_a, op.shape.transpose_a, row, row + kRows, visit);
  each_piece(op.desc_b, op.shape.transpose_b, 0, op.shape.n, visit);
}

float operand(Block& block, uint64_t descriptor, bool mn_major, int mn, int k, bool bf16) {
  const uint32_t address = operand_address(descriptor, mn_major, mn, k);
  if (address < kSharedBase || address - kSharedBase + 2 > block.arena_used)
    return __uint_as_float(0x7fffffffu);
  uint16_t bits;
  std::memcpy(&bits, block.shared(address), 2);
  return element_to_float(bits, bf16);
}

// The accumulator of these registers: taken from the kernel unless an op in flight has it already.
int take_accumulator(WgmmaState& state, void** args, int count) {
  for (size_t i = 0; i < state.accumulators.size(); i++)
    if (state.accumulators[i].registers[0] == static_cast<Issue*>(args[0])->d) return int(i);
  WgmmaAccumulator taken;
  taken.count = count;
  for (int lane = 0; lane < kWarpSize; lane++) {
    float* d = static_cast<Issue*>(args[lane])->d;
    taken.registers[lane] = d;
    taken.values.insert(taken.values.end(), d, d + count);
    for (int i = 0; i < count; i++) std::memcpy(d + i, &kInFlightWord, 4);
  }
  state.accumulators.push_back(std::move(taken));
  return int(state.accumulators.size()) - 1;
}

void issue(Block& block, void** args, uint32_t) {
  Warp& warp = block.warp_of(*block.current);
  WgmmaState& state = warp.wgmma;
  const Issue& first = *static_cast<Issue*>(args[0]);
  if (!state.fenced)
    report(warp.pc, "wgmma-fence", "no wgmma.fence since the start or the last wgmma.wait_group");
  for (int lane = 1; lane < kWarpSize; lane++) {
    const Issue& other = *static_cast<Issue*>(args[lane]);
    if (other.desc_a == first.desc_a && other.desc_b == first.desc_b &&
        other.accumulate == first.accumulate)
      continue;
    report(warp.pc, "wgmma", "lanes 0 and %d give different descriptors or scales", lane);
    break;
  }
  if ((first.desc_a | first.desc_b) >> 49 & 7)
    report(warp.pc, "wgmma", "a descriptor's base offset is not 0, which is not emulated");
  WgmmaOp op{*first.shape, first.desc_a, first.desc_b, first.a != nullptr, first.accumulate, {}, 0,
             warp.pc};
  for (int lane = 0; first.a && lane < kWarpSize; lane++) {
    const uint32_t* a = static_cast<Issue*>(args[lane])->a;
    for (int i = 0; i < 4; i++) check_initialised(a[i], warp.pc, "operand a");
    op.a.insert(op.a.end(), a, a + 4);
  }
  each_operand_piece(op, block.current->warp, [&](uint32_t address) {
    if (!shared_in_bounds(block, address, kPiece, warp.pc, "wgmma operand", kPiece)) return false;
    begin_async_read(block, address, kPiece, warp.pc, "wgmma");
    return true;
  });
  op.accumulator = take_accumulator(state, args, op.shape.n / 2);
  state.open.push_back(std::move(op));
}

void execute(Block& block, const WgmmaOp& op, WgmmaAccumulator& accumulator, uint32_t warp) {
  float a[kRows][kDepth];
  for (int m = 0; m < kRows; m++) {
    for (int k = 0; k < kDepth; k++) {
      if (op.a_in_registers) {  // laid out as a of mma m16n8k16
        const uint32_t word = op.a[(m % 8 * 4 + k % 8 / 2) * 4 + m / 8 + k / 8 * 2];
        a[m][k] = element_to_float(uint16_t(word >> k % 2 * 16), op.shape.bf16);
      } else {
        a[m][k] = operand(block, op.desc_a, op.shape.transpose_a, int(warp % 4) * kRows + m, k,
                          op.shape.bf16);
      }
    }
  }
  for (int n = 0; n < op.shape.n; n++) {
    float b[kDepth];
    for (int k = 0; k < kDepth; k++)
      b[k] = operand(block, op.desc_b, op.shape.transpose_b, n, k, op.shape.bf16);
    for (int m = 0; m < kRows; m++) {
      float sum = 0.0f;
      for (int k = 0; k < kDepth; k++) sum += a[m][k] * b[k];
      const int lane = m % 8 * 4 + n % 8 / 2, i = n / 8 * 4 + m / 8 * 2 + n % 2;
      float& d = accumulator.values[lane * accumulator.count + i];
      d = (op.accumulate ? d : 0.0f) + sum;
    }
  }
  block.counters.mma_flops += 2ull * kRows * op.shape.n * kDepth;
}

// Gives a finished accumulator back to the kernel's registers.
void give_back(const WgmmaAccumulator& taken, Pc pc) {
  bool touched = false;
  for (int lane = 0; lane < kWarpSize; lane++) {
    float* d = taken.registers[lane];
    for (int i = 0; i < taken.count; i++) touched |= __float_as_uint(d[i]) != kInFlightWord;
    std::memcpy(d, &taken.values[size_t(lane) * taken.count], size_t(taken.count) * 4);
  }
  if (touched)
    report(pc, "wgmma-accumulator-touched",
           "an accumulator was written while a wgmma that uses it was in flight");
}

void wait(Block& block, void** args, uint32_t) {
  Warp& warp = block.warp_of(*block.current);
  WgmmaState& state = warp.wgmma;
  const uint32_t index = block.current->warp;
  const int done = int(state.groups.size()) - *static_cast<int*>(args[0]);
  if (done <= 0) return;
  for (int g = 0; g < done; g++) {
    for (const WgmmaOp& op : state.groups[g]) {
      execute(block, op, state.accumulators[op.accumulator], index);
      each_operand_piece(op, index, [&](uint32_t address) {
        if (!shared_in_bounds(block, address, kPiece, op.pc, "wgmma operand", kPiece)) return false;
        end_async_read(block, address, kPiece, op.pc, "wgmma");
        return true;
      });
    }
  }
  state.groups.erase(state.groups.begin(), state.groups.begin() + done);
  state.fenced = false;

  std::vector<bool> busy(state.accumulators.size(), false);
  for (const auto& group : state.groups)
    for (const WgmmaOp& op : group) busy[op.accumulator] = true;
  for (const WgmmaOp& op : state.open) busy[op.accumulator] = true;
  std::vector<int> renumbered(busy.size(), 0);
  std::vector<WgmmaAccumulator> kept;
  for (size_t i = 0; i < busy.size(); i++) {
    renumbered[i] = int(kept.size());
    if (busy[i])
      kept.push_back(std::move(state.accumulators[i]));
    else
      give_back(state.accumulators[i], warp.pc);
  }
  state.accumulators = std::move(kept);
  for (auto& group : state.groups)
    for (WgmmaOp& op : group) op.accumulator = renumbered[op.accumulator];
  for (WgmmaOp& op : state.open) op.accumulator = renumbered[op.accumulator];
}

}  // namespace

void wgmma_fence() {
  Entry entry("wgmma.fence");
  collective(
      entry, FAL_SIMT_PC, "wgmma.fence",
      [](Block& block, void**, uint32_t) { block.warp_of(*block.current).wgmma.fenced = true; },
      nullptr, kFullMask, true);
}

void wgmma(float* d, WgmmaShape shape, const uint32_t* a_regs, uint64_t desc_a, uint64_t desc_b,
           bool accumulate) {
  Entry entry("wgmma.mma_async");
  Issue mine{d, &shape, a_regs, desc_a, desc_b, accumulate};
  collective(entry, FAL_SIMT_PC, "wgmma.mma_async", issue, &mine, kFullMask, true);
}

void wgmma_commit() {
  Entry entry("wgmma.commit_group");
  collective(
      entry, FAL_SIMT_PC, "wgmma.commit_group",
      [](Block& block, void**, uint32_t) {
        WgmmaState& state = block.warp_of(*block.current).wgmma;
        state.groups.push_back(std::move(state.open));
        state.open.clear();
      },
      nullptr, kFullMask, true);
}

void wgmma_wait(int groups_left) {
  Entry entry("wgmma.wait_group");
  collective(entry, FAL_SIMT_PC, "wgmma.wait_group", wait, &groups_left, kFullMask, true);
}

}  // namespace fal::simt
