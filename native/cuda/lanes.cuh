// Loops over elements and rows at the speed of memory. A thread moves 16 bytes at a time and computes in float32; the end of an array,
// or an array that is not aligned, goes element by element. Sums have a fixed order: the same bits in every run and on every GPU.
#pragma once
#include <type_traits>

#include "cuda/bf16.cuh"
#include "cuda/launch.h"

namespace limbeck::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// Elements that 16 bytes hold.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Neighbouring elements in registers.
template <int N>
struct Floats {
  float v[N];
  __device__ __forceinline__ float& operator[](int i) { return v[i]; }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

template <int N>
__device__ __forceinline__ Floats<N> splat(float x) {
  Floats<N> r;
#pragma unroll
  for (int i = 0; i < N; ++i) r.v[i] = x;
  return r;
}

#define LIMBECK_FLOATS(op)                                                                    \
  template <int N>                                                                            \
  __device__ __forceinline__ Floats<N> operator op(const Floats<N>& a, const Floats<N>& b) {  \
    Floats<N> r;                                                                              \
    _Pragma("unroll") for (int i = 0; i < N; ++i) r.v[i] = a.v[i] op b.v[i];                  \
    return r;                                                                                 \
  }                                                                                           \
  template <int N>                                                                            \
  __device__ __forceinline__ Floats<N> operator op(const Floats<N>& a, float b) {             \
    return a op splat<N>(b);                                                                  \
  }                                                                                           \
  template <int N>                                                                            \
  __device__ __forceinline__ Floats<N> operator op(float a, const Floats<N>& b) {             \
    return splat<N>(a) op b;                                                                  \
  }
LIMBECK_FLOATS(+)
LIMBECK_FLOATS(-)
LIMBECK_FLOATS(*)
LIMBECK_FLOATS(/)
#undef LIMBECK_FLOATS

template <int N>
__device__ __forceinline__ Floats<N> operator-(const Floats<N>& a) {
  return a * -1.f;
}

// f of each element.
template <int N, class F>
__device__ __forceinline__ Floats<N> map(const Floats<N>& a, F f) {
  Floats<N> r;
#pragma unroll
  for (int i = 0; i < N; ++i) r.v[i] = f(a.v[i]);
  return r;
}

template <int N>
__device__ __forceinline__ float sum(const Floats<N>& a) {
  float s = a.v[0];
#pragma unroll
  for (int i = 1; i < N; ++i) s += a.v[i];
  return s;
}

// N elements as they stand in memory: what waits in registers between two uses.
template <class T, int N>
struct Packed {
  static constexpr int kWords = static_cast<int>(N * sizeof(T) / 4);
  static_assert(kWords % 4 == 0 || kWords == 2, "words of 16 bytes, or one of 8");
  unsigned words[kWords];

  static __device__ __forceinline__ Packed load(const T* p) {
    Packed r;
    if constexpr (kWords == 2) {
      const uint2 w = *reinterpret_cast<const uint2*>(p);
      r.words[0] = w.x, r.words[1] = w.y;
    }
#pragma unroll
    for (int i = 0; i + 4 <= kWords; i += 4) {
      const uint4 w = reinterpret_cast<const uint4*>(p)[i / 4];
      r.words[i] = w.x, r.words[i + 1] = w.y, r.words[i + 2] = w.z, r.words[i + 3] = w.w;
    }
    return r;
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kWords == 2) *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
#pragma unroll
    for (int i = 0; i + 4 <= kWords; i += 4)
      reinterpret_cast<uint4*>(p)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
  }
  __device__ __forceinline__ Floats<N> floats() const {
    Floats<N> r;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 2) {
        r.v[2 * i] = low_float(words[i]);
        r.v[2 * i + 1] = high_float(words[i]);
      } else {
        r.v[i] = __uint_as_float(words[i]);
      }
    }
    return r;
  }
  static __device__ __forceinline__ Packed of(const Floats<N>& a) {
    Packed r;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 2)
        r.words[i] = pack_bf16(a.v[2 * i], a.v[2 * i + 1]);
      else
        r.words[i] = __float_as_uint(a.v[i]);
    }
    return r;
  }
};
template <class T>
struct Packed<T, 1> {
  T element;
  static __device__ __forceinline__ Packed load(const T* p) { return {*p}; }
  __device__ __forceinline__ void store(T* p) const { *p = element; }
  __device__ __forceinline__ Floats<1> floats() const { return {{to_float(element)}}; }
  static __device__ __forceinline__ Packed of(const Floats<1>& a) {
    return {from_float<T>(a.v[0])};
  }
};

