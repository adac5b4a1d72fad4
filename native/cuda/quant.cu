// Frozen weights of few bits. fp8 (e4m3): each row has a scale of its own, and a product rounds its tokens in the same way. On compute
// capability 9.0 the library multiplies fp8 with a scale for each row of both; elsewhere, and for sizes that its instructions cannot
// take, both become bf16, which holds every fp8 number exactly, some rows of the weight at a time, and a pass of ours scales the sums.
// Blocks of 8 and 4 bits (core/blocks.h) are multiplied as they are with few tokens (block_product.cuh); with more they become what the
// tokens are, some rows or columns of the weight at a time.
#include "cuda/block_product.cuh"
#include "cuda/products.cuh"
#include "cuda/ptx.cuh"

namespace limbeck::cuda {

constexpr float kLeastScale = 0x1p-100f;  // rows of zeros, or nearly, have one that can be divided by

// N codes in a row.
template <int N>
__device__ __forceinline__ void put_codes(uint8_t* p, const Floats<N>& v) {
  if constexpr (N == 1) {
    *p = static_cast<uint8_t>(ptx::pack_float8(v[0], 0.f));
  } else {
    uint32_t words[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) words[i] = ptx::pack_float8(v[4 * i], v[4 * i + 1]) | ptx::pack_float8(v[4 * i + 2], v[4 * i + 3]) << 16;
    if constexpr (N == 8) *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
    else *reinterpret_cast<uint32_t*>(p) = words[0];
  }
}
// The numbers that they stand for, which bf16 holds exactly.
template <int N>
__device__ __forceinline__ void put_codes(bf16* p, const Floats<N>& v) {
  Lanes<N>{}.put(p, map(v, [](float x) { return float8_to(static_cast<uint8_t>(ptx::pack_float8(x, 0.f))); }));
}

// A row's largest magnitude becomes 448. A NaN gives way: it stays one whatever it is divided by.
template <class T, class Code>
struct QuantizeRows {
  const T* x;
  Code* codes;  // null where not wanted
  float* scale;

  template <class Team, class L>
  __device__ __forceinline__ void operator()(int64_t row, Team team, L) const {
    const auto held = team.read(x + row * team.c);
    float most = 0;
    team.each([&](int64_t i, int k) {
      const auto v = held.get(i, k);
#pragma unroll
      for (int j = 0; j < L::count; ++j) most = fmaxf(most, fabsf(v[j]));
    });
    const float s = fmaxf(fmaxf(team.largest(most), 0.f) / kFloat8Largest, kLeastScale), by = 1.f / s;
    if (scale && threadIdx.x == 0) scale[row] = s;
    if (!codes) return;
    team.each([&](int64_t i, int k) { put_codes(codes + row * team.c + i, held.get(i, k) * by); });
  }
};

template <class T, class Code>
static void quantize_rows(const Call& call, const View& x, Code* codes, float* scale) {
  const QuantizeRows<T, Code> body{x.as<T>(), codes, scale};
  for_rows<kVector<T>>(call, x.rows(), x.cols(), aligned(body.x, body.codes), body);
}

// quantize_fp8(w[n k]:float) -> q[n k]:u8, scale[n]:f32
template <class T>
static void quantize_fp8(const Call& call) {
  quantize_rows<T>(call, call.in[0], call.out[0].as<uint8_t>(), call.out[1].as<float>());
}

// ---- linear_fp8(x[* k], q[n k]:u8, scale[n]:f32, bias[n]?) -> y[* n]

struct WidenCodes {
  const uint8_t* codes;
  bf16* values;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    Floats<L::count> v;
    if constexpr (L::count == 8) {
      const uint2 words = *reinterpret_cast<const uint2*>(codes + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[j] = float8_to(static_cast<uint8_t>(words.x >> 8 * j));
        v[4 + j] = float8_to(static_cast<uint8_t>(words.y >> 8 * j));
      }
    } else {
      v[0] = float8_to(codes[i]);
    }
    lanes.put(values + i, v);
  }
};

// y[i, j] = sums[i, j] * tokens[i] * channels[j] (+ bias[j]), for some columns of y.
template <class T>
struct ScaleSums {
  const float *sums, *tokens, *channels;
  const T* bias;
  int64_t columns, n;
  T* y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t at, L lanes) const {
    const Division place = divide(at, columns);
    const auto v = lanes.get(sums + at) * lanes.get(channels + place.rest) * tokens[place.quotient];
    lanes.put(y + place.quotient * n + place.rest, bias ? v + lanes.get(bias + place.rest) : v);
  }
};

// Rows of the weight that are widened at once: enough columns of y to fill the GPU.
static int64_t rows_at_once(int64_t n, int64_t k) {
  const int64_t fit = (int64_t{16} << 20) / (k > 0 ? k : 1) / 128 * 128;
  const int64_t rows = fit < 128 ? 128 : fit > 2048 ? 2048 : fit;
  return rows < n ? rows : n;
}

