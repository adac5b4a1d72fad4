// Frozen weights of one byte: fp8 (e4m3: a sign, four bits of exponent, three of fraction, largest 448), each row with a scale of its
// own. Products round the tokens in the same way and compute with the rounded numbers in float32; the weights are widened a few rows at
// a time, so that they take one byte each in memory.
#include "cpu/gemm.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

typedef uint8_t BVec __attribute__((vector_size(LIMBECK_WIDTH)));

constexpr float kLargest = 448.f;
constexpr float kLeastScale = 0x1p-100f;  // rows of zeros, or nearly, have one that can be divided by

// To the nearest, ties to even; beyond the largest value, the largest. NaN stays NaN.
LIMBECK_INLINE UVec float8_codes(Vec v) {
  const UVec bits = (UVec)v, magnitude = bits & 0x7fffffffu, sign = (bits >> 24) & 0x80u;
  // 20 bits of the fraction go; the exponent's bias of 127 becomes 7.
  const UVec normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Below 2^-6 the steps are 2^-9: adding a float whose own step is that rounds to them.
  const UVec small = (UVec)((Vec)magnitude + 0x1p14f) - 0x46800000u;
  UVec code = magnitude < 0x3c800000u ? small : normal;
  code = magnitude >= 0x43e00000u ? UVec{} + 0x7eu : code;
  code = magnitude > 0x7f800000u ? UVec{} + 0x7fu : code;
  return code | sign;
}

LIMBECK_INLINE Vec float8_values(UVec code) {
  const UVec magnitude = code & 0x7fu, sign = (code & 0x80u) << 24;
  const Vec small = __builtin_convertvector((IVec)magnitude, Vec) * 0x1p-9f;
  UVec bits = magnitude < 8u ? (UVec)small : (magnitude << 20) + (120u << 23);
  bits = magnitude == 0x7fu ? UVec{} + 0x7fc00000u : bits;
  return (Vec)(bits | sign);
}

LIMBECK_INLINE void put_codes(uint8_t* p, UVec code, AllLanes) {
  const BVec bytes = __builtin_convertvector(code, BVec);
  std::memcpy(p, &bytes, sizeof bytes);
}
LIMBECK_INLINE void put_codes(uint8_t* p, UVec code, SomeLanes lanes) {
  for (int64_t i = 0; i < lanes.n; ++i) p[i] = static_cast<uint8_t>(code[i]);
}
LIMBECK_INLINE UVec get_codes(const uint8_t* p, AllLanes) {
  BVec bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, UVec);
}
LIMBECK_INLINE UVec get_codes(const uint8_t* p, SomeLanes lanes) {
  BVec bytes{};
  std::memcpy(&bytes, p, static_cast<size_t>(lanes.n));
  return __builtin_convertvector(bytes, UVec);
}

// What the largest of a row is divided by to become 448. A NaN gives way: it stays one whatever it is divided by.
template <class T>
LIMBECK_INLINE float scale_of(const T* row, int64_t n) {
  Vec largest{};
  for_lanes(0, n, [&](int64_t i, auto lanes) {
    const Vec v = lanes.get(row + i);
    largest = max(max(v, -v), largest);
  });
  float most = 0;
  for (int i = 0; i < W; ++i) most = largest[i] > most ? largest[i] : most;
  const float scale = most / kLargest;
  return scale > kLeastScale ? scale : kLeastScale;
}

template <class T>
static void quantize_rows(const Call& call, const T* w) {
  const View &q = call.out[0], &scale = call.out[1];
  const int64_t n = call.in[0].dims[0], k = call.in[0].dims[1];
  for_rows(call, n, k, [&](int64_t row) {
    const float s = scale_of(w + row * k, k), by = 1.f / s;
    if (scale) scale.as<float>()[row] = s;
    if (!q) return;
    uint8_t* to = q.as<uint8_t>() + row * k;
    for_lanes(0, k, [&](int64_t i, auto lanes) { put_codes(to + i, float8_codes(lanes.get(w + row * k + i) * by), lanes); });
  });
}

// quantize_fp8(w[n k]:float) -> q[n k]:u8, scale[n]:f32
static void quantize_fp8(const Call& call) {
  const View& w = call.in[0];
  if (w.dtype == DType::bf16) quantize_rows(call, w.as<uint16_t>());
  else quantize_rows(call, w.as<float>());
}

// Rows of the weight that are widened at once: some MiB, so that the product finds them in the cache, and enough to pay for reading x.
static int64_t rows_at_once(int64_t n, int64_t k) {
  const int64_t fit = (int64_t{1} << 20) / (k > 0 ? k : 1) / kBlockColumns * kBlockColumns;
  const int64_t rows = fit < 4 * kBlockColumns ? 4 * kBlockColumns : fit > 512 ? 512 / kBlockColumns * kBlockColumns : fit;
  return rows < n ? rows : n;
}

// linear_fp8(x[* k], q[n k]:u8, scale[n]:f32, bias[n]?) -> y[* n]
static void linear_fp8(const Call& call) {
  const View &x = call.in[0], &q = call.in[1], &scale = call.in[2], &bias = call.in[3], &y = call.out[0];
  if (!y) return;
  const int64_t m = x.rows(), n = q.dims[0], k = q.dims[1], block = rows_at_once(n, k);
  float* tokens = static_cast<float*>(call.workspace);
  float* weights = tokens + (m * k + 15) / 16 * 16;
  for_rows(call, m, k, [&](int64_t row) {
    const float* from = x.as<float>() + row * k;
    const float s = scale_of(from, k), by = 1.f / s;
    for_lanes(row * k, row * k + k, [&](int64_t i, auto lanes) {
      lanes.put(tokens + i, float8_values(float8_codes(lanes.get(x.as<float>() + i) * by)) * s);
    });
  });
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t rows = n - begin < block ? n - begin : block;
    for_rows(call, rows, k, [&](int64_t row) {
      const uint8_t* from = q.as<uint8_t>() + (begin + row) * k;
      const float s = scale.as<float>()[begin + row];
      for_lanes(0, k, [&](int64_t i, auto lanes) { lanes.put(weights + row * k + i, float8_values(get_codes(from + i, lanes)) * s); });
    });
    GemmOptions options;
    if (bias) options.bias = bias.as<float>() + begin;
    gemm(*call.threads, m, rows, k, rows_of(tokens, k), transposed(weights, k), y.as<float>() + begin, n, options);
  }
}

static size_t linear_fp8_workspace(const Call& call) {
  const View &x = call.in[0], &q = call.in[1];
  return ((x.size() + 15) / 16 * 16 + rows_at_once(q.dims[0], q.dims[1]) * q.dims[1]) * sizeof(float);
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(quant, {"quantize_fp8", quantize_fp8}, {"linear_fp8", linear_fp8, linear_fp8_workspace})