// How many elements are moved at once: `lanes.get(p)` and `lanes.put(p, v)` read and write that many, of any float type.
template <int N>
struct Lanes {
  static constexpr int count = N;
  template <class T>
  __device__ __forceinline__ Floats<N> get(const T* p) const {
    return Packed<T, N>::load(p).floats();
  }
  template <class T>
  __device__ __forceinline__ void put(T* p, const Floats<N>& v) const {
    Packed<T, N>::of(v).store(p);
  }
};

// Floats that are few and read by everybody (weights): their type is looked at in place, so that kernels need not be made twice.
struct AnyFloats {
  const void* data;
  bool is_bf16;
  explicit AnyFloats(const View& v) : data(v.data), is_bf16(v.dtype == DType::bf16) {}
  template <class L>
  __device__ __forceinline__ Floats<L::count> get(int64_t i, L lanes) const {
    if (is_bf16) return lanes.get(static_cast<const bf16*>(data) + i);
    return lanes.get(static_cast<const float*>(data) + i);
  }
};

// An output that may be unwanted, and that either overwrites or accumulates.
template <class T>
struct Sink {
  T* data;
  bool accumulate;
  Sink(const Call& call, int i) : data(call.out[i].as<T>()), accumulate(call.accumulate[i]) {}
  Sink(T* data, bool accumulate) : data(data), accumulate(accumulate) {}
  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
  template <class L>
  __device__ __forceinline__ void put(int64_t i, L lanes, const Floats<L::count>& v) const {
    if (!data) return;
    lanes.put(data + i, accumulate ? lanes.get(data + i) + v : v);
  }
};

// i / n and what is left, without the long way of 64 bits where 32 do.
struct Division {
  int64_t quotient, rest;
};
__device__ __forceinline__ Division divide(int64_t i, int64_t n) {
  if (((i | n) >> 32) == 0) {
    const unsigned q = static_cast<unsigned>(i) / static_cast<unsigned>(n);
    return {q, static_cast<unsigned>(i) - q * static_cast<unsigned>(n)};
  }
  return {i / n, i % n};
}

// ---- Host: which kernel of a pair.

// Runs one of two functions by the dtype of input I: the call's compute dtype.
template <void (*F32)(const Call&), void (*Bf16)(const Call&), int I = 0>
void by_dtype(const Call& call) {
  (call.in[I].dtype == DType::bf16 ? Bf16 : F32)(call);
}

// Whether pointers allow 16 bytes at a time.
template <class... P>
bool aligned(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// ---- Elements.

constexpr int kThreads = 256;

// body(i, lanes) once for every N elements of [0, n), and one by one for those from vectors * N on.
template <int N, class Body>
__global__ void __launch_bounds__(kThreads) elements_kernel(int64_t n, int64_t vectors, Body body) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = at; i < vectors; i += step) body(i * N, Lanes<N>{});
  for (int64_t i = vectors * N + at; i < n; i += step) body(i, Lanes<1>{});
}

// N: of the widest vector that all types of the body allow, kVector of the narrowest; `whole`: pointers (and rows) allow vectors.
// A thread has one vector while that fills the GPU and up to four beyond: enough blocks that their ends do not show.
template <int N, class Body>
void for_elements(const Call& call, int64_t n, bool whole, const Body& body) {
  const int64_t vectors = whole ? n / N : 0, work = whole ? vectors + n % N : n;
  const int64_t fill = static_cast<int64_t>(device_of(call).processors) * 2048;
  const int64_t each = work > 4 * fill ? 4 : work > fill ? ceil_div(work, fill) : 1;
  const unsigned blocks = static_cast<unsigned>(ceil_div(work, kThreads * each));
  launch(call, Grid{dim3(blocks), dim3(kThreads)}, elements_kernel<N, Body>, n, vectors, body);
}

// ---- Sums over the threads of a warp and of a row.

// f(a, b) over all lanes, in the order of a butterfly; every lane gets it.
template <class V, class F>
__device__ __forceinline__ V warp_reduce(V x, F f) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}
struct Plus {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};
struct Larger {
  // A NaN gives way.
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ unsigned long long operator()(unsigned long long a, unsigned long long b) const { return a > b ? a : b; }
};

