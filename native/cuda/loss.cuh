// What the loss heads share on the GPU: which tokens count, how many of them make a chunk, the shape of a pass over logits, and the
// way between tokens and the rows of a chunk. Letters: n tokens, c width, v vocabulary, u logits before the cap, z after it.
//
// Logits are made by matrix products, as float32. Every pass over them has one tiling: a warp takes a slot, kSlot columns of one row,
// and a lane holds 32 of them in registers: 8 times 4 neighbours, so that a lane reads 16 bytes of float32 and writes 8 bytes of bf16,
// and a warp whole lines. A slot leaves its partial sums behind; a warp for each row adds them up in order, in float64. No sum depends
// on the number of processors, and none of floats is made with atomics.
#pragma once
#include <climits>
#include <cmath>

#include "cuda/blas.h"
#include "cuda/fault.h"
#include "cuda/lanes.cuh"
#include "cuda/ptx.cuh"

namespace limbeck::cuda {

constexpr int kSlot = 1024;
constexpr int kHeld = kSlot / kWarp;
// With |z| <= this, sums of e^z and their reciprocals stay far from float's limits: no maximum is needed.
constexpr double kBounded = 40;
constexpr int kSlotWarps = 8, kSlotThreads = kSlotWarps * kWarp;

// Lays out fields one after another; without a base it only counts.
struct Layout {
  char* base;
  size_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
    bytes += (static_cast<size_t>(count) * sizeof(T) + 255) & ~size_t{255};
    return p;
  }
};

constexpr int64_t whole_slots(int64_t columns) { return ceil_div(columns, kSlot) * kSlot; }

// At most so many rows, in whole tiles of the matrix products where there are that many.
constexpr int64_t whole_tiles(int64_t rows) { return rows >= 128 ? rows / 128 * 128 : rows >= 16 ? rows / 16 * 16 : rows > 0 ? rows : 1; }

// Tokens in a chunk: at most so many, and about as many in all chunks.
constexpr int64_t even_rows(int64_t n, int64_t most) {
  if (most >= n) return n > 0 ? n : 1;
  const int64_t even = ceil_div(ceil_div(n, ceil_div(n, most)), 128) * 128;
  return even < most ? even : most;
}

// Bytes that a head may use beside its inputs and outputs, where it has the choice.
inline int64_t workspace_budget(const Device& device, int64_t usual) {
  if (device.workspace_limit > 0) return static_cast<int64_t>(device.workspace_limit);
  const int64_t share = static_cast<int64_t>(device.memory / 16);
  return share > 0 && share < usual ? share : usual;
}

inline void zero(const Call& call, const View& v) {
  if (v && v.size() > 0) check(cudaMemsetAsync(v.data, 0, static_cast<size_t>(v.size()) * size_of(v.dtype), device_of(call).stream), call.op);
}

inline Grid warps(int64_t count) { return {dim3(static_cast<unsigned>(ceil_div(count, kSlotWarps))), dim3(kSlotThreads)}; }
__device__ __forceinline__ int64_t warp_index() { return static_cast<int64_t>(blockIdx.x) * kSlotWarps + threadIdx.x / kWarp; }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }

struct Smaller {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a < b ? a : b;
  }
};

// ---- Tokens.

// Row i of a chunk is the token at position(i), or none (-1).
struct Tokens {
  int64_t n = 0;
  const float* weights = nullptr;  // absent: every token counts 1 / n, so that the total is a mean
  const int* list = nullptr;       // [n] those that count, in order, then -1; absent: all
  int64_t first = 0;               // of the chunk
  int rows = 0;                    // of the chunk

  __device__ __forceinline__ int position(int row) const { return list ? list[first + row] : static_cast<int>(first) + row; }
  __device__ __forceinline__ float weight(int position) const {
    return position < 0 ? 0.f : weights ? weights[position] : 1.f / static_cast<float>(n);
  }
  Tokens chunk(int64_t from, int64_t count) const {
    Tokens t = *this;
    t.first = from;
    t.rows = static_cast<int>(count);
    return t;
  }
};

