// Every wrapper of ptx.cuh, and the shuffles and votes of CUDA that kernels use, once, on fixed
// inputs. One warp records; a second one is there for the named barrier. Inputs of the matrix
// instructions are small multiples of 2^-8 or less, so that sums are exact in any order and words
// can be compared.
#include "conformance.cuh"
#include "ptx.cuh"

namespace fal::cuda::conformance {

namespace {

constexpr Section kSections[] = {
    {"cp_async_16", 4, "exact"},
    {"cp_async_16_partial", 4, "exact"},
    {"cp_async_small", 3, "exact"},
    {"ldmatrix_x4", 4, "exact"},
    {"ldmatrix_x4_trans", 4, "exact"},
    {"ldmatrix_x2", 2, "exact"},
    {"ldmatrix_x2_trans", 2, "exact"},
    {"movmatrix_trans", 1, "exact"},
    {"mma_m16n8k16_bf16", 4, "exact"},
    {"mma_m16n8k16_f16", 4, "exact"},
    {"pack_bf16x2", 4, "exact"},
    {"pack_f16x2", 4, "exact"},
    {"fma_x2", 6, "exact"},
    {"ex2_edges", 4, "exact"},
    {"ex2", 2, "ulp 2"},
    {"tanh_approx", 2, "abs 0.001"},
    {"load_global", 3, "exact"},
    {"load_global_readonly", 3, "exact"},
    {"store_global", 7, "exact"},
    {"red_add_f32", 3, "exact"},
    {"shared_4_8_16", 7, "exact"},
    {"shuffles", 6, "exact"},
    {"votes", 6, "exact"},
    {"barrier_sync_arrive", 1, "exact"},
};
constexpr int kLanes = 32;
constexpr int kInputWords = 1024;
constexpr int kTileBytes = 2048;
constexpr int kSmemBytes = 2 * kTileBytes;

__device__ void record_copies(Recorder& record, const uint32_t* in, uint32_t tile, int lane) {
  for (int i = 0; i < 4; i++)
    ptx::cp_async_16(tile + (i * kLanes + lane) * 16, in + (i * kLanes + lane) * 4,
                     i != 3 || lane != 7);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 4; i++)
    record.put(ptx::load_shared<uint32_t>(tile + ((i * kLanes + lane) ^ 9) * 16 + lane % 4 * 4));

