// Launching a kernel, and the shared memory of its blocks. Kernels are launched through here only, so that the same source runs on a
// GPU and in emulation.
#pragma once
#include <string>

#include "core/error.h"
#include "cuda/device.h"

namespace limbeck::cuda {

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;  // bytes of shared memory of a block
  int cluster = 1;    // blocks along x that can reach each other's shared memory
};

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorKind::device, "ERR_CUDA", std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")").in(what);
}

// Shared memory of a block, cut into arrays: `Shared s; auto* a = s.take<float>(n); auto* b = s.take<bf16>(m, 1024);`. Every thread
// makes the same cuts. Under emulation each array has bounds of its own.
class Shared {
 public:
#ifdef LIMBECK_EMULATE
  template <class T>
  T* take(size_t n, size_t align = 16) {
    return static_cast<T*>(emulate::take_shared(used_, n * sizeof(T), align));
  }

 private:
  emulate::SharedCuts used_;
#else
  template <class T>
  __device__ T* take(size_t n, size_t align = 16) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    used_ = (used_ + align - 1) & ~(align - 1);
    T* p = reinterpret_cast<T*>(shared_bytes + used_);
    used_ += n * sizeof(T);
    return p;
  }

 private:
  size_t used_ = 0;
#endif
};

// Runs `kernel(args...)` on the call's stream. An empty grid is no launch.
template <class... Parameter, class... Argument>
void launch(const Call& call, const Grid& grid, void (*kernel)(Parameter...), Argument&&... args) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
#ifdef LIMBECK_EMULATE
  emulate::run(call, grid.blocks, grid.threads, grid.shared, grid.cluster, [&] { kernel(static_cast<Parameter>(args)...); });
#else
  if (grid.shared > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared)), call.op);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = device_of(call).stream;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameter>(args)...), call.op);
#endif
}

}  // namespace limbeck::cuda
