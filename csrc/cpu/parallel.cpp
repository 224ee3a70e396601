#include "parallel.h"

#include <sched.h>
#include <stdlib.h>

#include <new>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fal::cpu {
namespace {

// Flushes denormals to zero on this thread for as long as it lives.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

struct ThreadScratch {
  char* memory = nullptr;
  size_t size = 0;

  ~ThreadScratch() { free(memory); }
  // Null when memory cannot be had.
  char* at_least(size_t bytes) {
    if (size < bytes || !memory) {
      free(memory);
      size = (bytes + 4096) / 4096 * 4096;
      memory = static_cast<char*>(aligned_alloc(64, size));
      if (!memory) size = 0;
    }
    return memory;
  }
};

thread_local ThreadScratch thread_scratch;

struct Job {
  int64_t items;
  size_t scratch_bytes;
  void (*item)(const void* arg, int64_t i, char* scratch);
  const void* arg;
  int64_t next;
};

void work(void* context, int) {
  Job* job = static_cast<Job*>(context);
  // Before an item is taken: an item that was handed out always finishes, so others may wait for
  // it.
  char* scratch = thread_scratch.at_least(job->scratch_bytes);
  if (!scratch) return;
  const FlushDenormals flush;
  for (;;) {
    const int64_t i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (i >= job->items) return;
    job->item(job->arg, i, scratch);
  }
}

// Below this, waking the pool costs more than it saves (a wake-up is some microseconds).
constexpr double kInlineFlops = 1e6;

}  // namespace

void run_items(const ThreadPool& pool, int64_t items, double flops, size_t scratch_bytes,
               void (*item)(const void* arg, int64_t i, char* scratch), const void* arg) {
  Job job{items, scratch_bytes, item, arg, 0};
  const int workers = pool.threads < items ? pool.threads : static_cast<int>(items);
  if (workers <= 1 || flops < kInlineFlops) {
    work(&job, 0);
  } else {
    pool.run(pool.ctx, workers, &work, &job);
  }
  if (job.next < items) throw std::bad_alloc();
}

void* allocate_shared(size_t bytes) {
  void* memory = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void free_shared(void* memory) { free(memory); }

void wait_for_turn(const int32_t* turn, int32_t value) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != value; ++spins) {
    if (spins > 64) sched_yield();
  }
}

void pass_turn(int32_t* turn, int32_t value) { __atomic_store_n(turn, value, __ATOMIC_RELEASE); }

}  // namespace fal::cpu
