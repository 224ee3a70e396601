// What an emulated kernel calls: the functions behind CUDA's names (cuda_names.h) and behind the
// PTX wrappers (../cuda/ptx.cuh). Each one notes the address it was called from, which reports
// turn into file:line; so the wrappers that call them are always inlined into the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_types.h"

namespace fal::simt {

// ---- the running thread -------------------------------------------------------------------------
// Constant for a given thread, so the compiler may keep the results across any call.
[[gnu::const]] uint3 thread_idx();
[[gnu::const]] uint3 block_idx();
[[gnu::const]] dim3 block_dim();
[[gnu::const]] dim3 grid_dim();
[[gnu::const]] uint32_t lane_id();

// ---- shared memory: one arena per block, addressed by 32-bit shared addresses as in PTX
// -----------
uint8_t* dynamic_smem();
int next_static_site();
template <class Tag>
struct StaticSite {  // one number per FAL_SHARED declaration
  static inline const int id = next_static_site();
};
void* static_smem(int site, size_t bytes, size_t align, const char* name);
uint32_t shared_address(const void* p);  // cvta.to.shared

// ---- synchronisation ----------------------------------------------------------------------------
// threads = 0: the whole block. A warp's lanes must all arrive from the same place in the source.
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
enum class BarrierReduction { kAnd, kOr, kCount };
int barrier_reduce(int value, BarrierReduction op);  // __syncthreads_and, _or, _count
void sync_warp(uint32_t mask);
void thread_fence();

// ---- warp collectives: every lane of mask must call, and the last to come does the work
// -----------
uint32_t shuffle(uint32_t mask, uint32_t value, uint32_t source_lane);
uint32_t ballot(uint32_t mask, bool predicate);
void ldmatrix(uint32_t* r, int matrices, uint32_t address, bool transpose);
void stmatrix(uint32_t address, const uint32_t* r, int matrices, bool transpose);
uint32_t movmatrix_transpose(uint32_t r);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool bf16);

// ---- memory: checked and counted. Plain loads and stores of the kernel come through
// tsan_hooks.cpp --
void load_global(void* to, const void* from, int bytes);
void store_global(void* to, const void* from, int bytes);
void load_shared(void* to, uint32_t from, int bytes);
void store_shared(uint32_t to, const void* from, int bytes);
enum class AtomicType { kInt32, kUint32, kUint64, kFloat, kDouble };
enum class AtomicOp { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareSwap };
// Values travel as raw bits in the low bytes of 64-bit words. Returns the old value.
uint64_t atomic(void* p, AtomicType type, AtomicOp op, uint64_t value, uint64_t compare);
void reduce_add_f32(float* p, const float* values, int count);  // red.global.add[.v2|.v4].f32
float ex2(float x);
float tanh_approx(float x);
// Of packed pairs. Rounded by way of float: twice, where a result needs more than 24 bits.
uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c);
uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c);

// ---- cp.async: the copy lands when it is waited for, as late as the hardware may do it
// ------------ The first source_bytes of `bytes` are copied and the rest is zero-filled.
void cp_async(uint32_t to, const void* from, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

// ---- sm_90: mbarrier, TMA, wgmma
// -----------------------------------------------------------------
enum class Swizzle : uint32_t { kNone = 0, k32B = 1, k64B = 2, k128B = 3 };
// What cuTensorMapEncodeTiled is told: dim[0] is the innermost; stride in bytes, stride[0] unused.
struct alignas(64) TensorMap {
  uint64_t base;
  uint32_t element_bytes, rank;
  uint64_t dim[5], stride[5];
  uint32_t box[5];
  Swizzle swizzle;
};
void mbarrier_init(uint32_t barrier, uint32_t count);
void mbarrier_arrive(uint32_t barrier);
void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, const int* coords, int rank);
void tma_store(const TensorMap* map, uint32_t from, const int* coords, int rank);
void tma_store_commit();
void tma_store_wait(int groups_left);
void fence_proxy_async();
void setmaxnreg(int registers);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);
// d (64 x n per warpgroup, n/2 floats a thread) = a (64 x 16) * b (16 x n) + (accumulate ? d : 0);
// a from shared memory through a descriptor, or from 4 registers a thread where a_regs is given.
struct WgmmaShape {
  int n;
  bool bf16, transpose_a, transpose_b;
};
void wgmma(float* d, WgmmaShape shape, const uint32_t* a_regs, uint64_t desc_a, uint64_t desc_b,
           bool accumulate);

}  // namespace fal::simt
