// The K types of ggml: 256 values share a scale d and a minimum m, and groups of them have small integer scales and minima of their own.
// Packing searches for the scales that lose least, as llama.cpp's quantizer does without an importance matrix: in float64, a group in each
// lane, so that every sum has one order whatever the width of a vector.
#include <cmath>

#include "cpu/ggml.h"

namespace limbeck::cpu::LIMBECK_ISA {

// Scales and minima of 16 values in four bits each, then 2 bits a value: four groups of 32 share each run of 32 bytes.
static void unpack_q2_k(const uint8_t* from, float* to) {
  const float d = get_half(from + 80), m = get_half(from + 82);
  for (int g = 0; g < 16; ++g) {
    const float scale = d * static_cast<float>(from[g] & 15), low = m * static_cast<float>(from[g] >> 4);
    const uint8_t* q = from + 16 + (g >> 3) * 32 + (g & 1) * 16;
    const int shift = g & 6;
    for (int j = 0; j < 16; ++j) to[g * 16 + j] = scale * static_cast<float>((q[j] >> shift) & 3) - low;
  }
}

// The third bit of all 256 values, 2 bits a value, then scales of 16 values in six bits.
static void unpack_q3_k(const uint8_t* from, float* to) {
  const float d = get_half(from + 108);
  for (int g = 0; g < 16; ++g) {
    const int low = (from[96 + (g & 7)] >> ((g >> 1) & 4)) & 15, high = (from[104 + (g & 3)] >> ((g >> 2) * 2)) & 3;
    const float scale = d * static_cast<float>((low | high << 4) - 32);
    const uint8_t *q = from + 32 + (g >> 3) * 32 + (g & 1) * 16, *third = from + (g & 1) * 16;
    const int shift = g & 6, bit = g >> 1;
    for (int j = 0; j < 16; ++j) to[g * 16 + j] = scale * static_cast<float>(((q[j] >> shift) & 3) + ((third[j] >> bit) & 1) * 4 - 4);
  }
}

// Scale and minimum of group g of 8, six bits each, in 12 bytes.
struct Six {
  int scale, minimum;
};
static Six six_of(const uint8_t* p, int g) {
  if (g < 4) return {p[g] & 63, p[g + 4] & 63};
  return {(p[g + 4] & 15) | (p[g - 4] >> 6) << 4, (p[g + 4] >> 4) | (p[g] >> 6) << 4};
}

static void unpack_q4_k(const uint8_t* from, float* to) {
  const float d = get_half(from), m = get_half(from + 2);
  for (int g = 0; g < 8; ++g) {
    const Six six = six_of(from + 4, g);
    const float scale = d * static_cast<float>(six.scale), low = m * static_cast<float>(six.minimum);
    const uint8_t* q = from + 16 + (g >> 1) * 32;
    const int shift = (g & 1) * 4;
    for (int j = 0; j < 32; ++j) to[g * 32 + j] = scale * static_cast<float>((q[j] >> shift) & 15) - low;
  }
}

static void unpack_q5_k(const uint8_t* from, float* to) {
  const float d = get_half(from), m = get_half(from + 2);
  for (int g = 0; g < 8; ++g) {
    const Six six = six_of(from + 4, g);
    const float scale = d * static_cast<float>(six.scale), low = m * static_cast<float>(six.minimum);
    const uint8_t *q = from + 48 + (g >> 1) * 32, *fifth = from + 16;
    const int shift = (g & 1) * 4;
    for (int j = 0; j < 32; ++j) to[g * 32 + j] = scale * static_cast<float>(((q[j] >> shift) & 15) | ((fifth[j] >> g) & 1) << 4) - low;
  }
}

// 4 low bits, 2 high bits, signed scales of 16 values; halves of 128 values.
static void unpack_q6_k(const uint8_t* from, float* to) {
  const float d = get_half(from + 208);
  for (int g = 0; g < 16; ++g) {
    const float scale = d * static_cast<float>(static_cast<int8_t>(from[192 + g]));
    const int part = g >> 3, row = (g >> 1) & 3, column = (g & 1) * 16;
    const uint8_t *low = from + part * 64 + (row & 1) * 32 + column, *high = from + 128 + part * 32 + column;
    const int low_shift = (row >> 1) * 4, high_shift = row * 2;
    for (int j = 0; j < 16; ++j) {
      const int q = ((low[j] >> low_shift) & 15) | ((high[j] >> high_shift) & 3) << 4;
      to[g * 16 + j] = scale * static_cast<float>(q - 32);
    }
  }
}

constexpr int L = W / 2;
typedef double DVec __attribute__((vector_size(8 * L)));
typedef float FVec __attribute__((vector_size(4 * L)));

LIMBECK_INLINE DVec all(double x) { return x - DVec{}; }
// GCC makes one instruction of neither in a 512-bit vector.
#if defined(__AVX512F__)
LIMBECK_INLINE DVec within(DVec x, DVec low, DVec high) {
  return (DVec)_mm512_maskz_min_pd(0xff, _mm512_maskz_max_pd(0xff, (__m512d)x, (__m512d)low), (__m512d)high);
}
#elif defined(__AVX2__)
LIMBECK_INLINE DVec within(DVec x, DVec low, DVec high) {
  return (DVec)_mm256_min_pd(_mm256_max_pd((__m256d)x, (__m256d)low), (__m256d)high);
}
#else
LIMBECK_INLINE DVec within(DVec x, DVec low, DVec high) {
  const DVec raised = x > low ? x : low;
  return raised < high ? raised : high;
}
#endif
LIMBECK_INLINE DVec magnitude(DVec x) { return x < 0 ? -x : x; }

// To a whole number, ties to even: the step of 2^52 + 2^51 is 1.
LIMBECK_INLINE DVec nearest(DVec x) { return x + 0x1.8p52 - 0x1.8p52; }

// N values of each of L groups: value j of all groups is a vector.
template <int N>
static void take_groups(const float* from, DVec* x) {
  for (int lane = 0; lane < L; ++lane)
    for (int j = 0; j < N; ++j) x[j][lane] = from[lane * N + j];
}

// How much errors weigh, more where values are large: their root mean square and their own size.
static void weigh(const DVec* x, DVec* weights) {
  DVec squares{};
  for (int j = 0; j < 32; ++j) squares += x[j] * x[j];
  DVec typical;
  for (int lane = 0; lane < L; ++lane) typical[lane] = std::sqrt(squares[lane] / 32);
  for (int j = 0; j < 32; ++j) weights[j] = typical + magnitude(x[j]);
}

struct Affine {
  DVec scale, minimum;
};

// The scale, and the minimum that is taken away again, that lose least of 32 values when each becomes scale * q - minimum with q from 0 to
// Max: of spacings around the range of the values, from Max - From / 10 in tenths up to Max + 1, each with its least-squares fit, the one
// with the least error.
template <int Max, int From>
static Affine fit_affine(const DVec* x, const DVec* exact) {
  DVec low = x[0], high = x[0], sum_w{}, sum_x{}, weights[32], above[32], tried[32];
  for (int j = 1; j < 32; ++j) {
    low = x[j] < low ? x[j] : low;
    high = x[j] > high ? x[j] : high;
  }
  low = low > 0 ? DVec{} : low;
  for (int j = 0; j < 32; ++j) {
    sum_w += exact[j];
    sum_x += exact[j] * x[j];
    weights[j] = __builtin_convertvector(__builtin_convertvector(exact[j], FVec), DVec);
    above[j] = x[j] - low;
  }
  const DVec range = high - low, zero{}, most = all(Max);
  Affine best{range / Max, -low};
  DVec least{};
  const DVec plain = Max / range;
  for (int j = 0; j < 32; ++j) {
    const DVec off = best.scale * within(nearest(plain * above[j]), zero, most) + low - x[j];
    least += weights[j] * off * off;
  }
  for (int step = 0; step <= From + 10; ++step) {
    const DVec spacing = (Max - From / 10.0 + 0.1 * step) / range;
    DVec sum_q{}, sum_qq{}, sum_xq{};
    for (int j = 0; j < 32; ++j) {
      const DVec q = within(nearest(spacing * above[j]), zero, most), wq = weights[j] * q;
      tried[j] = q;
      sum_q += wq;
      sum_qq += wq * q;
      sum_xq += wq * x[j];
    }
    const DVec determinant = sum_w * sum_qq - sum_q * sum_q;
    DVec scale = (sum_w * sum_xq - sum_x * sum_q) / determinant, least_value = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
    const auto positive = least_value > 0;
    scale = positive ? sum_xq / sum_qq : scale;
    least_value = positive ? zero : least_value;
    DVec error{};
    for (int j = 0; j < 32; ++j) {
      const DVec off = scale * tried[j] + least_value - x[j];
      error += weights[j] * off * off;
    }
    const auto better = (determinant > 0) & (error < least);
    least = better ? error : least;
    best.scale = better ? scale : best.scale;
    best.minimum = better ? -least_value : best.minimum;
  }
  // All values are one: 0 or less, and their minimum says it all.
  best.scale = range == 0 ? zero : best.scale;
  return best;
}

LIMBECK_INLINE double at_most(double x, double limit) { return x < limit ? x : limit; }
// Halves go up.
LIMBECK_INLINE double rounded(double x) { return std::floor(x + 0.5); }

// Q4_K and Q5_K: d and m, 12 bytes of scales and minima, the fifth bits where there are any, four bits a value.
template <int Max, int From>
static void pack_affine(const float* from, uint8_t* to) {
  DVec x[8 / L][32], weights[8 / L][32];
  double scale[8], minimum[8], most_scale = 0, most_minimum = 0;
  for (int part = 0; part < 8 / L; ++part) {
    take_groups<32>(from + part * L * 32, x[part]);
    weigh(x[part], weights[part]);
    const Affine fitted = fit_affine<Max, From>(x[part], weights[part]);
    for (int lane = 0; lane < L; ++lane) {
      scale[part * L + lane] = fitted.scale[lane];
      minimum[part * L + lane] = fitted.minimum[lane];
    }
  }
  for (int g = 0; g < 8; ++g) {
    most_scale = scale[g] > most_scale ? scale[g] : most_scale;
    most_minimum = minimum[g] > most_minimum ? minimum[g] : most_minimum;
  }
  put_half(to, static_cast<float>(most_scale / 63));
  put_half(to + 2, static_cast<float>(most_minimum / 63));
  const double d = get_half(to), m = get_half(to + 2);

  // Scales and minima as whole numbers, in units of d and m: those nearby that lose least once the values are rounded to them too.
  uint8_t scales[8], minima[8], q[256];
  for (int part = 0; part < 8 / L; ++part) {
    DVec scale0, minimum0;
    for (int lane = 0; lane < L; ++lane) {
      const int g = part * L + lane;
      scale0[lane] = d == 0 ? 0 : at_most(rounded(scale[g] / d), 63);
      minimum0[lane] = m == 0 ? 0 : at_most(rounded(minimum[g] / m), 63);
    }
    const DVec zero{}, most = all(Max);
    const auto each = [&](DVec s, DVec l, auto use) {
      const DVec step = d * s, inverse = step == 0 ? zero : 1 / step, low = m * l;
      for (int j = 0; j < 32; ++j) {
        const DVec n = within(nearest((x[part][j] + low) * inverse), zero, most);
        use(j, n, step * n - low - x[part][j]);
      }
    };
    DVec best = all(INFINITY), best_scale = scale0, best_minimum = minimum0;
    for (int i = 0; i < 9; ++i) {
      const DVec s = scale0 + (i / 3 - 1), l = minimum0 + (i % 3 - 1);
      DVec error{};
      each(s, l, [&](int j, DVec, DVec off) { error += weights[part][j] * off * off; });
      const auto better = (s >= 0) & (s <= 63) & (l >= 0) & (l <= 63) & (error < best);
      best = better ? error : best;
      best_scale = better ? s : best_scale;
      best_minimum = better ? l : best_minimum;
    }
    each(best_scale, best_minimum, [&](int j, DVec n, DVec) {
      for (int lane = 0; lane < L; ++lane) q[(part * L + lane) * 32 + j] = static_cast<uint8_t>(n[lane]);
    });
    for (int lane = 0; lane < L; ++lane) {
      scales[part * L + lane] = static_cast<uint8_t>(best_scale[lane]);
      minima[part * L + lane] = static_cast<uint8_t>(best_minimum[lane]);
    }
  }
  for (int g = 0; g < 4; ++g) {
    to[4 + g] = static_cast<uint8_t>(scales[g] | scales[g + 4] >> 4 << 6);
    to[8 + g] = static_cast<uint8_t>(minima[g] | minima[g + 4] >> 4 << 6);
    to[12 + g] = static_cast<uint8_t>((scales[g + 4] & 15) | (minima[g + 4] & 15) << 4);
  }
  to += 16;
  if constexpr (Max > 15) {
    for (int j = 0; j < 32; ++j) {
      int bits = 0;
      for (int g = 0; g < 8; ++g) bits |= q[g * 32 + j] >> 4 << g;
      to[j] = static_cast<uint8_t>(bits);
    }
    to += 32;
  }
  for (int pair = 0; pair < 4; ++pair)
    for (int j = 0; j < 32; ++j) to[pair * 32 + j] = static_cast<uint8_t>((q[pair * 64 + j] & 15) | (q[pair * 64 + 32 + j] & 15) << 4);
}

// The scale that loses least of 16 values when each becomes scale * q with q from -32 to 31: of 19 spacings around the largest value, each
// with its least-squares fit. Errors weigh as the squares of the values.
static DVec fit_scale(const DVec* x) {
  DVec largest{}, best{}, scale{}, squares[16];
  for (int j = 0; j < 16; ++j) {
    largest = magnitude(x[j]) > magnitude(largest) ? x[j] : largest;
    squares[j] = x[j] * x[j];
  }
  for (int step = 0; step <= 18; ++step) {
    // The plain spacing first: of equals it wins.
    const int change = step == 0 ? 0 : step <= 9 ? step - 10 : step - 9;
    const DVec spacing = -(32 + 0.1 * change) / largest;
    DVec sum_xq{}, sum_qq{};
    for (int j = 0; j < 16; ++j) {
      const DVec n = within(nearest(spacing * x[j]), all(-32), all(31)), w = squares[j] * n;
      sum_xq += w * x[j];
      sum_qq += w * n;
    }
    const auto better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq);
    scale = better ? sum_xq / sum_qq : scale;
    best = better ? scale * sum_xq : best;
  }
  return magnitude(largest) < 1e-15 ? DVec{} : scale;
}

