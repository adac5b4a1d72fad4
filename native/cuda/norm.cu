// Normalisation over the last dimension (c). Forward: a warp or a block holds a row in registers, so that it is read once. Backward: a
// block walks over a fixed part of the rows, several at a time to keep enough loads on their way, and keeps the sums over its rows
// (dw, dbias) in registers; a second kernel adds the parts in order.
#include "cuda/lanes.cuh"

namespace limbeck::cuda {

// y = x rstd (offset + w) (+ residual).
template <class T>
struct RmsNorm {
  const T *x, *residual;
  AnyFloats w;
  float eps, offset;
  T* y;
  float* rstd;

  template <class Team, class L>
  __device__ __forceinline__ void operator()(int64_t row, Team team, L lanes) const {
    const auto held = team.read(x + row * team.c);
    auto base = held;
    if (residual) base = team.read(residual + row * team.c);
    float squares = 0;
    team.each([&](int64_t i, int k) {
      const auto v = held.get(i, k);
      squares += sum(v * v);
    });
    squares = team.sum(squares);
    const float r = 1.f / sqrtf((team.c > 0 ? squares / static_cast<float>(team.c) : 0.f) + eps);
    if (rstd && threadIdx.x == 0) rstd[row] = r;
    if (!y) return;
    team.each([&](int64_t i, int k) {
      const auto v = held.get(i, k) * r * (w.get(i, lanes) + offset);
      lanes.put(y + row * team.c + i, residual ? base.get(i, k) + v : v);
    });
  }
};

// rms_norm(x[* c], w[c]:float, eps, offset) -> y[* c], rstd[*]:f32
// rms_norm_add(x[* c], w[c]:float, residual[* c], eps, offset) -> y[* c], rstd[*]:f32
template <class T>
static void rms_norm(const Call& call) {
  const View &x = call.in[0], &w = call.in[1];
  const RmsNorm<T> body{x.as<T>(), call.in[2].as<T>(), AnyFloats(w), static_cast<float>(call.scalar[0]), static_cast<float>(call.scalar[1]),
                        call.out[0].as<T>(), call.out[1].as<float>()};
  for_rows<kVector<T>>(call, x.rows(), x.cols(), aligned(body.x, body.residual, body.w.data, body.y), body);
}

// y = (x - mean) rstd w (+ bias).
template <class T>
struct LayerNorm {
  const T* x;
  AnyFloats w, bias;
  float eps;
  T* y;
  float *mean, *rstd;

  template <class Team, class L>
  __device__ __forceinline__ void operator()(int64_t row, Team team, L lanes) const {
    const auto held = team.read(x + row * team.c);
    const float per = team.c > 0 ? 1.f / static_cast<float>(team.c) : 0.f;
    float total = 0, squares = 0;
    team.each([&](int64_t i, int k) { total += sum(held.get(i, k)); });
    const float m = team.sum(total) * per;
    team.each([&](int64_t i, int k) {
      const auto v = held.get(i, k) - m;
      squares += sum(v * v);
    });
    const float r = 1.f / sqrtf(team.sum(squares) * per + eps);
    if (threadIdx.x == 0) {
      if (mean) mean[row] = m;
      if (rstd) rstd[row] = r;
    }
    if (!y) return;
    team.each([&](int64_t i, int k) {
      const auto v = (held.get(i, k) - m) * r * w.get(i, lanes);
      lanes.put(y + row * team.c + i, bias.data ? v + bias.get(i, lanes) : v);
    });
  }
};

// layer_norm(x[* c], w[c]:float, bias[c]:float?, eps) -> y[* c], mean[*]:f32, rstd[*]:f32
template <class T>
static void layer_norm(const Call& call) {
  const View& x = call.in[0];
  const LayerNorm<T> body{x.as<T>(), AnyFloats(call.in[1]), AnyFloats(call.in[2]), static_cast<float>(call.scalar[0]), call.out[0].as<T>(),
                          call.out[1].as<float>(), call.out[2].as<float>()};
  for_rows<kVector<T>>(call, x.rows(), x.cols(), aligned(body.x, body.w.data, body.bias.data, body.y), body);
}

// ---- Gradients, of both norms. With g the factor of xhat = (x - mean) rstd (offset + w, or w): dxhat = dy g,
// dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)), where rms_norm has no mean; dw = sum of dy xhat, dbias = sum of dy over the rows.

template <class T>
struct Backward {
  const T *dy, *x;
  AnyFloats w;
  float offset;
  const float *mean, *rstd;  // no mean: rms_norm
  Sink<T> dx;
  float *part_dw, *part_db;  // [part stride]; null where not wanted
};

constexpr int kBackwardThreads = 512, kBackwardWarps = 8;

// M sums over the threads of a row at once.
template <int M>
__device__ __forceinline__ void sum_many(float (&x)[M], float* scratch) {
#pragma unroll
  for (int m = 0; m < M; ++m) x[m] = warp_reduce(x[m], Plus{});
  if (blockDim.x == kWarp) return;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  __syncthreads();
  if (lane == 0)
#pragma unroll
    for (int m = 0; m < M; ++m) scratch[m * kWarp + threadIdx.x / kWarp] = x[m];
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) x[m] = warp_reduce(lane < warps ? scratch[m * kWarp + lane] : 0.f, Plus{});
}

