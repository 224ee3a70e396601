// The wrappers of ptx_sm90.cuh once, on fixed inputs, by one warpgroup: matrix stores, TMA loads
// and stores with and beyond the tensor's edges, mbarriers, and wgmma with operands in both layouts
// and in registers. Matrix elements are small integers, so that sums are exact in any order.
#include "conformance.cuh"
#include "ptx_sm90.cuh"
#ifndef FAL_SIMT
#include <cudaTypedefs.h>
#endif

namespace fal::cuda::conformance {

namespace {

constexpr Section kSections[] = {
    {"stmatrix_x4", 4, "exact"},
    {"stmatrix_x4_trans", 4, "exact"},
    {"tma_load_2d_edge", 16, "exact"},
    {"tma_load_4d", 16, "exact"},
    {"wgmma_m64n64k16_ss_bf16", 32, "exact"},
    {"wgmma_m64n64k16_ss_bf16_transposed_b", 32, "exact"},
    {"wgmma_m64n64k16_ss_bf16_transposed_a", 32, "exact"},
    {"wgmma_m64n64k16_rs_bf16", 32, "exact"},
    {"wgmma_m64n128k16_ss_bf16", 64, "exact"},
    {"wgmma_m64n128k16_rs_bf16_transposed_b", 64, "exact"},
    {"wgmma_m64n64k16_ss_f16", 32, "exact"},
    {"wgmma_m64n64k16_rs_f16", 32, "exact"},
    {"wgmma_m64n128k16_ss_f16", 64, "exact"},
    {"wgmma_m64n128k16_rs_f16", 64, "exact"},
};
constexpr int kThreads = 128;
constexpr int kRows = 128, kColumns = 64;  // of the 16-bit input matrices
constexpr int kTileBytes = 64 * 64 * 2;
constexpr int kMatrixBytes = kRows * kColumns * 2;
constexpr int kSmemBytes = 2 * kMatrixBytes + 2 * kTileBytes;

struct Maps {
  ptx::TensorMap bf16, f16;    // the inputs (kRows, kColumns), boxes of 64 x 64
  ptx::TensorMap four;         // bf16 as (4, 2, 16, 64), box (2, 2, 16, 64)
  ptx::TensorMap stored;       // (64, 64), written by TMA stores
  ptx::TensorMap stored_four;  // the second half of the same buffer as (2, 2, 16, 64)
};

struct Tiles {
  uint32_t bf16, f16, scratch, spare;  // shared addresses
  uint32_t barrier;
  uint32_t phase = 0;
};

__device__ void wait_for_tiles(Tiles& tiles, int thread, uint32_t bytes) {
  if (thread == 0) ptx::mbarrier_arrive_expect_tx(tiles.barrier, bytes);
  if (thread == 32) ptx::mbarrier_arrive(tiles.barrier);
  ptx::mbarrier_wait(tiles.barrier, tiles.phase);
  tiles.phase ^= 1;
}

__device__ void record_stmatrix(Recorder& record, const uint32_t* in, uint32_t tile, int thread) {
  const int lane = thread % 32;
  const uint32_t mine = tile + thread / 32 * 512;
  uint32_t r[4];
  for (int i = 0; i < 4; i++) r[i] = in[thread * 4 + i];
  ptx::stmatrix_x4(mine + (lane ^ 3) * 16, r);
  __syncwarp();
  for (int i = 0; i < 4; i++) record.put(ptx::load_shared<uint32_t>(mine + i * 128 + lane * 4));
  __syncwarp();
  ptx::stmatrix_x4_trans(mine + lane * 16, r);
  __syncwarp();
  for (int i = 0; i < 4; i++) record.put(ptx::load_shared<uint32_t>(mine + i * 128 + lane * 4));
  __syncthreads();
}

__device__ void record_tile(Recorder& record, uint32_t tile, int thread) {
  for (int i = 0; i < 16; i++)
    record.put(ptx::load_shared<uint32_t>(tile + (i * kThreads + thread) * 4));
  __syncthreads();
}

__device__ uint64_t k_major(uint32_t tile, int kk) {
  return ptx::wgmma_descriptor(tile + kk * 32, 16, 1024, ptx::MatrixSwizzle::k128B);
}
__device__ uint64_t mn_major(uint32_t tile, int kk) {
  return ptx::wgmma_descriptor(tile + kk * 2048, kTileBytes, 1024, ptx::MatrixSwizzle::k128B);
}

// Runs multiply(d, kk) for the four steps of 16 of a 64-deep product and records the sums. The
// first step overwrites the accumulators, which hold 1.
template <int kFloats, class Multiply>
__device__ void record_product(Recorder& record, Multiply multiply) {
  float d[kFloats];
  for (float& x : d) x = 1.0f;
  ptx::wgmma_fence();
  for (int kk = 0; kk < 4; kk++) multiply(d, kk);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  record.put(d);
}

__device__ void load_fragment(uint32_t (&a)[4], const uint32_t* in, int thread, int kk) {
  // As mma's operand a: rows of 32 words, this warp's 16 rows.
  const int row = thread / 32 * 16 + thread % 32 / 4, word = kk * 8 + thread % 4;
  for (int i = 0; i < 4; i++) a[i] = in[(row + i % 2 * 8) * 32 + word + i / 2 * 4];
}

__global__ void __launch_bounds__(kThreads, 1)
    run_wrappers(const __grid_constant__ Maps maps, const uint32_t* in_bf16, const uint32_t* in_f16,
                 uint32_t* out) {
  FAL_DYNAMIC_SMEM(smem);
  FAL_SHARED(uint64_t, barrier);
  const int thread = threadIdx.x;
  Tiles tiles;
  tiles.bf16 = ptx::smem_address(smem);
  tiles.f16 = tiles.bf16 + kMatrixBytes;
  tiles.scratch = tiles.f16 + kMatrixBytes;
  tiles.spare = tiles.scratch + kTileBytes;
  tiles.barrier = ptx::smem_address(&barrier);
  Recorder record{out + thread, kThreads};
  if (thread == 0) {
    ptx::mbarrier_init(tiles.barrier, 2);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  record_stmatrix(record, in_bf16, tiles.spare, thread);

  if (thread == 0) {
    for (int half = 0; half < 2; half++) {
      ptx::tma_load_2d(tiles.bf16 + half * kTileBytes, &maps.bf16, tiles.barrier, 0, half * 64);
      ptx::tma_load_2d(tiles.f16 + half * kTileBytes, &maps.f16, tiles.barrier, 0, half * 64);
    }
    // Rows beyond 128 and columns before 0 read as zeros.
    ptx::tma_load_2d(tiles.scratch, &maps.bf16, tiles.barrier, -8, 100);
  }
  wait_for_tiles(tiles, thread, 2 * kMatrixBytes + kTileBytes);
  record_tile(record, tiles.scratch, thread);
  if (thread == 0) {
    ptx::fence_proxy_async();
    ptx::tma_load_4d(tiles.scratch, &maps.four, tiles.barrier, 0, 0, 0, 1);
  }
  wait_for_tiles(tiles, thread, kTileBytes);
  record_tile(record, tiles.scratch, thread);

  // Stores: what has just been loaded goes out, cut off at the tensor's edge.
  if (thread == 0) {
    ptx::tma_store_2d(&maps.stored, tiles.scratch, 0, 24);
    ptx::tma_store_4d(&maps.stored_four, tiles.scratch, 0, 0, 0, 0);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }

  const uint32_t b = tiles.bf16, f = tiles.f16;
  record_product<32>(record, [&](float (&d)[32], int kk) {
    ptx::wgmma_m64n64k16_ss_bf16<0, 0>(d, k_major(b, kk), k_major(b + kTileBytes, kk), kk > 0);
  });
  record_product<32>(record, [&](float (&d)[32], int kk) {
    ptx::wgmma_m64n64k16_ss_bf16<0, 1>(d, k_major(b, kk), mn_major(b + kTileBytes, kk), kk > 0);
  });
  record_product<32>(record, [&](float (&d)[32], int kk) {
    ptx::wgmma_m64n64k16_ss_bf16<1, 0>(d, mn_major(b, kk), k_major(b + kTileBytes, kk), kk > 0);
  });
  uint32_t a_bf16[4][4], a_f16[4][4];
  for (int kk = 0; kk < 4; kk++) {
    load_fragment(a_bf16[kk], in_bf16, thread, kk);
    load_fragment(a_f16[kk], in_f16, thread, kk);
  }
  record_product<32>(record, [&](float (&d)[32], int kk) {
    ptx::wgmma_m64n64k16_rs_bf16<0>(d, a_bf16[kk], k_major(b + kTileBytes, kk), kk > 0);
  });
  record_product<64>(record, [&](float (&d)[64], int kk) {
    ptx::wgmma_m64n128k16_ss_bf16<0, 0>(d, k_major(b, kk), k_major(b, kk), kk > 0);
  });
  record_product<64>(record, [&](float (&d)[64], int kk) {
    ptx::wgmma_m64n128k16_rs_bf16<1>(d, a_bf16[kk], mn_major(b, kk), kk > 0);
  });
  record_product<32>(record, [&](float (&d)[32], int kk) {
    ptx::wgmma_m64n64k16_ss_f16<0, 0>(d, k_major(f, kk), k_major(f + kTileBytes, kk), kk > 0);
  });
  record_product<32>(record, [&](float (&d)[32], int kk) {
    ptx::wgmma_m64n64k16_rs_f16<1>(d, a_f16[kk], mn_major(f + kTileBytes, kk), kk > 0);
  });
  record_product<64>(record, [&](float (&d)[64], int kk) {
    ptx::wgmma_m64n128k16_ss_f16<0, 1>(d, k_major(f, kk), mn_major(f, kk), kk > 0);
  });
  record_product<64>(record, [&](float (&d)[64], int kk) {
    ptx::wgmma_m64n128k16_rs_f16<0>(d, a_f16[kk], k_major(f, kk), kk > 0);
  });
}

// A 16-bit tensor of `rank` dimensions, innermost first, dense; 128-byte swizzle.
ptx::TensorMap tensor_map(void* data, int rank, const uint32_t* dims, const uint32_t* box) {
#ifdef FAL_SIMT
  ptx::TensorMap map{};
  map.base = reinterpret_cast<uint64_t>(data);
  map.element_bytes = 2;
  map.rank = rank;
  for (int d = 0; d < rank; d++) {
    map.dim[d] = dims[d];
    map.stride[d] = d == 0 ? 2 : map.stride[d - 1] * dims[d - 1];
    map.box[d] = box[d];
  }
  map.swizzle = simt::Swizzle::k128B;
  return map;
#else
  CUtensorMap map{};
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                   &found);
  if (!function) return map;
  cuuint64_t sizes[4], strides[4];
  cuuint32_t boxes[4], steps[4];
  for (int d = 0; d < rank; d++) {
    sizes[d] = dims[d];
    strides[d] = d == 0 ? 2 : strides[d - 1] * dims[d - 1];
    boxes[d] = box[d];
    steps[d] = 1;
  }
  reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, data, sizes, strides + 1, boxes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
#endif
}

constexpr int kStoredWords = 2 * kTileBytes / 4;

}  // namespace

}  // namespace fal::cuda::conformance

