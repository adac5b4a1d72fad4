// fp8 in the form e4m3: a sign, four bits of exponent, three of fraction. Largest 448, no infinities, NaN is 0x7f or 0xff.
#pragma once
#include <cstdint>

#include "core/everywhere.h"

namespace limbeck {

constexpr float kFloat8Largest = 448.f;

// To the nearest, ties to even; beyond the largest value, the largest. NaN stays NaN.
LIMBECK_EVERYWHERE constexpr uint8_t float8_from(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 24 & 0x80u;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  if (magnitude >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);  // 448
  if (magnitude < 0x3c800000u) {
    // Below 2^-6 the steps are 2^-9: adding a float whose own step is that rounds to them.
    const float step = __builtin_bit_cast(float, magnitude) + 0x1p14f;
    return static_cast<uint8_t>(sign | (__builtin_bit_cast(uint32_t, step) - __builtin_bit_cast(uint32_t, 0x1p14f)));
  }
  // 20 bits of the fraction go; the exponent's bias becomes 7.
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1);
  const uint32_t code = (rounded >> 20) - (120u << 3);
  return static_cast<uint8_t>(sign | (code > 0x7eu ? 0x7eu : code));
}

LIMBECK_EVERYWHERE constexpr float float8_to(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24, magnitude = code & 0x7fu;
  if (magnitude == 0x7fu) return __builtin_bit_cast(float, sign | 0x7fc00000u);
  if (magnitude < 8) return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, static_cast<float>(magnitude) * 0x1p-9f));
  return __builtin_bit_cast(float, sign | ((magnitude << 20) + (120u << 23)));
}

}  // namespace limbeck
