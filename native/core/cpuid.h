// Which of the compiled instruction sets this processor, under this operating system, can run.
#pragma once
#include <string>

#include "core/families.h"

namespace limbeck {

bool cpu_runs(const char* isa);

// The kernels of the instruction set `asked`; when that is empty, of the one named by LIMBECK_ISA; else of the best one there is.
// Throws Error(device, ERR_ISA) for one that was not compiled or that the processor lacks.
const IsaKernels& choose_isa(const std::string& asked = "");

}  // namespace limbeck
