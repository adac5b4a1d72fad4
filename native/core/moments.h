// How the optimizer's state is made small: moments of 8 bits in blocks that share a scale, and bf16 parameters that are rounded by
// chance. The same code on every device.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/random.h"

namespace limbeck {

constexpr int kMomentBlock = 256;

// The codes are roots of the value's share of the block's largest: fine steps (1.6 %) at the top, and a wide range below it, where a
// linear code would make small second moments zero and their updates huge.
// First moment: sign and 7 bits of the square root. Second: 8 bits of the fourth root, rounded so that only zero becomes zero.
LIMBECK_EVERYWHERE inline float unpack_first(uint8_t code, float largest) {
  const float root = static_cast<float>(code & 127) * (1.f / 127);
  return (code & 128 ? -root : root) * root * largest;
}
LIMBECK_EVERYWHERE inline uint8_t pack_first(float value, float largest) {
  if (!(largest > 0)) return 0;
  const float share = __builtin_fabsf(value) / largest;
  const int root = static_cast<int>(__builtin_sqrtf(share < 1 ? share : 1.f) * 127 + 0.5f);
  return static_cast<uint8_t>(root | (value < 0 ? 128 : 0));
}
LIMBECK_EVERYWHERE inline float unpack_second(uint8_t code, float largest) {
  const float root = static_cast<float>(code) * (1.f / 255), square = root * root;
  return square * square * largest;
}
LIMBECK_EVERYWHERE inline uint8_t pack_second(float value, float largest) {
  if (!(value > 0)) return 0;
  const float share = value / largest;
  const int root = static_cast<int>(__builtin_sqrtf(__builtin_sqrtf(share < 1 ? share : 1.f)) * 255 + 0.5f);
  return static_cast<uint8_t>(root < 1 ? 1 : root);
}

// Random bits of the eight parameters from `first` on, a multiple of eight, in update `step`: 16 for each.
struct Chances {
  Words<4> random;
  LIMBECK_EVERYWHERE Chances(uint64_t seed, uint64_t step, uint64_t first) : random(random_block(seed, step, first / 8)) {}
  LIMBECK_EVERYWHERE uint32_t operator[](int i) const { return random[i / 2] >> (i % 2 * 16) & 0xffff; }
};

// To bf16, up with the probability of the part that is cut off.
LIMBECK_EVERYWHERE inline uint16_t round_by_chance(float value, uint32_t chance) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000u) == 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | (bits & 0xffff ? 0x40 : 0));
  return static_cast<uint16_t>((bits + chance) >> 16);
}

}  // namespace limbeck
