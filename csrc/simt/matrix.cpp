// The warp's matrix instructions: ldmatrix, stmatrix, movmatrix and mma.sync m16n8k16. Fragment
// layouts are those of the PTX manual, written out beside the wrappers in ../cuda/ptx.cuh.
#include <cmath>
#include <cstring>

#include "state.h"

namespace fal::simt {

namespace {

constexpr int kRows = 8;       // of an 8x8 matrix
constexpr int kRowBytes = 16;  // eight 16-bit elements

struct MatrixAccess {
  uint32_t* registers;
  uint32_t address;
  int matrices;
  bool transpose;
};

// Lane l holds elements (l / 4, 2 (l % 4)) and the next in the row, or the transpose's.
uint16_t& element(uint16_t (&m)[kRows][kRows], uint32_t lane, int half, bool transpose) {
  const uint32_t row = lane / 4, column = lane % 4 * 2 + half;
  return transpose ? m[column][row] : m[row][column];
}

void count_wavefronts(Block& block, Pc pc, const uint64_t* addresses, AccessKind kind) {
  if (!config().account) return;
  int ideal = 0;
  const int units = wavefronts(addresses, kRows, kRowBytes, &ideal);
  SiteCount& site = block.sites[{pc, kind}];
  site.requests++;
  site.bytes += kRows * kRowBytes;
  site.units += units;
  site.ideal += ideal;
  block.counters.units[int(kind)] += units;
  block.counters.ideal[int(kind)] += ideal;
}

void run_ldmatrix(Block& block, void** args, uint32_t) {
  const Warp& warp = block.warp_of(*block.current);
  const uint32_t base = block.current->warp * kWarpSize;
  const auto& first = *static_cast<MatrixAccess*>(args[0]);
  for (int i = 0; i < first.matrices; i++) {
    uint16_t matrix[kRows][kRows];
    uint64_t addresses[kRows];
    for (int r = 0; r < kRows; r++) {
      const int lane = i * kRows + r;
      const uint32_t address = static_cast<MatrixAccess*>(args[lane])->address;
      block.on_behalf_of = &block.fibers[base + lane];
      addresses[r] = address;
      if (!shared_in_bounds(block, address, kRowBytes, warp.pc, "ldmatrix", kRowBytes)) {
        std::memset(matrix[r], 0xff, kRowBytes);
        addresses[r] = kNoAddress;
        continue;
      }
      note_shared_read(block, address, kRowBytes, base + lane, warp.pc, "ldmatrix");
      std::memcpy(matrix[r], block.shared(address), kRowBytes);
    }
    for (int lane = 0; lane < kWarpSize; lane++) {
      const uint32_t low = element(matrix, lane, 0, first.transpose);
      const uint32_t high = element(matrix, lane, 1, first.transpose);
      static_cast<MatrixAccess*>(args[lane])->registers[i] = low | high << 16;
    }
    count_wavefronts(block, warp.pc, addresses, AccessKind::kLdmatrix);
  }
  block.on_behalf_of = nullptr;
}

void run_stmatrix(Block& block, void** args, uint32_t) {
  const Warp& warp = block.warp_of(*block.current);
  const uint32_t base = block.current->warp * kWarpSize;
  const auto& first = *static_cast<MatrixAccess*>(args[0]);
  for (int i = 0; i < first.matrices; i++) {
    uint16_t matrix[kRows][kRows];
    uint64_t addresses[kRows];
    for (int lane = 0; lane < kWarpSize; lane++) {
      const uint32_t word = static_cast<MatrixAccess*>(args[lane])->registers[i];
      check_initialised(word, warp.pc, "the stored matrix");
      element(matrix, lane, 0, first.transpose) = uint16_t(word);
      element(matrix, lane, 1, first.transpose) = uint16_t(word >> 16);
    }
    for (int r = 0; r < kRows; r++) {
      const int lane = i * kRows + r;
      const uint32_t address = static_cast<MatrixAccess*>(args[lane])->address;
      block.on_behalf_of = &block.fibers[base + lane];
      addresses[r] = address;
      if (!shared_in_bounds(block, address, kRowBytes, warp.pc, "stmatrix", kRowBytes)) {
        addresses[r] = kNoAddress;
        continue;
      }
      note_shared_write(block, address, kRowBytes, base + lane, warp.pc, "stmatrix");
      std::memcpy(block.shared(address), matrix[r], kRowBytes);
    }
    count_wavefronts(block, warp.pc, addresses, AccessKind::kStmatrix);
  }
  block.on_behalf_of = nullptr;
}

void run_movmatrix(Block&, void** args, uint32_t) {
  uint16_t matrix[kRows][kRows];
  for (int lane = 0; lane < kWarpSize; lane++) {
    const uint32_t word = *static_cast<uint32_t*>(args[lane]);
    element(matrix, lane, 0, false) = uint16_t(word);
    element(matrix, lane, 1, false) = uint16_t(word >> 16);
  }
  for (int lane = 0; lane < kWarpSize; lane++) {
    const uint32_t low = element(matrix, lane, 0, true), high = element(matrix, lane, 1, true);
    *static_cast<uint32_t*>(args[lane]) = low | high << 16;
  }
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
  bool bf16;
};

void unpack(uint32_t word, bool bf16, float* to) {
  for (int half = 0; half < 2; half++)
    to[half] = element_to_float(uint16_t(word >> 16 * half), bf16);
}

// Sums in float32, k ascending. The hardware's order and its truncation differ in the last bits.
void run_mma(Block& block, void** args, uint32_t) {
  constexpr int kM = 16, kN = 8, kK = 16;
  const Warp& warp = block.warp_of(*block.current);
  float a[kM][kK], b[kK][kN], d[kM][kN];
  for (int lane = 0; lane < kWarpSize; lane++) {
    const auto& mine = *static_cast<Mma*>(args[lane]);
    const int g = lane / 4, c = lane % 4 * 2;
    block.on_behalf_of = &block.fibers[block.current->warp * kWarpSize + lane];
    for (int i = 0; i < 4; i++) {
      check_initialised(mine.a[i], warp.pc, "operand a");
      check_initialised(__float_as_uint(mine.d[i]), warp.pc, "the accumulator");
      unpack(mine.a[i], mine.bf16, &a[g + i % 2 * 8][c + i / 2 * 8]);
      d[g + i / 2 * 8][c + i % 2] = mine.d[i];
    }
    for (int i = 0; i < 2; i++) {
      check_initialised(mine.b[i], warp.pc, "operand b");
      float pair[2];
      unpack(mine.b[i], mine.bf16, pair);
      b[c + i * 8][g] = pair[0];
      b[c + i * 8 + 1][g] = pair[1];
    }
  }
  block.on_behalf_of = nullptr;
  for (int m = 0; m < kM; m++)
    for (int k = 0; k < kK; k++)
      for (int n = 0; n < kN; n++) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < kWarpSize; lane++) {
    const auto& mine = *static_cast<Mma*>(args[lane]);
    const int g = lane / 4, c = lane % 4 * 2;
    for (int i = 0; i < 4; i++) mine.d[i] = d[g + i / 2 * 8][c + i % 2];
  }
  block.counters.mma_flops += 2 * kM * kN * kK;
}

}  // namespace

