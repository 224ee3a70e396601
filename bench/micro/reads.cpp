// How fast one thread reads: from each level of the memory, and a KV cache in two orders.
// bench/micro.py compiles it for the processor that it runs on.
#define FAL_CPU_ISA micro
#include <stdio.h>
#include <stdlib.h>

#include <numeric>
#include <random>
#include <vector>

#include "clock.h"

namespace fal::cpu::micro {

constexpr int64_t kMemory = 128 << 20;
constexpr int kHeads = 8, kPart = 512;  // of a key; keys of a part
constexpr int kVector = sizeof(Float);

FAL_INLINE Float load_bytes(const char* p) {
  Float x;
  memcpy(&x, p, sizeof x);
  return x;
}
volatile float sink;
FAL_INLINE void keep_sum(Float (&sums)[8]) {
  for (int j = 1; j < 8; ++j) sums[0] += sums[j];
  sink = sum(sums[0]);
}

FAL_NOINLINE void read_linear(const char* memory, int64_t size) {
  Float sums[8] = {};
  for (int64_t at = 0; at < size; at += 8 * kVector) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] += load_bytes(memory + at + j * kVector);
  }
  keep_sum(sums);
}

// A row, and, where `ahead` is not 0, a prefetch of the row that many bytes later.
template <int kRow>
FAL_INLINE void read_row(const char* row, int64_t ahead, Float (&sums)[8]) {
  if (ahead != 0) {
    for (int at = 0; at < kRow; at += 64) __builtin_prefetch(row + ahead + at, 0, 3);
  }
#pragma GCC unroll 16
  for (int at = 0; at < kRow; at += kVector) sums[at / kVector % 8] += load_bytes(row + at);
}

// All heads of a key, then the next key: what lies one after the other.
template <int kRow>
FAL_NOINLINE void read_by_key(const char* memory) {
  Float sums[8] = {};
  for (int64_t at = 0; at < kMemory; at += kRow) read_row<kRow>(memory + at, 0, sums);
  keep_sum(sums);
}

// A head's rows of a part of the keys, then the next head's; rows so many keys ahead are
// prefetched.
template <int kRow>
FAL_NOINLINE void read_by_head(const char* memory, int keys_ahead) {
  constexpr int64_t kKey = kHeads * kRow;
  Float sums[8] = {};
  for (int64_t part = 0; part < kMemory; part += kPart * kKey) {
    for (int head = 0; head < kHeads; ++head) {
      const char* rows = memory + part + head * kRow;
      for (int key = 0; key < kPart; ++key) {
        read_row<kRow>(rows + key * kKey, keys_ahead * kKey, sums);
      }
    }
  }
  keep_sum(sums);
}

// K and V, the two halves of the memory, a piece of each in turns, in the order that is given, by
// loads of a Part. Where kPagesAhead, the next piece's memory pages are asked for: a line of each.
using HalfLine = float __attribute__((vector_size(32)));
template <class Part, bool kPagesAhead>
FAL_NOINLINE void read_in_turns(const char* memory, const std::vector<int64_t>& pieces) {
  const int64_t bytes = kMemory / 2 / static_cast<int64_t>(pieces.size());
  Part sums[4] = {};
  for (size_t piece = 0; piece < pieces.size(); ++piece) {
    const int64_t next = pieces[std::min(piece + 1, pieces.size() - 1)];
    for (const char* half : {memory, memory + kMemory / 2}) {
      if constexpr (kPagesAhead) {
        for (int64_t at = 0; at < bytes; at += 4096) {
          __builtin_prefetch(half + next * bytes + at, 0, 2);
        }
      }
      const char* from = half + pieces[piece] * bytes;
      for (int64_t i = 0; i < bytes; i += sizeof sums) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Part x;
          memcpy(&x, from + i + j * sizeof x, sizeof x);
          sums[j] += x;
        }
      }
    }
  }
  sums[0] += sums[1] + (sums[2] + sums[3]);
  sink = sums[0][0];
}

// The best of the samples, in GB/s: a ceiling is what the machine reaches.
template <class Run>
double rate(int64_t bytes, const Run& run) {
  double best = 1e9;
  for (int i = 0; i < kSamples; ++i) best = std::min(best, seconds(run));
  return 1e-9 * bytes / best;
}

template <int kRow>
void measure_orders(const char* memory) {
  printf("%-34d %9.1f %9.1f %9.1f %9.1f\n", kRow, rate(kMemory, [=] { read_by_key<kRow>(memory); }),
         rate(kMemory, [=] { read_by_head<kRow>(memory, 0); }),
         rate(kMemory, [=] { read_by_head<kRow>(memory, 16); }),
         rate(kMemory, [=] { read_by_head<kRow>(memory, 64); }));
}

void measure_all() {
  // Prefetches run past the end, where nothing needs to be.
  auto* memory = static_cast<char*>(aligned_alloc(4096, kMemory));
  memset(memory, 0, kMemory);
  printf("%-34s %9s %9s\n", "linear read, KiB", "GB/s", "B/cycle");
  for (const int64_t size : {int64_t{16} << 10, int64_t{256} << 10, int64_t{8} << 20, kMemory}) {
    const int64_t passes = std::max<int64_t>(1, (16 << 20) / size);
    const auto run = [=] {
      for (int64_t i = 0; i < passes; ++i) read_linear(memory, size);
    };
    const double speed = rate(passes * size, run);
    printf("%-34ld %9.1f %9.1f\n", static_cast<long>(size >> 10), speed,
           passes * size / cycles(run));
  }
  printf("\n%-34s %9s %9s %9s %9s\n", "8 heads, GB/s; bytes a row", "by key", "by head", "16 ahead",
         "64 ahead");
  measure_orders<512>(memory);
  measure_orders<256>(memory);
  measure_orders<128>(memory);
  printf("\n%-34s %9s %9s %9s %9s\n", "K and V in turns, GB/s; KiB each", "a vector", "32 a load",
         "ahead", "random");
  std::mt19937 random(1);
  for (const int64_t bytes : {int64_t{4} << 10, int64_t{16} << 10, int64_t{32} << 10,
                              int64_t{64} << 10, int64_t{256} << 10}) {
    std::vector<int64_t> pieces(kMemory / 2 / bytes);
    std::iota(pieces.begin(), pieces.end(), 0);
    const double vectors = rate(kMemory, [&] { read_in_turns<Float, false>(memory, pieces); });
    const double halves = rate(kMemory, [&] { read_in_turns<HalfLine, false>(memory, pieces); });
    const double ahead = rate(kMemory, [&] { read_in_turns<HalfLine, true>(memory, pieces); });
    std::shuffle(pieces.begin(), pieces.end(), random);
    const double shuffled = rate(kMemory, [&] { read_in_turns<HalfLine, true>(memory, pieces); });
    printf("%-34ld %9.1f %9.1f %9.1f %9.1f\n", static_cast<long>(bytes >> 10), vectors, halves,
           ahead, shuffled);
  }
  free(memory);
}

}  // namespace fal::cpu::micro

int main() { fal::cpu::micro::measure_all(); }
