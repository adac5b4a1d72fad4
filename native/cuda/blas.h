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
  virtual size_t workspace_bytes() const = 0;  // that it keeps on the device
  virtual std::string version() const = 0;     // empty where there is no library
};

// Whether the device multiplies a[m k] with b[n k]^T of fp8 and with scales for their rows. Any thread may ask. A device that is only
// thought of has the newest library.
bool multiplies_fp8(const Device& device, int64_t n, int64_t k);

// The device's products. A missing library is an error of the first product, not of this.
std::unique_ptr<Blas> open_blas(const Device& device);

}  // namespace limbeck::cuda
