// Sums to one number, in float64 over chunks of a fixed size that are added in a fixed order; and reductions over the last dimension
// (c), a warp or a block for each row. Rows that the threads of a block can hold are read once.
#include "core/checks.h"
#include "cuda/top.cuh"

namespace limbeck::cuda {

constexpr int64_t kChunk = 16384;

static size_t chunk_sums_bytes(const Call& call) { return sizeof(double) * static_cast<size_t>(ceil_div(call.in[0].size(), kChunk)); }

// What is summed, N neighbours at a time.
template <class T>
struct Sum {
  const T* x;
  template <class L>
  __device__ __forceinline__ double operator()(int64_t i, L lanes) const {
    const auto v = lanes.get(x + i);
    double s = v[0];
#pragma unroll
    for (int k = 1; k < L::count; ++k) s += static_cast<double>(v[k]);
    return s;
  }
};
template <class T>
struct Dot {
  const T *a, *b;
  template <class L>
  __device__ __forceinline__ double operator()(int64_t i, L lanes) const {
    const auto v = lanes.get(a + i), w = lanes.get(b + i);
    double s = 0;
#pragma unroll
    for (int k = 0; k < L::count; ++k) s += static_cast<double>(v[k]) * static_cast<double>(w[k]);
    return s;
  }
};
// 1 where an element is infinite or NaN.
template <class T>
struct Bad {
  const T* x;
  template <class L>
  __device__ __forceinline__ double operator()(int64_t i, L lanes) const {
    const auto v = lanes.get(x + i);
    float zero = 0;
#pragma unroll
    for (int k = 0; k < L::count; ++k) zero += v[k] * 0.f;  // 0, or NaN
    return zero == 0 ? 0 : 1;
  }
};

template <int N, class Value>
__global__ void __launch_bounds__(kThreads) chunk_sums_kernel(int64_t n, bool whole, Value value, double* sums) {
  Shared shared;
  auto* scratch = shared.take<double>(kWarp);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int count = static_cast<int>(n - begin < kChunk ? n - begin : kChunk), vectors = whole ? count / N : 0;
  double s = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += kThreads) s += value(begin + i * N, Lanes<N>{});
  for (int i = vectors * N + threadIdx.x; i < count; i += kThreads) s += value(begin + i, Lanes<1>{});
  s = block_reduce(s, Plus{}, 0.0, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = s;
}

template <class Finish>
__global__ void __launch_bounds__(kRowThreads) finish_kernel(int64_t count, const double* sums, Finish finish) {
  Shared shared;
  auto* scratch = shared.take<double>(kWarp);
  double s = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) s += sums[i];
  s = block_reduce(s, Plus{}, 0.0, scratch);
  if (threadIdx.x == 0) finish(s);
}

// finish(the sum of value over all elements).
template <int N, class Value, class Finish>
static void total(const Call& call, bool whole, const Value& value, const Finish& finish) {
  if (!call.out[0]) return;
  const int64_t n = call.in[0].size(), count = ceil_div(n, kChunk);
  double* sums = static_cast<double*>(call.workspace);
  const size_t shared = kWarp * sizeof(double);
  launch(call, Grid{dim3(static_cast<unsigned>(count)), dim3(kThreads), shared}, chunk_sums_kernel<N, Value>, n, whole, value, sums);
  const unsigned threads = count > kThreads ? kRowThreads : kThreads;
  launch(call, Grid{dim3(1), dim3(threads), shared}, finish_kernel<Finish>, count, sums, finish);
}

struct Divided {
  float* y;
  double by;
  __device__ __forceinline__ void operator()(double s) const { *y = static_cast<float>(s / by); }
};
struct Onward {
  const double* before;
  double* y;
  __device__ __forceinline__ void operator()(double s) const { *y = before ? *before + s : s; }
};
struct IsZero {
  int32_t* y;
  __device__ __forceinline__ void operator()(double s) const { *y = s == 0; }
};

// sum(x[*]) -> y[]:f32; mean(x[*]) -> y[]:f32, of nothing it is NaN.
template <class T, bool Mean>
static void sum_all(const Call& call) {
  const View& x = call.in[0];
  total<kVector<T>>(call, aligned(x.as<T>()), Sum<T>{x.as<T>()}, Divided{call.out[0].as<float>(), Mean ? static_cast<double>(x.size()) : 1.0});
}

// dot(a[*], b[*]) -> y[]:f32
template <class T>
static void dot(const Call& call) {
  const Dot<T> value{call.in[0].as<T>(), call.in[1].as<T>()};
  total<kVector<T>>(call, aligned(value.a, value.b), value, Divided{call.out[0].as<float>(), 1.0});
}