void ldmatrix(uint32_t* r, int matrices, uint32_t address, bool transpose) {
  Entry entry("ldmatrix");
  MatrixAccess mine{r, address, matrices, transpose};
  collective(entry, FAL_SIMT_PC, "ldmatrix", run_ldmatrix, &mine, kFullMask, true);
}

void stmatrix(uint32_t address, const uint32_t* r, int matrices, bool transpose) {
  Entry entry("stmatrix");
  MatrixAccess mine{const_cast<uint32_t*>(r), address, matrices, transpose};
  collective(entry, FAL_SIMT_PC, "stmatrix", run_stmatrix, &mine, kFullMask, true);
}

uint32_t movmatrix_transpose(uint32_t r) {
  Entry entry("movmatrix");
  collective(entry, FAL_SIMT_PC, "movmatrix", run_movmatrix, &r, kFullMask, true);
  return r;
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool bf16) {
  Entry entry("mma.sync");
  Mma mine{d, a, b, bf16};
  collective(entry, FAL_SIMT_PC, "mma.sync", run_mma, &mine, kFullMask, true);
}

// ---- scalar functions with a counter
// --------------------------------------------------------------------

float ex2(float x) {
  Entry entry("ex2.approx");
  check_initialised(__float_as_uint(x), FAL_SIMT_PC, "the exponent");
  entry.block.counters.ex2++;
  constexpr float kSmallestNormal = 0x1p-126f;  // .ftz: denormals are zero
  const float y = std::exp2(std::fabs(x) < kSmallestNormal ? 0.0f : x);
  return y < kSmallestNormal ? 0.0f : y;
}

float tanh_approx(float x) { return std::tanh(x); }

namespace {

template <class Widen, class Narrow>
uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c, Widen widen, Narrow narrow) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float d = std::fma(widen(a >> shift), widen(b >> shift), widen(c >> shift));
    result |= static_cast<uint32_t>(narrow(d).bits) << shift;
  }
  return result;
}

}  // namespace

uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto widen = [](uint32_t bits) { return __half2float({static_cast<uint16_t>(bits)}); };
  return fma_pairs(a, b, c, widen, __float2half_rn);
}
uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto widen = [](uint32_t bits) { return __bfloat162float({static_cast<uint16_t>(bits)}); };
  return fma_pairs(a, b, c, widen, __float2bfloat16_rn);
}

}  // namespace fal::simt
