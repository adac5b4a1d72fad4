// Matrix products with a weight [n k], and the second half of a gated MLP. The products are the library's, with float32 sums; here are
// the passes around them at the speed of memory: the activation before a product, its slopes after one, sums over rows for a bias.
#include "cuda/gate.cuh"
#include "cuda/products.cuh"

namespace limbeck::cuda {

template <class T>
constexpr DType kDType = sizeof(T) == 2 ? DType::bf16 : DType::f32;

// ---- dbias: a block sums 32 vectors of columns over its part of the rows, a warp every 8th row; then the parts are added in order.

constexpr int kSumWarps = 8, kSumRows = 64;

template <class T, int N>
__global__ void __launch_bounds__(kWarp* kSumWarps) bias_gradient_kernel(const T* x, int64_t rows, int64_t c, int64_t each, float* part) {
  Shared shared;
  auto* sums = shared.take<float>(kWarp * kSumWarps * N);
  const Lanes<N> lanes;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x) * N;
  const int64_t begin = blockIdx.y * each, end = begin + each < rows ? begin + each : rows;
  auto s = splat<N>(0);
  if (column < c)
#pragma unroll 4
    for (int64_t i = begin + threadIdx.y; i < end; i += kSumWarps) s = s + lanes.get(x + i * c + column);
  for (int j = 0; j < N; ++j) sums[(threadIdx.y * N + j) * kWarp + threadIdx.x] = s[j];
  __syncthreads();
  if (threadIdx.y > 0 || column >= c) return;
  for (int warp = 1; warp < kSumWarps; ++warp)
    for (int j = 0; j < N; ++j) s[j] += sums[(warp * N + j) * kWarp + threadIdx.x];
  lanes.put(part + blockIdx.y * c + column, s);
}

template <class T>
static void bias_gradient(const Call& call, const T* x, int64_t rows, int64_t c, float* part, Sink<float> total) {
  const RowParts parts(rows, kSumRows);
  // A part's row of float32 is written in vectors too.
  constexpr int N = kVector<T>;
  const bool wide = c % N == 0 && aligned(x, part);
  const auto grid = [&](int n) {
    return Grid{dim3(static_cast<unsigned>(ceil_div(c, kWarp * n)), static_cast<unsigned>(parts.count)), dim3(kWarp, kSumWarps), kWarp * kSumWarps * n * sizeof(float)};
  };
  if (wide) launch(call, grid(N), bias_gradient_kernel<T, N>, x, rows, c, parts.each, part);
  else launch(call, grid(1), bias_gradient_kernel<T, 1>, x, rows, c, parts.each, part);
  sum_parts(call, part, parts.count, c, c, total);
}

// ---- linear(x[* k], w[n k]:float, bias[n]?) -> y[* n]

template <class T>
static void linear(const Call& call) {
  const View &x = call.in[0], &w = call.in[1], &y = call.out[0];
  if (!y) return;
  const int64_t n = w.dims[0], k = w.dims[1];
  Parts parts(call.workspace);
  const void* weight = in_dtype<T>(call, w, parts);
  multiply(call, x.rows(), n, k, rows_of(x.data, kDType<T>, k), transposed(weight, kDType<T>, k), y, false, call.in[2].data);
}

template <class T>
static size_t linear_workspace(const Call& call) {
  Parts parts;
  in_dtype<T>(call, call.in[1], parts);
  return parts.used();
}

// ---- linear_backward(dy[* n], x[* k], w[n k]:float) -> dx[* k]+, dw[n k]:f32+, dbias[n]:f32+

template <class T>
static void linear_backward(const Call& call) {
  const View &dy = call.in[0], &x = call.in[1], &w = call.in[2];
  const View &dx = call.out[0], &dw = call.out[1], &dbias = call.out[2];
  const int64_t m = dy.rows(), n = w.dims[0], k = w.dims[1];
  Parts parts(call.workspace);
  if (dx) {
    const void* weight = in_dtype<T>(call, w, parts);
    multiply(call, m, k, n, rows_of(dy.data, kDType<T>, n), rows_of(weight, kDType<T>, k), dx, call.accumulate[0]);
  }
  if (dw) multiply(call, n, k, m, transposed(dy.data, kDType<T>, n), rows_of(x.data, kDType<T>, k), dw, call.accumulate[1]);
  if (dbias) bias_gradient(call, dy.as<T>(), m, n, parts.take<float>(RowParts(m, kSumRows).count * n), Sink<float>(call, 2));
}

template <class T>
static size_t linear_backward_workspace(const Call& call) {
  Parts parts;
  if (call.out[0]) in_dtype<T>(call, call.in[2], parts);
  if (call.out[2]) parts.take<float>(RowParts(call.in[0].rows(), kSumRows).count * call.in[2].dims[0]);
  return parts.used();
}

// ---- gated_linear(gate[* f], up[* f], w[n f]:float, kind) -> y[* n]