// squared_norm(x[*], before[]:f64?) -> y[]:f64
template <class T>
static void squared_norm(const Call& call) {
  const T* x = call.in[0].as<T>();
  total<kVector<T>>(call, aligned(x), Dot<T>{x, x}, Onward{call.in[1].as<const double>(), call.out[0].as<double>()});
}

// is_finite(x[*]) -> y[]:i32: 1 where no element is infinite or NaN.
template <class T>
static void is_finite(const Call& call) {
  const T* x = call.in[0].as<T>();
  total<kVector<T>>(call, aligned(x), Bad<T>{x}, IsZero{call.out[0].as<int32_t>()});
}

template <class T>
struct Spread {
  const float* dy;
  double factor;
  Sink<T> dx;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    dx.put(i, lanes, splat<L::count>(static_cast<float>(*dy * factor)));
  }
};

// sum_backward(dy[]:f32, x[*]) -> dx[*]+, mean_backward(dy[]:f32, x[*]) -> dx[*]+
template <class T, bool Mean>
static void spread(const Call& call) {
  const int64_t n = call.in[1].size();
  const Spread<T> body{call.in[0].as<float>(), Mean ? 1 / static_cast<double>(n) : 1.0, Sink<T>(call, 0)};
  for_elements<kVector<T>>(call, n, aligned(body.dx.data), body);
}

template <class T>
struct DotBackward {
  const float* dy;
  const T *a, *b;
  Sink<T> da, db;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    const float d = *dy;
    if (da) da.put(i, lanes, lanes.get(b + i) * d);
    if (db) db.put(i, lanes, lanes.get(a + i) * d);
  }
};

// dot_backward(dy[]:f32, a[*], b[*]) -> da[*]+, db[*]+
template <class T>
static void dot_backward(const Call& call) {
  const DotBackward<T> body{call.in[0].as<float>(), call.in[1].as<T>(), call.in[2].as<T>(), Sink<T>(call, 0), Sink<T>(call, 1)};
  for_elements<kVector<T>>(call, call.in[1].size(), aligned(body.a, body.b, body.da.data, body.db.data), body);
}

// ---- Rows.

template <class T>
struct Argmax {
  const T* x;
  int32_t* y;
  template <class Team, class L>
  __device__ __forceinline__ void operator()(int64_t row, Team team, L) const {
    const auto held = team.read(x + row * team.c);
    unsigned long long best = 0;
    team.each([&](int64_t i, int k) {
      const auto v = held.get(i, k);
#pragma unroll
      for (int j = 0; j < L::count; ++j) best = Larger{}(best, key_of(v[j], i + j));
    });
    best = team.largest(best);
    if (threadIdx.x == 0) y[row] = column_of(best);
  }
};

// argmax(x[* c]) -> y[*]:i32: the first of equal maxima; a NaN counts as the largest, as in NumPy.
template <class T>
static void argmax(const Call& call) {
  const View& x = call.in[0];
  check_argmax(call);
  if (!call.out[0]) return;
  for_rows<kVector<T>>(call, x.rows(), x.cols(), aligned(x.as<T>()), Argmax<T>{x.as<T>(), call.out[0].as<int32_t>()});
}

template <class T>
struct TopK {
  const T* x;
  top::Rows rows;
  T* values;
  int32_t* ids;
  __device__ __forceinline__ void operator()(int64_t row, const Key* keys) const {
    for (int i = static_cast<int>(threadIdx.x); i < rows.k; i += static_cast<int>(blockDim.x)) {
      const int32_t id = column_of(keys[i]);
      ids[row * rows.k + i] = id;
      values[row * rows.k + i] = x[row * rows.stride + id];
    }
  }
};

static top::Rows rows_of_top_k(const Call& call) { return {call.in[0].cols(), call.in[0].cols(), static_cast<int64_t>(call.scalar[0])}; }

// top_k(x[* c], k) -> values[* k], ids[* k]:i32: the largest first, the first of equals before the others; a NaN counts as the largest.
template <class T>
static void top_k(const Call& call) {
  check_top_k(call);
  const View& x = call.in[0];
  const top::Rows rows = rows_of_top_k(call);
  T* values = call.out[0].as<T>();
  int32_t* ids = call.out[1].as<int32_t>();
  if (!values || !ids) return;
  top::largest<false>(call, x.as<const T>(), x.rows(), rows, nullptr, [&](int64_t first, const top::Sums*) {
    return TopK<T>{x.as<const T>() + first * rows.stride, rows, values + first * rows.k, ids + first * rows.k};
  });
}

static size_t top_k_bytes(const Call& call) { return top::bytes(call.in[0].rows(), rows_of_top_k(call)); }

