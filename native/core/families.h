// What the build compiled: one table of kernel families for each instruction set, the portable one first. The definitions are
// generated (scripts/families.mjs), so that a new kernel file needs no registration.
#pragma once
#include "core/kernel.h"

namespace limbeck {

struct IsaKernels {
  const char* isa;
  const KernelFamily* const* families;
  int count;
};

extern const IsaKernels cpu_isas[];
extern const int cpu_isa_count;
extern const char* const blas_name;  // "builtin", or the BLAS that plain matrix products go to

}  // namespace limbeck
