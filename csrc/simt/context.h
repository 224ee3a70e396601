// Switching between fibers: each emulated thread has a stack of its own, and one OS thread hops
// from stack to stack. x86-64 saves the six callee-saved registers; elsewhere ucontext does it.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(FAL_SIMT_UCONTEXT)
#define FAL_SIMT_ASM_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace fal::simt {

struct Context {
#ifdef FAL_SIMT_ASM_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
};

// A stack with an unmapped page below it, so that an overflow faults instead of corrupting.
class Stack {
 public:
  Stack() = default;
  ~Stack();
  Stack(Stack&& other) noexcept;
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // `color` shifts the top: stacks with equal tops would fight for the same L1 cache sets.
  void reserve(int color);
  char* low() const { return low_; }
  char* high() const { return high_; }

 private:
  char* low_ = nullptr;
  char* high_ = nullptr;
};

// entry() starts on the stack at the first switch and must never return.
void prepare(Context& context, const Stack& stack, void (*entry)());
void switch_context(Context& from, Context& to);

}  // namespace fal::simt
