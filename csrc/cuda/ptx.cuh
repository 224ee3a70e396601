// Every PTX instruction of sm_80 that the kernels use: one instruction per function, each twice, as
// a call into the SIMT emulator and as inline asm. Kernels contain no asm of their own. The names
// follow the instructions of the PTX ISA manual. Instructions that need sm_90 are in ptx_sm90.cuh.
//
// Shared memory is addressed by 32-bit shared addresses (smem_address), as the instructions do.
#pragma once

#include <string.h>

#include "device.cuh"

#define FAL_PTX __device__ __forceinline__

namespace fal::ptx {

// x, known only here: what rare code makes of it is not prepared outside of a loop, where it would
// hold registers.
__device__ __forceinline__ int opaque(int x) {
#ifndef FAL_SIMT
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- addresses
// -------------------------------------------------------------------------------------

FAL_PTX uint32_t smem_address(const void* p) {
#ifdef FAL_SIMT
  return simt::shared_address(p);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// ---- arithmetic
// -------------------------------------------------------------------------------------

// 2^x with about 2 ulp of error, denormals flushed; ex2(-inf) = 0.
FAL_PTX float ex2(float x) {
#ifdef FAL_SIMT
  return simt::ex2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh(x) with an absolute error of about 2^-11.
FAL_PTX float tanh_approx(float x) {
#ifdef FAL_SIMT
  return simt::tanh_approx(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Two floats rounded to nearest even and packed: lo in bits 0-15, hi in bits 16-31.
FAL_PTX uint32_t pack_bf16x2(float lo, float hi) {
#ifdef FAL_SIMT
  return __float2bfloat16_rn(lo).bits | uint32_t(__float2bfloat16_rn(hi).bits) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
#endif
}
FAL_PTX uint32_t pack_f16x2(float lo, float hi) {
#ifdef FAL_SIMT
  return __float2half_rn(lo).bits | uint32_t(__float2half_rn(hi).bits) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
#endif
}

// a * b + c of two packed pairs, each rounded once.
FAL_PTX uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef FAL_SIMT
  return simt::fma_f16x2(a, b, c);
#else
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}
FAL_PTX uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef FAL_SIMT
  return simt::fma_bf16x2(a, b, c);
#else
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

// ---- global memory: naturally aligned accesses of 4, 8 or 16 bytes
// ------------------------------------

template <class T>
FAL_PTX T load_global(const void* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
#ifdef FAL_SIMT
  simt::load_global(&value, p, sizeof value);
#else
  uint32_t w[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(w[0]) : "l"(p) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p) : "memory");
  } else {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p)
                 : "memory");
  }
  memcpy(&value, w, sizeof value);
#endif
  return value;
}

// The same for memory that nobody writes during the launch (the read-only path).
template <class T>
FAL_PTX T load_global_readonly(const void* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
#ifdef FAL_SIMT
  simt::load_global(&value, p, sizeof value);
#else
  uint32_t w[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm("ld.global.nc.b32 %0, [%1];" : "=r"(w[0]) : "l"(p));
  } else if constexpr (sizeof(T) == 8) {
    asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  } else {
    asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
        : "l"(p));
  }
  memcpy(&value, w, sizeof value);
#endif
  return value;
}

template <class T>
FAL_PTX void store_global(void* p, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#ifdef FAL_SIMT
  simt::store_global(p, &value, sizeof value);
#else
  uint32_t w[sizeof(T) / 4];
  memcpy(w, &value, sizeof value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(w[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
  } else {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  }
#endif
}

// *p += value, relaxed, result not returned.
FAL_PTX void red_add_f32(float* p, float value) {
#ifdef FAL_SIMT
  simt::reduce_add_f32(p, &value, 1);
#else
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(value) : "memory");
#endif
}

// p[0] += x, p[1] += y; p aligned to 8 bytes. One instruction from sm_90 on, two before.
FAL_PTX void red_add_f32x2(float* p, float x, float y) {
#ifdef FAL_SIMT
  const float values[2] = {x, y};
  simt::reduce_add_f32(p, values, 2);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x), "f"(y) : "memory");
#else
  red_add_f32(p, x);
  red_add_f32(p + 1, y);
#endif
}

// The same for four floats; p aligned to 16 bytes.
FAL_PTX void red_add_f32x4(float* p, float4 v) {
#ifdef FAL_SIMT
  const float values[4] = {v.x, v.y, v.z, v.w};
  simt::reduce_add_f32(p, values, 4);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
#else
  red_add_f32(p, v.x);
  red_add_f32(p + 1, v.y);
  red_add_f32(p + 2, v.z);
  red_add_f32(p + 3, v.w);
#endif
}

// ---- shared memory: naturally aligned accesses of 4, 8 or 16 bytes
// ------------------------------------

