// CUDA C++'s keywords, built-in variables and functions for a host compiler, each implemented by
// the emulator. Include it through ../cuda/device.cuh. What is missing here is missing on purpose:
// kernels use the smallest part of CUDA that they need.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda_types.h"
#include "kernel_api.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (::fal::simt::thread_idx())
#define blockIdx (::fal::simt::block_idx())
#define blockDim (::fal::simt::block_dim())
#define gridDim (::fal::simt::grid_dim())
inline constexpr int warpSize = 32;

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __uint_as_float(0x7fffffffu)

// ---- barriers and fences
// -------------------------------------------------------------------------
__forceinline__ void __syncthreads() { fal::simt::barrier_sync(0, 0); }
__forceinline__ int __syncthreads_and(int value) {
  return fal::simt::barrier_reduce(value, fal::simt::BarrierReduction::kAnd);
}
__forceinline__ int __syncthreads_or(int value) {
  return fal::simt::barrier_reduce(value, fal::simt::BarrierReduction::kOr);
}
__forceinline__ int __syncthreads_count(int value) {
  return fal::simt::barrier_reduce(value, fal::simt::BarrierReduction::kCount);
}
__forceinline__ void __syncwarp(uint32_t mask = ~0u) { fal::simt::sync_warp(mask); }
__forceinline__ void __threadfence() { fal::simt::thread_fence(); }
__forceinline__ void __threadfence_block() {}

// ---- shuffles and votes
// --------------------------------------------------------------------------
namespace fal::simt {
// Lanes are grouped in segments of `width`. Up and down: a source outside the segment means the
// lane itself.
__forceinline__ uint32_t within_segment(uint32_t source, int width) {
  const uint32_t lane = lane_id(), segment = ~uint32_t(width - 1);
  return (source & segment) == (lane & segment) ? source : lane;
}
template <class T>
__forceinline__ T shuffle_as(uint32_t mask, T value, uint32_t source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
  if constexpr (sizeof(T) == 4) {
    return bit_cast<T>(shuffle(mask, bit_cast<uint32_t>(value), source));
  } else {
    const uint64_t bits = bit_cast<uint64_t>(value);
    const uint64_t low = shuffle(mask, uint32_t(bits), source);
    const uint64_t high = shuffle(mask, uint32_t(bits >> 32), source);
    return bit_cast<T>(low | high << 32);
  }
}
}  // namespace fal::simt

template <class T>
__forceinline__ T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const uint32_t lane = fal::simt::lane_id(), in = uint32_t(width - 1);
  return fal::simt::shuffle_as(mask, value, (lane & ~in) | (uint32_t(source) & in));
}
template <class T>
__forceinline__ T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32) {
  // Only a source behind the segment means the lane itself: from earlier ones xor reads (PTX ISA,
  // shfl.sync, .bfly).
  const uint32_t lane = fal::simt::lane_id(), source = lane ^ uint32_t(lane_mask);
  return fal::simt::shuffle_as(mask, value, source <= (lane | uint32_t(width - 1)) ? source : lane);
}
template <class T>
__forceinline__ T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const uint32_t source = fal::simt::lane_id() + delta;
  return fal::simt::shuffle_as(mask, value, fal::simt::within_segment(source, width));
}
template <class T>
__forceinline__ T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const uint32_t source = fal::simt::lane_id() - delta;
  return fal::simt::shuffle_as(mask, value, fal::simt::within_segment(source, width));
}
__forceinline__ uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return fal::simt::ballot(mask, predicate != 0);
}
__forceinline__ int __any_sync(uint32_t mask, int predicate) {
  return fal::simt::ballot(mask, predicate != 0) != 0;
}
__forceinline__ int __all_sync(uint32_t mask, int predicate) {
  return fal::simt::ballot(mask, predicate != 0) == mask;
}

// ---- atomics
// -------------------------------------------------------------------------------------
namespace fal::simt {
template <class T>
constexpr AtomicType atomic_type() {
  if constexpr (std::is_same_v<T, float>) return AtomicType::kFloat;
  if constexpr (std::is_same_v<T, double>) return AtomicType::kDouble;
  if constexpr (std::is_same_v<T, int>) return AtomicType::kInt32;
  if constexpr (std::is_same_v<T, unsigned>) return AtomicType::kUint32;
  return AtomicType::kUint64;
}
template <class T>
__forceinline__ T atomic_as(T* p, AtomicOp op, T value, T compare = T()) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  return bit_cast<T>(
      Bits(atomic(p, atomic_type<T>(), op, bit_cast<Bits>(value), bit_cast<Bits>(compare))));
}
}  // namespace fal::simt

// T is deduced from the pointer alone, as CUDA's overloads convert the value.
#define FAL_SIMT_ATOMIC(name, op)                                      \
  template <class T>                                                   \
  __forceinline__ T name(T* p, std::common_type_t<T> value) {          \
    return fal::simt::atomic_as<T>(p, fal::simt::AtomicOp::op, value); \
  }
FAL_SIMT_ATOMIC(atomicAdd, kAdd)
FAL_SIMT_ATOMIC(atomicMin, kMin)
FAL_SIMT_ATOMIC(atomicMax, kMax)
FAL_SIMT_ATOMIC(atomicAnd, kAnd)
FAL_SIMT_ATOMIC(atomicOr, kOr)
FAL_SIMT_ATOMIC(atomicXor, kXor)
FAL_SIMT_ATOMIC(atomicExch, kExchange)
#undef FAL_SIMT_ATOMIC
template <class T>
__forceinline__ T atomicCAS(T* p, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return fal::simt::atomic_as<T>(p, fal::simt::AtomicOp::kCompareSwap, value, compare);
}

// ---- arithmetic
// ----------------------------------------------------------------------------------
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// The device's fast intrinsics. Their exact bits differ on hardware; none is relied upon.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = selector >> (4 * i);
    unsigned byte = unsigned(bytes >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;  // replicate the sign
    result |= byte << (8 * i);
  }
  return result;
}
template <class T>
__forceinline__ T __ldg(const T* p) {
  T value;
  fal::simt::load_global(&value, p, sizeof value);
  return value;
}
