// Frozen weights of few bits. fp8 (e4m3: a sign, four bits of exponent, three of fraction, largest 448): each row has a scale of its own,
// products round the tokens in the same way and compute with the rounded numbers in float32; the weights are widened a few rows at a
// time, so that they take one byte each in memory. Blocks of 8 and 4 bits (core/blocks.h) are widened while a product packs them.
#include "cpu/blocks.h"
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

// What a row stands for, k elements from `from` on.
LIMBECK_INLINE void widen_row(const uint8_t* from, float s, int64_t k, float* to) {
  for_lanes(0, k, [&](int64_t i, auto lanes) { lanes.put(to + i, float8_values(get_codes(from + i, lanes)) * s); });
}

// Rows of the weight that are widened at once: some MiB, so that the product finds them in the cache, and enough to pay for reading x.
static int64_t rows_at_once(int64_t n, int64_t k) {
  constexpr int64_t wide = Slivers::kWidest;
  const int64_t fit = (int64_t{1} << 20) / (k > 0 ? k : 1) / wide * wide;
  const int64_t rows = fit < 4 * wide ? 4 * wide : fit > 512 ? 512 / wide * wide : fit;
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
      widen_row(q.as<uint8_t>() + (begin + row) * k, scale.as<float>()[begin + row], k, weights + row * k);
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

// dequantize_fp8(q[n k]:u8, scale[n]:f32) -> w[n k]:f32
static void dequantize_fp8(const Call& call) {
  const View &q = call.in[0], &w = call.out[0];
  const int64_t n = q.dims[0], k = q.dims[1];
  if (!w) return;
  for_rows(call, n, k, [&](int64_t row) { widen_row(q.as<uint8_t>() + row * k, call.in[1].as<float>()[row], k, w.as<float>() + row * k); });
}

// linear_fp8_backward(dy[* n], q[n k]:u8, scale[n]:f32) -> dx[* k]+
static void linear_fp8_backward(const Call& call) {
  const View &dy = call.in[0], &q = call.in[1], &dx = call.out[0];
  if (!dx) return;
  const int64_t m = dy.rows(), n = q.dims[0], k = q.dims[1], block = rows_at_once(n, k);
  float* const weights = static_cast<float*>(call.workspace);
  GemmOptions options;
  options.accumulate = call.accumulate[0];
  if (n == 0) gemm(*call.threads, m, k, 0, rows_of(dy.data, n), rows_of(weights, k), dx.as<float>(), k, options);
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t rows = n - begin < block ? n - begin : block;
    for_rows(call, rows, k, [&](int64_t row) {
      widen_row(q.as<uint8_t>() + (begin + row) * k, call.in[2].as<float>()[begin + row], k, weights + row * k);
    });
    gemm(*call.threads, m, k, rows, rows_of(dy.as<float>() + begin, n), rows_of(weights, k), dx.as<float>(), k, options);
    options.accumulate = true;
  }
}

static size_t linear_fp8_backward_workspace(const Call& call) {
  const View& q = call.in[1];
  return static_cast<size_t>(rows_at_once(q.dims[0], q.dims[1]) * q.dims[1]) * sizeof(float);
}

// ---- Blocks

template <int Bits>
LIMBECK_INLINE UVec block_codes(Vec v) {
  if constexpr (Bits == 8) {
    constexpr float magic = 12582912.f;  // 1.5 * 2^23 rounds to an integer in the low bits
    return (UVec)(clamp(v, -127.f, 127.f) + magic);
  } else {
    IVec code{};
    for (int i = 0; i < 15; ++i) code -= v > nf4_middle(i);
    return (UVec)code;
  }
}

// A NaN or an infinity makes its block NaN.
template <int Bits, class T>
static void quantize_blocks_of(const Call& call, const T* w) {
  const View &q = call.out[0], &scale = call.out[1];
  constexpr int64_t kBlock = block_of(Bits), kBytes = kBlock * Bits / 8;
  const int64_t n = call.in[0].dims[0], k = call.in[0].dims[1], blocks = (k + kBlock - 1) / kBlock;
  for_rows(call, n * blocks, kBlock, [&](int64_t at) {
    const T* const from = w + at / blocks * k + at % blocks * kBlock;
    const int64_t size = k - at % blocks * kBlock < kBlock ? k - at % blocks * kBlock : kBlock;
    Vec largest{}, bad{};
    for_lanes(0, size, [&](int64_t i, auto lanes) {
      const Vec v = lanes.get(from + i);
      largest = max(max(v, -v), largest);
      bad += v * 0.f;
    });
    float most = 0;
    for (int i = 0; i < W; ++i) most = largest[i] > most ? largest[i] : most;
    const float exact = most * (Bits == 8 ? 1.f / 127 : 1.f);
    const uint16_t bits = static_cast<uint16_t>(bf16_bits(splat((exact > kLeastBlockScale ? exact : kLeastBlockScale) + sum(bad)))[0]);
    if (scale) scale.as<uint16_t>()[at] = bits;
    if (!q) return;
    const float by = 1.f / from_bf16(bits);
    uint32_t codes[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) codes[i] = Bits == 8 ? 0 : kNf4Zero;
    for_lanes(0, size, [&](int64_t i, auto lanes) {
      const UVec c = block_codes<Bits>(lanes.get(from + i) * by);
      std::memcpy(codes + i, &c, sizeof(float) * static_cast<size_t>(size - i < W ? size - i : W));
    });
    uint8_t* const to = q.as<uint8_t>() + at * kBytes;
    for (int64_t i = 0; i < kBytes; ++i) to[i] = static_cast<uint8_t>(Bits == 8 ? codes[i] : codes[2 * i] | codes[2 * i + 1] << 4);
  });
}

