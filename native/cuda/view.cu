// Rearrangements that have to move bytes. The package reshapes to the few forms below: o and i are all dims before and after.
#include "core/checks.h"
#include "cuda/fault.h"
#include "cuda/lanes.cuh"

namespace limbeck::cuda {

// ---- Transposition.

// Element i of y, where runs of `inner` stay together: y[o b c a i] = x[o a c b i].
template <class T>
struct MoveRuns {
  const T* x;
  int64_t m, k, n, inner;
  Sink<T> y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t at, L lanes) const {
    const auto [run, i] = divide(at, inner);
    const auto [rest, a] = divide(run, m);
    const auto [slab, c] = divide(rest, k);
    const auto [o, b] = divide(slab, n);
    y.put(at, lanes, lanes.get(x + (((o * m + a) * k + c) * n + b) * inner + i));
  }
};

constexpr int kTileSide = 64;

// Single elements, in tiles of 64 by 64 that pass through shared memory: rows of N elements at a time come in and go out. An odd number
// of 4-byte words between its rows keeps the banks apart.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) transpose_kernel(int64_t m, int64_t k, int64_t n, int64_t tiles_m, int64_t tiles_n, const T* x, Sink<T> y) {
  constexpr int kStride = kTileSide + 4 / static_cast<int>(sizeof(T)), kAcross = kTileSide / N, kDown = kThreads / kAcross;
  Shared shared;
  T* tile = shared.take<T>(kTileSide * kStride);
  const auto [rest, tile_n] = divide(blockIdx.x, tiles_n);
  const auto [slab, tile_m] = divide(rest, tiles_m);
  const auto [o, c] = divide(slab, k);
  const int64_t a0 = tile_m * kTileSide, b0 = tile_n * kTileSide;
  const int across = threadIdx.x % kAcross * N, down = threadIdx.x / kAcross;

  for (int a = down; a < kTileSide && a0 + a < m; a += kDown) {
    if (b0 + across >= n) break;
    const auto v = Packed<T, N>::load(x + ((o * m + a0 + a) * k + c) * n + b0 + across).floats();
#pragma unroll
    for (int j = 0; j < N; ++j) tile[a * kStride + across + j] = from_float<T>(v[j]);
  }
  __syncthreads();
  for (int b = down; b < kTileSide && b0 + b < n; b += kDown) {
    if (a0 + across >= m) break;
    Floats<N> v;
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = to_float(tile[(across + j) * kStride + b]);
    y.put(((o * n + b0 + b) * k + c) * m + a0 + across, Lanes<N>{}, v);
  }
}

// transpose(x[o m k n i]) -> y[o n k m i], transpose_backward(dy[o n k m i]) -> dx[o m k n i]+
template <class T>
static void transpose(const Call& call) {
  constexpr int N = kVector<T>;
  const View& x = call.in[0];
  int64_t m = x.dims[1], k = x.dims[2], n = x.dims[3], inner = x.dims[4];
  const Sink<T> y(call, 0);
  if (!y.data || x.size() == 0) return;
  // A dim of one swaps its neighbours; with nothing to swap all stays in place.
  if (m == 1) std::swap(m, k);
  if (n == 1) std::swap(n, k);
  if (k == 1 && (m == 1 || n == 1)) inner *= m * n, m = n = 1;
  const T* from = x.as<T>();
  if (inner > 1) {
    for_elements<N>(call, x.size(), inner % N == 0 && aligned(from, y.data), MoveRuns<T>{from, m, k, n, inner, y});
    return;
  }
  const int64_t tiles_m = ceil_div(m, kTileSide), tiles_n = ceil_div(n, kTileSide);
  const Grid grid{dim3(static_cast<unsigned>(x.dims[0] * k * tiles_m * tiles_n)), dim3(kThreads), kTileSide * (kTileSide * sizeof(T) + 4)};
  const bool whole = m % N == 0 && n % N == 0 && aligned(from, y.data);
  launch(call, grid, whole ? transpose_kernel<T, N> : transpose_kernel<T, 1>, m, k, n, tiles_m, tiles_n, from, y);
}

// ---- Parts of rows.

// to[o, at .. at + run] = or += from[o, start .. start + run].
template <class T>
struct Slab {
  int64_t run;
  const T* from;
  int64_t from_row, from_at;
  Sink<T> to;
  int64_t to_row, to_at;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t at, L lanes) const {
    const auto [o, i] = divide(at, run);
    to.put(o * to_row + to_at + i, lanes, lanes.get(from + o * from_row + from_at + i));
  }
};

template <class T>
static void copy_slab(const Call& call, int64_t outer, const Slab<T>& slab) {
  constexpr int N = kVector<T>;
  if (!slab.to.data) return;
  const bool whole = (slab.run | slab.from_row | slab.from_at | slab.to_row | slab.to_at) % N == 0 && aligned(slab.from, slab.to.data);
  for_elements<N>(call, outer * slab.run, whole, slab);
}

// concat(a[o m i], b[o n i], s) -> y[o s i], s = m + n
template <class T>
static void concat(const Call& call) {
  const View &a = call.in[0], &b = call.in[1];
  const int64_t inner = a.dims[2], m = a.dims[1] * inner, n = b.dims[1] * inner;
  check_concat(call);
  const Sink<T> y(call, 0);
  copy_slab<T>(call, a.dims[0], {m, a.as<T>(), m, 0, y, m + n, 0});
  copy_slab<T>(call, a.dims[0], {n, b.as<T>(), n, 0, y, m + n, m});
}

