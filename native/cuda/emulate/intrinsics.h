// CUDA's intrinsic functions for the host. Approximate ones (__expf, ...) are exact here.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/emulate/schedule.h"

// Bits.
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i);
    const unsigned byte = static_cast<unsigned>(both >> (8 * (s & 7))) & 0xff;
    r |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using wide = unsigned __int128;
  return static_cast<unsigned long long>((static_cast<wide>(a) * b) >> 64);
}

// Arithmetic.
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __log10f(float x) { return std::log10(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanhf(float x) { return std::tanh(x); }
inline void __sincosf(float x, float* s, float* c) { *s = std::sin(x), *c = std::cos(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
// Kept apart from a later addition or product, as on the GPU.
inline float __fmul_rn(float a, float b) {
  float r = a * b;
  __asm__("" : "+m"(r));
  return r;
}
inline float __fadd_rn(float a, float b) {
  float r = a + b;
  __asm__("" : "+m"(r));
  return r;
}
inline float __fsub_rn(float a, float b) { return __fadd_rn(a, -b); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(std::ceil(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

// Loads and stores with cache hints.
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldca(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcg(T* p, T v) { *p = v; }
template <class T> void __stcs(T* p, T v) { *p = v; }

// Barriers, fences and warps.
namespace limbeck::cuda::emulate {
template <class T>
T shuffle_any(Shuffle kind, uint32_t mask, T value, int operand, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
  for (uint32_t& w : words) w = shuffle(kind, mask, w, operand, width);
  std::memcpy(&value, words, sizeof(T));
  return value;
}
}  // namespace limbeck::cuda::emulate

inline void __syncthreads() { limbeck::cuda::emulate::barrier_sync("__syncthreads", 0, 0); }
inline int __syncthreads_count(int p) { return limbeck::cuda::emulate::barrier_reduce("__syncthreads_count", p, 0); }
inline int __syncthreads_and(int p) { return limbeck::cuda::emulate::barrier_reduce("__syncthreads_and", p, 1); }
inline int __syncthreads_or(int p) { return limbeck::cuda::emulate::barrier_reduce("__syncthreads_or", p, 2); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { limbeck::cuda::emulate::warp_sync(mask); }
inline void __threadfence() {}  // atomics order all of a block's accesses before them, see races.cpp
inline void __threadfence_block() {}
inline void __threadfence_system() {}
template <class T> T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  return limbeck::cuda::emulate::shuffle_any(limbeck::cuda::emulate::Shuffle::index, mask, v, lane, width);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return limbeck::cuda::emulate::shuffle_any(limbeck::cuda::emulate::Shuffle::up, mask, v, static_cast<int>(delta), width);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return limbeck::cuda::emulate::shuffle_any(limbeck::cuda::emulate::Shuffle::down, mask, v, static_cast<int>(delta), width);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  return limbeck::cuda::emulate::shuffle_any(limbeck::cuda::emulate::Shuffle::exclusive_or, mask, v, lanes, width);
}
inline unsigned __ballot_sync(unsigned mask, int p) { return limbeck::cuda::emulate::ballot("__ballot_sync", mask, p != 0); }
inline int __any_sync(unsigned mask, int p) { return limbeck::cuda::emulate::ballot("__any_sync", mask, p != 0) != 0; }
inline int __all_sync(unsigned mask, int p) { return limbeck::cuda::emulate::ballot("__all_sync", mask, p != 0) == mask; }
template <class T> unsigned __match_any_sync(unsigned mask, T v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint32_t words[2] = {};
  std::memcpy(words, &v, sizeof(T));
  return limbeck::cuda::emulate::match_any(mask, words[0], words[1]);
}
unsigned __activemask() = delete;  // names whatever lanes happen to be together: pass the mask that is meant

#define LIMBECK_REDUCE(name, T, kind)                                                                      \
  inline T __reduce_##name##_sync(unsigned mask, T v) {                                                    \
    return static_cast<T>(limbeck::cuda::emulate::reduce(limbeck::cuda::emulate::Reduce::kind, mask, static_cast<uint32_t>(v))); \
  }
LIMBECK_REDUCE(add, int, add)
LIMBECK_REDUCE(add, unsigned, add)
LIMBECK_REDUCE(min, int, min_signed)
LIMBECK_REDUCE(max, int, max_signed)
LIMBECK_REDUCE(min, unsigned, min_unsigned)
LIMBECK_REDUCE(max, unsigned, max_unsigned)
LIMBECK_REDUCE(and, unsigned, bit_and)
LIMBECK_REDUCE(or, unsigned, bit_or)
LIMBECK_REDUCE(xor, unsigned, bit_xor)
#undef LIMBECK_REDUCE

#define LIMBECK_ATOMIC(name, T, word, kind)                                                                                 \
  inline T atomic##name(T* p, T v) {                                                                                        \
    return static_cast<T>(limbeck::cuda::emulate::atomic(limbeck::cuda::emulate::Atomic::kind, reinterpret_cast<word*>(p), static_cast<word>(v))); \
  }
#define LIMBECK_ATOMICS(name, signed_kind, unsigned_kind)      \
  LIMBECK_ATOMIC(name, int, uint32_t, signed_kind)             \
  LIMBECK_ATOMIC(name, unsigned, uint32_t, unsigned_kind)      \
  LIMBECK_ATOMIC(name, unsigned long long, uint64_t, unsigned_kind)
LIMBECK_ATOMICS(Add, add, add)
LIMBECK_ATOMICS(Exch, exchange, exchange)
LIMBECK_ATOMICS(Min, min_signed, min_unsigned)
LIMBECK_ATOMICS(Max, max_signed, max_unsigned)
LIMBECK_ATOMICS(And, bit_and, bit_and)
LIMBECK_ATOMICS(Or, bit_or, bit_or)
LIMBECK_ATOMICS(Xor, bit_xor, bit_xor)
LIMBECK_ATOMIC(Inc, unsigned, uint32_t, increment)
LIMBECK_ATOMIC(Dec, unsigned, uint32_t, decrement)
#undef LIMBECK_ATOMICS
#undef LIMBECK_ATOMIC
inline float atomicAdd(float* p, float v) { return limbeck::cuda::emulate::atomic_add(p, v); }
inline double atomicAdd(double* p, double v) { return limbeck::cuda::emulate::atomic_add(p, v); }
inline float atomicExch(float* p, float v) {
  return __uint_as_float(atomicExch(reinterpret_cast<unsigned*>(p), __float_as_uint(v)));
}
inline int atomicCAS(int* p, int compare, int v) {
  return static_cast<int>(limbeck::cuda::emulate::atomic_compare_exchange(reinterpret_cast<uint32_t*>(p), static_cast<uint32_t>(compare),
                                                                          static_cast<uint32_t>(v)));
}
inline unsigned atomicCAS(unsigned* p, unsigned compare, unsigned v) {
  return limbeck::cuda::emulate::atomic_compare_exchange(reinterpret_cast<uint32_t*>(p), compare, v);
}
inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long compare, unsigned long long v) {
  return limbeck::cuda::emulate::atomic_compare_exchange(reinterpret_cast<uint64_t*>(p), static_cast<uint64_t>(compare), static_cast<uint64_t>(v));
}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { limbeck::cuda::emulate::trap("__trap"); }