using namespace fal::cuda::conformance;

const char* fal_cuda_conformance_sm90_sections() {
  static const std::string text =
      describe(kSections, kThreads) + "tma_store " + std::to_string(kStoredWords) + " exact\n";
  return text.c_str();
}

int32_t fal_cuda_conformance_sm90(uint32_t* words, int32_t capacity) {
  using fal::ptx::TensorMap;
  const int total = total_words(kSections, kThreads);
  if (capacity < total + kStoredWords) return -int32_t(cudaErrorInvalidValue);
  std::vector<uint16_t> bf16(kRows * kColumns), f16(kRows * kColumns);
  constexpr uint16_t kBf16[] = {0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040};  // -2 -1 0 1 2 3
  constexpr uint16_t kF16[] = {0xc000, 0xbc00, 0x0000, 0x3c00, 0x4000, 0x4200};
  uint32_t x = 7;
  for (size_t i = 0; i < bf16.size(); i++) {
    x = x * 1664525u + 1013904223u;
    bf16[i] = kBf16[(x >> 16) % 6];
    f16[i] = kF16[(x >> 10) % 6];
  }
  const std::vector<uint32_t> unset(total, kUnset), blank(kStoredWords, 0);
  const DeviceArray in_bf16(bf16.data(), kMatrixBytes, "in_bf16");
  const DeviceArray in_f16(f16.data(), kMatrixBytes, "in_f16");
  const DeviceArray out(unset.data(), unset.size() * 4, "out");
  const DeviceArray stored(blank.data(), blank.size() * 4, "stored");
  for (const DeviceArray* array : {&in_bf16, &in_f16, &out, &stored})
    if (array->error() != cudaSuccess) return -int32_t(array->error());

  const uint32_t dims[] = {kColumns, kRows}, box[] = {64, 64}, stored_dims[] = {64, 64};
  const uint32_t dims4[] = {64, 16, 2, 4}, box4[] = {64, 16, 2, 2}, stored_dims4[] = {64, 16, 2, 2};
  Maps maps;
  maps.bf16 = tensor_map(in_bf16.as<void>(), 2, dims, box);
  maps.f16 = tensor_map(in_f16.as<void>(), 2, dims, box);
  maps.four = tensor_map(in_bf16.as<void>(), 4, dims4, box4);
  maps.stored = tensor_map(stored.as<void>(), 2, stored_dims, box);
  maps.stored_four = tensor_map(stored.as<char>() + kTileBytes, 4, stored_dims4, box4);
  cudaError_t error = fal::cuda::launch(run_wrappers, dim3(1), dim3(kThreads), kSmemBytes, nullptr,
                                        maps, in_bf16.as<const uint32_t>(),
                                        in_f16.as<const uint32_t>(), out.as<uint32_t>());
  if (error == cudaSuccess) error = out.read(words);
  if (error == cudaSuccess) error = stored.read(words + total);
  return error == cudaSuccess ? total + kStoredWords : -int32_t(error);
}
