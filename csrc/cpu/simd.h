// One vector type per instruction set and the operations that the kernels need from it. Arithmetic
// is written with operators (GCC vector extensions); a function exists here only where operators do
// not reach. The including file defines FAL_CPU_ISA (the namespace) and is compiled with the flags
// that fit.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#include "isa.h"
#if defined(__x86_64__)
#if !defined(__clang__)
// GCC's own AVX-512 headers pass an undefined vector where a mask leaves nothing of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fal::cpu::FAL_CPU_ISA {

// Element types of tensors. All but float are storage only.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
// Stored bytes of quantised K/V.
struct Int8 {
  int8_t value;
};
struct Float8E4M3 {
  uint8_t bits;
};

// kRows x (kVectors * kLanes) is the register tile of tile_gemm.h: accumulators, one row of B and
// one broadcast must fit the register file (32 registers with AVX-512 and NEON, 16 otherwise).
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kRows = 12;
using Float = __m512;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2, kRows = 6;
using Float = __m256;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 4, kRows = 6;
using Float = float32x4_t;
#else
constexpr int kLanes = 4, kVectors = 2, kRows = 6;
typedef float Float __attribute__((vector_size(16)));
#endif
constexpr int kPanel = kLanes * kVectors;

typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UInt __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UShort __attribute__((vector_size(2 * kLanes)));
typedef int8_t SByte __attribute__((vector_size(kLanes)));

FAL_INLINE Float load(const float* p) {
  Float x;
  memcpy(&x, p, sizeof x);
  return x;
}
FAL_INLINE void store(float* p, Float x) { memcpy(p, &x, sizeof x); }
FAL_INLINE Int load(const int32_t* p) {
  Int x;
  memcpy(&x, p, sizeof x);
  return x;
}
FAL_INLINE UShort load_bits(const void* p) {
  UShort x;
  memcpy(&x, p, sizeof x);
  return x;
}

FAL_INLINE Float set1(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#elif defined(__aarch64__)
  return vdupq_n_f32(x);
#else
  return Float{x, x, x, x};
#endif
}
FAL_INLINE Int set1(int32_t x) { return x - Int{}; }

// 0, 1, 2, ...
FAL_INLINE Int iota() {
  Int x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// a * b + c, in one rounding where the instruction set can.
FAL_INLINE Float fma(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The greater one; x when x is NaN (NEON: also when bound is).
FAL_INLINE Float max(Float bound, Float x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(bound, x);
#elif defined(__AVX2__)
  return _mm256_max_ps(bound, x);
#elif defined(__aarch64__)
  return vmaxq_f32(bound, x);
#elif defined(__SSE2__)
  return _mm_max_ps(bound, x);
#else
  return bound > x ? bound : x;
#endif
}

// Lane-wise conditions: mask registers with AVX-512, vectors of 0 and -1 elsewhere.
#if defined(__AVX512F__)
using Mask = __mmask16;
FAL_INLINE Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FAL_INLINE Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
FAL_INLINE Mask less_equal(Int a, Int b) { return _mm512_cmple_epi32_mask((__m512i)a, (__m512i)b); }
FAL_INLINE Mask less(Int a, Int b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
FAL_INLINE Float select(Mask m, Float yes, Float no) { return _mm512_mask_blend_ps(m, no, yes); }
FAL_INLINE Float keep(Mask m, Float x) { return _mm512_maskz_mov_ps(m, x); }
#else
using Mask = Int;
FAL_INLINE Mask less(Float a, Float b) { return (Mask)(a < b); }
FAL_INLINE Mask equal(Float a, Float b) { return (Mask)(a == b); }
FAL_INLINE Mask less_equal(Int a, Int b) { return (Mask)(a <= b); }
FAL_INLINE Mask less(Int a, Int b) { return (Mask)(a < b); }
FAL_INLINE Float keep(Mask m, Float x) { return (Float)(m & (Int)x); }
FAL_INLINE Float select(Mask m, Float yes, Float no) {
#if defined(__AVX2__)
  return _mm256_blendv_ps(no, yes, (__m256)m);
#else
  return (Float)((m & (Int)yes) | (~m & (Int)no));
#endif
}
#endif
FAL_INLINE Float keep_bits(Int m, Float x) { return (Float)(m & (Int)x); }
FAL_INLINE Float abs(Float x) { return (Float)((Int)x & 0x7fffffff); }
FAL_INLINE Float to_float(Int x) { return __builtin_convertvector(x, Float); }
FAL_INLINE Int min(Int a, Int b) { return a < b ? a : b; }

FAL_INLINE float sum(Float x) {
  float lanes[kLanes], total = 0.f;
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// ---- 16-bit elements <-> float

// By name: GCC widens a vector of 16 shorts in halves and puts them together again.
FAL_INLINE UInt widen(UShort x) {
#if defined(__AVX512F__)
  return (UInt)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (UInt)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, UInt);
#endif
}
FAL_INLINE Float load(const BFloat16* p) { return (Float)(widen(load_bits(p)) << 16); }

FAL_INLINE Float from_half(UShort bits16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)bits16);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)bits16);
#elif defined(__aarch64__)
  return vcvt_f32_f16((float16x4_t)bits16);
