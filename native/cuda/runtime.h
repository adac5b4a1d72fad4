// CUDA's language and runtime: NVIDIA's under nvcc, ours when the kernels are compiled for the host (LIMBECK_EMULATE).
#pragma once
#ifdef LIMBECK_EMULATE
#include "cuda/emulate/cuda.h"
#else
#include <cuda_runtime.h>
#endif
