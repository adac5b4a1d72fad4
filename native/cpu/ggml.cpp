// ggml's plain types: F16, BF16, and blocks of 32 values with a scale, or a scale and a minimum. Packing gives the bytes of llama.cpp's own
// quantizer.
#include "cpu/ggml.h"

#include <cmath>

namespace limbeck::cpu::LIMBECK_ISA {

static void unpack_f16(const Call& call) {
  const uint8_t* from = call.in[0].as<uint8_t>();
  float* to = call.out[0].as<float>();
  for (int64_t i = 0, n = call.out[0].size(); i < n; ++i) to[i] = get_half(from + 2 * i);
}
static void pack_f16(const Call& call) {
  const float* from = call.in[0].as<float>();
  uint8_t* to = call.out[0].as<uint8_t>();
  for (int64_t i = 0, n = call.in[0].size(); i < n; ++i) put_half(to + 2 * i, from[i]);
}

static void unpack_bf16(const Call& call) {
  const uint8_t* from = call.in[0].as<uint8_t>();
  float* to = call.out[0].as<float>();
  for (int64_t i = 0, n = call.out[0].size(); i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof bits);
    to[i] = from_bf16(bits);
  }
}
static void pack_bf16(const Call& call) {
  const float* from = call.in[0].as<float>();
  uint8_t* to = call.out[0].as<uint8_t>();
  for (int64_t i = 0, n = call.in[0].size(); i < n; ++i) {
    const uint32_t wide = std::bit_cast<uint32_t>(from[i]);
    // A NaN stays one, though only its low bits say so.
    const uint32_t bits = (wide & 0x7fffffffu) > 0x7f800000u ? (wide >> 16) | 64u : (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    const auto narrow = static_cast<uint16_t>(bits);
    std::memcpy(to + 2 * i, &narrow, sizeof narrow);
  }
}

static void unpack_q8_0(const uint8_t* from, float* to) {
  const float d = get_half(from);
  for (int j = 0; j < 32; ++j) to[j] = d * static_cast<float>(static_cast<int8_t>(from[2 + j]));
}

// What to multiply by instead of dividing; 0 for scales so small that nothing is left of the values.
static float inverse_of(float d) {
  const float inverse = 1.f / d;
  return std::isfinite(inverse) ? inverse : 0.f;
}

static void pack_q8_0(const float* from, uint8_t* to) {
  float most = 0;
  for (int j = 0; j < 32; ++j) most = std::fabs(from[j]) > most ? std::fabs(from[j]) : most;
  const float d = most / 127.f, inverse = inverse_of(d);
  put_half(to, d);
  for (int j = 0; j < 32; ++j) {
    // Halves go away from zero.
    const double v = from[j] * inverse;
    to[2 + j] = static_cast<uint8_t>(static_cast<int32_t>(v < 0 ? v - 0.5 : v + 0.5));
  }
}

static void unpack_q4_0(const uint8_t* from, float* to) {
  const float d = get_half(from);
  for (int j = 0; j < 16; ++j) {
    to[j] = d * static_cast<float>((from[2 + j] & 15) - 8);
    to[j + 16] = d * static_cast<float>((from[2 + j] >> 4) - 8);
  }
}

static void unpack_q4_1(const uint8_t* from, float* to) {
  const float d = get_half(from), m = get_half(from + 2);
  for (int j = 0; j < 16; ++j) {
    to[j] = d * static_cast<float>(from[4 + j] & 15) + m;
    to[j + 16] = d * static_cast<float>(from[4 + j] >> 4) + m;
  }
}

// The fifth bits of 32 values.
static uint32_t word(const uint8_t* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

static void unpack_q5_0(const uint8_t* from, float* to) {
  const float d = get_half(from);
  const uint32_t high = word(from + 2);
  for (uint32_t j = 0; j < 16; ++j) {
    const uint32_t q = from[6 + j];
    to[j] = d * static_cast<float>(static_cast<int32_t>((q & 15) | ((high >> j) & 1) << 4) - 16);
    to[j + 16] = d * static_cast<float>(static_cast<int32_t>((q >> 4) | ((high >> (j + 16)) & 1) << 4) - 16);
  }
}

static void pack_q5_0(const float* from, uint8_t* to) {
  float largest = 0;
  for (int j = 0; j < 32; ++j) largest = std::fabs(from[j]) > std::fabs(largest) ? from[j] : largest;
  const float d = largest / -16.f, inverse = inverse_of(d);
  put_half(to, d);
  uint32_t q[32], high = 0;
  for (int j = 0; j < 32; ++j) {
    const auto n = static_cast<uint32_t>(from[j] * inverse + 16.5f);
    q[j] = n > 31 ? 31 : n;
  }
  for (uint32_t j = 0; j < 16; ++j) {
    to[6 + j] = static_cast<uint8_t>((q[j] & 15) | (q[j + 16] & 15) << 4);
    high |= (q[j] >> 4) << j | (q[j + 16] >> 4) << (j + 16);
  }
  std::memcpy(to + 2, &high, sizeof high);
}

static void unpack_q5_1(const uint8_t* from, float* to) {
  const float d = get_half(from), m = get_half(from + 2);
  const uint32_t high = word(from + 4);
  for (uint32_t j = 0; j < 16; ++j) {
    const uint32_t q = from[8 + j];
    to[j] = d * static_cast<float>((q & 15) | ((high >> j) & 1) << 4) + m;
    to[j + 16] = d * static_cast<float>((q >> 4) | ((high >> (j + 16)) & 1) << 4) + m;
  }
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(ggml, {"unpack_f16", unpack_f16}, {"pack_f16", pack_f16}, {"unpack_bf16", unpack_bf16}, {"pack_bf16", pack_bf16},
                {"unpack_q8_0", unpack<32, 34, unpack_q8_0>}, {"pack_q8_0", pack<32, 34, pack_q8_0>},
                {"unpack_q4_0", unpack<32, 18, unpack_q4_0>}, {"unpack_q4_1", unpack<32, 20, unpack_q4_1>},
                {"unpack_q5_0", unpack<32, 22, unpack_q5_0>}, {"pack_q5_0", pack<32, 22, pack_q5_0>},
                {"unpack_q5_1", unpack<32, 24, unpack_q5_1>})
