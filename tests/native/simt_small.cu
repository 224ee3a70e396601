// Small correct kernels for the emulator's own tests: reductions, a histogram, a transpose, strided
// loads, named barriers, shuffles and votes. Some take a bug to plant; the statement at which it
// must be reported follows a comment "reports: name".
#include "csrc/cuda/launch.h"
#include "csrc/cuda/ptx.cuh"
#include "simt_test_kernels.h"

namespace {

using namespace fal;

FAL_DEFINE_BUGS(FAL_SMALL_BUGS)

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(~0u, x, step);
  return x;
}

// Sum over the block, valid in thread 0.
__device__ float block_sum(float x) {
  using PerWarp = float[32];
  FAL_SHARED(PerWarp, per_warp);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_sum(x);
  if (lane == 0) per_warp[warp] = x;
  __syncthreads();
  if (warp == 0) x = warp_sum(lane < int(blockDim.x) / 32 ? per_warp[lane] : 0.0f);
  return x;
}

__global__ void sum(const float* in, float* out, int n) {
  float x = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    x += in[i];
  x = block_sum(x);
  if (threadIdx.x == 0) ptx::red_add_f32(out, x);
}

// Each block stores its partial sum; the last one to finish adds them up in order.
__global__ void sum_last_block(const float* in, float* partial, unsigned* counter, float* out,
                               int n, int bug) {
  float x = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    x += in[i];
  x = block_sum(x);
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = x;
  if (bug != k_no_threadfence) __threadfence();
  if (atomicAdd(counter, 1u) != gridDim.x - 1) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; b++) {
    // reports: no_threadfence
    total += partial[b];
  }
  *out = total;
}

__global__ void histogram(const int* in, int* out, int n, int bins, int bug) {
  using Counts = int[64];
  FAL_SHARED(Counts, counts);
  for (int i = threadIdx.x; i < bins; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    if (bug == k_increment_without_atomic) {
      // reports: increment_without_atomic
      counts[in[i]] += 1;
    } else {
      atomicAdd(&counts[in[i]], 1);
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += blockDim.x)
    if (counts[b]) atomicAdd(&out[b], counts[b]);
}

template <int kPad>
__global__ void transpose(const float* in, float* out, int n) {
  using Tile = float[32][32 + kPad];
  FAL_SHARED(Tile, tile);
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int i = 0; i < 32; i += 8) tile[threadIdx.y + i][threadIdx.x] = in[(y + i) * n + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x;
  y = blockIdx.x * 32 + threadIdx.y;
  for (int i = 0; i < 32; i += 8) out[(y + i) * n + x] = tile[threadIdx.x][threadIdx.y + i];
}

__global__ void strided(const float* in, float* out, int stride) {
  out[threadIdx.x] = in[threadIdx.x * stride];
}

// Two groups of 64 threads hand a buffer over through named barriers.
__global__ void ping_pong(float* out, int rounds, int bug) {
  using Row = float[64];
  FAL_SHARED(Row, row);
  const int group = threadIdx.x / 64, i = threadIdx.x % 64;
  for (int r = 0; r < rounds; r++) {
    if (group == 0) {
      // reports: named_arrive_forgotten
      if (r > 0) ptx::barrier_sync(2, 128);  // the buffer is free
      row[i] = float(100 * r + i);
      // reports: named_count_differs
      ptx::barrier_arrive(1, 128);  // the buffer is full
    } else {
      // reports: named_count_differs
      ptx::barrier_sync(1, bug == k_named_count_differs ? 64 : 128);
      out[64 * r + i] = row[63 - i];
      if (r + 1 < rounds && bug != k_named_arrive_forgotten) ptx::barrier_arrive(2, 128);
    }
  }
}

// Inclusive prefix sums of 32 floats through shared memory.
__global__ void warp_scan(const float* in, float* out, int bug) {
  using Row = float[32];
  FAL_SHARED(Row, row);
  const int lane = threadIdx.x;
  row[lane] = in[lane];
  for (int step = 1; step < 32; step *= 2) {
    if (bug != k_no_syncwarp) __syncwarp();
    // reports: no_syncwarp
    const float left = lane >= step ? row[lane - step] : 0.0f;
    if (bug != k_no_syncwarp) __syncwarp();
    row[lane] += left;
  }
  out[lane] = row[lane];
}

// Votes and shuffles of each kind, 64 threads.
__global__ void votes(const int* in, int* out) {
  const int t = threadIdx.x, x = in[t];
  int* mine = out + 10 * t;
  mine[0] = __syncthreads_count(x > 0);
  mine[1] = __syncthreads_and(x > -100);
  mine[2] = __syncthreads_or(x > 100);
  mine[3] = int(__ballot_sync(~0u, x % 2));
  mine[4] = __any_sync(~0u, x == 7);
  mine[5] = __all_sync(~0u, x < 64);
  mine[6] = __shfl_sync(~0u, x, 3, 8);
  mine[7] = __shfl_up_sync(~0u, x, 2);
  mine[8] = __shfl_down_sync(~0u, x, 5, 16);
  mine[9] = int(__shfl_xor_sync(~0u, int64_t(x) << 32, 9) >> 32);
}

}  // namespace

int run_sum(const float* in, float* out, int n, int blocks) {
  return cuda::launch(sum, dim3(blocks), dim3(128), 0, nullptr, in, out, n);
}
int run_sum_last_block(const float* in, float* partial, unsigned* counter, float* out, int n,
                       int blocks, int bug) {
  return cuda::launch(sum_last_block, dim3(blocks), dim3(64), 0, nullptr, in, partial, counter, out,
                      n, bug);
}
int run_histogram(const int* in, int* out, int n, int bins, int bug) {
  return cuda::launch(histogram, dim3((n + 127) / 128), dim3(128), 0, nullptr, in, out, n, bins,
                      bug);
}
int run_transpose(const float* in, float* out, int n, int pad) {
  return cuda::launch(pad ? transpose<1> : transpose<0>, dim3(n / 32, n / 32), dim3(32, 8), 0,
                      nullptr, in, out, n);
}
int run_strided(const float* in, float* out, int stride) {
  return cuda::launch(strided, dim3(1), dim3(32), 0, nullptr, in, out, stride);
}
int run_ping_pong(float* out, int rounds, int bug) {
  return cuda::launch(ping_pong, dim3(1), dim3(128), 0, nullptr, out, rounds, bug);
}
int run_warp_scan(const float* in, float* out, int bug) {
  return cuda::launch(warp_scan, dim3(1), dim3(32), 0, nullptr, in, out, bug);
}
int run_votes(const int* in, int* out) {
  return cuda::launch(votes, dim3(1), dim3(64), 0, nullptr, in, out);
}
