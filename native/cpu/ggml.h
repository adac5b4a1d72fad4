// Weights as ggml packs them: kernels over blocks of a fixed number of values, which files of several programs have. They know no tensors;
// binding/ggml.cpp runs them. The build compiles them without fused multiply-adds, so that a file has the same bytes wherever it is written.
//   d scale, m minimum, q the integers
#pragma once
#include <cstring>

#include "core/float16.h"
#include "core/kernel.h"
#include "cpu/simd.h"

namespace limbeck::cpu::LIMBECK_ISA {

LIMBECK_INLINE float get_half(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return float_of_half(bits);
}
LIMBECK_INLINE void put_half(uint8_t* p, float x) {
  const uint16_t bits = half_of_float(x);
  std::memcpy(p, &bits, sizeof bits);
}

// unpack_*(blocks) -> values, pack_*(values) -> blocks: as many blocks as the values are
template <int Values, int Bytes, void (*Block)(const uint8_t*, float*)>
static void unpack(const Call& call) {
  const uint8_t* from = call.in[0].as<uint8_t>();
  float* to = call.out[0].as<float>();
  for (int64_t i = 0, blocks = call.out[0].size() / Values; i < blocks; ++i) Block(from + i * Bytes, to + i * Values);
}
template <int Values, int Bytes, void (*Block)(const float*, uint8_t*)>
static void pack(const Call& call) {
  const float* from = call.in[0].as<float>();
  uint8_t* to = call.out[0].as<uint8_t>();
  for (int64_t i = 0, blocks = call.in[0].size() / Values; i < blocks; ++i) Block(from + i * Values, to + i * Bytes);
}

}  // namespace limbeck::cpu::LIMBECK_ISA