// The largest element and the sum of exp(x - largest), in one pass: what was summed is scaled when a larger element comes.
struct Normaliser {
  float top = -INFINITY, sum = 0;
  // What to subtract: 0 before anything but -inf came, as -inf - -inf is no number.
  static __device__ __forceinline__ float base(float top) { return top == -INFINITY ? 0.f : top; }

  template <int N>
  __device__ __forceinline__ void add(const Floats<N>& v) {
    float higher = top;
#pragma unroll
    for (int j = 0; j < N; ++j) higher = fmaxf(higher, v[j]);
    const float b = base(higher);
    sum *= expf(top - b);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += expf(v[j] - b);
    top = higher;
  }
  template <class Team>
  __device__ __forceinline__ void combine(Team team) {
    const float highest = team.largest(top);
    sum = team.sum(sum * expf(top - base(highest)));
    top = highest;
  }
};

// softmax: exp(x - top) / sum; log_softmax: (x - top) - log(sum), apart: their sum would round the small one away.
template <class T, bool Log>
struct Softmax {
  const T* x;
  T* y;
  template <class Team, class L>
  __device__ __forceinline__ void operator()(int64_t row, Team team, L lanes) const {
    const auto held = team.read(x + row * team.c);
    Normaliser z;
    team.each([&](int64_t i, int k) { z.add(held.get(i, k)); });
    z.combine(team);
    const float top = z.top, last = Log ? logf(z.sum) : 1.f / z.sum;
    team.each([&](int64_t i, int k) {
      const auto v = held.get(i, k) - top;
      lanes.put(y + row * team.c + i, Log ? v - last : map(v, [](float e) { return expf(e); }) * last);
    });
  }
};

// softmax(x[* c]) -> y[* c], log_softmax(x[* c]) -> y[* c]
template <class T, bool Log>
static void softmax(const Call& call) {
  const View& x = call.in[0];
  const Softmax<T, Log> body{x.as<T>(), call.out[0].as<T>()};
  if (body.y) for_rows<kVector<T>>(call, x.rows(), x.cols(), aligned(body.x, body.y), body);
}

// softmax: dx = y (dy - sum(dy y)); log_softmax: dx = dy - exp(y) sum(dy).
template <class T, bool Log>
struct SoftmaxBackward {
  const T *dy, *y;
  Sink<T> dx;
  template <class Team, class L>
  __device__ __forceinline__ void operator()(int64_t row, Team team, L lanes) const {
    const auto d = team.read(dy + row * team.c), p = team.read(y + row * team.c);
    float s = 0;
    team.each([&](int64_t i, int k) { s += sum(Log ? d.get(i, k) : d.get(i, k) * p.get(i, k)); });
    s = team.sum(s);
    team.each([&](int64_t i, int k) {
      const auto v = d.get(i, k), q = p.get(i, k);
      dx.put(row * team.c + i, lanes, Log ? v - map(q, [](float e) { return expf(e); }) * s : q * (v - s));
    });
  }
};

// softmax_backward(dy[* c], y[* c]) -> dx[* c]+, log_softmax_backward(dy[* c], y[* c]) -> dx[* c]+
template <class T, bool Log>
static void softmax_backward(const Call& call) {
  const View& y = call.in[1];
  const SoftmaxBackward<T, Log> body{call.in[0].as<T>(), y.as<T>(), Sink<T>(call, 0)};
  if (body.dx.data) for_rows<kVector<T>>(call, y.rows(), y.cols(), aligned(body.dy, body.y, body.dx.data), body);
}

}  // namespace limbeck::cuda

#define BOTH(f) by_dtype<f<float>, f<bf16>>
#define BOTH_OF(f, flag, ...) by_dtype<f<float, flag>, f<bf16, flag> __VA_OPT__(, ) __VA_ARGS__>
LIMBECK_KERNELS(reduce, {"sum", BOTH_OF(sum_all, false), chunk_sums_bytes}, {"sum_backward", BOTH_OF(spread, false, 1)},
                {"mean", BOTH_OF(sum_all, true), chunk_sums_bytes}, {"mean_backward", BOTH_OF(spread, true, 1)},
                {"dot", BOTH(dot), chunk_sums_bytes}, {"dot_backward", by_dtype<dot_backward<float>, dot_backward<bf16>, 1>},
                {"squared_norm", BOTH(squared_norm), chunk_sums_bytes}, {"is_finite", BOTH(is_finite), chunk_sums_bytes},
                {"argmax", BOTH(argmax)}, {"top_k", BOTH(top_k), top_k_bytes}, {"softmax", BOTH_OF(softmax, false)}, {"softmax_backward", BOTH_OF(softmax_backward, false)},
                {"log_softmax", BOTH_OF(softmax, true)}, {"log_softmax_backward", BOTH_OF(softmax_backward, true)})