// A block has `each` rows. Its threads along x share a row, of which each holds K vectors of N; along y stand warps with rows of their
// own. R rows are on their way at once.
template <class T, int N, int K, int R, bool Layer>
__global__ void __launch_bounds__(kBackwardThreads) backward_kernel(int64_t rows, int64_t c, int64_t each, int64_t stride, Backward<T> p) {
  Shared shared;
  constexpr int M = Layer ? 2 * R : R;
  auto* scratch = shared.take<float>(M * kWarp);
  const Lanes<N> lanes;
  const int64_t begin = blockIdx.x * each, end = begin + each < rows ? begin + each : rows;
  const float per = 1.f / static_cast<float>(c);
  constexpr bool kEarly = K < 4;  // what is added to comes with the rest, where there are registers for it
  const bool add = p.dx && p.dx.accumulate;

  // Wide rows leave no registers for the factors: they are read for each row, from the nearest cache.
  constexpr bool kHeld = K * N * (Layer ? 2 : 1) < 32;
  int at[K];
  Floats<N> g[K], sum_dw[K], sum_db[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    at[k] = static_cast<int>(threadIdx.x + k * blockDim.x) * N;
    if (kHeld) g[k] = at[k] < c ? p.w.get(at[k], lanes) + p.offset : splat<N>(0);
    sum_dw[k] = sum_db[k] = splat<N>(0);
  }
  const auto factor = [&](int k) { return kHeld ? g[k] : p.w.get(at[k], lanes) + p.offset; };

  for (int64_t row = begin + threadIdx.y * R; row < end; row += blockDim.y * R) {
    Packed<T, N> dy[R][K], x[R][K], old[R][K];  // the last of dx, where it is added to
    float m[R], r[R], dot[M] = {};
#pragma unroll
    for (int j = 0; j < R; ++j) {
      if (row + j >= end) continue;
      m[j] = Layer ? p.mean[row + j] : 0.f;
      r[j] = p.rstd[row + j];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (at[k] >= c) continue;
        dy[j][k] = Packed<T, N>::load(p.dy + (row + j) * c + at[k]);
        x[j][k] = Packed<T, N>::load(p.x + (row + j) * c + at[k]);
        if (kEarly && add) old[j][k] = Packed<T, N>::load(p.dx.data + (row + j) * c + at[k]);
      }
    }
    if (p.dx) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        if (row + j >= end) continue;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (at[k] >= c) continue;
          const auto d = dy[j][k].floats() * factor(k);
          dot[j] += sum(d * (x[j][k].floats() - m[j]));
          if constexpr (Layer) dot[R + j] += sum(d);
        }
      }
      sum_many(dot, scratch);
    }
