// The kernels of the emulator's own tests, as the binding (simt_tests.cpp) calls them. Each takes
// the number of a bug to plant, 0 for none; the lists below name them for Python.
#pragma once

#include <cstdint>

#define FAL_ATTENTION_BUGS(X)       \
  X(none)                           \
  X(no_sync_after_wait)             \
  X(no_sync_before_reuse)           \
  X(no_wait)                        \
  X(wait_for_too_few)               \
  X(global_load_past_end)           \
  X(global_store_past_end)          \
  X(ldmatrix_past_end)              \
  X(ldmatrix_misaligned)            \
  X(ldmatrix_wrong_row)             \
  X(ldmatrix_skipped_by_lanes)      \
  X(v_not_loaded)                   \
  X(scores_not_cleared)             \
  X(shuffle_skipped_by_half_a_warp) \
  X(barrier_skipped_by_a_warp)

#define FAL_GEMM_BUGS(X)      \
  X(none)                     \
  X(no_full_wait)             \
  X(no_empty_wait)            \
  X(expect_too_many_bytes)    \
  X(expect_too_few_bytes)     \
  X(wrong_parity)             \
  X(no_wgmma_wait)            \
  X(no_wgmma_fence)           \
  X(early_release)            \
  X(no_sync_after_init)       \
  X(no_proxy_fence)           \
  X(accumulator_written)      \
  X(too_many_arrivals)        \
  X(mbarrier_not_initialised) \
  X(swizzled_tile_misaligned) \
  X(wrong_stride)             \
  X(load_never_waited)        \
  X(store_without_fence)      \
  X(store_not_waited)         \
  X(store_source_reused)      \
  X(setmaxnreg_not_multiple)

// small kernels; a bug of one leaves the others alone
#define FAL_SMALL_BUGS(X)       \
  X(none)                       \
  X(no_syncwarp)                \
  X(static_overrun)             \
  X(dynamic_overrun)            \
  X(shared_never_written)       \
  X(barrier_in_two_branches)    \
  X(barrier_against_shuffle)    \
  X(barrier_exited_lanes)       \
  X(named_count_differs)        \
  X(named_arrive_forgotten)     \
  X(named_id_too_large)         \
  X(store_beside_atomic)        \
  X(two_blocks_store)           \
  X(block_reads_neighbour)      \
  X(no_threadfence)             \
  X(increment_without_atomic)   \
  X(load_misaligned)            \
  X(store_misaligned)           \
  X(shared_misaligned)          \
  X(copy_source_misaligned)     \
  X(register_never_set)         \
  X(shuffle_register_never_set) \
  X(shuffle_from_outside_mask)  \
  X(shuffle_lane_not_in_mask)   \
  X(mma_in_two_branches)        \
  X(store_to_read_only)         \
  X(copy_never_waited)          \
  X(store_into_copy_in_flight)  \
  X(index_before_start)         \
  X(null_pointer)               \
  X(too_many_threads)           \
  X(too_much_shared_memory)     \
  X(too_much_static_memory)

#define FAL_BUG_ENUMERATOR(name) k_##name,
#define FAL_DEFINE_BUGS(list) enum Bug : int { list(FAL_BUG_ENUMERATOR) };

// Every launcher returns launch()'s error code. Matrices are bfloat16, row-major.
int run_attention(const void* q, const void* k, const void* v, void* out, float* lse, int heads,
                  int seqlen, bool causal, float scale, int bug);
// c (m, n) float32 = a (m, k) * b (k, n), or b (n, k)^T; sizes multiples of 64.
int run_gemm_sm80(const void* a, const void* b, float* c, int m, int n, int k);
int run_gemm_sm90(const void* a, const void* b, void* c, int m, int n, int k, bool b_transposed,
                  int bug);
int run_sum(const float* in, float* out, int n, int blocks);
int run_sum_last_block(const float* in, float* partial, unsigned* counter, float* out, int n,
                       int blocks, int bug);
int run_histogram(const int* in, int* out, int n, int bins, int bug);
int run_transpose(const float* in, float* out, int n, int pad);
int run_strided(const float* in, float* out, int stride);
int run_ping_pong(float* out, int rounds, int bug);
int run_warp_scan(const float* in, float* out, int bug);
int run_votes(const int* in, int* out);
// out: at least 4096 bytes; in: 256 floats. Does what the bug's name says.
int run_mistake(const float* in, float* out, int bug);
