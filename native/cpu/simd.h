// Vectors of floats, as wide as the instruction set this file is compiled for: GCC/Clang vector extensions, so that one source
// serves AVX2, AVX-512, NEON and the portable build. Multiply-adds contract to FMA where the machine has it.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>  // for what vector extensions cannot say: masked access, minimum and maximum, a question about all lanes
#endif

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
#if defined(__AVX512F__)
LIMBECK_INLINE Vec load_part(const float* p, int64_t n) {
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
LIMBECK_INLINE void store_part(float* p, Vec v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
#elif defined(__AVX2__)
LIMBECK_INLINE IVec first_lanes(int64_t n) { return static_cast<int32_t>(n) > IVec{0, 1, 2, 3, 4, 5, 6, 7}; }
LIMBECK_INLINE Vec load_part(const float* p, int64_t n) { return (Vec)_mm256_maskload_ps(p, (__m256i)first_lanes(n)); }
LIMBECK_INLINE void store_part(float* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v); }
#else
LIMBECK_INLINE Vec load_part(const float* p, int64_t n) {
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
LIMBECK_INLINE void store_part(float* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif
// Line i of a register tile: acc[v] += x[v] * *p. With AVX-512 a multiply-add can take its factor from memory, which saves the instruction
// that spreads it, but loads it once for each vector: so five lines in seven do, as many as the load units have time for.
template <int N>
LIMBECK_INLINE void add_line(Vec (&acc)[N], const Vec (&x)[N], const float* p, [[maybe_unused]] int i) {
#if defined(__AVX512F__)
  if ((i + 1) * 5 / 7 != i * 5 / 7) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(acc[v]) : "v"(x[v]), "m"(*p));
    return;
  }
#endif
  const Vec y = splat(*p);
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) acc[v] += y * x[v];
}
LIMBECK_INLINE Vec load_bf16(const uint16_t* p) {
  HVec h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
}
LIMBECK_INLINE Vec load_bf16_part(const uint16_t* p, int64_t n) {
  uint16_t buffer[LIMBECK_WIDTH] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * 2);
  return load_bf16(buffer);
}
LIMBECK_INLINE float from_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// a < b ? a : b, so NaN in either gives b. This is what the x86 instruction does, but GCC does not use it of itself. (The plain
// 512-bit intrinsics warn in GCC 12.)
#if defined(__AVX512F__)
LIMBECK_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
LIMBECK_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
#elif defined(__AVX2__)
LIMBECK_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
LIMBECK_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
LIMBECK_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
LIMBECK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif
LIMBECK_INLINE Vec clamp(Vec x, float low, float high) { return min(max(x, splat(low)), splat(high)); }  // NaN gives low

// Vectors in step: chains of dependent operations then hide each other's latency.
template <int N>
struct Vecs {
  Vec v[N];
};
using Pair = Vecs<2>;
template <int N, class Step>
LIMBECK_INLINE Vecs<N> each(Step step) {
  Vecs<N> y;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) y.v[i] = step(i);
  return y;
}
#define LIMBECK_EACH(op)                                                                                      \
  template <int N>                                                                                            \
  LIMBECK_INLINE Vecs<N> operator op(const Vecs<N>& x, const Vecs<N>& y) {                                    \
    return each<N>([&](int i) { return x.v[i] op y.v[i]; });                                                  \
  }                                                                                                           \
  template <int N>                                                                                            \
  LIMBECK_INLINE Vecs<N> operator op(const Vecs<N>& x, float y) {                                             \
    return each<N>([&](int i) { return x.v[i] op y; });                                                       \
  }                                                                                                           \
  template <int N>                                                                                            \
  LIMBECK_INLINE Vecs<N> operator op(float x, const Vecs<N>& y) {                                             \
    return each<N>([&](int i) { return x op y.v[i]; });                                                       \
  }
