// bf16, the upper half of a float, and pairs of it in one register: the first element in the low half.
#pragma once
#include <cstdint>

#include "cuda/runtime.h"

namespace limbeck::cuda {

struct bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float low_float(uint32_t pair) { return bits_to_float(pair << 16); }
__device__ __forceinline__ float high_float(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }
__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) { return make_float2(low_float(pair), high_float(pair)); }

#ifdef LIMBECK_EMULATE
// To the nearest, ties to even; NaN as the hardware gives it.
__device__ __forceinline__ bf16 to_bf16(float x) {
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return static_cast<uint32_t>(to_bf16(low).bits) | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}
// Pair by pair, rounded once.
__device__ __forceinline__ uint32_t subtract_bf16(uint32_t a, uint32_t b) {
  return pack_bf16(low_float(a) - low_float(b), high_float(a) - high_float(b));
}
#else
__device__ __forceinline__ bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t subtract_bf16(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(b), "r"(0xbf80bf80u), "r"(a));  // b times -1 plus a
  return pair;
}
#endif

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}

}  // namespace limbeck::cuda
