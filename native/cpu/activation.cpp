// Activations and gated activations, element by element.
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

// f(x) and f'(x); what a caller does not use is not computed.
struct Slope {
  Vec value, slope;
};

// 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): the sigmoid keeps the small tail below zero exact.
struct Gelu {
  static LIMBECK_INLINE Slope at(Vec x) {
    constexpr float k = 1.5957691216057308f;  // 2 sqrt(2/pi)
    const Vec x2 = x * x;
    const Vec e = exp(-(x * (x2 * (0.044715f * k) + k)));
    const Vec s = 1.f / (1.f + e);
    return {x * s, s + x * (s * (e * s)) * (x2 * (3 * 0.044715f * k) + k)};
  }
};

struct Silu {
  static LIMBECK_INLINE Slope at(Vec x) {
    const Vec e = exp(-x);
    const Vec s = 1.f / (1.f + e);
    return {x * s, s + x * (s * (e * s))};
  }
};

// gelu(x[*]) -> y[*]
template <class F>
static void activate(const Call& call) {
  const float* x = call.in[0].as<float>();
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { y.put(i, lanes, F::at(lanes.get(x + i)).value); });
}

// gelu_backward(dy[*], x[*]) -> dx[*]+
template <class F>
static void activate_backward(const Call& call) {
  const float *dy = call.in[0].as<float>(), *x = call.in[1].as<float>();
  const Sink dx(call, 0);
  for_elements(call, call.in[0].size(),
               [=](int64_t i, auto lanes) { dx.put(i, lanes, lanes.get(dy + i) * F::at(lanes.get(x + i)).slope); });
}

// geglu(gate[*], up[*]) -> y[*]
template <class F>
static void gated(const Call& call) {
  const float *gate = call.in[0].as<float>(), *up = call.in[1].as<float>();
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(),
               [=](int64_t i, auto lanes) { y.put(i, lanes, F::at(lanes.get(gate + i)).value * lanes.get(up + i)); });
}

// geglu_backward(dy[*], gate[*], up[*]) -> dgate[*]+, dup[*]+
template <class F>
static void gated_backward(const Call& call) {
  const float *dy = call.in[0].as<float>(), *gate = call.in[1].as<float>(), *up = call.in[2].as<float>();
  const Sink dgate(call, 0), dup(call, 1);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) {
    const Slope f = F::at(lanes.get(gate + i));
    const Vec d = lanes.get(dy + i);
    dgate.put(i, lanes, d * lanes.get(up + i) * f.slope);
    dup.put(i, lanes, d * f.value);
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(activation, {"gelu", activate<Gelu>}, {"gelu_backward", activate_backward<Gelu>}, {"silu", activate<Silu>},
                {"silu_backward", activate_backward<Silu>}, {"geglu", gated<Gelu>}, {"geglu_backward", gated_backward<Gelu>},
                {"swiglu", gated<Silu>}, {"swiglu_backward", gated_backward<Silu>})
