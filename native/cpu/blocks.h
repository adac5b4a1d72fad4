// Reading weights in blocks (core/blocks.h), W elements at a time; what packing and products of few rows load from.
#pragma once
#include "core/blocks.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

struct Nf4Table {
  float value[16] = {};
  constexpr Nf4Table() {
    for (int i = 0; i < 16; ++i) value[i] = nf4_value(i);
  }
};
constexpr Nf4Table kNf4;

LIMBECK_INLINE Vec nf4_values(UVec code) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)code, (__m512)load(kNf4.value));
#elif defined(__AVX2__)
  const Vec low = (Vec)_mm256_permutevar8x32_ps((__m256)load(kNf4.value), (__m256i)code);
  const Vec high = (Vec)_mm256_permutevar8x32_ps((__m256)load(kNf4.value + 8), (__m256i)code);
  return code > 7u ? high : low;
#else
  Vec v{};
  for (int i = 0; i < W; ++i) v[i] = kNf4.value[code[i]];
  return v;
#endif
}

// An index is that of an element among rows filled up to whole blocks, and a multiple of W, or of 8 where that is less.
template <int Bits>
struct LoadBlocks {
  static constexpr int64_t kBlock = block_of(Bits);
  const uint8_t* codes;
  const uint16_t* scales;

  LIMBECK_INLINE Vec operator()(int64_t i) const { return decode(codes + i * Bits / 8) * scale(i, W); }
  LIMBECK_INLINE Vec part(int64_t i, int64_t n) const {
    uint8_t bytes[W] = {};
    std::memcpy(bytes, codes + i * Bits / 8, static_cast<size_t>((n * Bits + 7) / 8));
    return SomeLanes{n}.keep(decode(bytes) * scale(i, n));
  }
  LIMBECK_INLINE void fetch(int64_t i) const { __builtin_prefetch(codes + i * Bits / 8); }

 private:
  LIMBECK_INLINE static Vec decode(const uint8_t* p) {
    if constexpr (Bits == 8) {
      typedef int8_t Bytes __attribute__((vector_size(LIMBECK_WIDTH)));
      Bytes bytes;
      std::memcpy(&bytes, p, sizeof bytes);
      return __builtin_convertvector(__builtin_convertvector(bytes, IVec), Vec);
    } else {
      // The same eight codes in each of eight lanes, which take one each.
      constexpr int kWords = W == 16 ? 2 : 1;
      uint32_t words[kWords] = {};
      std::memcpy(words, p, W / 2);
      UVec all = words[0] - UVec{}, shift{};
      for (int lane = 0; lane < W; ++lane) shift[lane] = static_cast<uint32_t>(lane % 8 * 4);
#if LIMBECK_WIDTH == 16
      const UVec upper = words[1] - UVec{};
      all = __builtin_shufflevector(all, upper, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31);
#endif
      return nf4_values(all >> shift & 15u);
    }
  }
  // Of n elements, which may begin in one block and end in the next.
  LIMBECK_INLINE Vec scale(int64_t i, int64_t n) const {
    const int64_t first = i / kBlock, last = (i + n - 1) / kBlock;
    const Vec s = splat(from_bf16(scales[first]));
    if (first == last) [[likely]]
      return s;
    IVec lane{};
    for (int k = 0; k < W; ++k) lane[k] = k;
    return lane < static_cast<int32_t>(last * kBlock - i) ? s : splat(from_bf16(scales[last]));
  }
};

}  // namespace limbeck::cpu::LIMBECK_ISA
