// The activations of gated MLPs, value(gate) * up, and their slopes.
#pragma once
#include "cpu/simd.h"

namespace limbeck::cpu::LIMBECK_ISA {

enum class Gate { gelu_tanh = 0, silu = 1 };  // the numbers that signatures use

// gelu_tanh(x) = x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
constexpr float kGelu = 1.5957691216057308f;  // 2 sqrt(2/pi)
constexpr float kGeluCube = 0.044715f * kGelu;

// T is a Vec or a Pair. For products with x: of NaN it is 1, and it is never quite zero.
template <class T>
LIMBECK_INLINE T sigmoid(T x) {
  return 1.f / (1.f + exp_inside(clamp(-x, -87.f, 88.f)));
}

template <Gate G, class T>
LIMBECK_INLINE T gate_value(T x) {
  if constexpr (G == Gate::gelu_tanh) return x * sigmoid(x * (x * x * kGeluCube + kGelu));
  return x * sigmoid(x);
}

// Value and slope with one exponential.
template <Gate G, class T>
LIMBECK_INLINE void gate_slope(T x, T& value, T& slope) {
  if constexpr (G == Gate::gelu_tanh) {
    const T c = clamp(x, -20.f, 20.f);  // saturated long before; keeps c * c finite
    const T s = sigmoid(c * (c * c * kGeluCube + kGelu));
    value = x * s;
    slope = s + s * (1.f - s) * (c * (c * c * (3.f * kGeluCube) + kGelu));
  } else {
    const T s = sigmoid(x);
    value = x * s;
    slope = s + value * (1.f - s);
  }
}

}  // namespace limbeck::cpu::LIMBECK_ISA
