// The emulator from outside: run a kernel, own or register device buffers, read reports and
// counters. Used by launch.h and by the test modules; kernels never include it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cuda_types.h"

namespace fal::simt {

struct Config {
  uint64_t seed = 0;    // 0: threads run in order; any other value is one random schedule
  int threads = 1;      // OS threads that run blocks
  bool check = true;    // races, uninitialised reads, copies in flight (bounds are always checked)
  bool account = true;  // sectors and bank conflicts per call site (traffic is always counted)
  bool async_late = true;  // copies land when waited for; false: at random moments before that
  int max_reports = 32;
  size_t max_smem_bytes = 227 * 1024;  // static + dynamic, per block; 163 KB on sm_80
  int multiprocessors = 108;           // that the device says it has: hosts size grids by it
};
void configure(const Config& config);
const Config& config();

// ---- what was found
// ------------------------------------------------------------------------------
struct Report {
  std::string kind;     // "race", "smem-out-of-bounds", ...: listed in docs/simt.md
  std::string message;  // what, where in memory, which block and thread, who else
  std::string where;    // file:line of the kernel's source, callers behind it; "?" if unknown
};
std::vector<Report> reports();  // one per (kind, place), in the order found

// ---- what was counted, since the last reset
// --------------------------------------------------------- Keys: global_load_bytes,
// global_store_bytes, global_load_sectors, global_load_sectors_ideal, global_store_sectors,
// global_store_sectors_ideal, global_atomics, mma_flops, ex2, collectives, barriers, switches,
// launches, and for x in {smem_load, smem_store, ldmatrix, stmatrix, cp_async_smem}: x_wavefronts,
// x_wavefronts_ideal.
std::map<std::string, uint64_t> counters();
struct Traffic {
  uint64_t read_bytes, written_bytes;
};
std::map<std::string, Traffic> traffic();  // by buffer name; buffers of one name are added up
struct Site {
  std::string where, kind;  // kind: ld.global, st.global, ld.shared, st.shared, cp.async, ...
  uint64_t requests, bytes;
  uint64_t units, ideal;  // 32-byte sectors (global) or wavefronts (shared), and the least possible
};
std::vector<Site> sites();
std::string summary();  // reports, traffic, counters and sites as readable text

// ---- device memory
// ----------------------------------------------------------------------------------- The
// emulator's own memory: NaN-filled, red zones around it. Kept until reset().
void* allocate(size_t bytes, const std::string& name);
// Memory that the caller owns (a tensor's data pointer). Kernels may read it, and write it if
// writable. Registering the same address again replaces the old entry; overlaps are an error.
void register_buffer(void* data, size_t bytes, const std::string& name, bool writable);
void unregister_buffer(void* data);
cudaError_t fill_device(void* data, int value, size_t bytes);

// Forgets reports and counters; reset() also frees and unregisters every buffer.
void clear_results();
void reset();

// run(call) is executed once per thread; `call` holds the kernel's parameters, in call_bytes bytes.
// Returns cudaSuccess, or cudaErrorLaunchFailure when a block had to be abandoned.
cudaError_t launch(void (*run)(void*), void* call, size_t call_bytes, dim3 grid, dim3 block,
                   size_t smem_bytes);

}  // namespace fal::simt
