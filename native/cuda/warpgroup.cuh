// Hopper's blocks of three warpgroups: one loads by TMA, the other two multiply by WGMMA, 64 rows at a time.
#pragma once
#include "cuda/lanes.cuh"
#include "cuda/ptx.cuh"

namespace limbeck::cuda {

// The launch gives every thread 168 registers; the loading warpgroup leaves most of its own to the others: 24 + 2 * 240 = 3 * 168.
constexpr int kLoadRegisters = 24, kComputeRegisters = 240;

// A place that walks over the stages of a ring: stage and parity.
template <int Stages>
struct Slot {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ int warpgroup_of_thread() {
#ifdef LIMBECK_EMULATE
  return static_cast<int>(threadIdx.x) / 128;
#else
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);  // known to be the same in a warp
#endif
}

// What a thread has of 64 rows of results: rows thread_row() and 8 more, columns 8 j + thread_column() and the next.
__device__ __forceinline__ int thread_row() {
  const int thread = static_cast<int>(threadIdx.x);
  return thread % 128 / 32 * 16 + thread % 32 / 4;
}
__device__ __forceinline__ int thread_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }

// Sum, maximum over the four threads that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

}  // namespace limbeck::cuda