static __global__ void __launch_bounds__(1024) list_tokens_kernel(Tokens tokens, int* list, int* count) {
  Shared shared;
  int* counts = shared.take<int>(kWarp);
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / kWarp, n = static_cast<int>(tokens.n);
  int before = 0;
  for (int from = 0; from < n; from += 1024) {
    const int i = from + static_cast<int>(threadIdx.x);
    const bool keep = i < n && tokens.weights[i] != 0.f;
    const unsigned votes = __ballot_sync(kAllLanes, keep);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int offset = before;
    for (int k = 0; k < kWarp; ++k) {
      if (k < warp) offset += counts[k];
      before += counts[k];
    }
    if (keep) list[offset + __popc(votes & ((1u << lane) - 1))] = i;
    __syncthreads();
  }
  for (int i = before + static_cast<int>(threadIdx.x); i < n; i += 1024) list[i] = -1;
  if (threadIdx.x == 0) *count = before;
}

// Lists the tokens that count, and returns how many the host should reckon with. The sizes of matrix products come from the host, so
// work that is proportional to the tokens kept needs their number: the one place where a kernel waits for the device, about as long as
// launching a few kernels takes. While a graph is recorded there is nothing to wait for; then rows without a token are carried along.
inline int64_t list_tokens(const Call& call, Tokens& tokens, int* list, int* count) {
  if (!tokens.weights || tokens.n == 0) return tokens.n;
  launch(call, Grid{dim3(1), dim3(1024), kWarp * sizeof(int)}, list_tokens_kernel, tokens, list, count);
  tokens.list = list;
#ifdef LIMBECK_EMULATE
  return *count;
#else
  const cudaStream_t stream = device_of(call).stream;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing), call.op);
  if (capturing != cudaStreamCaptureStatusNone) return tokens.n;
  int kept = 0;
  check(cudaMemcpyAsync(&kept, count, sizeof kept, cudaMemcpyDeviceToHost, stream), call.op);
  check(cudaStreamSynchronize(stream), call.op);
  return kept;
#endif
}

// The target of each row, or -1. A target outside the vocabulary is reported.
static __global__ void __launch_bounds__(kThreads) targets_kernel(Tokens tokens, const int* targets, FaultCheck outside, int* target) {
  const int row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (row >= tokens.rows) return;
  const int position = tokens.position(row);
  int y = position < 0 ? -1 : targets[position];
  if (position >= 0 && (y < 0 || y >= outside.limit)) {
    outside.refuse(position, y);
    y = -1;
  }
  target[row] = y;
}

// to[row] = scale[row] x[token of the row], 0 where there is none. A block takes a row.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(Tokens tokens, const T* x, int64_t c, const float* scale, bool whole, T* to) {
  const int row = static_cast<int>(blockIdx.x), position = tokens.position(row);
  const float f = position < 0 ? 0.f : scale ? scale[row] : 1.f;
  const T* from = x + static_cast<int64_t>(position < 0 ? 0 : position) * c;
  T* out = to + row * c;
  const auto move = [&](int64_t i, auto lanes) { lanes.put(out + i, position < 0 ? splat<decltype(lanes)::count>(0.f) : lanes.get(from + i) * f); };
  if (whole)
    for (int64_t i = threadIdx.x * kVector<T>; i < c; i += kThreads * kVector<T>) move(i, Lanes<kVector<T>>{});
  else
    for (int64_t i = threadIdx.x; i < c; i += kThreads) move(i, Lanes<1>{});
}
template <class T>
void gather(const Call& call, const Tokens& tokens, const View& x, const float* scale, T* to) {
  const bool whole = aligned(x.as<const T>(), to) && x.cols() % kVector<T> == 0;
  launch(call, Grid{dim3(static_cast<unsigned>(tokens.rows)), dim3(kThreads)}, gather_kernel<T>, tokens, x.as<const T>(), x.cols(), scale, whole, to);
}

