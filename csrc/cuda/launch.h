// The one way to start a kernel: it asks for large dynamic shared memory when needed, launches on
// the stream, checks for errors and returns the error code. Under the emulator the kernel runs
// before the call returns.
#pragma once

#include "device.cuh"
#ifdef FAL_SIMT
#include "../simt/host_api.h"
#endif

#include <tuple>

namespace fal::cuda {

// Dynamic shared memory that a kernel may use without asking for more.
inline constexpr size_t kDefaultDynamicSmem = 48 * 1024;

// kernel(args...) on `grid` x `block` threads with smem_bytes of dynamic shared memory. Arguments
// are converted to the kernel's parameter types here. An empty grid launches nothing.
template <class... Params, class... Args>
[[nodiscard]] inline cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block,
                                        size_t smem_bytes, cudaStream_t stream, Args... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument per kernel parameter");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  std::tuple<Params...> params(static_cast<Params>(args)...);
#ifdef FAL_SIMT
  (void)stream;
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } call{kernel, params};
  const auto run = [](void* data) {
    const Call* c = static_cast<const Call*>(data);
    std::apply(c->kernel, c->params);
  };
  return simt::launch(run, &call, sizeof(call), grid, block, smem_bytes);
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  if (smem_bytes > kDefaultDynamicSmem) {
    const cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem_bytes));
    if (error != cudaSuccess) return error;
  }
  return std::apply(
      [&](Params&... values) {
        void* addresses[] = {&values..., nullptr};
        return cudaLaunchKernel(function, grid, block, addresses, smem_bytes, stream);
      },
      params);
#endif
}

// Multiprocessors of the current device. Asked of the driver once, never of the device: nothing
// waits. At least 1.
[[nodiscard]] inline int multiprocessors() {
#ifdef FAL_SIMT
  return simt::config().multiprocessors;
#else
  constexpr int kCached = 64;
  static int cache[kCached];  // 0: not asked yet. Racing threads write the same value.
  int device = 0, count = 0;
  if (cudaGetDevice(&device) == cudaSuccess && device < kCached && cache[device] > 0) {
    return cache[device];
  }
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();  // a question that failed must not fail the next launch
    return 1;
  }
  if (device < kCached) cache[device] = count;
  return count;
#endif
}

// Sets `bytes` bytes of device memory to `value`, in stream order.
[[nodiscard]] inline cudaError_t fill_bytes(void* data, int value, size_t bytes,
                                            cudaStream_t stream) {
#ifdef FAL_SIMT
  (void)stream;
  return simt::fill_device(data, value, bytes);
#else
  return cudaMemsetAsync(data, value, bytes, stream);
#endif
}

}  // namespace fal::cuda