// The library adds a bias of bf16 only.
static bool by_library(const Call& call) {
  const View &x = call.in[0], &q = call.in[1], &bias = call.in[3];
  return (!bias || x.dtype == DType::bf16) && multiplies_fp8(device_of(call), q.dims[0], q.dims[1]);
}

template <class T>
static void linear_fp8(const Call& call) {
  const View &x = call.in[0], &q = call.in[1], &scale = call.in[2], &bias = call.in[3], &y = call.out[0];
  if (!y) return;
  const int64_t m = x.rows(), n = q.dims[0], k = q.dims[1];
  Parts parts(call.workspace);
  float* tokens = parts.take<float>(m);
  if (by_library(call)) {
    uint8_t* codes = parts.take<uint8_t>(m * k);
    quantize_rows<T>(call, x, codes, tokens);
    Matrix a = rows_of(codes, DType::u8, k), b = transposed(q.data, DType::u8, k);
    a.scales = tokens;
    b.scales = scale.as<float>();
    return multiply(call, m, n, k, a, b, y, false, bias.data);
  }
  const int64_t block = rows_at_once(n, k);
  bf16 *values = parts.take<bf16>(m * k), *weights = parts.take<bf16>(block * k);
  float* sums = parts.take<float>(m * block);
  quantize_rows<T>(call, x, values, tokens);
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t rows = n - begin < block ? n - begin : block;
    const WidenCodes widen{q.as<uint8_t>() + begin * k, weights};
    for_elements<8>(call, rows * k, aligned(widen.codes, widen.values), widen);
    multiply(call, {m, rows, k, rows_of(values, DType::bf16, k), transposed(weights, DType::bf16, k), sums, DType::f32, rows});
    const ScaleSums<T> body{sums, tokens, scale.as<float>() + begin, bias ? bias.as<T>() + begin : nullptr, rows, n,
                            y.as<T>() + begin};
    for_elements<4>(call, m * rows, rows % 4 == 0 && n % 4 == 0 && aligned(body.sums, body.channels, body.bias, body.y), body);
  }
}

static size_t linear_fp8_workspace(const Call& call) {
  const int64_t m = call.in[0].rows(), n = call.in[1].dims[0], k = call.in[1].dims[1];
  Parts parts;
  parts.take<float>(m);
  if (by_library(call)) {
    parts.take<uint8_t>(m * k);
  } else {
    parts.take<bf16>(m * k);
    parts.take<bf16>(rows_at_once(n, k) * k);
    parts.take<float>(m * rows_at_once(n, k));
  }
  return parts.used();
}

// ---- Weights as they are, scales included: the columns of `columns` from `column` on, of rows from `row` on.

// N codes in a row.
template <int N>
__device__ __forceinline__ Floats<N> get_codes(const uint8_t* p) {
  Floats<N> v;
  if constexpr (N == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(p);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = static_cast<float>(words.x >> 8 * j & 0xff);
      v[4 + j] = static_cast<float>(words.y >> 8 * j & 0xff);
    }
  } else {
    v[0] = static_cast<float>(*p);
  }
  return v;
}

struct Float8Rows {
  const uint8_t* codes;
  const float* scales;
  int64_t k;
  template <class L>
  __device__ __forceinline__ Floats<L::count> get(int64_t row, int64_t column, L) const {
    return map(get_codes<L::count>(codes + row * k + column), [](float code) { return float8_to(static_cast<uint8_t>(code)); }) * scales[row];
  }
};

// Eight neighbours lie in one block: a column is a multiple of eight where there are eight lanes.
template <int Bits>
struct Blocks {
  const uint8_t* codes;
  const bf16* scales;
  int64_t blocks;  // of a row
  template <class L>
  __device__ __forceinline__ Floats<L::count> get(int64_t row, int64_t column, L) const {
    const float scale = to_float(scales[row * blocks + column / block_of(Bits)]);
    const int64_t at = row * blocks * block_of(Bits) + column;
    if constexpr (Bits == 8) {
      return map(get_codes<L::count>(codes + at), [](float code) { return code - (code > 127.f ? 256.f : 0.f); }) * scale;
    } else if constexpr (L::count == 8) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(codes + at / 2);
      Floats<8> v;
      nf4_values(word, v.v);
      nf4_values(word >> 16, v.v + 4);
      return v * scale;
    } else {
      float v[4];
      nf4_values(codes[at / 2] >> at % 2 * 4, v);
      return Floats<1>{{v[0]}} * scale;
    }
  }
};

template <class Weight, class T>
struct Widen {
  Weight weight;
  int64_t row, column, columns;
  T* to;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    const Division place = divide(i, columns);
    lanes.put(to + i, weight.get(row + place.quotient, column + place.rest, lanes));
  }
};

