// One-line mistakes, each in a kernel that does nothing else. The statement at which the emulator
// must report it follows a comment "reports: name".
#include "csrc/cuda/launch.h"
#include "csrc/cuda/ptx.cuh"
#include "simt_test_kernels.h"

namespace {

using namespace fal;

FAL_DEFINE_BUGS(FAL_SMALL_BUGS)

constexpr int kDynamicBytes = 1024;

__device__ void shared_memory_mistakes(const float* in, float* out, uint8_t* dynamic, int bug) {
  using Row = float[64];
  FAL_SHARED(Row, first);
  FAL_SHARED(Row, second);
  const int t = threadIdx.x;
  first[t] = in[t];
  second[t] = in[t];
  __syncthreads();
  if (bug == k_static_overrun) {
    // reports: static_overrun
    first[t + 1] = 1.0f;
  }
  if (bug == k_dynamic_overrun) {
    float* row = reinterpret_cast<float*>(dynamic);
    // reports: dynamic_overrun
    row[t * 5] = 1.0f;
  }
  if (bug == k_shared_never_written) {
    const float* row = reinterpret_cast<const float*>(dynamic);
    // reports: shared_never_written
    out[t] = row[t];
  }
  if (bug == k_shared_misaligned) {
    const uint32_t row = ptx::smem_address(first);
    // reports: shared_misaligned
    const float2 pair = ptx::load_shared<float2>(row + 4 * (t / 2));
    out[t] = pair.x;
  }
}

__device__ void barrier_mistakes(const float* in, float* out, int bug) {
  const int t = threadIdx.x;
  if (bug == k_barrier_in_two_branches) {
    if (t % 2) {
      // reports: barrier_in_two_branches
      __syncthreads();
      out[t] = in[t];
    } else {
      out[t] = -in[t];
      // reports: barrier_in_two_branches
      __syncthreads();
    }
  }
  if (bug == k_barrier_against_shuffle) {
    if (t % 32 < 16) {
      // reports: barrier_against_shuffle
      __syncthreads();
    } else {
      // reports: barrier_against_shuffle
      out[t] = __shfl_xor_sync(~0u, in[t], 1);
    }
  }
  if (bug == k_barrier_exited_lanes) {
    if (t == 40) return;
    // reports: barrier_exited_lanes
    out[t] = __shfl_xor_sync(~0u, in[t], 1);
  }
  if (bug == k_named_id_too_large) {
    // reports: named_id_too_large
    ptx::barrier_sync(16, 64);
  }
}

__device__ void global_race_mistakes(const float* in, float* out, int bug) {
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (bug == k_store_beside_atomic) {
    // reports: store_beside_atomic
    if (blockIdx.x % 2) atomicAdd(&out[t], 1.0f);
    // reports: store_beside_atomic
    else
      out[t] = in[t];
  }
  if (bug == k_two_blocks_store) {
    // reports: two_blocks_store
    out[t] = in[t];
  }
  if (bug == k_block_reads_neighbour) {
    out[i] = in[t];
    // reports: block_reads_neighbour
    const float x = out[i ^ 64];
    out[i + 512] = x;
  }
}

__device__ void address_mistakes(const float* in, float* out, uint8_t* dynamic, int bug) {
  const int t = threadIdx.x;
  if (bug == k_load_misaligned) {
    // reports: load_misaligned
    const float4 v = ptx::load_global<float4>(in + t);
    out[t] = v.x;
  }
  if (bug == k_store_misaligned) {
    // reports: store_misaligned
    ptx::store_global(out + 3 * t, make_float2(0, 1));
  }
  if (bug == k_copy_source_misaligned) {
    // reports: copy_source_misaligned
    ptx::cp_async_16(ptx::smem_address(dynamic) + 16 * t, in + t);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
  if (bug == k_store_to_read_only) {
    // reports: store_to_read_only
    const_cast<float*>(in)[t] = 0.0f;
  }
  if (bug == k_index_before_start) {
    // reports: index_before_start
    out[t] = in[t - 1];
  }
  if (bug == k_null_pointer) {
    const float* volatile nowhere = nullptr;
    // reports: null_pointer
    out[t] = nowhere[t];
  }
  if (bug == k_copy_never_waited) {
    // reports: copy_never_waited
    ptx::cp_async_16(ptx::smem_address(dynamic) + 16 * t, in + 4 * t);
    ptx::cp_async_commit();
  }
  if (bug == k_store_into_copy_in_flight) {
    ptx::cp_async_16(ptx::smem_address(dynamic) + 16 * t, in + 4 * t);
    ptx::cp_async_commit();
    // reports: store_into_copy_in_flight
    ptx::store_shared(ptx::smem_address(dynamic) + 16 * t, 1.0f);
    ptx::cp_async_wait<0>();
  }
}

__device__ void register_mistakes(const float* in, float* out, int bug) {
  const int t = threadIdx.x;
  if (bug == k_register_never_set) {
    float d[4];
    if (in == nullptr) d[0] = 1.0f;
    const uint32_t a[4] = {1, 2, 3, 4};
    // reports: register_never_set
    ptx::mma_m16n8k16_bf16(d, a, 5, 6);
    out[t] = d[0];
  }
  if (bug == k_shuffle_register_never_set) {
    float x;
    for (int i = 0; i < int(in[t]); i++) x = float(i);  // in holds zeros: never
    // reports: shuffle_register_never_set
    out[t] = __shfl_xor_sync(~0u, x, 1);
  }
  if (bug == k_shuffle_from_outside_mask && t % 32 < 16) {
    // reports: shuffle_from_outside_mask
    out[t] = __shfl_xor_sync(0xffffu, in[t], 16);
  }
  if (bug == k_shuffle_lane_not_in_mask) {
    // reports: shuffle_lane_not_in_mask
    out[t] = __shfl_xor_sync(0xffffu, in[t], 1);
  }
  if (bug == k_mma_in_two_branches) {
    float d[4] = {0, 0, 0, 0};
    const uint32_t a[4] = {1, 2, 3, 4};
    if (t % 2) {
      // reports: mma_in_two_branches
      ptx::mma_m16n8k16_bf16(d, a, 5, 6);
    } else {
      d[0] = 1.0f;
      // reports: mma_in_two_branches
      ptx::mma_m16n8k16_bf16(d, a, 5, 6);
    }
    out[t] = d[0];
  }
}

__global__ void mistake(const float* in, float* out, int bug) {
  FAL_DYNAMIC_SMEM(dynamic);
  shared_memory_mistakes(in, out, dynamic, bug);
  barrier_mistakes(in, out, bug);
  global_race_mistakes(in, out, bug);
  address_mistakes(in, out, dynamic, bug);
  register_mistakes(in, out, bug);
}

__global__ void large_static(float* out) {
  using Large = float[13 * 1024];
#ifdef FAL_SIMT  // nvcc refuses it
  // reports: too_much_static_memory
  FAL_SHARED(Large, large);
  large[threadIdx.x] = 1.0f;
  out[threadIdx.x] = large[threadIdx.x];
#else
  out[threadIdx.x] = sizeof(Large);
#endif
}

}  // namespace

int run_mistake(const float* in, float* out, int bug) {
  if (bug == k_too_much_static_memory)
    return cuda::launch(large_static, dim3(1), dim3(64), 0, nullptr, out);
  const int threads = bug == k_too_many_threads ? 1056 : 64;
  const size_t bytes = bug == k_too_much_shared_memory ? 230 * 1024 : kDynamicBytes;
  const bool races =
      bug == k_store_beside_atomic || bug == k_two_blocks_store || bug == k_block_reads_neighbour;
  return cuda::launch(mistake, dim3(races ? 4 : 1), dim3(threads), bytes, nullptr, in, out, bug);
}
