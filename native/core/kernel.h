// What a backend implements: named functions over views. A kernel family is one file that ends with LIMBECK_KERNELS(family, ...).
#pragma once
#include <cstddef>

#include "core/error.h"
#include "core/threads.h"
#include "core/view.h"

namespace limbeck {

constexpr int kMaxTensors = 16;
constexpr int kMaxScalars = 16;

// Tensors and scalars stand in the order of the op's signature, counted apart. Shapes and dtypes were checked against it.
struct Call {
  const char* op = "";
  View in[kMaxTensors];
  View out[kMaxTensors];               // an output that is not wanted has no data: skip its work
  bool accumulate[kMaxTensors] = {};   // out[i] += instead of =, for outputs marked + in the signature
  double scalar[kMaxScalars] = {};
  ThreadPool* threads = nullptr;        // of the CPU backend
  void* device = nullptr;              // of a backend library: what its kernels launch on
  void* workspace = nullptr;           // as many bytes as the kernel's workspace function asked for, 64-byte aligned
  size_t workspace_bytes = 0;
};

struct Kernel {
  const char* name;
  void (*run)(const Call&);
  // Bytes of temporary memory; it may look at shapes, dtypes, scalars, presence (data != nullptr) and threads, not at data.
  size_t (*workspace)(const Call&) = nullptr;
};

struct KernelFamily {
  const Kernel* kernels;
  int count;
};

}  // namespace limbeck

// Every file of native/cpu is compiled once for each instruction set, in a namespace of that name; native/cuda once for the GPU and
// once for its emulation. The build lists the families.
#ifndef LIMBECK_KERNEL_SPACE
#define LIMBECK_KERNEL_SPACE limbeck::cpu::LIMBECK_ISA
#endif
#define LIMBECK_KERNELS(family, ...)                                   \
  namespace LIMBECK_KERNEL_SPACE {                                     \
  static constexpr Kernel family##_table[] = {__VA_ARGS__};            \
  extern const KernelFamily family##_family;                           \
  constinit const KernelFamily family##_family = {family##_table, sizeof(family##_table) / sizeof(Kernel)}; \
  }
