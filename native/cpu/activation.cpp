// Activations and gated activations, element by element.
#include "cpu/gate.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

// gelu(x[*]) -> y[*]
template <Gate G>
static void activate(const Call& call) {
  const float* x = call.in[0].as<float>();
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { y.put(i, lanes, gate_value<G>(lanes.get(x + i))); });
}

// gelu_backward(dy[*], x[*]) -> dx[*]+
template <Gate G>
static void activate_backward(const Call& call) {
  const float *dy = call.in[0].as<float>(), *x = call.in[1].as<float>();
  const Sink dx(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) {
    Vec value, slope;
    gate_slope<G>(lanes.get(x + i), value, slope);
    dx.put(i, lanes, lanes.get(dy + i) * slope);
  });
}

// geglu(gate[*], up[*]) -> y[*]
template <Gate G>
static void gated(const Call& call) {
  const float *gate = call.in[0].as<float>(), *up = call.in[1].as<float>();
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(),
               [=](int64_t i, auto lanes) { y.put(i, lanes, gate_value<G>(lanes.get(gate + i)) * lanes.get(up + i)); });
}

// geglu_backward(dy[*], gate[*], up[*]) -> dgate[*]+, dup[*]+
template <Gate G>
static void gated_backward(const Call& call) {
  const float *dy = call.in[0].as<float>(), *gate = call.in[1].as<float>(), *up = call.in[2].as<float>();
  const Sink dgate(call, 0), dup(call, 1);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) {
    Vec value, slope;
    gate_slope<G>(lanes.get(gate + i), value, slope);
    const Vec d = lanes.get(dy + i);
    dgate.put(i, lanes, d * lanes.get(up + i) * slope);
    dup.put(i, lanes, d * value);
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(activation, {"gelu", activate<Gate::gelu_tanh>}, {"gelu_backward", activate_backward<Gate::gelu_tanh>},
                {"silu", activate<Gate::silu>}, {"silu_backward", activate_backward<Gate::silu>},
                {"geglu", gated<Gate::gelu_tanh>}, {"geglu_backward", gated_backward<Gate::gelu_tanh>},
                {"swiglu", gated<Gate::silu>}, {"swiglu_backward", gated_backward<Gate::silu>})
