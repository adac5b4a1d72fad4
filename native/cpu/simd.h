// Vectors of floats, as wide as the instruction set this file is compiled for: GCC/Clang vector extensions, so that one source
// serves AVX2, AVX-512, NEON and the portable build. Multiply-adds contract to FMA where the machine has it.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define LIMBECK_WIDTH 16
#elif defined(__AVX2__)
#define LIMBECK_WIDTH 8
#else
#define LIMBECK_WIDTH 4
#endif
#define LIMBECK_INLINE inline __attribute__((always_inline))

namespace limbeck::cpu::LIMBECK_ISA {

constexpr int W = LIMBECK_WIDTH;
typedef float Vec __attribute__((vector_size(4 * LIMBECK_WIDTH)));
typedef int32_t IVec __attribute__((vector_size(4 * LIMBECK_WIDTH)));
typedef uint16_t HVec __attribute__((vector_size(2 * LIMBECK_WIDTH)));
typedef uint32_t UVec __attribute__((vector_size(4 * LIMBECK_WIDTH)));

LIMBECK_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LIMBECK_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
LIMBECK_INLINE Vec splat(float x) { return x - Vec{}; }
// The first n (< W) elements; the others are zero, and are not touched in memory.
LIMBECK_INLINE Vec load_part(const float* p, int64_t n) {
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
LIMBECK_INLINE void store_part(float* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
LIMBECK_INLINE Vec load_bf16(const uint16_t* p) {
  HVec h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
}
LIMBECK_INLINE float from_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
LIMBECK_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
LIMBECK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
LIMBECK_INLINE float sum(Vec v) {
  // A fixed tree, so that the same width gives the same bits.
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

// e^x to about 1 ulp for x in [-87, 88]; below it gives 0, above it saturates near 2^127. NaN stays NaN.
LIMBECK_INLINE Vec exp(Vec x) {
  const Vec in = x;
  x = min(max(x, splat(-87.3f)), splat(88.3f));
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23 rounds to an integer in the low mantissa bits
  const Vec t = x * 1.44269504088896341f + magic;
  const Vec n = t - magic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const Vec scale = (Vec)(((IVec)t << 23) + 0x3f800000);
  Vec y = p * scale;
  y = in < -87.3f ? Vec{} : y;
  return in == in ? y : in;
}

// tanh to about 2 ulp (odd rational approximation, exact sign, saturates at |x| > 7.9). NaN stays NaN.
LIMBECK_INLINE Vec tanh(Vec x) {
  const Vec in = x;
  x = min(max(x, splat(-7.90531110763549805f)), splat(7.90531110763549805f));
  const Vec x2 = x * x;
  Vec p = x2 * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * x2 + -8.60467152213735e-11f;
  p = p * x2 + 5.12229709037114e-08f;
  p = p * x2 + 1.48572235717979e-05f;
  p = p * x2 + 6.37261928875436e-04f;
  p = p * x2 + 4.89352455891786e-03f;
  Vec q = x2 * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * x2 + 2.26843463243900e-03f;
  q = q * x2 + 4.89352518554385e-03f;
  const Vec y = x * p / q;
  return in == in ? y : in;
}

}  // namespace limbeck::cpu::LIMBECK_ISA
