// float16: a sign, five bits of exponent, ten of fraction. Largest 65504. Written so that a loop over them becomes vector instructions.
#pragma once
#include <bit>
#include <cstdint>

namespace limbeck {

__attribute__((always_inline)) inline float float_of_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
  // The exponent's bias grows by 112, by a product that makes subnormal numbers normal.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(sign | ((half & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite));
}

// The nearest, ties to even; beyond the largest, infinity. NaN stays NaN.
__attribute__((always_inline)) inline uint16_t half_of_float(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // 13 bits of the fraction go; the exponent's bias of 127 becomes 15.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the steps are 2^-24: adding a float whose own step is that rounds to them.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite));
}

}  // namespace limbeck
