// What kernels and launch.h see of the executor: a grid's blocks run in turn (blocks of a cluster together), a block's threads as
// fibers that switch where they wait. Anything that a GPU would not forgive ends the launch as an Error of kind device.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/emulate/vectors.h"

namespace limbeck {
struct Call;
}

namespace limbeck::cuda::emulate {

// Constant for a thread, so that the compiler may keep them over calls that switch to other threads.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_size();
__attribute__((const)) uint3 grid_size();

// Runs body(context) once for each thread. Global memory is what the call's views and its workspace cover, and what was allowed.
void run(const Call& call, dim3 blocks, dim3 threads, size_t shared, int cluster, void (*body)(const void*), const void* context);
template <class Body>
void run(const Call& call, dim3 blocks, dim3 threads, size_t shared, int cluster, const Body& body) {
  run(call, blocks, threads, shared, cluster, [](const void* b) { (*static_cast<const Body*>(b))(); }, &body);
}

// More memory that kernels may touch, beside the tensors of their calls.
void allow(const void* data, size_t bytes, const char* name);
void forbid(const void* data);

// One thread's place in the cuts of its block's shared memory.
struct SharedCuts {
  size_t used = 0;
};
void* take_shared(SharedCuts& cuts, size_t bytes, size_t align);

// Barriers of a block: `threads` of them must come; arriving does not wait.
void barrier_sync(const char* name, int id, int threads);
void barrier_arrive(int id, int threads);
int block_threads();
int barrier_reduce(const char* name, int value, int kind);  // __syncthreads_count, _and, _or

// Collectives of a warp. Every lane of the mask must come, with the same mask.
enum class Shuffle { index, up, down, exclusive_or };
uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t bits, int operand, int width);
uint32_t ballot(const char* name, uint32_t mask, uint32_t value);
uint32_t match_any(uint32_t mask, uint32_t low, uint32_t high);
enum class Reduce { add, min_signed, max_signed, min_unsigned, max_unsigned, bit_and, bit_or, bit_xor };
uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value);
void warp_sync(uint32_t mask);

// Atomics: of 4 or 8 bytes. Each returns the old value.
enum class Atomic { add, exchange, min_signed, max_signed, min_unsigned, max_unsigned, bit_and, bit_or, bit_xor, increment, decrement };
uint32_t atomic(Atomic kind, uint32_t* p, uint32_t value);
uint64_t atomic(Atomic kind, uint64_t* p, uint64_t value);
uint32_t atomic_compare_exchange(uint32_t* p, uint32_t compare, uint32_t value);
uint64_t atomic_compare_exchange(uint64_t* p, uint64_t compare, uint64_t value);
float atomic_add(float* p, float value);
double atomic_add(double* p, double value);

[[noreturn]] void trap(const char* what);

}  // namespace limbeck::cuda::emulate