template <class Weight, class T>
static void widen(const Call& call, const Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t columns, T* to) {
  const Widen<Weight, T> body{weight, row, column, columns, to};
  for_elements<8>(call, rows * columns, columns % 8 == 0 && column % 8 == 0 && reinterpret_cast<uintptr_t>(weight.codes) % 8 == 0 && aligned(to), body);
}

// Columns that are widened at once, where sums run over rows.
static int64_t columns_at_once(int64_t n, int64_t k) {
  const int64_t fit = (int64_t{16} << 20) / (n > 0 ? n : 1) / 128 * 128;
  const int64_t columns = fit < 128 ? 128 : fit;
  return columns < k ? columns : k;
}

template <class T>
constexpr DType kDType = sizeof(T) == 2 ? DType::bf16 : DType::f32;

// dx[m k] (+)= dy[m n] w[n k].
template <class T, class Weight>
static void product_backward(const Call& call, const Weight& weight, int64_t n) {
  const View &dy = call.in[0], &dx = call.out[0];
  if (!dx) return;
  const int64_t m = dy.rows(), k = dx.cols(), block = columns_at_once(n, k);
  T* const panel = static_cast<T*>(call.workspace);
  for (int64_t begin = 0; begin < k; begin += block) {
    const int64_t columns = k - begin < block ? k - begin : block;
    widen(call, weight, 0, n, begin, columns, panel);
    Product product{m, columns, n, rows_of(dy.data, kDType<T>, n), rows_of(panel, kDType<T>, columns), dx.as<T>() + begin, kDType<T>, k};
    product.accumulate = call.accumulate[0];
    multiply(call, product);
  }
}

template <class T>
static size_t product_backward_workspace(const Call& call) {
  const int64_t n = call.in[1].dims[0], k = call.out[0].cols();
  return static_cast<size_t>(n * columns_at_once(n, k)) * sizeof(T);
}

// dequantize_fp8(q[n k]:u8, scale[n]:f32) -> w[n k]:f32
static void dequantize_fp8(const Call& call) {
  const View& w = call.out[0];
  if (!w) return;
  widen(call, Float8Rows{call.in[0].as<uint8_t>(), call.in[1].as<float>(), w.dims[1]}, 0, w.dims[0], 0, w.dims[1], w.as<float>());
}

// linear_fp8_backward(dy[* n], q[n k]:u8, scale[n]:f32) -> dx[* k]+
template <class T>
static void linear_fp8_backward(const Call& call) {
  const View& q = call.in[1];
  product_backward<T>(call, Float8Rows{q.as<uint8_t>(), call.in[2].as<float>(), q.dims[1]}, q.dims[0]);
}

// ---- Blocks

// quantize_q8(w[n k]:float, c, b) -> q[n c]:u8, scale[n b]:bf16; quantize_q4 likewise. A thread has a block: weights are made once. A
// NaN or an infinity makes its block NaN.
template <int Bits>
struct QuantizeBlocks {
  AnyFloats w;
  int64_t k, blocks;
  uint8_t* codes;
  bf16* scales;

  template <class L>
  __device__ __forceinline__ void operator()(int64_t at, L) const {
    constexpr int kBlock = static_cast<int>(block_of(Bits));
    const Division place = divide(at, blocks);
    const int64_t first = place.rest * kBlock, from = place.quotient * k + first;
    const int size = static_cast<int>(k - first < kBlock ? k - first : kBlock);
    float most = 0, bad = 0;
    for (int i = 0; i < size; ++i) {
      const float v = w.get(from + i, Lanes<1>{})[0];
      most = fmaxf(most, fabsf(v));
      bad += v * 0.f;
    }
    const float exact = most * (Bits == 8 ? 1.f / 127 : 1.f);
    const bf16 scale = to_bf16(fmaxf(exact, kLeastBlockScale) + bad);
    if (scales) scales[at] = scale;
    if (!codes) return;
    const float by = 1.f / to_float(scale);
    uint8_t* const to = codes + at * (kBlock * Bits / 8);
    const auto code_of = [&](int i) -> unsigned {
      if (i >= size) return Bits == 8 ? 0 : kNf4Zero;
      const float v = w.get(from + i, Lanes<1>{})[0] * by;
      if constexpr (Bits == 8) {
        return static_cast<unsigned>(static_cast<int>(rintf(fminf(fmaxf(v, -127.f), 127.f)))) & 0xffu;
      } else {
        unsigned code = 0;
#pragma unroll
        for (int j = 0; j < 15; ++j) code += v > nf4_middle(j);
        return code;
      }
    };
    for (int i = 0; i < kBlock * Bits / 8; ++i)
      to[i] = static_cast<uint8_t>(Bits == 8 ? code_of(i) : code_of(2 * i) | code_of(2 * i + 1) << 4);
  }
};