// f over the threads of a block along x, a multiple of the warp; all of them get it. `scratch` holds a value for each warp.
template <class V, class F>
__device__ __forceinline__ V block_reduce(V x, F f, V none, V* scratch) {
  x = warp_reduce(x, f);
  if (blockDim.x == kWarp) return x;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  __syncthreads();  // of the reduction before, all have read
  if (lane == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_reduce(lane < warps ? scratch[lane] : none, f);
}

// ---- Rows.

// The threads that share a row of c elements (blockDim.x of them; blockDim.y rows in a block). Each has every blockDim.x-th vector of N.
// With K > 0 a row has at most K vectors for a thread, so that what is read can stay in registers; with K = 0 it is read again.
template <int N, int K>
struct Team {
  int64_t c;
  unsigned long long* scratch;

  template <class T>
  struct Held {
    const T* p;
    Packed<T, N> packed[K > 0 ? K : 1];
    __device__ __forceinline__ Floats<N> get(int64_t i, int k) const {
      if constexpr (K > 0) return packed[k].floats();
      return Packed<T, N>::load(p + i).floats();
    }
  };

  // body(i, k): i is the first element of the thread's k-th vector.
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
    if constexpr (K > 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int i = static_cast<int>(threadIdx.x + k * blockDim.x) * N;
        if (i < c) body(i, k);
      }
    } else {
      for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < c; i += static_cast<int64_t>(blockDim.x) * N) body(i, 0);
    }
  }
  // All loads of a row are on their way before the first is used.
  template <class T>
  __device__ __forceinline__ Held<T> read(const T* p) const {
    Held<T> held;
    held.p = p;
    if constexpr (K > 0) each([&](int64_t i, int k) { held.packed[k] = Packed<T, N>::load(p + i); });
    return held;
  }
  __device__ __forceinline__ float sum(float x) const { return block_reduce(x, Plus{}, 0.f, reinterpret_cast<float*>(scratch)); }
  __device__ __forceinline__ float largest(float x) const {
    return block_reduce(x, Larger{}, -INFINITY, reinterpret_cast<float*>(scratch));
  }
  __device__ __forceinline__ unsigned long long largest(unsigned long long x) const { return block_reduce(x, Larger{}, 0ull, scratch); }
};

constexpr int kRowVectors = 4;  // that a thread holds
constexpr int kRowThreads = 1024;

template <int N, int K, class Body>
__global__ void __launch_bounds__(kRowThreads) rows_kernel(int64_t rows, int64_t c, Body body) {
  Shared shared;
  auto* scratch = shared.take<unsigned long long>(kWarp);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row < rows) body(row, Team<N, K>{c, scratch}, Lanes<N>{});
}

// A warp for each row while 4 vectors a lane are enough, else a block; body(row, team, lanes).
template <int N, class Body>
void for_rows(const Call& call, int64_t rows, int64_t c, bool whole, const Body& body) {
  const bool wide = whole && c % N == 0;
  const int64_t vectors = wide ? c / N : c;
  int64_t threads = ceil_div(ceil_div(vectors, kRowVectors), kWarp) * kWarp;
  threads = threads < kWarp ? kWarp : threads > kRowThreads ? kRowThreads : threads;
  const unsigned together = threads == kWarp ? 8 : 1;
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(rows, together))), dim3(static_cast<unsigned>(threads), together), kWarp * sizeof(unsigned long long)};
  if (!wide)
    launch(call, grid, rows_kernel<1, 0, Body>, rows, c, body);
  else if (vectors > threads * kRowVectors)
    launch(call, grid, rows_kernel<N, 0, Body>, rows, c, body);
  else
    launch(call, grid, rows_kernel<N, kRowVectors, Body>, rows, c, body);
}

// ---- Sums over rows, in two stages: rows are cut into parts by the shape alone, each part is summed on its own into
// part[p * stride + column], and sum_parts() adds the parts in order.

// At most 256 parts, each of a multiple of `least` rows.
struct RowParts {
  int64_t each, count;
  RowParts(int64_t rows, int64_t least) : each(ceil_div(ceil_div(rows, 256), least) * least), count(0) {
    if (rows > 0) count = ceil_div(rows, each);
  }
};

constexpr int kPartGroups = 16;

// A block has 32 columns; its 16 warps each sum every 16th part, then the warps' sums are added in order.
template <class T>
__global__ void __launch_bounds__(kWarp* kPartGroups) sum_parts_kernel(const float* part, int64_t count, int64_t stride, int64_t c, Sink<T> out) {
  Shared shared;
  auto* sums = shared.take<float>(kWarp * kPartGroups);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float s = 0;
  if (i < c) {
#pragma unroll 4
    for (int64_t p = threadIdx.y; p < count; p += kPartGroups) s += part[p * stride + i];
  }
  sums[threadIdx.y * kWarp + threadIdx.x] = s;
  __syncthreads();
  if (threadIdx.y > 0 || i >= c) return;
  for (int g = 1; g < kPartGroups; ++g) s += sums[g * kWarp + threadIdx.x];
  out.put(i, Lanes<1>{}, Floats<1>{{s}});
}

template <class T>
void sum_parts(const Call& call, const float* part, int64_t count, int64_t stride, int64_t c, Sink<T> out) {
  if (!out.data) return;
  launch(call, Grid{dim3(static_cast<unsigned>(ceil_div(c, kWarp))), dim3(kWarp, kPartGroups), kWarp * kPartGroups * sizeof(float)},
         sum_parts_kernel<T>, part, count, stride, c, out);
}

}  // namespace limbeck::cuda
