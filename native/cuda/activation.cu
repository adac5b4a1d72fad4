// Activations and gated activations, element by element.
#include "cuda/gate.cuh"
#include "cuda/lanes.cuh"

namespace limbeck::cuda {

template <class T, Gate G>
struct Activate {
  const T* x;
  Sink<T> y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    y.put(i, lanes, map(lanes.get(x + i), [](float v) { return gate_value<G>(v); }));
  }
};

// gelu(x[*]) -> y[*]
template <class T, Gate G>
static void activate(const Call& call) {
  const Activate<T, G> body{call.in[0].as<T>(), Sink<T>(call, 0)};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.x, body.y.data), body);
}

template <Gate G, int N>
__device__ __forceinline__ void slopes(const Floats<N>& x, Floats<N>& value, Floats<N>& slope) {
#pragma unroll
  for (int i = 0; i < N; ++i) gate_slope<G>(x[i], value[i], slope[i]);
}

template <class T, Gate G>
struct ActivateBackward {
  const T *dy, *x;
  Sink<T> dx;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    Floats<L::count> value, slope;
    slopes<G>(lanes.get(x + i), value, slope);
    dx.put(i, lanes, lanes.get(dy + i) * slope);
  }
};

// gelu_backward(dy[*], x[*]) -> dx[*]+
template <class T, Gate G>
static void activate_backward(const Call& call) {
  const ActivateBackward<T, G> body{call.in[0].as<T>(), call.in[1].as<T>(), Sink<T>(call, 0)};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.dy, body.x, body.dx.data), body);
}

template <class T, Gate G>
struct Gated {
  const T *gate, *up;
  Sink<T> y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    const auto g = lanes.get(gate + i), u = lanes.get(up + i);
    y.put(i, lanes, map(g, [](float v) { return gate_value<G>(v); }) * u);
  }
};

// geglu(gate[*], up[*]) -> y[*]
template <class T, Gate G>
static void gated(const Call& call) {
  const Gated<T, G> body{call.in[0].as<T>(), call.in[1].as<T>(), Sink<T>(call, 0)};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.gate, body.up, body.y.data), body);
}

template <class T, Gate G>
struct GatedBackward {
  const T *dy, *gate, *up;
  Sink<T> dgate, dup;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    const auto d = lanes.get(dy + i), g = lanes.get(gate + i);
    Floats<L::count> u = splat<L::count>(0), value, slope;
    if (dgate) u = lanes.get(up + i);
    slopes<G>(g, value, slope);
    dgate.put(i, lanes, d * u * slope);
    dup.put(i, lanes, d * value);
  }
};

// geglu_backward(dy[*], gate[*], up[*]) -> dgate[*]+, dup[*]+
template <class T, Gate G>
static void gated_backward(const Call& call) {
  const GatedBackward<T, G> body{call.in[0].as<T>(), call.in[1].as<T>(), call.in[2].as<T>(), Sink<T>(call, 0), Sink<T>(call, 1)};
  for_elements<kVector<T>>(call, call.in[0].size(), aligned(body.dy, body.gate, body.up, body.dgate.data, body.dup.data), body);
}

}  // namespace limbeck::cuda

#define BOTH(f, gate) by_dtype<f<float, Gate::gate>, f<bf16, Gate::gate>>
LIMBECK_KERNELS(activation, {"gelu", BOTH(activate, gelu_tanh)}, {"gelu_backward", BOTH(activate_backward, gelu_tanh)},
                {"silu", BOTH(activate, silu)}, {"silu_backward", BOTH(activate_backward, silu)}, {"geglu", BOTH(gated, gelu_tanh)},
                {"geglu_backward", BOTH(gated_backward, gelu_tanh)}, {"swiglu", BOTH(gated, silu)},
                {"swiglu_backward", BOTH(gated_backward, silu)})