LIMBECK_EACH(+)
LIMBECK_EACH(-)
LIMBECK_EACH(*)
LIMBECK_EACH(/)
#undef LIMBECK_EACH
template <int N>
LIMBECK_INLINE Vecs<N> operator-(const Vecs<N>& x) {
  return each<N>([&](int i) { return -x.v[i]; });
}
template <int N>
LIMBECK_INLINE Vecs<N> clamp(const Vecs<N>& x, float low, float high) {
  return each<N>([&](int i) { return clamp(x.v[i], low, high); });
}
template <int N>
LIMBECK_INLINE void store(float* p, const Vecs<N>& x) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(p + i * W, x.v[i]);
}

// Whether |x| <= bound in all lanes of all vectors; NaN is not. Sizes are compared as integers, above which are those of NaN.
template <int N>
LIMBECK_INLINE bool all_within(const Vecs<N>& x, float bound) {
  const auto size = [](Vec v) { return (IVec)v & 0x7fffffff; };
  IVec top = size(x.v[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) top = size(x.v[i]) > top ? size(x.v[i]) : top;
  const IVec limit = (IVec)splat(bound);
#if defined(__AVX512F__)
  return _mm512_cmpgt_epi32_mask((__m512i)top, (__m512i)limit) == 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(_mm256_cmpgt_epi32((__m256i)top, (__m256i)limit)) == 0;
#else
  bool yes = true;
  for (int i = 0; i < W; ++i) yes &= top[i] <= limit[i];
  return yes;
#endif
}

// Horner's rule, coefficients from the highest power.
template <class T, class... Rest>
LIMBECK_INLINE T horner(const T& x, float first, float second, Rest... rest) {
  T y = x * first + second;
  ((y = y * x + rest), ...);
  return y;
}

LIMBECK_INLINE float sum(Vec v) {
  // A fixed tree, so that the same width gives the same bits.
#if LIMBECK_WIDTH == 16
  const auto h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#elif LIMBECK_WIDTH == 8
  const auto q = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  const Vec q = v;
#endif
  const auto p = q + __builtin_shufflevector(q, q, 2, 3, 0, 1);
  return p[0] + p[1];
}

// v[i][j] becomes v[j][i].
LIMBECK_INLINE void transpose(Vec (&v)[LIMBECK_WIDTH]) {
  Vec c[LIMBECK_WIDTH];
  // 4 x 4 blocks inside each 128-bit lane...
#if LIMBECK_WIDTH == 16
#define LIMBECK_LANES(a, b, c, d) \
  a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#elif LIMBECK_WIDTH == 8
#define LIMBECK_LANES(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#else
#define LIMBECK_LANES(a, b, c, d) a, b, c, d
#endif
  for (int r = 0; r < W; r += 4) {
    const Vec t0 = __builtin_shufflevector(v[r], v[r + 1], LIMBECK_LANES(0, W, 1, W + 1));
    const Vec t1 = __builtin_shufflevector(v[r], v[r + 1], LIMBECK_LANES(2, W + 2, 3, W + 3));
    const Vec t2 = __builtin_shufflevector(v[r + 2], v[r + 3], LIMBECK_LANES(0, W, 1, W + 1));
    const Vec t3 = __builtin_shufflevector(v[r + 2], v[r + 3], LIMBECK_LANES(2, W + 2, 3, W + 3));
    c[r] = __builtin_shufflevector(t0, t2, LIMBECK_LANES(0, 1, W, W + 1));
    c[r + 1] = __builtin_shufflevector(t0, t2, LIMBECK_LANES(2, 3, W + 2, W + 3));
    c[r + 2] = __builtin_shufflevector(t1, t3, LIMBECK_LANES(0, 1, W, W + 1));
    c[r + 3] = __builtin_shufflevector(t1, t3, LIMBECK_LANES(2, 3, W + 2, W + 3));
  }
#undef LIMBECK_LANES
  // ... then the lanes as a matrix of blocks.
  for (int j = 0; j < 4; ++j) {
#if LIMBECK_WIDTH == 16
    for (int half = 0; half < 2; ++half) {
      const Vec x0 = half ? __builtin_shufflevector(c[j], c[j + 4], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
                          : __builtin_shufflevector(c[j], c[j + 4], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      const Vec x1 =
          half ? __builtin_shufflevector(c[j + 8], c[j + 12], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
               : __builtin_shufflevector(c[j + 8], c[j + 12], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      v[8 * half + j] = __builtin_shufflevector(x0, x1, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      v[8 * half + 4 + j] = __builtin_shufflevector(x0, x1, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
#elif LIMBECK_WIDTH == 8
    v[j] = __builtin_shufflevector(c[j], c[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[4 + j] = __builtin_shufflevector(c[j], c[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
#else
    v[j] = c[j];
#endif
  }
}

// 2^n from the bits of n + 1.5 * 2^23.
LIMBECK_INLINE Vec power_of(Vec t) { return (Vec)(((IVec)t << 23) + 0x3f800000); }
template <int N>
LIMBECK_INLINE Vecs<N> power_of(const Vecs<N>& t) {
  return each<N>([&](int i) { return power_of(t.v[i]); });
}

// e^x to about 1 ulp, for x known to lie in [-87, 88]: a Vec or Vecs. NaN stays NaN.
template <class T>
LIMBECK_INLINE T exp_inside(T x) {
  constexpr float magic = 12582912.f;  // 1.5 * 2^23 rounds to an integer in the low mantissa bits
  const T t = x * 1.44269504088896341f + magic;
  const T n = t - magic;
  T r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  const T p = horner(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f)
              * (r * r) + r + 1.f;
  return p * power_of(t);
}
// The same for any x: 0 below -87, saturates near 2^127 above 88.
LIMBECK_INLINE Vec exp(Vec x) {
  const Vec y = x < -87.3f ? Vec{} : exp_inside(min(max(x, splat(-87.3f)), splat(88.3f)));
  return x == x ? y : x;
}

// tanh to 1.5 ulp for |x| <= kTanhNear, where the arguments of soft caps nearly always are: an odd polynomial. A Vec or Vecs. NaN stays NaN.
constexpr float kTanhNear = 0.7f;
template <class T>
LIMBECK_INLINE T tanh_near(const T& x) {
  return x * horner(x * x, -5.0883359e-3f, 2.0024458e-2f, -5.3526009e-2f, 1.3328415e-1f, -3.3333130e-1f, 1.f);
}
// For any x to about 5 ulp (3e-7 relative; beyond kTanhNear an odd rational approximation, which saturates at 7.9). NaN stays NaN. What
// the other lanes hold decides what is computed, never the bits of this one.
template <int N>
LIMBECK_INLINE Vecs<N> tanh(const Vecs<N>& x) {
  const Vecs<N> near = tanh_near(x);
  if (all_within(x, kTanhNear)) return near;
  const Vecs<N> c = clamp(x, -7.90531110763549805f, 7.90531110763549805f), u = c * c;
  const Vecs<N> p = horner(u, -2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                           1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f);
  const Vecs<N> q = horner(u, 1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f);
  return each<N>([&](int i) { return max(x.v[i], -x.v[i]) > kTanhNear ? c.v[i] * p.v[i] / q.v[i] : near.v[i]; });
}
LIMBECK_INLINE Vec tanh(Vec x) { return tanh(Vecs<1>{{x}}).v[0]; }

// Natural logarithm to about 1 ulp, subnormal numbers included: -inf at 0, NaN below.
LIMBECK_INLINE Vec log(Vec x) {
  const Vec in = x;
  const IVec tiny = x < 1.17549435e-38f;
  x = tiny ? x * 8388608.f : x;
  const IVec e = ((IVec)x - 0x3f3504f3) >> 23;  // x = 2^e m, m in [sqrt 1/2, sqrt 2)
  const Vec f = (Vec)((IVec)x - (e << 23)) - 1.f;
  const Vec n = __builtin_convertvector(e, Vec) - (tiny ? splat(23.f) : Vec{});
  const Vec p = horner(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                       2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  const Vec f2 = f * f;
  Vec y = p * (f2 * f) + n * -2.12194440e-4f;
  y = f - (f2 * 0.5f - y) + n * 0.693359375f;
  y = in > 3.4028235e38f ? in : y;
  y = in == 0.f ? splat(-__builtin_inff()) : y;
  return in >= 0.f ? y : splat(__builtin_nanf(""));
}

}  // namespace limbeck::cpu::LIMBECK_ISA
