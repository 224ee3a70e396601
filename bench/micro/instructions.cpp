// Cycles of the instructions that the inner loops of csrc/cpu are made of, and of its exponentials,
// with their errors. bench/micro.py compiles it for the processor that it runs on.
#define FAL_CPU_ISA micro
#include <math.h>
#include <stdio.h>

#if !defined(__AVX2__)
#error "written for processors with AVX2"
#elif defined(__AVX512BF16__)
#include "csrc/cpu/amx.h"
#endif
#include "clock.h"

namespace fal::cpu::micro {

constexpr int kRepeats = 20000;
constexpr int kIndependent = 12;  // registers: enough for a latency of 6 at two a cycle

void report(const char* name, double throughput) { printf("%-34s %9.2f\n", name, throughput); }
void report(const char* name, double throughput, double latency) {
  printf("%-34s %9.2f %9.1f\n", name, throughput, latency);
}

// Cycles of instruction(x, zero), which reads and writes x, on kCount registers in turn.
template <int kCount, class Instruction>
double cycles_of(const Instruction& instruction) {
  const double all = cycles([&] {
    Float x[kCount], zero = set1(0.f);
    for (Float& each : x) each = set1(1.f);
    for (int i = 0; i < kRepeats; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kCount; ++j) instruction(x[j], zero);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) asm volatile("" ::"v"(x[j]));
  });
  return all / (kRepeats * kCount);
}
template <class Instruction>
void measure(const char* name, const Instruction& instruction) {
  report(name, cycles_of<kIndependent>(instruction), cycles_of<1>(instruction));
}

void measure_vectors() {
  measure("vfmadd231ps", [](Float& x, Float zero) {
    asm volatile("vfmadd231ps %1, %1, %0" : "+v"(x) : "v"(zero));
  });
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  measure("vscalefps", [](Float& x, Float zero) {
    asm volatile("vscalefps %1, %0, %0" : "+v"(x) : "v"(zero));
  });
  measure("vreduceps", [](Float& x, Float) { asm volatile("vreduceps $9, %0, %0" : "+v"(x)); });
#endif
#if defined(__AVX512BF16__)
  measure("vdpbf16ps", [](Float& x, Float zero) {
    asm volatile("vdpbf16ps %1, %1, %0" : "+v"(x) : "v"(zero));
  });
  measure("vcvtne2ps2bf16", [](Float& x, Float) {
    asm volatile("vcvtne2ps2bf16 %0, %0, %0" : "+v"(x));
  });
#endif
}

// The largest relative error where P = exp2(S - max) is not 0: from 0 down, in every binade.
template <class Exp2>
double largest_error(const Exp2& exp2) {
  constexpr int kPoints = 1 << 22;
  double largest = 0;
  for (int i = 0; i < kPoints; i += kLanes) {
    float x[kLanes], y[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const double share = (i + lane) / static_cast<double>(kPoints);
      x[lane] = static_cast<float>(-126 * share * share * share * share);
    }
    store(y, exp2(load(x)));
    for (int lane = 0; lane < kLanes; ++lane) {
      const double truth = ::exp2(static_cast<double>(x[lane]));
      largest = std::max(largest, fabs(y[lane] - truth) / truth);
    }
  }
  return largest;
}

template <class Exp2>
FAL_NOINLINE void exp2_of(const float* x, float* y, int values, const Exp2& exp2) {
  for (int at = 0; at < values; at += kLanes) store(y + at, exp2(load(x + at)));
}

// A vector of them, loaded from L1 and stored there, as the softmax does.
template <class Exp2>
void measure_exp2(const char* name, const Exp2& exp2) {
  constexpr int kValues = 64 * kLanes;
  alignas(64) float x[kValues] = {}, y[kValues];
  const double all = cycles([&] {
    for (int i = 0; i < kRepeats / 64; ++i) {
      exp2_of(x, y, kValues, exp2);
      asm volatile("" ::"r"(y) : "memory");
    }
  });
  char text[64];
  snprintf(text, sizeof text, "%s, error %.1e", name, largest_error(exp2));
  report(text, all / (kRepeats / 64 * 64));
}

#if defined(__AMX_BF16__)
constexpr int kTileRepeats = 4000;

template <class Step>
double tile_cycles(const Step& step) {
  return cycles([&] {
           TileSession session;
           clear_block();
           for (int i = 0; i < kTileRepeats; ++i) step(i);
         }) /
         kTileRepeats;
}

void measure_tiles() {
  if (!request_amx()) return;
  constexpr int kMemory = 64 << 20;
  auto* memory = static_cast<char*>(aligned_alloc(4096, kMemory));
  memset(memory, 0, kMemory);
  const double four = tile_cycles([](int) {
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  });
  report("tdpbf16ps", four / 4, tile_cycles([](int) { tile_multiply<0, 4, 6>(); }));
  // A and B of one step: 4 KiB.
  report("  with four loads from L1 for four", tile_cycles([&](int) {
                                                 multiply_block(memory, memory + 1024, 64,
                                                                memory + 2048, memory + 3072, 64);
                                               }) / 4);
  for (const int size : {16 << 10, 1 << 20, 16 << 20}) {
    char name[64];
    snprintf(name, sizeof name, "tileloadd, of %d KiB", size >> 10);
    report(name, tile_cycles([&](int i) { tile_load<4>(memory + i * kTileBytes % size, 64); }));
  }
  report("tilestored, of 16 KiB",
         tile_cycles([&](int i) { tile_store<0>(memory + i * kTileBytes % (16 << 10), 64); }));
  free(memory);
}
#endif

void measure_all() {
  printf("%d-bit vectors, %.2f GHz\n", kLanes * 32, 1e-9 / seconds_of_a_cycle());
  printf("%-34s %9s %9s\n", "", "cycles", "latency");
  measure_vectors();
  measure_exp2("exp2", [](Float x) { return exp2(x); });
#if defined(__AVX512BF16__)
  measure_exp2("exp2_by_scalef", [](Float x) { return exp2_by_scalef(x); });
#endif
#if defined(__AMX_BF16__)
  measure_tiles();
#endif
}

}  // namespace fal::cpu::micro

int main() { fal::cpu::micro::measure_all(); }
