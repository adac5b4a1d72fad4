// Matrix products on the GPU: cuBLASLt, opened at run time; in emulation, plain loops.
#pragma once
#include <memory>
#include <string>

#include "core/view.h"
#include "cuda/device.h"

namespace limbeck::cuda {

// Row-major matrices: c[m n] (+)= scale * op(a)[m k] * op(b)[k n]. `ld` is the distance of rows in elements.
struct Matrix {
  const void* data;
  DType dtype;         // bf16, f32, or u8 for fp8 (e4m3)
  int64_t ld;
  bool transposed;     // a is stored [k m], b is stored [n k]
  const float* scales = nullptr;  // fp8: one for each row of a (token), each row of stored b (channel)
};

struct Product {
  int64_t m, n, k;
  Matrix a, b;
  void* c;
  DType c_dtype;       // f32 or bf16; sums are float32
  int64_t ldc;
  bool accumulate = false;
  float scale = 1;
  const void* bias = nullptr;  // [n], of c's dtype
};

class Blas {
 public:
  virtual ~Blas() = default;
  // Enqueues on the device's stream. Deterministic. Throws Error of kind device where the library is missing or refuses.
  virtual void run(const Device& device, const Product& product) = 0;
  // Whether a[m k] * b[n k]^T of fp8 with scales for their rows is there; any thread may ask.
  virtual bool multiplies_fp8(const Device& device, int64_t n, int64_t k) const = 0;
  virtual size_t workspace_bytes() const = 0;  // that it keeps on the device
  virtual std::string version() const = 0;     // empty where there is no library
};

// The device's products. A missing library is an error of the first product, not of this.
std::unique_ptr<Blas> open_blas(const Device& device);

}  // namespace limbeck::cuda