#pragma unroll
    for (int j = 0; j < R; ++j) {
      if (row + j >= end) continue;
      const float slope = dot[j] * r[j] * per, shift = Layer ? dot[M - R + j] * per : 0.f;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (at[k] >= c) continue;
        const auto d = dy[j][k].floats(), xhat = (x[j][k].floats() - m[j]) * r[j];
        if (p.dx) {
          const auto made = (d * factor(k) - shift - xhat * slope) * r[j];
          T* const to = p.dx.data + (row + j) * c + at[k];
          lanes.put(to, !add ? made : kEarly ? old[j][k].floats() + made : lanes.get(to) + made);
        }
        sum_dw[k] = sum_dw[k] + d * xhat;
        if constexpr (Layer) sum_db[k] = sum_db[k] + d;
      }
    }
  }

  // Where warps have rows of their own, their sums are added in order.
  const auto put = [&](const Floats<N>(&sums)[K], float* part) {
    if (!part) return;
    if (blockDim.y > 1) {
      Shared again;
      again.take<float>(M * kWarp);
      auto* all = again.take<float>(static_cast<size_t>(blockDim.y) * c);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (at[k] < c) lanes.put(all + threadIdx.y * c + at[k], sums[k]);
      __syncthreads();
      for (int64_t i = threadIdx.y * kWarp + threadIdx.x; i < c; i += blockDim.y * kWarp) {
        float s = 0;
        for (unsigned y = 0; y < blockDim.y; ++y) s += all[y * c + i];
        part[blockIdx.x * stride + i] = s;
      }
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (at[k] < c) lanes.put(part + blockIdx.x * stride + at[k], sums[k]);
    }
  };
  put(sum_dw, p.part_dw);
  if constexpr (Layer) put(sum_db, p.part_db);
}

// Rows that no block can hold: dx row by row, and the sums in a pass of their own.
template <class T, bool Layer>
struct WideBackward {
  Backward<T> p;
  template <class Team, class L>
  __device__ __forceinline__ void operator()(int64_t row, Team team, L lanes) const {
    const T *dy = p.dy + row * team.c, *x = p.x + row * team.c;
    const float m = Layer ? p.mean[row] : 0.f, r = p.rstd[row], per = 1.f / static_cast<float>(team.c);
    float dot = 0, total = 0;
    team.each([&](int64_t i, int) {
      const auto d = lanes.get(dy + i) * (p.w.get(i, lanes) + p.offset);
      dot += sum(d * (lanes.get(x + i) - m));
      if constexpr (Layer) total += sum(d);
    });
    const float slope = team.sum(dot) * r * per, shift = Layer ? team.sum(total) * per : 0.f;
    team.each([&](int64_t i, int) {
      const auto d = lanes.get(dy + i) * (p.w.get(i, lanes) + p.offset), xhat = (lanes.get(x + i) - m) * r;
      p.dx.put(row * team.c + i, lanes, (d - shift - xhat * slope) * r);
    });
  }
};

constexpr int kColumnGroups = 8;

// A block has 32 columns of one part; its warps sum every 8th row.
template <class T, bool Layer>
__global__ void __launch_bounds__(kWarp* kColumnGroups) wide_sums_kernel(int64_t rows, int64_t c, int64_t each, int64_t stride, Backward<T> p) {
  Shared shared;
  auto* sums = shared.take<float>(2 * kWarp * kColumnGroups);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const int64_t begin = blockIdx.y * each, end = begin + each < rows ? begin + each : rows;
  float dw = 0, db = 0;
  if (i < c)
    for (int64_t row = begin + threadIdx.y; row < end; row += kColumnGroups) {
      const float d = to_float(p.dy[row * c + i]), m = Layer ? p.mean[row] : 0.f;
      dw += d * ((to_float(p.x[row * c + i]) - m) * p.rstd[row]);
      db += d;
    }
  sums[threadIdx.y * kWarp + threadIdx.x] = dw;
  sums[(kColumnGroups + threadIdx.y) * kWarp + threadIdx.x] = db;
  __syncthreads();
  if (threadIdx.y > 0 || i >= c) return;
  for (int g = 1; g < kColumnGroups; ++g) {
    dw += sums[g * kWarp + threadIdx.x];
    db += sums[(kColumnGroups + g) * kWarp + threadIdx.x];
  }
  if (p.part_dw) p.part_dw[blockIdx.y * stride + i] = dw;
  if (p.part_db) p.part_db[blockIdx.y * stride + i] = db;
}

static RowParts backward_parts(const Call& call) { return RowParts(call.in[1].rows(), call.in[1].cols() <= 1024 ? 32 : 8); }

template <bool Layer>
static size_t backward_bytes(const Call& call) {
  return sizeof(float) * static_cast<size_t>(call.in[1].cols() * (Layer ? 2 : 1) * backward_parts(call).count);
}