// concat_backward(dy[o s i], a[o m i], b[o n i]) -> da[o m i]+, db[o n i]+ (a and b for their shapes)
template <class T>
static void concat_backward(const Call& call) {
  const View &dy = call.in[0], &a = call.in[1], &b = call.in[2];
  const int64_t inner = dy.dims[2], m = a.dims[1] * inner, n = b.dims[1] * inner;
  copy_slab<T>(call, dy.dims[0], {m, dy.as<T>(), m + n, 0, Sink<T>(call, 0), m, 0});
  copy_slab<T>(call, dy.dims[0], {n, dy.as<T>(), m + n, m, Sink<T>(call, 1), n, 0});
}

// slice(x[o n i], start, m) -> y[o m i]
template <class T>
static void slice(const Call& call) {
  const View &x = call.in[0], &y = call.out[0];
  const int64_t start = static_cast<int64_t>(call.scalar[0]), inner = x.dims[2], m = y.dims[1], n = x.dims[1];
  check_slice(call, start, m, n);
  copy_slab<T>(call, x.dims[0], {m * inner, x.as<T>(), n * inner, start * inner, Sink<T>(call, 0), m * inner, 0});
}

// dx is dy inside the slice, and zero elsewhere.
template <class T>
struct SliceBackward {
  const T* dy;
  int64_t row, start, run;
  T* dx;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t at, L lanes) const {
    const auto [o, i] = divide(at, row);
    const int64_t j = i - start;
    lanes.put(dx + at, j >= 0 && j < run ? lanes.get(dy + o * run + j) : splat<L::count>(0));
  }
};

// slice_backward(dy[o m i], x[o n i], start) -> dx[o n i]+ (x for its shape)
template <class T>
static void slice_backward(const Call& call) {
  constexpr int N = kVector<T>;
  const View &dy = call.in[0], &x = call.in[1];
  const int64_t start = static_cast<int64_t>(call.scalar[0]), inner = x.dims[2], m = dy.dims[1], n = x.dims[1];
  check_slice(call, start, m, n);
  const Sink<T> dx(call, 0);
  if (!dx.data) return;
  if (dx.accumulate) return copy_slab<T>(call, x.dims[0], {m * inner, dy.as<T>(), m * inner, 0, dx, n * inner, start * inner});
  const SliceBackward<T> body{dy.as<T>(), n * inner, start * inner, m * inner, dx.data};
  for_elements<N>(call, x.size(), (body.row | body.start | body.run) % N == 0 && aligned(body.dy, body.dx), body);
}

// ---- One element of each row.

struct Index {
  const int32_t* ids;
  int64_t c;
  FaultCheck check;
  explicit Index(const Call& call, const View& x, const View& ids)
      : ids(ids.as<int32_t>()), c(x.cols()), check{device_of(call).fault, Fault::row_index, call.op, x.cols()} {}
  // Whether the row's index lies in the row.
  __device__ __forceinline__ bool inside(int64_t row) const {
    const int32_t id = ids[row];
    if (id >= 0 && id < c) return true;
    check.refuse(row, id);
    return false;
  }
};

template <class T>
struct Pick {
  const T* x;
  Index index;
  T* y;
  __device__ __forceinline__ void operator()(int64_t row, Lanes<1> lanes) const {
    lanes.put(y + row, index.inside(row) ? lanes.get(x + row * index.c + index.ids[row]) : splat<1>(NAN));
  }
};

// pick(x[* c], ids[*]:i32) -> y[*]
template <class T>
static void pick(const Call& call) {
  const Pick<T> body{call.in[0].as<T>(), Index(call, call.in[0], call.in[1]), call.out[0].as<T>()};
  if (body.y) for_elements<1>(call, call.in[0].rows(), false, body);
}

template <class T>
struct PickBackward {
  const T* dy;
  Index index;
  T* dx;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t at, L lanes) const {
    const auto [row, i] = divide(at, index.c);
    const int64_t j = index.ids[row] - i;
    if (i == 0) index.inside(row);
    auto v = splat<L::count>(0);
    if (j >= 0 && j < L::count) {
      const float d = to_float(dy[row]);
#pragma unroll
      for (int k = 0; k < L::count; ++k) v[k] = k == j ? d : 0.f;
    }
    lanes.put(dx + at, v);
  }
};
template <class T>
struct PickAccumulate {
  const T* dy;
  Index index;
  T* dx;
  __device__ __forceinline__ void operator()(int64_t row, Lanes<1> lanes) const {
    if (!index.inside(row)) return;
    T* to = dx + row * index.c + index.ids[row];
    lanes.put(to, lanes.get(to) + lanes.get(dy + row));
  }
};

// pick_backward(dy[*], x[* c], ids[*]:i32) -> dx[* c]+ (x for its shape)
template <class T>
static void pick_backward(const Call& call) {
  constexpr int N = kVector<T>;
  const View& x = call.in[1];
  const T* dy = call.in[0].as<T>();
  const Index index(call, x, call.in[2]);
  const Sink<T> dx(call, 0);
  if (!dx.data) return;
  if (dx.accumulate)
    for_elements<1>(call, x.rows(), false, PickAccumulate<T>{dy, index, dx.data});
  else
    for_elements<N>(call, x.size(), x.cols() % N == 0 && aligned(dx.data), PickBackward<T>{dy, index, dx.data});
}

}  // namespace limbeck::cuda

#define BOTH(f) by_dtype<f<float>, f<bf16>>
LIMBECK_KERNELS(view, {"transpose", BOTH(transpose)}, {"transpose_backward", BOTH(transpose)}, {"concat", BOTH(concat)},
                {"concat_backward", BOTH(concat_backward)}, {"slice", BOTH(slice)}, {"slice_backward", BOTH(slice_backward)},
                {"pick", BOTH(pick)}, {"pick_backward", BOTH(pick_backward)})
