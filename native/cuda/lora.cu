// What adapters of low rank need beside products: lengths of rows, columns scaled to new lengths, dropout.
#include "core/random.h"
#include "cuda/lanes.cuh"

namespace limbeck::cuda {

template <class T>
struct RowSquares {
  const T* w;
  float* s;
  template <class Team, class L>
  __device__ __forceinline__ void operator()(int64_t row, Team team, L) const {
    const auto held = team.read(w + row * team.c);
    float total = 0;
    team.each([&](int64_t i, int k) {
      const auto v = held.get(i, k);
      total += sum(v * v);
    });
    total = team.sum(total);
    if (threadIdx.x == 0) s[row] = total;
  }
};

// row_squares(w[n k]:float) -> s[n]:f32
template <class T>
static void row_squares(const Call& call) {
  const View& w = call.in[0];
  const RowSquares<T> body{w.as<T>(), call.out[0].as<float>()};
  if (body.s) for_rows<kVector<T>>(call, w.dims[0], w.dims[1], aligned(body.w), body);
}

// low_rank_norms(squares[n]:f32, p[r n], b[n r]:float, g[r r], scale) -> norm[n]:f32
// |w + s b a|² = |w|² + 2 s b·(a w) + s² b (a aᵀ) bᵀ for a row w of W and a row b of B; p = A Wᵀ, g = A Aᵀ.
template <class T>
struct LowRankNorms {
  const float* squares;
  const T *p, *g;
  AnyFloats b;
  int64_t n, r;
  float scale;
  float* norm;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t row, L) const {
    const Lanes<1> one;
    float total = 0;
    for (int64_t i = 0; i < r; ++i) {
      float inner = 0;
      for (int64_t j = 0; j < r; ++j) inner += to_float(g[i * r + j]) * b.get(row * r + j, one)[0];
      total += b.get(row * r + i, one)[0] * (2.f * to_float(p[i * n + row]) + scale * inner);
    }
    const float square = squares[row] + scale * total;
    norm[row] = square < 0.f ? 0.f : sqrtf(square);
  }
};

template <class T>
static void low_rank_norms(const Call& call) {
  const View& p = call.in[1];
  const LowRankNorms<T> body{call.in[0].as<float>(), p.as<T>(), call.in[3].as<T>(), AnyFloats(call.in[2]), p.dims[1], p.dims[0],
                             static_cast<float>(call.scalar[0]), call.out[0].as<float>()};
  if (body.norm) for_elements<1>(call, body.n, false, body);
}

// x · m / norm (+ bias), each column with its own.
template <class T>
struct ScaleColumns {
  const T* x;
  AnyFloats m;
  const float* norm;
  const T* bias;
  int64_t n;
  Sink<T> y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t at, L lanes) const {
    const int64_t i = divide(at, n).rest;
    const auto v = lanes.get(x + at) * (m.get(i, lanes) / lanes.get(norm + i));
    y.put(at, lanes, bias ? v + lanes.get(bias + i) : v);
  }
};

template <class T>
static void scale(const Call& call, const View& x, const View& m, const View& norm, const View& bias) {
  const ScaleColumns<T> body{x.as<T>(), AnyFloats(m), norm.as<float>(), bias.as<T>(), norm.size(), Sink<T>(call, 0)};
  constexpr int N = 4;
  if (body.y.data) for_elements<N>(call, x.size(), body.n % N == 0 && aligned(body.x, m.as<char>(), body.norm, body.bias, body.y.data), body);
}

// scale_columns(x[* n], m[n]:float, norm[n]:f32, bias[n]?) -> y[* n]
template <class T>
static void scale_columns(const Call& call) {
  scale<T>(call, call.in[0], call.in[1], call.in[2], call.in[3]);
}

// part[p, j]: the sum of dy · x / norm over a part's rows. A thread has a column.
template <class T>
__global__ void __launch_bounds__(kThreads) magnitude_kernel(const T* dy, const T* x, const float* norm, int64_t rows, int64_t n, int64_t each, float* part) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= n) return;
  const int64_t begin = blockIdx.y * each, end = begin + each < rows ? begin + each : rows;
  float total = 0;
#pragma unroll 4
  for (int64_t i = begin; i < end; ++i) total += to_float(dy[i * n + j]) * to_float(x[i * n + j]);
  part[blockIdx.y * n + j] = total / norm[j];
}

constexpr int kPartRows = 16;

// scale_columns_backward(dy[* n], x[* n], m[n]:float, norm[n]:f32) -> dx[* n]+, dm[n]:f32+
template <class T>
static void scale_columns_backward(const Call& call) {
  const View &dy = call.in[0], &x = call.in[1], &norm = call.in[3];
  scale<T>(call, dy, call.in[2], norm, View{});
  const Sink<float> dm(call, 1);
  if (!dm.data) return;
  const int64_t rows = dy.rows(), n = norm.size();
  const RowParts parts(rows, kPartRows);
  float* const part = static_cast<float*>(call.workspace);
  if (parts.count > 0)
    launch(call, Grid{dim3(static_cast<unsigned>(ceil_div(n, kThreads)), static_cast<unsigned>(parts.count)), dim3(kThreads)},
           magnitude_kernel<T>, dy.as<T>(), x.as<T>(), norm.as<float>(), rows, n, parts.each, part);
  sum_parts(call, part, parts.count, n, n, dm);
}

static size_t scale_columns_backward_workspace(const Call& call) {
  return static_cast<size_t>(RowParts(call.in[0].rows(), kPartRows).count * call.in[0].cols()) * sizeof(float);
}

// Elements 4 block to 4 block + 3 share a block of random numbers.
template <class T>
struct Dropout {
  const T* x;
  Sink<T> y;
  float rate;
  uint64_t seed, stream;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    const auto bits = random_block(seed, stream, static_cast<uint64_t>(i / 4));
    auto v = lanes.get(x + i) * (1.f / (1.f - rate));
#pragma unroll
    for (int k = 0; k < L::count; ++k)
      if (uniform(bits[static_cast<size_t>((i + k) % 4)]) < rate) v[k] = 0.f;
    y.put(i, lanes, v);
  }
};

// dropout(x[*], rate, seed, stream) -> y[*]; dropout_backward is the same of dy.
template <class T>
static void dropout(const Call& call) {
  const Dropout<T> body{call.in[0].as<T>(), Sink<T>(call, 0), static_cast<float>(call.scalar[0]), static_cast<uint64_t>(call.scalar[1]),
                        static_cast<uint64_t>(call.scalar[2])};
  if (body.y.data) for_elements<4>(call, call.in[0].size(), aligned(body.x, body.y.data), body);
}

}  // namespace limbeck::cuda

LIMBECK_KERNELS(lora, {"row_squares", by_dtype<row_squares<float>, row_squares<bf16>>},
                {"low_rank_norms", by_dtype<low_rank_norms<float>, low_rank_norms<bf16>, 1>},
                {"scale_columns", by_dtype<scale_columns<float>, scale_columns<bf16>>},
                {"scale_columns_backward", by_dtype<scale_columns_backward<float>, scale_columns_backward<bf16>>, scale_columns_backward_workspace},
                {"dropout", by_dtype<dropout<float>, dropout<bf16>>}, {"dropout_backward", by_dtype<dropout<float>, dropout<bf16>>})