#else
  // Integer arithmetic only, because denormals may be flushed: exponent rebased from 15 to 127,
  // all ones kept, subnormals through an integer conversion.
  const UInt h = __builtin_convertvector(bits16, UInt);
  const UInt sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  const UInt normal = (magnitude << 13) + (112u << 23);
  const UInt special = (magnitude << 13) | 0x7f800000u;
  const Float tiny = __builtin_convertvector((Int)magnitude, Float) * 0x1p-24f;
  const UInt bits = magnitude >= 0x7c00u ? special : magnitude < 0x400u ? (UInt)tiny : normal;
  return (Float)(bits | sign);
#endif
}
FAL_INLINE Float load(const Half* p) { return from_half(load_bits(p)); }

FAL_INLINE void store_bits(void* p, UShort x) { memcpy(p, &x, sizeof x); }

// Round to nearest even; a NaN stays a NaN (made quiet, its upper payload kept).
FAL_INLINE void store(BFloat16* p, Float x) {
#if defined(__AVX512BF16__)
  store_bits(p, (UShort)_mm512_cvtneps_pbh(x));
#else
  const UInt u = (UInt)x;
  const UInt rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UInt quiet = (u >> 16) | 0x40u;
  const UInt bits = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  store_bits(p, __builtin_convertvector(bits, UShort));
#endif
}

FAL_INLINE void store(Half* p, Float x) {
#if defined(__AVX512F__)
  store_bits(
      p, (UShort)_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  store_bits(p, (UShort)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  store_bits(p, (UShort)vcvt_f16_f32(x));
#else
  const UInt u = (UInt)x;
  const UInt sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const UInt normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // One ulp of 0.5 is the smallest subnormal half: the addition rounds to it.
  const UInt tiny = (UInt)((Float)magnitude + 0.5f) - 0x3f000000u;
  const UInt special = magnitude > 0x7f800000u ? 0x7e00u + (magnitude & 0u) : 0x7c00u + (u & 0u);
  const UInt bits = magnitude >= 0x477ff000u ? special : magnitude < 0x38800000u ? tiny : normal;
  store_bits(p, __builtin_convertvector(bits | sign, UShort));
#endif
}

// ---- stored bytes of quantised rows -> float

FAL_INLINE Float load(const Int8* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
#else
  SByte x;
  memcpy(&x, p, sizeof x);
  return to_float(__builtin_convertvector(x, Int));
#endif
}

// e4m3 as half, in units of 2^8: from sign-extended words the exponent, biased by 8 less, moves to
// its place, and the only NaN's becomes half's, all ones.
constexpr float kFloat8Unit = 256.f;
typedef uint16_t WideUShort __attribute__((vector_size(4 * kLanes)));
template <class Words>
FAL_INLINE Words half_of_float8(Words sign_extended) {
  const Words bits = (sign_extended << 7) & 0xbfff;
  return bits | ((bits + 0x80) & 0x4000);
}

// Two vectors in units of kFloat8Unit.
FAL_INLINE void load_units(const Float8E4M3* p, Float* low, Float* high) {
#if defined(__AVX512F__)
  const __m512i h = (__m512i)half_of_float8(
      (WideUShort)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)));
  *low = from_half((UShort)_mm512_castsi512_si256(h));
  *high = from_half((UShort)_mm512_extracti64x4_epi64(h, 1));
#elif defined(__AVX2__)
  const __m256i h =
      (__m256i)half_of_float8((WideUShort)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)));
  *low = from_half((UShort)_mm256_castsi256_si128(h));
  *high = from_half((UShort)_mm256_extracti128_si256(h, 1));
