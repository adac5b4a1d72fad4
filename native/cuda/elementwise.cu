// One pass over one, two or three arrays: as fast as memory.
#include "cuda/lanes.cuh"

namespace limbeck::cuda {

struct Sum {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};
struct Difference {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const { return a - b; }
};
struct Product {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const { return a * b; }
};

// y = f(a, b)
template <class T, class F>
struct Binary {
  F f;
  const T *a, *b;
  Sink<T> y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    y.put(i, lanes, f(lanes.get(a + i), lanes.get(b + i)));
  }
};

template <class T, class F>
static void binary(const Call& call, F f) {
  const Binary<T, F> body{f, call.in[0].as<T>(), call.in[1].as<T>(), Sink<T>(call, 0)};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.a, body.b, body.y.data), body);
}

// add(a[*], b[*]) -> y[*]
template <class T>
static void add(const Call& call) { binary<T>(call, Sum{}); }

// sub(a[*], b[*]) -> y[*]
template <class T>
static void sub(const Call& call) { binary<T>(call, Difference{}); }

// mul(a[*], b[*]) -> y[*]
template <class T>
static void mul(const Call& call) { binary<T>(call, Product{}); }

template <class T>
struct MulBackward {
  const T *dy, *a, *b;
  Sink<T> da, db;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    const auto d = lanes.get(dy + i);
    if (da) da.put(i, lanes, d * lanes.get(b + i));
    if (db) db.put(i, lanes, d * lanes.get(a + i));
  }
};

// mul_backward(dy[*], a[*], b[*]) -> da[*]+, db[*]+
template <class T>
static void mul_backward(const Call& call) {
  const MulBackward<T> body{call.in[0].as<T>(), call.in[1].as<T>(), call.in[2].as<T>(), Sink<T>(call, 0), Sink<T>(call, 1)};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.dy, body.a, body.b, body.da.data, body.db.data), body);
}

template <class T>
struct Scale {
  const T* x;
  float s;
  Sink<T> y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    y.put(i, lanes, lanes.get(x + i) * s);
  }
};

template <class T>
static void scaled(const Call& call, float s) {
  const Scale<T> body{call.in[0].as<T>(), s, Sink<T>(call, 0)};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.x, body.y.data), body);
}

// scale(x[*], s) -> y[*], scale_backward(dy[*], s) -> dx[*]+
template <class T>
static void scale(const Call& call) { scaled<T>(call, static_cast<float>(call.scalar[0])); }

// sub_backward(dy[*]) -> db[*]+
template <class T>
static void sub_backward(const Call& call) { scaled<T>(call, -1); }

template <class T>
struct Fill {
  T* x;
  float value;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    lanes.put(x + i, splat<L::count>(value));
  }
};

// fill(x[*]:float&, value)
template <class T>
static void fill(const Call& call) {
  const Fill<T> body{call.in[0].as<T>(), static_cast<float>(call.scalar[0])};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.x), body);
}

// ---- Copies, with or without another dtype: rounded to the nearest, ties to even.

template <class From, class To>
struct Copy {
  const From* x;
  Sink<To> y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    y.put(i, lanes, lanes.get(x + i));
  }
};

template <class From, class To>
static void copy_as(const Call& call, const View& x, Sink<To> y) {
  if (!y.data) return;
  const Copy<From, To> body{x.as<From>(), y};
  constexpr int N = kVector<From> > kVector<To> ? kVector<From> : kVector<To>;
  for_elements<N>(call, x.size(), aligned(body.x, y.data), body);
}

template <class To>
static void copy_any(const Call& call, const View& x, Sink<To> y) {
  if (x.dtype == DType::bf16)
    copy_as<bf16, To>(call, x, y);
  else
    copy_as<float, To>(call, x, y);
}

// copy(x[*]) -> y[*], to_bf16(x[*]:float) -> y[*]:bf16, to_f32(x[*]:float) -> y[*]:f32, and with the gradient in another place
// to_f32_backward(x[*]:float, dy[*]:f32) -> dx[*]+, to_bf16_backward(x[*]:float, dy[*]:float) -> dx[*]+
template <int I>
static void copy(const Call& call) {
  if (call.out[0].dtype == DType::bf16)
    copy_any(call, call.in[I], Sink<bf16>(call, 0));
  else
    copy_any(call, call.in[I], Sink<float>(call, 0));
}

// copy_(y[*]:float&, x[*]:float), add_(y[*]&, x[*])
template <class T, bool Accumulate>
static void into(const Call& call) { copy_any(call, call.in[1], Sink<T>(call.in[0].as<T>(), Accumulate)); }

// ---- Soft-cap.

template <class T>
struct Softcap {
  const T* x;
  float cap, per;
  Sink<T> y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    y.put(i, lanes, map(lanes.get(x + i) * per, [](float v) { return tanhf(v); }) * cap);
  }
};

// softcap(x[*], cap) -> y[*] = cap tanh(x / cap)
template <class T>
static void softcap(const Call& call) {
  const Softcap<T> body{call.in[0].as<T>(), static_cast<float>(call.scalar[0]), static_cast<float>(1 / call.scalar[0]), Sink<T>(call, 0)};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.x, body.y.data), body);
}

template <class T>
struct SoftcapBackward {
  const T *dy, *y;
  float per;
  Sink<T> dx;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    const auto t = lanes.get(y + i) * per;
    dx.put(i, lanes, lanes.get(dy + i) * (1.f - t * t));
  }
};

// softcap_backward(dy[*], y[*], cap) -> dx[*]+ = dy (1 - (y / cap)^2)
template <class T>
static void softcap_backward(const Call& call) {
  const SoftcapBackward<T> body{call.in[0].as<T>(), call.in[1].as<T>(), static_cast<float>(1 / call.scalar[0]), Sink<T>(call, 0)};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.dy, body.y, body.dx.data), body);
}

}  // namespace limbeck::cuda

#define BOTH(f) by_dtype<f<float>, f<bf16>>
LIMBECK_KERNELS(elementwise, {"add", BOTH(add)}, {"sub", BOTH(sub)}, {"sub_backward", BOTH(sub_backward)}, {"mul", BOTH(mul)},
                {"mul_backward", BOTH(mul_backward)}, {"scale", BOTH(scale)}, {"scale_backward", BOTH(scale)}, {"fill", BOTH(fill)},
                {"copy", copy<0>}, {"copy_backward", copy<0>}, {"copy_", by_dtype<into<float, false>, into<bf16, false>>},
                {"add_", by_dtype<into<float, true>, into<bf16, true>>}, {"to_bf16", copy<0>}, {"to_f32", copy<0>},
                {"to_bf16_backward", copy<1>}, {"to_f32_backward", copy<1>}, {"softcap", BOTH(softcap)},
                {"softcap_backward", BOTH(softcap_backward)})
