// The matrix products of blas.h on the host: what tests of kernels on emulated devices multiply with. Operands become float32 panels,
// sums are float32.
#include "cuda/blas.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "core/float8.h"

namespace limbeck::cuda {
namespace {

float element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::bf16) return std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
  return float8_to(static_cast<const uint8_t*>(data)[i]);
}

void put(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[i] = x;
    return;
  }
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  static_cast<uint16_t*>(data)[i] = nan ? 0x7fff : static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

// Rows [begin, begin + count) of op(m), each of `length` elements, as float32 one after the other.
void panel(const Matrix& m, int64_t begin, int64_t count, int64_t length, float* out) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < length; ++j)
      out[i * length + j] = element(m.data, m.dtype, m.transposed ? j * m.ld + begin + i : (begin + i) * m.ld + j);
}

class HostBlas final : public Blas {
 public:
  void run(const Device&, const Product& p) override {
    constexpr int64_t kRows = 16, kDepth = 128;
    std::vector<float> a(kRows * p.k), b(p.k * p.n), sums(kRows * p.n);
    panel(p.b, 0, p.k, p.n, b.data());
    for (int64_t begin = 0; begin < p.m; begin += kRows) {
      const int64_t rows = std::min(kRows, p.m - begin);
      panel(p.a, begin, rows, p.k, a.data());
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t depth = 0; depth < p.k; depth += kDepth)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t l = depth; l < std::min(depth + kDepth, p.k); ++l) {
            const float x = a[i * p.k + l];
            const float* from = &b[l * p.n];
            float* to = &sums[i * p.n];
            for (int64_t j = 0; j < p.n; ++j) to[j] += x * from[j];
          }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < p.n; ++j) {
          const int64_t at = (begin + i) * p.ldc + j;
          float x = sums[i * p.n + j] * p.scale;
          if (p.a.scales) x *= p.a.scales[begin + i] * p.b.scales[j];
          if (p.bias) x += element(p.bias, p.c_dtype, j);
          if (p.accumulate) x += element(p.c, p.c_dtype, at);
          put(p.c, p.c_dtype, at, x);
        }
    }
  }

  size_t workspace_bytes() const override { return 0; }
  std::string version() const override { return "emulated"; }
};

}  // namespace

// Where the GPU would multiply them itself, so that both ways are run.
bool multiplies_fp8(const Device& device, int64_t n, int64_t k) {
  return device.architecture == 90 && n % 16 == 0 && k % 16 == 0 && n > 0 && k > 0;
}

std::unique_ptr<Blas> open_blas(const Device&) { return std::make_unique<HostBlas>(); }

}  // namespace limbeck::cuda
