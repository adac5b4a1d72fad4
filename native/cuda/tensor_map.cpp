#include "cuda/tensor_map.h"

#include "core/fail.h"
#include "cuda/launch.h"

namespace limbeck::cuda {

namespace {

[[noreturn]] void refuse(const Text& problem) {
  throw Error(ErrorKind::internal, "ERR_TENSOR_MAP", std::string("tensor_map: ") + problem.chars);
}

// What the hardware asks of a map; checked here, so that a mistake is found without it.
void check_map(const void* data, DType dtype, int rank, const int64_t* dims, const int64_t* strides, const int* box, Swizzle swizzle) {
  const auto bytes = static_cast<int64_t>(size_of(dtype));
  if (rank < 2 || rank > 5) refuse(text("rank %d; it can be 2 to 5", rank));
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) refuse(text("the tensor at %p is not aligned to 16 bytes", data));
  for (int d = 0; d < rank; ++d) {
    if (dims[d] < 1 || dims[d] > int64_t{1} << 32) refuse(text("dimension %d is %lld", d, static_cast<long long>(dims[d])));
    if (box[d] < 1 || box[d] > 256) refuse(text("the box is %d long in dimension %d; it can be 1 to 256", box[d], d));
    if (d > 0 && (strides[d - 1] % 16 != 0 || strides[d - 1] < 0 || strides[d - 1] >= int64_t{1} << 40))
      refuse(text("the stride of dimension %d is %lld bytes, which is no multiple of 16", d, static_cast<long long>(strides[d - 1])));
  }
  const int64_t row = box[0] * bytes, span = swizzle == Swizzle::none ? 256 * 16 : 16 << static_cast<int>(swizzle);
  if (row % 16 != 0) refuse(text("rows of the box have %lld bytes, which is no multiple of 16", static_cast<long long>(row)));
  if (row > span) refuse(text("rows of the box have %lld bytes, and its swizzle spans %lld", static_cast<long long>(row), static_cast<long long>(span)));
}

}  // namespace

#ifdef LIMBECK_EMULATE

TensorMap tensor_map(const void* data, DType dtype, int rank, const int64_t* dims, const int64_t* strides, const int* box, Swizzle swizzle) {
  check_map(data, dtype, rank, dims, strides, box, swizzle);
  TensorMap map = {};
  map.data = static_cast<const char*>(data);
  map.rank = static_cast<uint8_t>(rank);
  map.element_bytes = static_cast<uint8_t>(size_of(dtype));
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.dtype = dtype;
  for (int d = 0; d < rank; ++d) {
    map.dims[d] = static_cast<uint32_t>(dims[d]);
    map.box[d] = static_cast<uint16_t>(box[d]);
    if (d > 0) map.strides[d - 1] = static_cast<uint64_t>(strides[d - 1]);
  }
  map.made = 1;
  return map;
}

#else

TensorMap tensor_map(const void* data, DType dtype, int rank, const int64_t* dims, const int64_t* strides, const int* box, Swizzle swizzle) {
  check_map(data, dtype, rank, dims, strides, box, swizzle);
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found), "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw Error(ErrorKind::device, "ERR_CUDA_DRIVER", "cuda: the driver has no cuTensorMapEncodeTiled; install a driver of version 525 or newer");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  constexpr CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_INT32,
                                           CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_FLOAT64};
  constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B,
                                             CU_TENSOR_MAP_SWIZZLE_128B};
  TensorMap map;
  cuuint64_t sizes[5], steps[4];
  cuuint32_t boxes[5], ones[5] = {1, 1, 1, 1, 1};
  for (int d = 0; d < rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(dims[d]);
    boxes[d] = static_cast<cuuint32_t>(box[d]);
    if (d > 0) steps[d - 1] = static_cast<cuuint64_t>(strides[d - 1]);
  }
  const CUresult made = encode(&map, types[static_cast<int>(dtype)], static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes, steps, boxes, ones,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (made != CUDA_SUCCESS) refuse(text("the driver refuses it with error %d", static_cast<int>(made)));
  return map;
}

#endif

}  // namespace limbeck::cuda
