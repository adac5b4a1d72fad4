// What a TMA copy knows of a tensor in global memory: its shape, the box that one copy moves, and how the box is swizzled in shared
// memory. Made on the host, passed to a kernel as `const __grid_constant__ TensorMap map`.
#pragma once
#include <cstdint>

#include "core/error.h"
#include "core/view.h"
#include "cuda/runtime.h"
#ifndef LIMBECK_EMULATE
#include <cuda.h>
#endif

namespace limbeck::cuda {

// Rows of a box are stored in spans of this many bytes, whose 16-byte chunks are permuted by the row: chunk ^= row % 8 for 128 bytes.
enum class Swizzle { none = 0, b32 = 1, b64 = 2, b128 = 3 };

#ifdef LIMBECK_EMULATE
struct alignas(64) TensorMap {
  const char* data;
  uint64_t strides[4];  // bytes
  uint32_t dims[5];
  uint16_t box[5];
  uint8_t rank, element_bytes, swizzle, made;
  DType dtype;
};
static_assert(sizeof(TensorMap) <= 128);
#else
using TensorMap = CUtensorMap;
#endif

// Sizes are given innermost first: dims and box in elements, strides in bytes of dims 1.. (rank - 1 of them). What lies outside of the
// tensor is read as zero and not written. Throws Error of kind internal where the hardware would refuse.
TensorMap tensor_map(const void* data, DType dtype, int rank, const int64_t* dims, const int64_t* strides, const int* box, Swizzle swizzle);

}  // namespace limbeck::cuda
