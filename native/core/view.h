// A tensor as a kernel sees it: bytes, a dtype and a contiguous row-major shape.
#pragma once
#include <cstddef>
#include <cstdint>

namespace limbeck {

enum class DType : uint8_t { f32 = 0, bf16 = 1, i32 = 2, u8 = 3, f64 = 4 };

constexpr size_t size_of(DType t) {
  constexpr size_t bytes[] = {4, 2, 4, 1, 8};
  return bytes[static_cast<size_t>(t)];
}
const char* name_of(DType t);

constexpr int kMaxRank = 6;

struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  int64_t dims[kMaxRank] = {};

  // An optional tensor that was not given is a view of no data.
  explicit operator bool() const { return data != nullptr; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dims[i];
    return n;
  }
  // A tensor read as a matrix: the last dimension is a row, all others are counted together.
  int64_t cols() const { return rank == 0 ? 1 : dims[rank - 1]; }
  int64_t rows() const {
    int64_t n = 1;
    for (int i = 0; i + 1 < rank; ++i) n *= dims[i];
    return n;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace limbeck
