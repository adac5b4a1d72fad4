#include "cuda/emulate/fiber.h"

#include <cstdint>

#if defined(__x86_64__) || defined(__aarch64__)

#ifdef __APPLE__
#define LIMBECK_SYMBOL "_limbeck_switch_stack"
#else
#define LIMBECK_SYMBOL "limbeck_switch_stack"
#endif

extern "C" __attribute__((visibility("hidden"))) void limbeck_switch_stack(void** from, void* to);

// Saves what a called function must keep, changes the stack, and returns to where the other one stopped.
#ifdef __x86_64__
__asm__(
    ".text\n.globl " LIMBECK_SYMBOL "\n" LIMBECK_SYMBOL
    ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
#else
__asm__(
    ".text\n.globl " LIMBECK_SYMBOL "\n.p2align 2\n" LIMBECK_SYMBOL
    ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x2, sp\n  str x2, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#endif

namespace limbeck::cuda::emulate {

void make_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
#ifdef __x86_64__
  *--top = 0;  // where entry would return to; it also aligns the stack as a call does
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
#else
  for (int i = 0; i < 20; ++i) *--top = 0;
  top[11] = reinterpret_cast<uintptr_t>(entry);  // x30
#endif
  fiber.stopped = top;
}

void switch_fiber(Fiber& from, const Fiber& to) { limbeck_switch_stack(&from.stopped, to.stopped); }

}  // namespace limbeck::cuda::emulate

#else
#include <ucontext.h>

namespace limbeck::cuda::emulate {

// `stopped` is a context on the heap, made once for each fiber and kept.
static ucontext_t* context_of(Fiber& fiber) {
  if (!fiber.stopped) fiber.stopped = new ucontext_t;
  return static_cast<ucontext_t*>(fiber.stopped);
}

void make_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  ucontext_t* context = context_of(fiber);
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

void switch_fiber(Fiber& from, const Fiber& to) { swapcontext(context_of(from), static_cast<ucontext_t*>(to.stopped)); }

}  // namespace limbeck::cuda::emulate
#endif