static void pack_q6_k(const float* from, uint8_t* to) {
  DVec x[16 / L][16];
  double scale[16], largest = 0;
  for (int part = 0; part < 16 / L; ++part) {
    take_groups<16>(from + part * L * 16, x[part]);
    const DVec fitted = fit_scale(x[part]);
    for (int lane = 0; lane < L; ++lane) scale[part * L + lane] = fitted[lane];
  }
  for (const double s : scale) largest = std::fabs(s) > std::fabs(largest) ? s : largest;
  std::memset(to, 0, 210);
  if (std::fabs(largest) < 1e-15) return;
  const double per_scale = -128 / largest;
  put_half(to + 208, static_cast<float>(1 / per_scale));
  const double d = get_half(to + 208);
  uint8_t q[256];
  for (int part = 0; part < 16 / L; ++part) {
    DVec inverse;
    for (int lane = 0; lane < L; ++lane) {
      const int g = part * L + lane;
      const double whole = at_most(rounded(per_scale * scale[g]), 127);
      to[192 + g] = static_cast<uint8_t>(static_cast<int>(whole));
      inverse[lane] = d * whole == 0 ? 0 : 1 / (d * whole);
    }
    for (int j = 0; j < 16; ++j) {
      const DVec n = within(nearest(x[part][j] * inverse), all(-32), all(31)) + 32;
      for (int lane = 0; lane < L; ++lane) q[(part * L + lane) * 16 + j] = static_cast<uint8_t>(n[lane]);
    }
  }
  for (int part = 0; part < 2; ++part) {
    for (int j = 0; j < 32; ++j) {
      const uint8_t* row = q + part * 128 + j;
      const int a = row[0], b = row[32], c = row[64], e = row[96];
      to[part * 64 + j] = static_cast<uint8_t>((a & 15) | (c & 15) << 4);
      to[part * 64 + j + 32] = static_cast<uint8_t>((b & 15) | (e & 15) << 4);
      to[128 + part * 32 + j] = static_cast<uint8_t>(a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6);
    }
  }
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(kquants, {"unpack_q2_k", unpack<256, 84, unpack_q2_k>}, {"unpack_q3_k", unpack<256, 110, unpack_q3_k>},
                {"unpack_q4_k", unpack<256, 144, unpack_q4_k>}, {"pack_q4_k", pack<256, 144, pack_affine<15, 10>>},
                {"unpack_q5_k", unpack<256, 176, unpack_q5_k>}, {"pack_q5_k", pack<256, 176, pack_affine<31, 5>>},
                {"unpack_q6_k", unpack<256, 210, unpack_q6_k>}, {"pack_q6_k", pack<256, 210, pack_q6_k>})
