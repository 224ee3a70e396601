// Matrix products for the emulator's own tests. sm_80: a ring of three cp.async stages, ldmatrix
// and mma.sync. sm_90: a producer warp (TMA, 128-byte swizzle), a ring of mbarriers and a consumer
// warpgroup (wgmma, both operands in shared memory), result stored by TMA. The statement at which a
// planted bug must be reported follows a comment "reports: name".
#include "csrc/cuda/launch.h"
#include "csrc/cuda/ptx_sm90.cuh"
#include "simt_test_kernels.h"

namespace {

using namespace fal;

FAL_DEFINE_BUGS(FAL_GEMM_BUGS)

constexpr int kTile = 64;
constexpr int kTileBytes = kTile * kTile * 2;

// ---- sm_80
// ------------------------------------------------------------------------------------------

constexpr int kStages80 = 3;

// b (k, n). Each block computes a 64 x 64 tile with four warps of 16 rows.
__global__ void __launch_bounds__(128)
    gemm_sm80(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int n, int k) {
  FAL_DYNAMIC_SMEM(smem);
  const uint32_t smem_a = ptx::smem_address(smem), smem_b = smem_a + kStages80 * kTileBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = blockIdx.y * kTile, col0 = blockIdx.x * kTile, steps = k / kTile;
  const auto offset_of = [](int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; };
  const auto load = [&](int step) {
    if (step < steps) {
      const int stage = step % kStages80 * kTileBytes;
      for (int i = 0; i < 4; i++) {
        const int id = i * 128 + threadIdx.x, row = id / 8, chunk = id % 8;
        ptx::cp_async_16(smem_a + stage + offset_of(row, chunk),
                         a + size_t(row0 + row) * k + step * kTile + chunk * 8);
        ptx::cp_async_16(smem_b + stage + offset_of(row, chunk),
                         b + size_t(step * kTile + row) * n + col0 + chunk * 8);
      }
    }
    ptx::cp_async_commit();  // empty groups keep the count right at the end
  };
  for (int step = 0; step < kStages80 - 1; step++) load(step);
  float acc[8][4] = {};
  for (int step = 0; step < steps; step++) {
    ptx::cp_async_wait<kStages80 - 2>();
    __syncthreads();  // the stage has landed for all, and the one before is free
    load(step + kStages80 - 1);
    const uint32_t stage = step % kStages80 * kTileBytes;
    for (int kk = 0; kk < kTile / 16; kk++) {
      uint32_t fa[4];
      ptx::ldmatrix_x4(fa, smem_a + stage + offset_of(warp * 16 + lane % 16, kk * 2 + lane / 16));
      for (int j = 0; j < kTile / 16; j++) {
        uint32_t fb[4];
        ptx::ldmatrix_x4_trans(fb,
                               smem_b + stage + offset_of(kk * 16 + lane % 16, j * 2 + lane / 16));
        ptx::mma_m16n8k16_bf16(acc[2 * j], fa, fb[0], fb[1]);
        ptx::mma_m16n8k16_bf16(acc[2 * j + 1], fa, fb[2], fb[3]);
      }
    }
  }
  ptx::cp_async_wait<0>();
  for (int j = 0; j < 8; j++)
    for (int h = 0; h < 2; h++) {
      const int row = row0 + warp * 16 + lane / 4 + h * 8, col = col0 + j * 8 + lane % 4 * 2;
      ptx::store_global(c + size_t(row) * n + col, make_float2(acc[j][2 * h], acc[j][2 * h + 1]));
    }
}

// ---- sm_90
// ------------------------------------------------------------------------------------------

constexpr int kStages90 = 2;
#ifdef FAL_SIMT
constexpr int kWrongRegisterCount = 42;
#else
constexpr int kWrongRegisterCount = 40;  // ptxas refuses 42
#endif
constexpr int kSmemBytes90 = (2 * kStages90 + 1) * kTileBytes;

template <bool kTransposedB>
__global__ void __launch_bounds__(256, 1)
    gemm_sm90(const __grid_constant__ ptx::TensorMap map_a,
              const __grid_constant__ ptx::TensorMap map_b,
              const __grid_constant__ ptx::TensorMap map_c, int k, int bug) {
  FAL_DYNAMIC_SMEM(smem);
  using Barriers = uint64_t[2 * kStages90 + 1];
  FAL_SHARED(Barriers, barriers);
  const uint32_t smem_a = ptx::smem_address(smem), smem_b = smem_a + kStages90 * kTileBytes;
  const uint32_t smem_c = smem_b + kStages90 * kTileBytes;
  const uint32_t full = ptx::smem_address(barriers), empty = full + 8 * kStages90;
  const int thread = threadIdx.x, steps = k / kTile;
  const int row0 = blockIdx.y * kTile, col0 = blockIdx.x * kTile;
  if (thread == 0) {
    for (int s = 0; s < kStages90; s++) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, 128);
    }
    ptx::fence_mbarrier_init();
  }
  if (bug != k_no_sync_after_init) __syncthreads();

  if (thread < 128) {  // producer
    ptx::setmaxnreg_dec<40>();
    // reports: setmaxnreg_not_multiple
    if (bug == k_setmaxnreg_not_multiple) ptx::setmaxnreg_dec<kWrongRegisterCount>();
    if (thread != 0) return;
    for (int step = 0; step < steps; step++) {
      const int s = step % kStages90, phase = step / kStages90 % 2;
      if (bug == k_load_never_waited && step == kStages90) break;
      if (bug != k_no_empty_wait) ptx::mbarrier_wait(empty + 8 * s, phase ^ 1);
      const uint32_t barrier =
          bug == k_mbarrier_not_initialised ? full + 16 * kStages90 : full + 8 * s;
      const int error = bug == k_expect_too_many_bytes  ? 16
                        : bug == k_expect_too_few_bytes ? -16
                                                        : 0;
      // reports: mbarrier_not_initialised too_many_arrivals
      ptx::mbarrier_arrive_expect_tx(barrier, 2 * kTileBytes + error);
      if (bug == k_too_many_arrivals) {
        // reports: too_many_arrivals
        ptx::mbarrier_arrive(full + 8 * s);
      }
      const uint32_t shift = bug == k_swizzled_tile_misaligned ? 128 : 0;
      // reports: no_empty_wait early_release no_wgmma_wait
      // reports: swizzled_tile_misaligned load_never_waited
      ptx::tma_load_2d(smem_a + s * kTileBytes + shift, &map_a, full + 8 * s, step * kTile, row0);
      if (kTransposedB)
        ptx::tma_load_2d(smem_b + s * kTileBytes, &map_b, full + 8 * s, step * kTile, col0);
      else
        ptx::tma_load_2d(smem_b + s * kTileBytes, &map_b, full + 8 * s, col0, step * kTile);
    }
    return;
  }

  ptx::setmaxnreg_inc<232>();  // consumers
  const int lane = thread % 32, warp = thread / 32 - 4;
  float acc[32] = {};
  for (int step = 0; step < steps; step++) {
    const int s = step % kStages90, phase = step / kStages90 % 2;
    if (bug == k_load_never_waited) break;
    // reports: no_sync_after_init expect_too_many_bytes expect_too_few_bytes
    if (bug != k_no_full_wait)
      ptx::mbarrier_wait(full + 8 * s, bug == k_wrong_parity ? phase ^ 1 : phase);
    if (bug == k_no_proxy_fence) {  // rewrite a part of the tile by ordinary stores
      const uint32_t address = smem_a + s * kTileBytes + (thread - 128) * 4;
      ptx::store_shared(address, ptx::load_shared<uint32_t>(address));
      ptx::barrier_sync(1, 128);
    }
    if (bug != k_no_wgmma_fence) ptx::wgmma_fence();
    for (int kk = 0; kk < kTile / 16; kk++) {
      const uint32_t stride = bug == k_wrong_stride ? 512 : 1024;
      const uint64_t desc_a = ptx::wgmma_descriptor(smem_a + s * kTileBytes + kk * 32, 16, stride,
                                                    ptx::MatrixSwizzle::k128B);
      const uint64_t desc_b = kTransposedB
                                  ? ptx::wgmma_descriptor(smem_b + s * kTileBytes + kk * 32, 16,
                                                          1024, ptx::MatrixSwizzle::k128B)
                                  : ptx::wgmma_descriptor(smem_b + s * kTileBytes + kk * 2048, 1024,
                                                          1024, ptx::MatrixSwizzle::k128B);
      // reports: no_full_wait wrong_parity no_wgmma_fence no_proxy_fence
      ptx::wgmma_m64n64k16_ss_bf16<0, kTransposedB ? 0 : 1>(acc, desc_a, desc_b, 1);
    }
    ptx::wgmma_commit();
    if (bug == k_accumulator_written) acc[5] = 1.0f;
    if (bug == k_early_release) ptx::mbarrier_arrive(empty + 8 * s);
    // reports: accumulator_written
    if (bug != k_no_wgmma_wait) ptx::wgmma_wait<0>();
    if (bug != k_early_release) ptx::mbarrier_arrive(empty + 8 * s);
  }

  // The tile goes out through shared memory, swizzled as the tensor map says.
  for (int j = 0; j < 8; j++)
    for (int h = 0; h < 2; h++) {
      const int row = warp * 16 + lane / 4 + h * 8;
      const uint32_t to = smem_c + row * 128 + ((j ^ (row & 7)) * 16) + lane % 4 * 4;
      ptx::store_shared(to, ptx::pack_bf16x2(acc[j * 4 + h * 2], acc[j * 4 + h * 2 + 1]));
    }
  if (bug != k_store_without_fence) ptx::fence_proxy_async();
  ptx::barrier_sync(1, 128);
  if (thread == 128) {
    // reports: store_without_fence store_not_waited
    ptx::tma_store_2d(&map_c, smem_c, col0, row0);
    ptx::tma_store_commit();
    // reports: store_source_reused
    if (bug == k_store_source_reused) ptx::store_shared(smem_c, 0u);
    if (bug != k_store_not_waited) ptx::tma_store_wait_read<0>();
  }
}

