// Fiber stacks and the switch between them; see context.h.
#include "context.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

#ifdef FAL_SIMT_ASM_SWITCH
// fal_simt_switch(save, to): push the callee-saved registers, store the stack pointer in *save,
// continue on the stack `to`.
asm(R"(
  .text
  .globl fal_simt_switch
  .hidden fal_simt_switch
  .type fal_simt_switch, @function
fal_simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size fal_simt_switch, . - fal_simt_switch
)");
extern "C" void fal_simt_switch(void** save, void* to);
#endif

namespace fal::simt {

namespace {
constexpr size_t kGuardBytes = 4096;
constexpr size_t kStackBytes = 256 * 1024;  // kernels hold their register tiles on it
}  // namespace

Stack::~Stack() {
  if (low_) munmap(low_, kGuardBytes + kStackBytes);
}

Stack::Stack(Stack&& other) noexcept
    : low_(std::exchange(other.low_, nullptr)), high_(std::exchange(other.high_, nullptr)) {}

void Stack::reserve(int color) {
  if (low_) return;
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::fputs("simt: no memory for a fiber's stack\n", stderr);
    std::abort();
  }
  low_ = static_cast<char*>(memory);
  mprotect(low_, kGuardBytes, PROT_NONE);
  high_ = low_ + kGuardBytes + kStackBytes - color * 448 % 4096 / 64 * 64;
}

#ifdef FAL_SIMT_ASM_SWITCH

void prepare(Context& context, const Stack& stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack.high());
  *--top = nullptr;  // keeps the stack 16-byte aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the six registers
  context.stack_pointer = top;
}

void switch_context(Context& from, Context& to) {
  fal_simt_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(Context& context, const Stack& stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack.low() + kGuardBytes;
  context.state.uc_stack.ss_size = stack.high() - stack.low() - kGuardBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

}  // namespace fal::simt