// dx[token of the row] (+)= scale[row] from[row].
template <class T>
__global__ void __launch_bounds__(kThreads) scatter_kernel(Tokens tokens, const float* from, int64_t c, const float* scale, bool whole, Sink<T> dx) {
  const int row = static_cast<int>(blockIdx.x), position = tokens.position(row);
  if (position < 0) return;
  const float f = scale ? scale[row] : 1.f;
  const float* in = from + row * c;
  const int64_t at = position * c;
  if (whole)
    for (int64_t i = threadIdx.x * kVector<T>; i < c; i += kThreads * kVector<T>) dx.put(at + i, Lanes<kVector<T>>{}, Lanes<kVector<T>>{}.get(in + i) * f);
  else
    for (int64_t i = threadIdx.x; i < c; i += kThreads) dx.put(at + i, Lanes<1>{}, Lanes<1>{}.get(in + i) * f);
}
template <class T>
void scatter(const Call& call, const Tokens& tokens, const float* from, const float* scale, int64_t c, const Sink<T>& dx) {
  const bool whole = aligned(from, dx.data) && c % kVector<T> == 0;
  launch(call, Grid{dim3(static_cast<unsigned>(tokens.rows)), dim3(kThreads)}, scatter_kernel<T>, tokens, from, c, scale, whole, dx);
}

// The sum of what each row added to the total, in one order whatever the chunks.
static __global__ void __launch_bounds__(1024) total_kernel(const double* part, int64_t count, float* total) {
  Shared shared;
  auto* scratch = shared.take<double>(kWarp);
  double s = 0;
  for (int64_t i = threadIdx.x; i < count; i += 1024) s += part[i];
  s = block_reduce(s, Plus{}, 0., scratch);
  if (threadIdx.x == 0) *total = static_cast<float>(s);
}

// ---- Passes over logits.

// The functions that passes take of every logit. For bf16 those of the special function unit, whose errors of 2^-22 are below those of
// the logits themselves, and for float32 the exact ones. base^(of_e x) is e^x, tanh is of x / of_tanh: factors that are made once.
template <class T>
struct Math {
  static constexpr float of_e = 1, of_tanh = 1;
  static __device__ __forceinline__ float power(float x) { return expf(x); }
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ float log(float x) { return logf(x); }
  static __device__ __forceinline__ float tanh(float x) { return tanhf(x); }
  static __device__ __forceinline__ float divide(float a, float b) { return a / b; }
};
template <>
struct Math<bf16> {
  static constexpr float of_e = 1.44269504088896341f, of_tanh = 2 * of_e;
  static __device__ __forceinline__ float power(float x) { return ptx::ex2(x); }
  static __device__ __forceinline__ float exp(float x) { return ptx::ex2(x * of_e); }
  static __device__ __forceinline__ float log(float x) { return ptx::lg2(x) * (1 / of_e); }
  static __device__ __forceinline__ float tanh(float x) { return 1.f - 2.f * ptx::rcp(1.f + ptx::ex2(x)); }
  static __device__ __forceinline__ float divide(float a, float b) { return a * ptx::rcp(b); }
};

// tanh(u / cap) cap, with slope 1 - tanh^2; without a cap, u and 1. The passes hold s, what is left of u: z = heat s.
struct Cap {
  float heat, inverse, bend;
  explicit Cap(double cap)
      : heat(cap > 0 ? static_cast<float>(cap) : 1.f), inverse(cap > 0 ? static_cast<float>(1 / cap) : 1.f), bend(cap > 0 ? 1.f : 0.f) {}

  template <class M>
  __device__ __forceinline__ float shape(float u) const {
    return bend > 0 ? M::tanh(u * (inverse * M::of_tanh)) : u;
  }
  __device__ __forceinline__ float slope(float s) const { return 1.f - bend * s * s; }
  template <class M>
  __device__ __forceinline__ void shape(float (&u)[kHeld]) const {
    if (!(bend > 0)) return;
    const float factor = inverse * M::of_tanh;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) u[i] = M::tanh(u[i] * factor);
  }
};

// Rows of float32 logits, of the columns [first, first + cols) of the vocabulary. Rows are padded to whole slots; the padding is read
// and not used.
struct Logits {
  float* u = nullptr;
  int64_t ld = 0;
  int rows = 0;
  int64_t first = 0, cols = 0;

