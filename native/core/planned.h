// A device that is only thought of: calls are checked and memory is handed out as on the real one, and nothing runs. What a step
// would take is then known before anything is allocated; times come from the roofline.
#pragma once
#include <memory>
#include <vector>

#include "core/backend.h"

namespace limbeck {

struct PlannedDevice {
  double flops = 0;      // of matrix products, a second
  double fast_flops = 0; // the same with fp8 operands
  double bandwidth = 0;  // bytes of memory, a second
  size_t memory = 0;     // bytes
  int threads = 1;       // of a CPU
  bool bf16 = false;     // whether it computes in bf16
};

// Floating-point operations of a call: those of its matrix products, counting only pairs that a mask leaves. 0 where memory decides.
double flops_of(const Call& call);

std::unique_ptr<Backend> open_planned(const PlannedDevice& planned, std::vector<const KernelFamily*> families, std::shared_ptr<void> device);

}  // namespace limbeck