#else
  typedef int8_t WideSByte __attribute__((vector_size(2 * kLanes)));
  typedef int16_t WideShort __attribute__((vector_size(4 * kLanes)));
  WideSByte x;
  memcpy(&x, p, sizeof x);
  const WideUShort h = half_of_float8((WideUShort) __builtin_convertvector(x, WideShort));
  UShort halves[2];
  memcpy(halves, &h, sizeof h);
  *low = from_half(halves[0]);
  *high = from_half(halves[1]);
#endif
}

FAL_INLINE Float load(const Float8E4M3* p) {
#if defined(__AVX512F__)
  const UShort x = (UShort)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  const UShort x = (UShort)_mm_cvtepi8_epi16(_mm_loadu_si64(p));
#else
  typedef int16_t Short __attribute__((vector_size(2 * kLanes)));
  SByte bytes;
  memcpy(&bytes, p, sizeof bytes);
  const UShort x = (UShort) __builtin_convertvector(bytes, Short);
#endif
  return from_half(half_of_float8(x)) * kFloat8Unit;
}

// The first n < kLanes elements, zeros after them; nothing beyond is touched.
template <class T>
FAL_INLINE Float load_first(const T* p, int n) {
  T lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
FAL_INLINE void store_first(T* p, Float x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// ---- functions

// 2^x for x <= 127: degree-5 minimax polynomial on [-1/2, 1/2], 1.6e-7 relative; exactly 0 below
// -126.5 and for -inf; a NaN stays a NaN, whatever its payload. The rounding constant carries the
// exponent's bias, so that its low bits, shifted, are the power of two; below -126.5 they are 0.
FAL_INLINE Float exp2(Float x) {
  const Float rounder = set1(12582912.f + 127.f);
  x = max(set1(-127.f), x);
  const Float t = x + rounder;
  const Float f = x - (t - rounder);
  Float p = set1(1.32647273e-3f);
  p = fma(p, f, set1(9.67151276e-3f));
  p = fma(p, f, set1(5.55073374e-2f));
  p = fma(p, f, set1(2.40222421e-1f));
  p = fma(p, f, set1(6.93146978e-1f));
  p = fma(p, f, set1(1.f));
  return p * (Float)((Int)t << 23);
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// tanh x, 2 ulp: an odd polynomial below 5/8, 1 - 2 / (e^2x + 1) above.
FAL_INLINE Float tanh(Float x) {
  const Float magnitude = abs(x);
  const Float z = x * x;
  Float p = set1(-5.704986397e-03f);
  p = fma(p, z, set1(2.063908614e-02f));
  p = fma(p, z, set1(-5.373971537e-02f));
  p = fma(p, z, set1(1.333144158e-01f));
  p = fma(p, z, set1(-3.333328068e-01f));
  const Float small = fma(p * z, x, x);
  // Above 10 the result is 1; the bound keeps a NaN, as max does.
  const Float bounded = -max(set1(-10.f), -magnitude);
  const Float large = 1.f - 2.f / (exp2(bounded * (2.f * kLog2E)) + 1.f);
  const Float signed_large = (Float)((Int)large | ((Int)x & (Int)set1(-0.f)));
  return select(less(magnitude, set1(0.625f)), small, signed_large);
}

// x[lanes[i]] in lane i.
FAL_INLINE Float permute(Float x, Int lanes) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)lanes, x);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(x, (__m256i)lanes);
#elif defined(__clang__)
  Float y;
  for (int i = 0; i < kLanes; ++i) y[i] = x[lanes[i]];
  return y;
#else
  return __builtin_shuffle(x, lanes);
#endif
}

