// Contexts that hand the processor to each other: a stack and the place where it stopped.
#pragma once
#include <cstddef>

namespace limbeck::cuda::emulate {

struct Fiber {
  void* stopped = nullptr;  // the stack pointer, below the saved registers
};

// The stack's upper end and the function that runs on it; it must never return.
void make_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)());
void switch_fiber(Fiber& from, const Fiber& to);

}  // namespace limbeck::cuda::emulate