template <class T, Gate G>
struct GatedActivation {
  const T *gate, *up;
  T* act;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    lanes.put(act + i, map(lanes.get(gate + i), [](float v) { return gate_value<G>(v); }) * lanes.get(up + i));
  }
};

template <class T, Gate G>
static void activate(const Call& call, const View& gate, const View& up, T* act) {
  const GatedActivation<T, G> body{gate.as<T>(), up.as<T>(), act};
  for_elements<kVector<T>>(call, gate.size(), aligned(body.gate, body.up, body.act), body);
}

static bool is_silu(const Call& call) { return static_cast<int>(call.scalar[0]) == static_cast<int>(Gate::silu); }

template <class T>
static void gated_linear(const Call& call) {
  const View &gate = call.in[0], &up = call.in[1], &w = call.in[2], &y = call.out[0];
  if (!y) return;
  const int64_t n = w.dims[0], f = w.dims[1];
  Parts parts(call.workspace);
  T* act = parts.take<T>(gate.size());
  const void* weight = in_dtype<T>(call, w, parts);
  (is_silu(call) ? activate<T, Gate::silu> : activate<T, Gate::gelu_tanh>)(call, gate, up, act);
  multiply(call, gate.rows(), n, f, rows_of(act, kDType<T>, f), transposed(weight, kDType<T>, f), y);
}

template <class T>
static size_t gated_linear_workspace(const Call& call) {
  Parts parts;
  parts.take<T>(call.in[0].size());
  in_dtype<T>(call, call.in[2], parts);
  return parts.used();
}

// ---- gated_linear_backward(dy[* n], gate[* f], up[* f], w[n f]:float, kind) -> dgate[* f], dup[* f], dw[n f]:f32+

// One pass makes both gradients from that of the activation, and in its place the activation once more for dw. The gradients may lie
// where gate and up do.
template <class T, Gate G>
struct GatedSlopes {
  const T *gate, *up, *dact;
  T *dgate, *dup, *act;  // null where not wanted
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    const auto g = lanes.get(gate + i), u = lanes.get(up + i), d = lanes.get(dact + i);
    Floats<L::count> value, slope;
#pragma unroll
    for (int j = 0; j < L::count; ++j) gate_slope<G>(g[j], value[j], slope[j]);
    if (dgate) lanes.put(dgate + i, d * u * slope);
    if (dup) lanes.put(dup + i, d * value);
    if (act) lanes.put(act + i, value * u);
  }
};

template <class T, Gate G>
static void slopes(const Call& call, const T* dact, T* act) {
  const View& gate = call.in[1];
  const GatedSlopes<T, G> body{gate.as<T>(), call.in[2].as<T>(), dact, call.out[0].as<T>(), call.out[1].as<T>(), act};
  for_elements<kVector<T>>(call, gate.size(), aligned(body.gate, body.up, body.dact, body.dgate, body.dup, body.act), body);
}

template <class T>
static void gated_linear_backward(const Call& call) {
  const View &dy = call.in[0], &gate = call.in[1], &up = call.in[2], &w = call.in[3];
  const View &dgate = call.out[0], &dup = call.out[1], &dw = call.out[2];
  const int64_t m = dy.rows(), n = w.dims[0], f = w.dims[1];
  const bool silu = is_silu(call);
  Parts parts(call.workspace);
  T* act = parts.take<T>(gate.size());
  if (dgate || dup) {
    const void* weight = in_dtype<T>(call, w, parts);
    multiply(call, {m, f, n, rows_of(dy.data, kDType<T>, n), rows_of(weight, kDType<T>, f), act, kDType<T>, f});
    (silu ? slopes<T, Gate::silu> : slopes<T, Gate::gelu_tanh>)(call, act, dw ? act : nullptr);
  } else if (dw) {
    (silu ? activate<T, Gate::silu> : activate<T, Gate::gelu_tanh>)(call, gate, up, act);
  }
  if (dw) multiply(call, n, f, m, transposed(dy.data, kDType<T>, n), rows_of(act, kDType<T>, f), dw, call.accumulate[2]);
}

template <class T>
static size_t gated_linear_backward_workspace(const Call& call) {
  Parts parts;
  parts.take<T>(call.in[1].size());
  if (call.out[0] || call.out[1]) in_dtype<T>(call, call.in[3], parts);
  return parts.used();
}

template <size_t (*F32)(const Call&), size_t (*Bf16)(const Call&)>
static size_t workspace_by_dtype(const Call& call) {
  return (call.in[0].dtype == DType::bf16 ? Bf16 : F32)(call);
}

}  // namespace limbeck::cuda

#define LIMBECK_PRODUCT(name) \
  {#name, by_dtype<name<float>, name<bf16>>, workspace_by_dtype<name##_workspace<float>, name##_workspace<bf16>>}
LIMBECK_KERNELS(linear, LIMBECK_PRODUCT(linear), LIMBECK_PRODUCT(linear_backward), LIMBECK_PRODUCT(gated_linear),
                LIMBECK_PRODUCT(gated_linear_backward))