template <class T>
FAL_PTX T load_shared(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
#ifdef FAL_SIMT
  simt::load_shared(&value, address, sizeof value);
#else
  uint32_t w[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(w[0]), "=r"(w[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(address)
                 : "memory");
  }
  memcpy(&value, w, sizeof value);
#endif
  return value;
}

template <class T>
FAL_PTX void store_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#ifdef FAL_SIMT
  simt::store_shared(address, &value, sizeof value);
#else
  uint32_t w[sizeof(T) / 4];
  memcpy(w, &value, sizeof value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(w[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(w[0]), "r"(w[1])
                 : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  }
#endif
}

// ---- asynchronous copies, global to shared. --------------------------------------------------
// What a thread has copied is visible to it after its wait, to others after a barrier behind that.

// 16 bytes past the L1 cache; zeros are written where valid is false (nothing is read then).
FAL_PTX void cp_async_16(uint32_t to, const void* from, bool valid = true) {
#ifdef FAL_SIMT
  simt::cp_async(to, from, 16, valid ? 16 : 0);
#else
  // The ignore-src predicate costs nothing; a source size of 0 costs four instructions a copy.
  asm volatile(
      "{ .reg .pred ignore; setp.eq.b32 ignore, %2, 0; "
      "cp.async.cg.shared.global [%0], [%1], 16, ignore; }" ::"r"(to),
      "l"(from), "r"(static_cast<int>(valid))
      : "memory");
#endif
}

// 16 bytes of which the first source_bytes (0 to 16) are read and the rest are zeros.
FAL_PTX void cp_async_16_partial(uint32_t to, const void* from, int source_bytes) {
#ifdef FAL_SIMT
  simt::cp_async(to, from, 16, source_bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(source_bytes)
               : "memory");
#endif
}

// 4 or 8 bytes through the L1 cache, for rows that are not 16-byte aligned.
template <int kBytes>
FAL_PTX void cp_async_small(uint32_t to, const void* from, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8);
#ifdef FAL_SIMT
  simt::cp_async(to, from, kBytes, valid ? kBytes : 0);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
               "r"(valid ? kBytes : 0)
               : "memory");
#endif
}

// Closes the group of the copies issued since the last commit (an empty group counts too).
FAL_PTX void cp_async_commit() {
#ifdef FAL_SIMT
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroupsLeft of this thread's latest groups are still in flight.
template <int kGroupsLeft>
FAL_PTX void cp_async_wait() {
#ifdef FAL_SIMT
  simt::cp_async_wait(kGroupsLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

// ---- 8x8 matrices of 16-bit elements, shared memory to registers. -------------------------
// Lane 8i + j gives the address of row j of matrix i; lane l receives elements (l / 4, 2 (l % 4))
// and (l / 4, 2 (l % 4) + 1) of each, or of its transpose.

FAL_PTX void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
#ifdef FAL_SIMT
  simt::ldmatrix(r, 4, address, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}
FAL_PTX void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
#ifdef FAL_SIMT
  simt::ldmatrix(r, 4, address, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}
FAL_PTX void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
#ifdef FAL_SIMT
  simt::ldmatrix(r, 2, address, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
#endif
}
FAL_PTX void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
#ifdef FAL_SIMT
  simt::ldmatrix(r, 2, address, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
#endif
}

// Transposes one 8x8 matrix held by the warp.
FAL_PTX uint32_t movmatrix_trans(uint32_t r) {
#ifdef FAL_SIMT
  return simt::movmatrix_transpose(r);
#else
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
  return transposed;
#endif
}

// ---- tensor cores: d (16x8, f32) += a (16x16, row) * b (16x8, column). ----------------------
// With g = lane / 4 and c = 2 (lane % 4), a register holds a pair of neighbours in the row:
//   a[0] (g, c)  a[1] (g + 8, c)  a[2] (g, c + 8)  a[3] (g + 8, c + 8)
//   b0 (k = c, n = g)  b1 (k = c + 8, n = g)
//   d[0], d[1] (g, c), (g, c + 1)  d[2], d[3] (g + 8, c), (g + 8, c + 1)

FAL_PTX void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef FAL_SIMT
  const uint32_t b[2] = {b0, b1};
  simt::mma_m16n8k16(d, a, b, true);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
FAL_PTX void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef FAL_SIMT
  const uint32_t b[2] = {b0, b1};
  simt::mma_m16n8k16(d, a, b, false);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- named barriers 1 to 15 (0 is __syncthreads); `threads` a multiple of 32. ------------------

// Arrives and waits until `threads` threads have arrived (sync and arrive alike).
FAL_PTX void barrier_sync(int id, int threads) {
#ifdef FAL_SIMT
  simt::barrier_sync(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}
// Arrives without waiting.
FAL_PTX void barrier_arrive(int id, int threads) {
#ifdef FAL_SIMT
  simt::barrier_arrive(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace fal::ptx