  __host__ __device__ int slots() const { return static_cast<int>((cols + kSlot - 1) / kSlot); }
};

// A warp's slot.
struct Place {
  int row, slot;     // in the block of logits
  int64_t at;        // of the slot's first logit, in elements from u
  int first, left;   // the slot's first column in the vocabulary, and how many there are
  int lane;
  bool any;

  __device__ __forceinline__ explicit Place(const Logits& l) {
    const unsigned warp = static_cast<unsigned>(warp_index()), slots = static_cast<unsigned>(l.slots());
    row = static_cast<int>(warp / slots), slot = static_cast<int>(warp % slots);
    any = row < l.rows;
    at = row * l.ld + static_cast<int64_t>(slot) * kSlot;
    first = static_cast<int>(l.first) + slot * kSlot;
    const int64_t rest = l.cols - static_cast<int64_t>(slot) * kSlot;
    left = rest < kSlot ? static_cast<int>(rest) : kSlot;
    lane = lane_index();
  }
  // The column, in the slot, of the i-th value that this lane holds.
  __device__ __forceinline__ int column(int i) const { return i / 4 * (4 * kWarp) + lane * 4 + i % 4; }
  __device__ __forceinline__ bool has(int i) const { return column(i) < left; }

  // What lies beyond the vocabulary becomes so small that it adds to no sum, and stays finite.
  __device__ __forceinline__ void end(float (&held)[kHeld]) const {
    if (left == kSlot) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = has(i) ? held[i] : -1e30f;
  }
  __device__ __forceinline__ void load(const float* u, float (&held)[kHeld]) const {
    const float4* from = reinterpret_cast<const float4*>(u + at) + lane;
#pragma unroll
    for (int q = 0; q < kHeld / 4; ++q) {
      const float4 a = from[q * kWarp];
      held[4 * q] = a.x, held[4 * q + 1] = a.y, held[4 * q + 2] = a.z, held[4 * q + 3] = a.w;
    }
  }
  // To rows of the same padding.
  __device__ __forceinline__ void store(float* row, const float (&held)[kHeld]) const {
    float4* to = reinterpret_cast<float4*>(row) + lane;
#pragma unroll
    for (int q = 0; q < kHeld / 4; ++q) to[q * kWarp] = make_float4(held[4 * q], held[4 * q + 1], held[4 * q + 2], held[4 * q + 3]);
  }
  __device__ __forceinline__ void store(bf16* row, const float (&held)[kHeld]) const {
    uint2* to = reinterpret_cast<uint2*>(row) + lane;
#pragma unroll
    for (int q = 0; q < kHeld / 4; ++q) to[q * kWarp] = make_uint2(pack_bf16(held[4 * q], held[4 * q + 1]), pack_bf16(held[4 * q + 2], held[4 * q + 3]));
  }
  // The largest value of the slot; none where all are NaN.
  __device__ __forceinline__ float top(const float (&held)[kHeld]) const {
    float t = -INFINITY;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) t = fmaxf(t, held[i]);
    return warp_reduce(t, Larger{});
  }
  // The first column that holds `value`; it may lie beyond the vocabulary where all are NaN.
  __device__ __forceinline__ int find(const float (&held)[kHeld], float value) const {
    int at = INT_MAX;
#pragma unroll
    for (int i = kHeld - 1; i >= 0; --i)
      if (held[i] == value) at = first + column(i);
    return warp_reduce(at, Smaller{});
  }
};

// The largest of a row and its first column, of those of its slots; for all lanes.
struct Best {
  float top;
  int at;
};
template <class Get>
__device__ __forceinline__ Best best_of(int slots, Get get) {
  Best best{-INFINITY, INT_MAX};
  for (int k = lane_index(); k < slots; k += kWarp) {
    const Best b = get(k);
    if (b.top > best.top || (b.top == best.top && b.at < best.at)) best = b;
  }
  const float top = warp_reduce(best.top, Larger{});
  return {top, warp_reduce(best.top == top ? best.at : INT_MAX, Smaller{})};
}
template <class Term>
__device__ __forceinline__ double sum_of(int slots, Term term) {
  double s = 0;
  for (int k = lane_index(); k < slots; k += kWarp) s += term(k);
  return warp_reduce(s, Plus{});
}
// Where nothing is above -infinity, 0 stands for the maximum: exp(-infinity - 0) is 0.
__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.f : top; }