template <class T, bool Layer>
static void backward(const Call& call) {
  constexpr int N = kVector<T>;
  const View& x = call.in[1];
  const int64_t rows = x.rows(), c = x.cols(), stride = Layer ? 2 * c : c;
  const Sink<float> dw(call, 1), db = Layer ? Sink<float>(call, 2) : Sink<float>(nullptr, false);
  float* part = static_cast<float*>(call.workspace);
  const Backward<T> p{call.in[0].as<T>(), x.as<T>(), AnyFloats(call.in[2]), Layer ? 0.f : static_cast<float>(call.scalar[0]),
                      Layer ? call.in[3].as<float>() : nullptr, call.in[Layer ? 4 : 3].as<float>(), Sink<T>(call, 0),
                      dw.data ? part : nullptr, db.data ? part + c : nullptr};
  const RowParts parts = backward_parts(call);
  const bool whole = c % N == 0 && aligned(p.dy, p.x, p.w.data, p.dx.data);
  const int64_t vectors = whole ? c / N : c;
  const auto run = [&](auto kernel, int vectors_each, int rows_at_once) {
    const unsigned threads = static_cast<unsigned>(ceil_div(ceil_div(vectors, vectors_each), kWarp) * kWarp);
    const unsigned warps = threads == kWarp ? kBackwardWarps : 1;
    const size_t floats = (Layer ? 2 : 1) * static_cast<size_t>(rows_at_once) * kWarp + (warps > 1 ? warps * static_cast<size_t>(c) : 0);
    launch(call, Grid{dim3(static_cast<unsigned>(parts.count)), dim3(threads, warps), floats * sizeof(float)}, kernel, rows, c, parts.each, stride, p);
  };
  if (rows > 0 && c > 0) {
    constexpr int most = Layer ? 2 : 4;  // vectors that a thread holds, with two sums for each element or one
    const int64_t one = vectors <= most * kWarp ? kWarp : kBackwardThreads;  // threads that a row has at most
    if (whole && vectors <= one)
      run(backward_kernel<T, N, 1, 2, Layer>, 1, 2);
    else if (whole && vectors <= 2 * one)
      run(backward_kernel<T, N, 2, 1, Layer>, 2, 1);
    else if (whole && vectors <= most * one)
      run(backward_kernel<T, N, most, 1, Layer>, most, 1);
    else if (!whole && vectors <= 4 * one)
      run(backward_kernel<T, 1, 4, 2, Layer>, 4, 2);
    else {
      if (p.dx.data) for_rows<N>(call, rows, c, whole, WideBackward<T, Layer>{p});
      if (dw.data || db.data)
        launch(call, Grid{dim3(static_cast<unsigned>(ceil_div(c, kWarp)), static_cast<unsigned>(parts.count)), dim3(kWarp, kColumnGroups),
                          2 * kWarp * kColumnGroups * sizeof(float)},
               wide_sums_kernel<T, Layer>, rows, c, parts.each, stride, p);
    }
  }
  sum_parts(call, part, parts.count, stride, c, dw);
  sum_parts(call, part + c, parts.count, stride, c, db);
}

// rms_norm_backward(dy[* c], x[* c], w[c]:float, rstd[*]:f32, offset) -> dx[* c]+, dw[c]:f32+
// layer_norm_backward(dy[* c], x[* c], w[c]:float, mean[*]:f32, rstd[*]:f32) -> dx[* c]+, dw[c]:f32+, dbias[c]:f32+
constexpr auto rms_norm_backward = by_dtype<backward<float, false>, backward<bf16, false>>;
constexpr auto layer_norm_backward = by_dtype<backward<float, true>, backward<bf16, true>>;
constexpr auto rms_norm_any = by_dtype<rms_norm<float>, rms_norm<bf16>>;

}  // namespace limbeck::cuda

// The gradient of the residual is dy itself, so rms_norm_add shares the backward kernel.
LIMBECK_KERNELS(norm, {"rms_norm", rms_norm_any}, {"rms_norm_backward", rms_norm_backward, backward_bytes<false>},
                {"rms_norm_add", rms_norm_any}, {"rms_norm_add_backward", rms_norm_backward, backward_bytes<false>},
                {"layer_norm", by_dtype<layer_norm<float>, layer_norm<bf16>>},
                {"layer_norm_backward", layer_norm_backward, backward_bytes<true>})
