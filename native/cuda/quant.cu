// Frozen weights of one byte (fp8, e4m3), each row with a scale of its own. A product rounds its tokens in the same way. On compute
// capability 9.0 the library multiplies fp8 with a scale for each row of both; elsewhere, and for sizes that its instructions cannot
// take, both become bf16, which holds every fp8 number exactly, some rows of the weight at a time, and a pass of ours scales the sums.
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

}  // namespace limbeck::cuda

LIMBECK_KERNELS(quant, {"quantize_fp8", by_dtype<quantize_fp8<float>, quantize_fp8<bf16>>},
                {"linear_fp8", by_dtype<linear_fp8<float>, linear_fp8<bf16>>, linear_fp8_workspace})