  const uint32_t other = tile + kTileBytes;
  ptx::cp_async_16_partial(other + lane * 16, in + lane * 4, lane % 17);
  ptx::cp_async_commit();
  ptx::cp_async_small<4>(other + 512 + lane * 4, in + 1023 - lane, lane % 5 != 0);
  ptx::cp_async_small<8>(other + 1024 + lane * 8, in + 2 * lane, lane % 3 != 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncwarp();
  for (int i = 0; i < 4; i++) record.put(ptx::load_shared<uint32_t>(other + i * 128 + lane * 4));
  ptx::cp_async_wait<0>();
  __syncwarp();
  record.put(ptx::load_shared<uint32_t>(other + 512 + (lane ^ 1) * 4));
  const uint2 pair = ptx::load_shared<uint2>(other + 1024 + (lane ^ 2) * 8);
  record.put(pair.x);
  record.put(pair.y);
}

__device__ void record_matrices(Recorder& record, const uint32_t* in, uint32_t tile, int lane) {
  uint32_t four[4], two[2];
  ptx::ldmatrix_x4(four, tile + lane * 16);
  record.put(four);
  ptx::ldmatrix_x4_trans(four, tile + (lane ^ 5) * 16);
  record.put(four);
  ptx::ldmatrix_x2(two, tile + 1024 + (lane ^ 3) % 16 * 16);
  record.put(two);
  ptx::ldmatrix_x2_trans(two, tile + 512 + lane % 16 * 16);
  record.put(two);
  record.put(ptx::movmatrix_trans(in[lane]));

  for (int kind = 0; kind < 2; kind++) {
    float x[12], d[4] = {1.0f * lane, 0.5f, -2.0f, 0.0f};
    for (int i = 0; i < 12; i++) x[i] = float(int(in[lane * 12 + i] % 128) - 64) / 32;
    uint32_t a[4], b[2];
    for (int i = 0; i < 6; i++) {
      const float lo = x[2 * i], hi = x[2 * i + 1];
      (i < 4 ? a[i % 4] : b[i % 2]) =
          kind == 0 ? ptx::pack_bf16x2(lo, hi) : ptx::pack_f16x2(lo, hi);
    }
    if (kind == 0)
      ptx::mma_m16n8k16_bf16(d, a, b[0], b[1]);
    else
      ptx::mma_m16n8k16_f16(d, a, b[0], b[1]);
    record.put(d);
  }
}

__device__ void record_arithmetic(Recorder& record, const uint32_t* in, int lane) {
  const float any = __uint_as_float(in[lane] << 3);  // any bits: NaN, infinities, denormals
  const float small = float(int(in[lane + 32] % 4096) - 2048) * 0.0123f;
  record.put(ptx::pack_bf16x2(any, small));
  record.put(ptx::pack_bf16x2(1.00390625f, CUDART_NAN_F));  // a tie; NaN
  record.put(ptx::pack_bf16x2(-0.0f, CUDART_INF_F));
  record.put(ptx::pack_bf16x2(1.01171875f, 3.4028235e38f));  // the other tie; rounds to infinity
  record.put(ptx::pack_f16x2(any, small));
  record.put(ptx::pack_f16x2(1.00048828125f, CUDART_NAN_F));
  record.put(ptx::pack_f16x2(-0.0f, 70000.0f));
  record.put(ptx::pack_f16x2(6.0e-8f * lane, 65519.0f));  // denormals; the last below infinity

  // Sums that float holds exactly, so that they are rounded once; infinity times 0; a denormal.
  float x[6];
  for (int i = 0; i < 6; i++) x[i] = float(int(in[lane * 6 + i] % 128) - 64) / 32;
  record.put(ptx::fma_f16x2(ptx::pack_f16x2(x[0], x[1]), ptx::pack_f16x2(x[2], x[3]),
                            ptx::pack_f16x2(x[4], x[5])));
  record.put(ptx::fma_bf16x2(ptx::pack_bf16x2(x[0], x[1]), ptx::pack_bf16x2(x[2], x[3]),
                             ptx::pack_bf16x2(x[4], x[5])));
  record.put(ptx::fma_f16x2(0x7c003c00u, 0u, ptx::pack_f16x2(x[0], x[1])));
  record.put(ptx::fma_bf16x2(0x7f803f80u, 0u, ptx::pack_bf16x2(x[0], x[1])));
  record.put(ptx::fma_f16x2(0x00018001u + lane * 8, 0x5c005c00u, 0x80008000u));
  record.put(ptx::fma_bf16x2(0x00018001u + lane * 8, 0x7b807b80u, 0x80008000u));

  record.put(ptx::ex2(-CUDART_INF_F));
  record.put(ptx::ex2(0.0f));
  record.put(ptx::ex2(128.0f + lane));   // infinity
  record.put(ptx::ex2(-127.0f - lane));  // flushed to zero
  record.put(ptx::ex2(float(lane - 16)));
  record.put(ptx::ex2(-0.37f * lane - 0.01f));
  record.put(ptx::tanh_approx(0.25f * (lane - 16)));
  record.put(ptx::tanh_approx(1e-3f * lane));
}

__device__ void record_memory(Recorder& record, const uint32_t* in, uint32_t tile, int lane) {
  const uint32_t one = ptx::load_global<uint32_t>(in + (lane ^ 3));
  const uint2 two = ptx::load_global<uint2>(in + 2 * (lane ^ 3));
  const uint4 four = ptx::load_global<uint4>(in + 4 * (lane ^ 3));
  record.put(one);
  record.put(two.x ^ two.y);
  record.put(four.x ^ four.y ^ four.z ^ four.w);
  const uint2 also_two = ptx::load_global_readonly<uint2>(in + 2 * lane);
  const uint4 also_four = ptx::load_global_readonly<uint4>(in + 4 * lane);
  record.put(ptx::load_global_readonly<uint32_t>(in + lane));
  record.put(also_two.x - also_two.y);
  record.put(also_four.x - also_four.y + also_four.z - also_four.w);

  uint32_t* rows = record.next - lane;  // the next rows, as memory
  ptx::store_global(rows + lane, one);
  ptx::store_global(rows + kLanes + 2 * lane, two);
  ptx::store_global(rows + 3 * kLanes + 4 * lane, four);
  record.next += 7 * kLanes;

  float* sums = reinterpret_cast<float*>(record.next - lane);
  for (int i = 0; i < 3; i++) sums[i * kLanes + lane] = 0.5f * i;
  __syncwarp();
  ptx::red_add_f32(sums + lane % 8, float(lane));
  ptx::red_add_f32x2(sums + kLanes + lane % 4 * 2, float(lane), 0.25f * lane);
  ptx::red_add_f32x4(sums + 2 * kLanes + lane % 2 * 4,
                     make_float4(float(lane), 1.0f, -1.0f, 0.125f * lane));
  record.next += 3 * kLanes;

  __syncwarp();
  ptx::store_shared(tile + 4 * lane, one);
  ptx::store_shared(tile + 128 + 8 * lane, two);
  ptx::store_shared(tile + 512 + 16 * lane, four);
  __syncwarp();
  const uint2 pair = ptx::load_shared<uint2>(tile + 128 + 8 * (lane ^ 5));
  const uint4 quad = ptx::load_shared<uint4>(tile + 512 + 16 * (lane ^ 5));
  record.put(ptx::load_shared<uint32_t>(tile + 4 * (lane ^ 5)));
  record.put(pair.x);
  record.put(pair.y);
  record.put(quad.x);
  record.put(quad.y);
  record.put(quad.z);
  record.put(quad.w);
}

__device__ void record_warp_functions(Recorder& record, const uint32_t* in, int lane) {
  const uint32_t x = in[lane];
  record.put(__shfl_sync(~0u, x, lane + 9));
  record.put(__shfl_sync(~0u, x, 5, 8));
  record.put(__shfl_xor_sync(~0u, x, 5));
  record.put(__shfl_xor_sync(~0u, x, 12, 8));
  record.put(__shfl_down_sync(~0u, x, 3, 16));
  record.put(__shfl_up_sync(~0u, x, 7));
  record.put(__ballot_sync(~0u, x % 3 == 1));
  record.put(uint32_t(__any_sync(~0u, x == in[13])));
  record.put(uint32_t(__any_sync(~0u, lane == 32)));
  record.put(uint32_t(__all_sync(~0u, lane < 32)));
  record.put(uint32_t(__all_sync(~0u, lane != 13)));
  record.put(lane % 2 ? __ballot_sync(0xaaaaaaaau, x % 2) : 0u);
}

// in: kInputWords; out: the rows of kSections.
__global__ void __launch_bounds__(2 * kLanes) run_wrappers(const uint32_t* in, uint32_t* out) {
  FAL_DYNAMIC_SMEM(smem);
  const uint32_t tile = ptx::smem_address(smem);
  using Message = uint32_t[kLanes];
  FAL_SHARED(Message, message);
  const int lane = threadIdx.x % kLanes;
  if (threadIdx.x >= kLanes) {
    message[lane] = in[lane] + 1;
    ptx::barrier_arrive(1, 2 * kLanes);
    return;
  }
  Recorder record{out + lane, kLanes};
  record_copies(record, in, tile, lane);
  record_matrices(record, in, tile, lane);
  record_arithmetic(record, in, lane);
  record_memory(record, in, tile, lane);
  record_warp_functions(record, in, lane);
  ptx::barrier_sync(1, 2 * kLanes);
  record.put(message[lane ^ 31]);
}

}  // namespace

}  // namespace fal::cuda::conformance

using namespace fal::cuda::conformance;

const char* fal_cuda_conformance_sections() {
  static const std::string text = describe(kSections, kLanes);
  return text.c_str();
}

int32_t fal_cuda_conformance(uint32_t* words, int32_t capacity) {
  const int total = total_words(kSections, kLanes);
  if (capacity < total) return -int32_t(cudaErrorInvalidValue);
  std::vector<uint32_t> input(kInputWords), output(total, kUnset);
  uint32_t x = 1;
  for (uint32_t& word : input) word = (x = x * 1664525u + 1013904223u) >> 3;
  const DeviceArray in(input.data(), input.size() * 4, "in");
  const DeviceArray out(output.data(), output.size() * 4, "out");
  cudaError_t error = in.error() != cudaSuccess ? in.error() : out.error();
  if (error == cudaSuccess)
    error = fal::cuda::launch(run_wrappers, dim3(1), dim3(2 * kLanes), kSmemBytes, nullptr,
                              in.as<const uint32_t>(), out.as<uint32_t>());
  if (error == cudaSuccess) error = out.read(words);
  return error == cudaSuccess ? total : -int32_t(error);
}
