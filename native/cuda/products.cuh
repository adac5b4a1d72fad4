// What op files hand to Blas: views as matrices, and weights in the dtype of what they are multiplied with.
#pragma once
#include "cuda/blas.h"
#include "cuda/lanes.cuh"

namespace limbeck::cuda {

inline Matrix rows_of(const void* data, DType dtype, int64_t cols) { return {data, dtype, cols, false}; }
inline Matrix transposed(const void* data, DType dtype, int64_t cols) { return {data, dtype, cols, true}; }

inline void multiply(const Call& call, const Product& product) { device_of(call).blas->run(device_of(call), product); }

// c[m n] (+)= a b.
inline void multiply(const Call& call, int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, const View& c, bool accumulate = false,
                     const void* bias = nullptr) {
  Product product{m, n, k, a, b, c.data, c.dtype, n};
  product.accumulate = accumulate;
  product.bias = bias;
  multiply(call, product);
}

// Parts of the call's workspace, one after the other; without memory it counts only.
class Parts {
 public:
  explicit Parts(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(memory_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return memory_ ? part : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

template <class T>
struct Convert {
  AnyFloats from;
  T* to;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    lanes.put(to + i, from.get(i, lanes));
  }
};

// A weight that is not of the other operand's dtype T is converted into the workspace.
template <class T>
const void* in_dtype(const Call& call, const View& w, Parts& parts) {
  constexpr DType dtype = sizeof(T) == 2 ? DType::bf16 : DType::f32;
  if (w.dtype == dtype) return w.data;
  T* converted = parts.take<T>(w.size());
  const Convert<T> body{AnyFloats(w), converted};
  if (converted) for_elements<kVector<float>>(call, w.size(), aligned(w.as<char>(), converted), body);
  return converted;
}

}  // namespace limbeck::cuda