// A log-sum-exp of 20 rounded to float would put an error of 1e-6 on every probability of its row.
struct Split {
  float high, low;
  __device__ __forceinline__ explicit Split(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - static_cast<double>(high))) {}
  __device__ __forceinline__ double factor() const { return exp(-static_cast<double>(low)); }  // exp(u - x) = exp(u - high) factor
};

// ---- Matrix products.

// Rows of a vocabulary matrix in the dtype that the products want. Where it is another, they are converted on the way, so many at a
// time that a product is still large.
template <class T>
struct Words {
  static constexpr int64_t kConverted = 8064;  // whole tiles of product_sm90.cuh
  const View* w;
  T* converted;  // [kConverted c], where dtypes differ

  static constexpr DType dtype = sizeof(T) == 2 ? DType::bf16 : DType::f32;
  static int64_t room(const View& w) { return !w || w.dtype == dtype ? 0 : (w.dims[0] < kConverted ? w.dims[0] : kConverted) * w.cols(); }

  // body(first, count, matrix) for all words of [first, first + count).
  template <class Body>
  void each(const Call& call, int64_t first, int64_t count, Body body) const;
};

template <class From, class To>
struct Convert {
  const From* from;
  To* to;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    lanes.put(to + i, lanes.get(from + i));
  }
};

template <class T>
template <class Body>
void Words<T>::each(const Call& call, int64_t first, int64_t count, Body body) const {
  const int64_t c = w->cols();
  if (w->dtype == dtype) return body(first, count, Matrix{w->as<const T>() + first * c, dtype, c, false});
  using From = std::conditional_t<sizeof(T) == 2, float, bf16>;
  for (int64_t at = first; at < first + count; at += kConverted) {
    const int64_t some = first + count - at < kConverted ? first + count - at : kConverted;
    const From* from = w->as<const From>() + at * c;
    for_elements<8>(call, some * c, aligned(from, converted), Convert<From, T>{from, converted});
    body(at, some, Matrix{converted, dtype, c, false});
  }
}

// u[rows, columns] = x[rows c] w[columns]^T; `at`: the block's column that `first` stands in.
template <class T>
void make_logits(const Call& call, const T* x, const Words<T>& words, const Logits& l) {
  const int64_t c = words.w->cols();
  words.each(call, l.first, l.cols, [&](int64_t first, int64_t count, Matrix w) {
    Product p{l.rows, count, c, Matrix{x, Words<T>::dtype, c, false}, w, l.u + (first - l.first), DType::f32, l.ld};
    p.b.transposed = true;
    device_of(call).blas->run(device_of(call), p);
  });
}

// back[rows c] (+)= g w, for the columns of g that are words [first, first + count).
template <class T>
void back_to_x(const Call& call, const T* g, int64_t ld, int64_t rows, const Words<T>& words, int64_t first, int64_t count, float* back, bool add) {
  const int64_t c = words.w->cols();
  words.each(call, first, count, [&](int64_t at, int64_t some, Matrix w) {
    Product p{rows, c, some, Matrix{g + (at - first), Words<T>::dtype, ld, false}, w, back, DType::f32, c};
    p.accumulate = add || at > first;
    device_of(call).blas->run(device_of(call), p);
  });
}

// dw[first ..] (+)= g^T x.
template <class T>
void back_to_w(const Call& call, const T* g, int64_t ld, int64_t rows, const T* x, int64_t c, int64_t first, int64_t count, float* dw, bool add) {
  Product p{count, c, rows, Matrix{g, Words<T>::dtype, ld, true}, Matrix{x, Words<T>::dtype, c, false}, dw + first * c, DType::f32, c};
  p.accumulate = add;
  device_of(call).blas->run(device_of(call), p);
}

}  // namespace limbeck::cuda