template <int Bits>
static void quantize_blocks(const Call& call) {
  const View& w = call.in[0];
  const int64_t k = w.dims[1], blocks = ceil_div(k, block_of(Bits));
  const QuantizeBlocks<Bits> body{AnyFloats(w), k, blocks, call.out[0].as<uint8_t>(), call.out[1].as<bf16>()};
  for_elements<1>(call, w.dims[0] * blocks, false, body);
}

template <int Bits>
static Blocks<Bits> blocks_of(const View& q, const View& scale) {
  return {q.as<uint8_t>(), scale.as<bf16>(), scale.dims[1]};
}

// dequantize_q8(q[n c]:u8, scale[n b]:bf16, k) -> w[n k]:f32; dequantize_q4 likewise
template <int Bits>
static void dequantize_blocks(const Call& call) {
  const View& w = call.out[0];
  if (w) widen(call, blocks_of<Bits>(call.in[0], call.in[1]), 0, w.dims[0], 0, w.dims[1], w.as<float>());
}

template <class T>
static bool has_few_tokens(const Call& call) {
  return std::is_same_v<T, bf16> && call.in[0].rows() <= kFewTokens;
}

// linear_q8(x[* k], q[n c]:u8, scale[n b]:bf16, bias[n]?, k) -> y[* n]; linear_q4 likewise
template <int Bits, class T>
static void linear_blocks(const Call& call) {
  const View &x = call.in[0], &q = call.in[1], &bias = call.in[3], &y = call.out[0];
  if (!y) return;
  const int64_t m = x.rows(), n = q.dims[0], k = x.cols(), block = rows_at_once(n, k);
  if (has_few_tokens<T>(call))
    return few_tokens<Bits>(call, x.as<bf16>(), q.as<uint8_t>(), call.in[2].as<bf16>(), bias.as<bf16>(), y.as<bf16>(), m, n, k, call.in[2].dims[1]);
  T* const panel = static_cast<T*>(call.workspace);
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t rows = n - begin < block ? n - begin : block;
    widen(call, blocks_of<Bits>(q, call.in[2]), begin, rows, 0, k, panel);
    Product product{m, rows, k, rows_of(x.data, kDType<T>, k), transposed(panel, kDType<T>, k), y.as<T>() + begin, kDType<T>, n};
    product.bias = bias ? bias.as<T>() + begin : nullptr;
    multiply(call, product);
  }
}

template <class T>
static size_t linear_blocks_workspace(const Call& call) {
  if (has_few_tokens<T>(call)) return 0;
  const int64_t n = call.in[1].dims[0], k = call.in[0].cols();
  return static_cast<size_t>(rows_at_once(n, k) * k) * sizeof(T);
}

// linear_q8_backward(dy[* n], q[n c]:u8, scale[n b]:bf16, k) -> dx[* k]+; linear_q4_backward likewise
template <int Bits, class T>
static void linear_blocks_backward(const Call& call) {
  product_backward<T>(call, blocks_of<Bits>(call.in[1], call.in[2]), call.in[1].dims[0]);
}

template <size_t (*F32)(const Call&), size_t (*Bf16)(const Call&)>
static size_t workspace_by_dtype(const Call& call) {
  return (call.in[0].dtype == DType::bf16 ? Bf16 : F32)(call);
}

}  // namespace limbeck::cuda

#define LIMBECK_BACKWARD workspace_by_dtype<product_backward_workspace<float>, product_backward_workspace<bf16>>
#define LIMBECK_BLOCKS(bits)                                                                                          \
  {"quantize_q" #bits, quantize_blocks<bits>}, {"dequantize_q" #bits, dequantize_blocks<bits>},                       \
      {"linear_q" #bits, by_dtype<linear_blocks<bits, float>, linear_blocks<bits, bf16>>,                             \
       workspace_by_dtype<linear_blocks_workspace<float>, linear_blocks_workspace<bf16>>},                            \
      {"linear_q" #bits "_backward", by_dtype<linear_blocks_backward<bits, float>, linear_blocks_backward<bits, bf16>>, LIMBECK_BACKWARD}
LIMBECK_KERNELS(quant, {"quantize_fp8", by_dtype<quantize_fp8<float>, quantize_fp8<bf16>>}, {"dequantize_fp8", dequantize_fp8},
                {"linear_fp8", by_dtype<linear_fp8<float>, linear_fp8<bf16>>, linear_fp8_workspace},
                {"linear_fp8_backward", by_dtype<linear_fp8_backward<float>, linear_fp8_backward<bf16>>, LIMBECK_BACKWARD},
                LIMBECK_BLOCKS(8), LIMBECK_BLOCKS(4))
