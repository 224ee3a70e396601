// AMX, one instruction per function, and what the products of attention need around it.
//
// A tile register holds 16 rows of 64 bytes. tile_multiply adds, for bf16 A and B and fp32 C,
//
//     C[m][n] += sum over p < 16 of A[m][2p] B[2p][n] + A[m][2p + 1] B[2p + 1][n]
//
// with A as 16 rows of 32 elements and B as 16 rows of 16 pairs: row p holds B[2p][n] and B[2p +
// 1][n] side by side in the 32-bit lane n ("pairs" below). Denormals count as zero; each step
// rounds to nearest even. All registers are configured as whole tiles: operands are padded with
// zeros instead.
//
// Register map of every product: a block of 32 x 32 results.
//
//     tmm0 tmm1    C, rows 0 .. 15       tmm4  A, rows 0 .. 15      tmm6  B, columns 0 .. 15
//     tmm2 tmm3    C, rows 16 .. 31      tmm5  A, rows 16 .. 31     tmm7  B, columns 16 .. 31
#pragma once

// GCC's own headers read a variable in its initialiser to say "undefined" (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "simd.h"

namespace fal::cpu::FAL_CPU_ISA {

constexpr int kTileBytes = 1024;  // of a tile register
constexpr int kTileDepth = 32;    // bf16 elements of A's rows: the products' step along the depth
constexpr int kBlock = 32;        // rows and columns of a block of C
static_assert(kBlock == kPanel, "a block's columns are one panel of query rows");

#ifdef FAL_AMX_TILES  // tests: the instructions in C++, for processors without them
#include FAL_AMX_TILES
#else

// The compiler does not know what tile instructions read and write: "memory" orders them with the
// vector code that fills and reads the same buffers.
template <int kTile>
FAL_INLINE void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
FAL_INLINE void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
FAL_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kC, int kA, int kB>
FAL_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// Tile registers belong to the thread; holding them makes its context switches dearer, so each item
// configures them and gives them back.
class TileSession {
 public:
  FAL_INLINE TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  FAL_INLINE ~TileSession() { asm volatile("tilerelease"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

#endif  // FAL_AMX_TILES

FAL_INLINE void clear_block() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}

// C <-> fp32 [32][stride], stride in floats.
FAL_INLINE void load_block(const float* c, int64_t stride) {
  const int64_t bytes = stride * 4;
  tile_load<0>(c, bytes);
  tile_load<1>(c + 16, bytes);
  tile_load<2>(c + 16 * stride, bytes);
  tile_load<3>(c + 16 * stride + 16, bytes);
}
FAL_INLINE void store_block(float* c, int64_t stride) {
  const int64_t bytes = stride * 4;
  tile_store<0>(c, bytes);
  tile_store<1>(c + 16, bytes);
  tile_store<2>(c + 16 * stride, bytes);
  tile_store<3>(c + 16 * stride + 16, bytes);
}

// One step along the depth: C += A B for A of 32 x 32 and B of 32 x 32. a0 and a1 are the two
// halves of A's rows, b0 and b1 those of B's columns; strides in bytes.
FAL_INLINE void multiply_block(const void* a0, const void* a1, int64_t a_stride, const void* b0,
                               const void* b1, int64_t b_stride) {
  tile_load<4>(a0, a_stride);
  tile_load<6>(b0, b_stride);
  tile_multiply<0, 4, 6>();
  tile_load<7>(b1, b_stride);
  tile_multiply<1, 4, 7>();
  tile_load<5>(a1, a_stride);
  tile_multiply<2, 5, 6>();
  tile_multiply<3, 5, 7>();
}

// exp2(x) to 9.2e-8: a degree-5 minimax polynomial on the fraction, the exponent by vscalef; exact
// at whole numbers, where the greatest score always is. Exactly 0 for -inf; a NaN stays a NaN.
// Eight instructions, all of which issue twice a cycle; simd.h's exp2 needs eleven. (Degree 4 would
// do for P in bf16, but the LSE would be 3e-6 off.)
FAL_INLINE Float exp2_by_scalef(Float x) {
  const Float f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Float p = set1(1.879318637e-03f);
  p = fma(p, f, set1(8.990995119e-03f));
  p = fma(p, f, set1(5.581867595e-02f));
  p = fma(p, f, set1(2.401592715e-01f));
  p = fma(p, f, set1(6.931517388e-01f));
  p = fma(p, f, set1(1.f));
  return _mm512_scalef_ps(p, x);
}

}  // namespace fal::cpu::FAL_CPU_ISA
