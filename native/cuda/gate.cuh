// The activations of gated MLPs, value(gate) * up, and their slopes.
#pragma once
#include "cuda/runtime.h"

namespace limbeck::cuda {

enum class Gate { gelu_tanh = 0, silu = 1 };  // the numbers that signatures use

// gelu_tanh(x) = x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
constexpr float kGelu = 1.5957691216057308f;  // 2 sqrt(2/pi)
constexpr float kGeluCube = 0.044715f * kGelu;

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

template <Gate G>
__device__ __forceinline__ float gate_value(float x) {
  if constexpr (G == Gate::gelu_tanh) return x * sigmoid(x * (x * x * kGeluCube + kGelu));
  return x * sigmoid(x);
}

// Value and slope with one exponential.
template <Gate G>
__device__ __forceinline__ void gate_slope(float x, float& value, float& slope) {
  if constexpr (G == Gate::gelu_tanh) {
    const float c = fminf(fmaxf(x, -20.f), 20.f);  // saturated long before; keeps c * c finite
    const float s = sigmoid(c * (c * c * kGeluCube + kGelu));
    value = x * s;
    slope = s + value * (1.f - s) * (c * c * (3.f * kGeluCube) + kGelu);
  } else {
    const float s = sigmoid(x);
    value = x * s;
    slope = s + value * (1.f - s);
  }
}

}  // namespace limbeck::cuda
