// The GPU as kernels see it.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "core/kernel.h"
#include "cuda/runtime.h"

namespace limbeck::cuda {

class Blas;
struct FaultRecord;

struct Device {
  int number = 0;
  int architecture = 0;          // 80, 90, ...: compute capability times ten
  int processors = 0;            // streaming multiprocessors
  size_t memory = 0;             // bytes
  size_t shared_per_block = 0;   // bytes a block may opt in to
  size_t workspace_limit = 0;    // bytes of temporary memory for kernels that have the choice; 0: their own
  cudaStream_t stream = nullptr; // what kernels are launched on
  Blas* blas = nullptr;          // matrix products (blas.h)
  FaultRecord* fault = nullptr;  // where kernels report bad data (fault.h)
};

std::vector<const KernelFamily*> families();

// Throws Error of kind device for a GPU that lacks what the kernels need: bf16 tensor cores and asynchronous copies.
constexpr int kOldestArchitecture = 80;
void check_architecture(int architecture, const std::string& name);

// A device that is not here, for plans: what workspace functions look at.
std::shared_ptr<void> imagine(int architecture, int processors, size_t memory);

inline const Device& device_of(const Call& call) { return *static_cast<const Device*>(call.device); }

}  // namespace limbeck::cuda