#ifdef FAL_SIMT
ptx::TensorMap tensor_map(const void* data, int rows, int columns) {
  ptx::TensorMap map{};
  map.base = reinterpret_cast<uint64_t>(data);
  map.element_bytes = 2;
  map.rank = 2;
  map.dim[0] = columns;
  map.dim[1] = rows;
  map.stride[1] = uint64_t(columns) * 2;
  map.box[0] = map.box[1] = kTile;
  map.swizzle = simt::Swizzle::k128B;
  return map;
}
#endif

}  // namespace

int run_gemm_sm80(const void* a, const void* b, float* c, int m, int n, int k) {
  return cuda::launch(gemm_sm80, dim3(n / kTile, m / kTile), dim3(128), 2 * kStages80 * kTileBytes,
                      nullptr, static_cast<const __nv_bfloat16*>(a),
                      static_cast<const __nv_bfloat16*>(b), c, n, k);
}

#ifdef FAL_SIMT
int run_gemm_sm90(const void* a, const void* b, void* c, int m, int n, int k, bool b_transposed,
                  int bug) {
  return cuda::launch(b_transposed ? gemm_sm90<true> : gemm_sm90<false>, dim3(n / kTile, m / kTile),
                      dim3(256), kSmemBytes90, nullptr, tensor_map(a, m, k),
                      b_transposed ? tensor_map(b, n, k) : tensor_map(b, k, n), tensor_map(c, m, n),
                      k, bug);
}
#endif
