// A small FlashAttention-2 forward, for the emulator's own tests: bf16, head dim 64, 64 x 64 tiles,
// four warps of 16 query rows, K and V double-buffered by cp.async. `bug` plants one mistake; the
// statement at which the emulator must report it follows a comment "reports: name".
#include "csrc/cuda/launch.h"
#include "csrc/cuda/ptx.cuh"
#include "simt_test_kernels.h"

namespace {

using namespace fal;

FAL_DEFINE_BUGS(FAL_ATTENTION_BUGS)

constexpr int kTile = 64, kDim = 64, kThreads = 128;
constexpr int kTileBytes = kTile * kDim * 2;
constexpr int kSmemBytes = 5 * kTileBytes;  // Q, then K and V twice

// Byte offset of 16-byte chunk `chunk` of a row; the XOR keeps ldmatrix free of bank conflicts.
__device__ __forceinline__ uint32_t offset_of(int row, int chunk) {
  return row * kDim * 2 + ((chunk ^ (row & 7)) * 16);
}

__device__ __forceinline__ void load_tile(uint32_t to, const __nv_bfloat16* from, int row0,
                                          int rows, bool past_end) {
  for (int i = 0; i < kTile * kDim / 8 / kThreads; i++) {
    const int id = i * kThreads + threadIdx.x, row = id / (kDim / 8), chunk = id % (kDim / 8);
    const bool inside = row0 + row < rows || past_end;
    const __nv_bfloat16* source = from + size_t(inside ? row0 + row : 0) * kDim + chunk * 8;
    // reports: global_load_past_end no_sync_before_reuse
    ptx::cp_async_16(to + offset_of(row, chunk), source, inside);
  }
}

// q, k, v, out (heads, seqlen, 64); lse (heads, seqlen), natural log. Grid (tiles of rows, heads).
__global__ void __launch_bounds__(kThreads)
    attention(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
              __nv_bfloat16* out, float* lse, int seqlen, bool causal, float scale_log2, int bug) {
  FAL_DYNAMIC_SMEM(smem);
  const uint32_t smem_q = ptx::smem_address(smem);
  const uint32_t smem_k = smem_q + kTileBytes, smem_v = smem_k + 2 * kTileBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = blockIdx.x * kTile;
  const size_t head = size_t(blockIdx.y) * seqlen * kDim;
  const int keys = causal ? min(seqlen, row0 + kTile) : seqlen;
  const int tiles = (keys + kTile - 1) / kTile;
  const bool past_end = bug == k_global_load_past_end;

  load_tile(smem_q, q + head, row0, seqlen, false);
  load_tile(smem_k, k + head, 0, seqlen, past_end);
  load_tile(smem_v, v + head, 0, seqlen, past_end);
  ptx::cp_async_commit();

  float acc[kDim / 8][4], row_max[2] = {-CUDART_INF_F, -CUDART_INF_F}, row_sum[2] = {0, 0};
  for (int d = 0; d < kDim / 8; d++)
    for (int e = 0; e < 4; e++) acc[d][e] = 0;

  for (int j = 0; j < tiles; j++) {
    const uint32_t k_tile = smem_k + j % 2 * kTileBytes, v_tile = smem_v + j % 2 * kTileBytes;
    if (j + 1 < tiles) {
      const int next = (j + 1) % 2 * kTileBytes;
      load_tile(smem_k + next, k + head, (j + 1) * kTile, seqlen, past_end);
      if (bug != k_v_not_loaded)
        load_tile(smem_v + next, v + head, (j + 1) * kTile, seqlen, past_end);
    }
    ptx::cp_async_commit();
    if (bug == k_wait_for_too_few)
      ptx::cp_async_wait<2>();
    else if (bug != k_no_wait)
      ptx::cp_async_wait<1>();
    if (bug == k_barrier_skipped_by_a_warp && j == 1) {
      if (warp != 3) __syncthreads();
    } else if (bug != k_no_sync_after_wait) {
      __syncthreads();
    }

    float s[kTile / 8][4];
    for (int n = 0; n < kTile / 8; n++)
      for (int e = 0; e < 4; e++)
        if (bug != k_scores_not_cleared || n != 3) s[n][e] = 0;
    for (int kk = 0; kk < kDim / 16; kk++) {
      uint32_t a[4];
      // reports: no_sync_after_wait no_wait
      ptx::ldmatrix_x4(a, smem_q + offset_of(warp * 16 + lane % 16, kk * 2 + lane / 16));
      for (int n = 0; n < kTile / 16; n++) {
        uint32_t b[4];
        const int row =
            bug == k_ldmatrix_wrong_row ? n * 16 + lane % 16 : n * 16 + lane % 8 + lane / 16 * 8;
        uint32_t address = k_tile + offset_of(row, kk * 2 + lane / 8 % 2);
        if (bug == k_ldmatrix_past_end && lane == 31) address = smem_q + kSmemBytes + 64;
        if (bug == k_ldmatrix_misaligned && lane == 5) address += 8;
        // reports: ldmatrix_past_end ldmatrix_misaligned wait_for_too_few barrier_skipped_by_a_warp
        if (bug != k_ldmatrix_skipped_by_lanes || lane >= 8) ptx::ldmatrix_x4(b, address);
        // reports: ldmatrix_skipped_by_lanes scores_not_cleared
        ptx::mma_m16n8k16_bf16(s[2 * n], a, b[0], b[1]);
        ptx::mma_m16n8k16_bf16(s[2 * n + 1], a, b[2], b[3]);
      }
    }
    for (int n = 0; n < kTile / 8; n++)
      for (int e = 0; e < 4; e++) {
        const int row = row0 + warp * 16 + lane / 4 + e / 2 * 8;
        const int key = j * kTile + n * 8 + lane % 4 * 2 + e % 2;
        if (key >= seqlen || (causal && key > row)) s[n][e] = -CUDART_INF_F;
      }
    for (int h = 0; h < 2; h++) {
      float m = row_max[h], sum = 0;
      for (int n = 0; n < kTile / 8; n++) m = fmaxf(m, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      if (bug == k_shuffle_skipped_by_half_a_warp && lane >= 16) continue;
      // reports: shuffle_skipped_by_half_a_warp
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      const float reference = m == -CUDART_INF_F ? 0.0f : m * scale_log2;
      const float rescale = ptx::ex2(row_max[h] * scale_log2 - reference);
      row_max[h] = m;
      for (int n = 0; n < kTile / 8; n++)
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          s[n][e] = ptx::ex2(s[n][e] * scale_log2 - reference);
          sum += s[n][e];
        }
      row_sum[h] = row_sum[h] * rescale + sum;
      for (int d = 0; d < kDim / 8; d++) {
        acc[d][2 * h] *= rescale;
        acc[d][2 * h + 1] *= rescale;
      }
    }
    for (int kk = 0; kk < kTile / 16; kk++) {
      const uint32_t a[4] = {ptx::pack_bf16x2(s[2 * kk][0], s[2 * kk][1]),
                             ptx::pack_bf16x2(s[2 * kk][2], s[2 * kk][3]),
                             ptx::pack_bf16x2(s[2 * kk + 1][0], s[2 * kk + 1][1]),
                             ptx::pack_bf16x2(s[2 * kk + 1][2], s[2 * kk + 1][3])};
      for (int d = 0; d < kDim / 16; d++) {
        uint32_t b[4];
        // reports: v_not_loaded shuffle_skipped_by_half_a_warp
        ptx::ldmatrix_x4_trans(b, v_tile + offset_of(kk * 16 + lane % 16, d * 2 + lane / 16));
        ptx::mma_m16n8k16_bf16(acc[2 * d], a, b[0], b[1]);
        ptx::mma_m16n8k16_bf16(acc[2 * d + 1], a, b[2], b[3]);
      }
    }
    if (bug != k_no_sync_before_reuse) __syncthreads();
  }
  ptx::cp_async_wait<0>();

  for (int h = 0; h < 2; h++) {
    float sum = row_sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int row = row0 + warp * 16 + lane / 4 + h * 8;
    if (row >= seqlen && bug != k_global_store_past_end) continue;
    for (int d = 0; d < kDim / 8; d++) {
      __nv_bfloat16* to = out + head + size_t(row) * kDim + d * 8 + lane % 4 * 2;
      // reports: global_store_past_end
      ptx::store_global(to, ptx::pack_bf16x2(acc[d][2 * h] / sum, acc[d][2 * h + 1] / sum));
    }
    if (lane % 4 == 0)
      lse[size_t(blockIdx.y) * seqlen + row] =
          row_max[h] * scale_log2 * 0.6931471805599453f + logf(sum);
  }
}

}  // namespace

int run_attention(const void* q, const void* k, const void* v, void* out, float* lse, int heads,
                  int seqlen, bool causal, float scale, int bug) {
  using Element = __nv_bfloat16;
  return cuda::launch(attention, dim3((seqlen + kTile - 1) / kTile, heads), dim3(kThreads),
                      kSmemBytes, nullptr, static_cast<const Element*>(q),
                      static_cast<const Element*>(k), static_cast<const Element*>(v),
                      static_cast<Element*>(out), lse, seqlen, causal, scale * 1.4426950408889634f,
                      bug);
}