// quantize_q8(w[n k]:float, c, b) -> q[n c]:u8, scale[n b]:bf16; quantize_q4 likewise
template <int Bits>
static void quantize_blocks(const Call& call) {
  const View& w = call.in[0];
  if (w.dtype == DType::bf16) quantize_blocks_of<Bits>(call, w.as<uint16_t>());
  else quantize_blocks_of<Bits>(call, w.as<float>());
}

// dequantize_q8(q[n c]:u8, scale[n b]:bf16, k) -> w[n k]:f32; dequantize_q4 likewise
template <int Bits>
static void dequantize_blocks(const Call& call) {
  const View &q = call.in[0], &scale = call.in[1], &w = call.out[0];
  if (!w) return;
  const int64_t n = w.dims[0], k = w.dims[1], row_size = scale.dims[1] * block_of(Bits);
  const LoadBlocks<Bits> source{q.as<uint8_t>(), scale.as<uint16_t>()};
  for_rows(call, n, k, [&](int64_t row) {
    float* const to = w.as<float>() + row * k;
    int64_t i = 0;
    for (; i + W <= k; i += W) store(to + i, source(row * row_size + i));
    if (i < k) store_part(to + i, source.part(row * row_size + i, k - i), k - i);
  });
}

template <int Bits>
static Matrix blocks_of(const View& q, const View& scale, bool transposed) {
  const int64_t row_size = scale.dims[1] * block_of(Bits);
  Matrix b = transposed ? Matrix{q.data, 1, row_size, DType::u8} : Matrix{q.data, row_size, 1, DType::u8};
  b.scales = scale.as<uint16_t>();
  b.bits = Bits;
  return b;
}

// linear_q8(x[* k], q[n c]:u8, scale[n b]:bf16, bias[n]?, k) -> y[* n]; linear_q4 likewise
template <int Bits>
static void linear_blocks(const Call& call) {
  const View &x = call.in[0], &q = call.in[1], &bias = call.in[3], &y = call.out[0];
  if (!y) return;
  const int64_t n = q.dims[0], k = x.cols();
  GemmOptions options;
  options.bias = bias.as<float>();
  gemm(*call.threads, x.rows(), n, k, rows_of(x.data, k), blocks_of<Bits>(q, call.in[2], true), y.as<float>(), n, options);
}

// linear_q8_backward(dy[* n], q[n c]:u8, scale[n b]:bf16, k) -> dx[* k]+; linear_q4_backward likewise
template <int Bits>
static void linear_blocks_backward(const Call& call) {
  const View &dy = call.in[0], &q = call.in[1], &dx = call.out[0];
  if (!dx) return;
  const int64_t n = q.dims[0], k = dx.cols();
  GemmOptions options;
  options.accumulate = call.accumulate[0];
  gemm(*call.threads, dy.rows(), k, n, rows_of(dy.data, n), blocks_of<Bits>(q, call.in[2], false), dx.as<float>(), k, options);
}

}  // namespace limbeck::cpu::LIMBECK_ISA

#define LIMBECK_BLOCKS(bits)                                                                                  \
  {"quantize_q" #bits, quantize_blocks<bits>}, {"dequantize_q" #bits, dequantize_blocks<bits>}, {"linear_q" #bits, linear_blocks<bits>}, \
      {"linear_q" #bits "_backward", linear_blocks_backward<bits>}
LIMBECK_KERNELS(quant, {"quantize_fp8", quantize_fp8}, {"dequantize_fp8", dequantize_fp8}, {"linear_fp8", linear_fp8, linear_fp8_workspace},
                {"linear_fp8_backward", linear_fp8_backward, linear_fp8_backward_workspace}, LIMBECK_BLOCKS(8), LIMBECK_BLOCKS(4))
