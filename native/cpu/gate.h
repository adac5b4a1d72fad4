// The activations of gated MLPs, value(gate) * up, and their slopes.
#pragma once
#include "cpu/simd.h"

namespace limbeck::cpu::LIMBECK_ISA {

enum class Gate { gelu_tanh = 0, silu = 1 };  // the numbers that signatures use

// gelu_tanh(x) = x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
constexpr float kGelu = 1.5957691216057308f;  // 2 sqrt(2/pi)
constexpr float kGeluCube = 0.044715f * kGelu;

LIMBECK_INLINE Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

template <Gate G>
LIMBECK_INLINE Vec gate_value(Vec x) {
  if constexpr (G == Gate::gelu_tanh) return x * sigmoid(x * (x * x * kGeluCube + kGelu));
  return x * sigmoid(x);
}

// Value and slope with one exponential.
template <Gate G>
LIMBECK_INLINE void gate_slope(Vec x, Vec& value, Vec& slope) {
  if constexpr (G == Gate::gelu_tanh) {
    const Vec c = min(max(x, splat(-20.f)), splat(20.f));  // saturated long before; keeps c * c finite
    const Vec s = sigmoid(c * (c * c * kGeluCube + kGelu));
    value = x * s;
    slope = s + value * (1.f - s) * (c * c * (3.f * kGeluCube) + kGelu);
  } else {
    const Vec s = sigmoid(x);
    value = x * s;
    slope = s + value * (1.f - s);
  }
}

}  // namespace limbeck::cpu::LIMBECK_ISA