// Lanes of a and, from kLanes on, of b.
template <int... kLane>
FAL_INLINE Float shuffle(Float a, Float b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, Int{kLane...});
#endif
}

// Exchanges the off-diagonal blocks of kBlock lanes between two rows.
template <int kBlock, int... kLane>
FAL_INLINE void exchange_blocks(Float& a, Float& b, std::integer_sequence<int, kLane...>) {
  const Float upper = shuffle<(kLane & kBlock ? kLane - kBlock + kLanes : kLane)...>(a, b);
  b = shuffle<(kLane & kBlock ? kLane + kLanes : kLane + kBlock)...>(a, b);
  a = upper;
}

template <int kBlock>
FAL_INLINE void transpose_step(Float (&r)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kBlock)) {
      exchange_blocks<kBlock>(r[i], r[i + kBlock], std::make_integer_sequence<int, kLanes>{});
    }
  }
}

// r[i][j] -> r[j][i].
FAL_INLINE void transpose(Float (&r)[kLanes]) {
  transpose_step<1>(r);
  transpose_step<2>(r);
  if constexpr (kLanes > 4) transpose_step<4>(r);
  if constexpr (kLanes > 8) transpose_step<8>(r);
}

// ---- words: what products multiply. A word of A is broadcast, a vector of words of B is loaded:
// fp32 elements, or pairs of bf16 where the instruction set multiplies those.

// Elements along a product's depth that one word holds.
template <class Word>
constexpr int kPerWord = 1;

FAL_INLINE Float broadcast(const float* p) { return set1(*p); }
// Element number `part` of each word.
FAL_INLINE Float element(Float x, int) { return x; }

#if defined(__AVX512BF16__)
// Two neighbours along the depth, the even one in the lower half. The products round to nearest
// even after each of the two additions and count denormals as zero.
struct Pair {
  uint32_t bits;
};
template <>
constexpr int kPerWord<Pair> = 2;
struct Pairs {
  Int lanes;
};

FAL_INLINE Pairs broadcast(const Pair* p) {
  int32_t word;
  memcpy(&word, p, sizeof word);
  return {(Int)_mm512_set1_epi32(word)};
}
FAL_INLINE Pairs load(const Pair* p) {
  Pairs x;
  memcpy(&x, p, sizeof x);
  return x;
}
FAL_INLINE void store(Pair* p, Pairs x) { memcpy(p, &x, sizeof x); }
FAL_INLINE Float fma(Pairs a, Pairs b, Float c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a.lanes, (__m512bh)b.lanes);
}

// Rounded to nearest (ties away from zero). Four instructions; vcvtne2ps2bf16 leaves the halves
// apart and takes 1.4 to 2 cycles alone. A NaN must have a zero among its lower 16 bits' top (as
// arithmetic makes them) to stay one.
FAL_INLINE Pairs make_pairs(Float even, Float odd) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(-0x10000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  return {(Int)_mm512_ternarylogic_epi32(high, upper, low, 0xEA)};  // (high & upper) | low
}
FAL_INLINE Float element(Pairs x, int part) {
  return (Float)(part ? (x.lanes & -0x10000) : (x.lanes << 16));
}

// Two rows of 16 elements, side by side in words.
FAL_INLINE Pairs pair_rows(__m256i even, __m256i odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
  return {(Int)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both)};
}
#endif

}  // namespace fal::cpu::FAL_CPU_ISA
