// AdamW (Loshchilov and Hutter, arXiv 1711.05101) for all parameters in one launch.
#include <cmath>

#include "core/checks.h"
#include "core/moments.h"
#include "core/random.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

constexpr int64_t kBlock = 64;  // parameters that share one entry of the decay mask

LIMBECK_INLINE Vec sqrt(Vec v) {
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

// The numbers of one update, from norm2[], rates[2] and the scalars beta1, beta2, eps, weight_decay, clip, seed.
struct Update {
  bool finite;
  float scale, b1, b2, c2, rate, root, eps, kept[2];
  uint64_t seed, step;
};

static Update update_of(const Call& call, const View& norm2, const View& rates) {
  const double norm = __builtin_sqrt(*norm2.as<double>()), lr = rates.as<double>()[0], step = rates.as<double>()[1];
  const double beta1 = call.scalar[0], beta2 = call.scalar[1], ratio = call.scalar[4] / (norm + 1e-6);
  Update u;
  u.finite = norm <= __DBL_MAX__;
  u.scale = static_cast<float>(ratio < 1 ? ratio : 1);
  u.b1 = static_cast<float>(1 - beta1);
  u.b2 = static_cast<float>(beta2);
  u.c2 = static_cast<float>(1 - beta2);
  u.rate = static_cast<float>(lr / (1 - ::pow(beta1, step)));
  u.root = static_cast<float>(1 / __builtin_sqrt(1 - ::pow(beta2, step)));
  u.eps = static_cast<float>(call.scalar[2]);
  u.kept[0] = 1.f;
  u.kept[1] = static_cast<float>(1 - lr * call.scalar[3]);
  u.seed = static_cast<uint64_t>(call.scalar[5]);
  u.step = static_cast<uint64_t>(step);
  return u;
}

// Where parameters are kept: float32, with a rounded copy where one is wanted, or bf16 alone, rounded up or down by chance so that
// small updates are not lost on average.
struct Parameters {
  float* p;
  uint16_t *rounded, *alone;
  uint64_t seed, step;

  Parameters(const View& p_, const View& copy, const Update& u)
      : p(p_.dtype == DType::f32 ? p_.as<float>() : nullptr), rounded(copy.as<uint16_t>()),
        alone(p_.dtype == DType::bf16 ? p_.as<uint16_t>() : nullptr), seed(u.seed), step(u.step) {}

  template <class Lanes>
  LIMBECK_INLINE Vec get(int64_t i, Lanes lanes) const { return alone ? lanes.get(alone + i) : lanes.get(p + i); }
  template <class Lanes>
  LIMBECK_INLINE void put(int64_t i, Lanes lanes, Vec v, int64_t count) const {
    if (alone) {
      for (int64_t k = 0; k < count;) {
        const Chances chances(seed, step, static_cast<uint64_t>(i + k));
        do alone[i + k] = round_by_chance(v[k], chances[static_cast<int>((i + k) % 8)]);
        while (++k < count && (i + k) % 8 != 0);
      }
      return;
    }
    lanes.put(p + i, v);
    if (rounded) lanes.put(rounded + i, v);
  }
};

// adamw(p[n]:float&, g[n]:f32, m[n]:f32&, v[n]:f32&, norm2[]:f64, decay[k]:u8, rates[2]:f64, copy[n]:bf16?&, beta1, beta2, eps,
//       weight_decay, clip, seed) ->
// One pass: reads p, g, m, v and writes p, m, v (28 bytes a parameter). The gradient is scaled to a norm of at most `clip`, from its
// squared norm in norm2; where that is not finite nothing is updated. Weight decay holds for blocks whose mask is not 0. `rates` are
// the learning rate and the number of this update, from 1.
static void adamw(const Call& call) {
  const int64_t n = call.in[0].size();
  check_blocks(call, call.in[5], "decay", kBlock);
  const Update u = update_of(call, call.in[4], call.in[6]);
  if (!u.finite) return;
  const Parameters p(call.in[0], call.in[7], u);
  float *m = call.in[2].as<float>(), *v = call.in[3].as<float>();
  const float* g = call.in[1].as<float>();
  const uint8_t* decay = call.in[5].as<uint8_t>();

  for_chunks(call, n, kChunk, [=](int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end; from += kBlock) {
      const float keep = u.kept[decay[from / kBlock] != 0];
      const int64_t to = end - from < kBlock ? end : from + kBlock;
      for_lanes(from, to, [=](int64_t i, auto lanes) {
        const Vec d = lanes.get(g + i) * u.scale;
        Vec first = lanes.get(m + i), second = lanes.get(v + i) * u.b2 + d * d * u.c2;
        first += (d - first) * u.b1;
        lanes.put(m + i, first);
        lanes.put(v + i, second);
        p.put(i, lanes, p.get(i, lanes) * keep - first * u.rate / (sqrt(second) * u.root + u.eps), to - i < W ? to - i : W);
      });
    }
  });
}

// adamw_8bit(p[n]:float&, g[n]:f32, m[n]:u8&, m_scale[j]:f32&, v[n]:u8&, v_scale[j]:f32&, norm2[]:f64, decay[k]:u8, rates[2]:f64,
//            copy[n]:bf16?&, beta1, beta2, eps, weight_decay, clip, seed) ->
// The same with moments of 8 bits (moments.h), unpacked and packed again block by block: 2 bytes of state a parameter instead of 8.
static void adamw_8bit(const Call& call) {
  const int64_t n = call.in[0].size();
  check_blocks(call, call.in[7], "decay", kBlock);
  check_blocks(call, call.in[3], "m_scale", kMomentBlock);
  check_blocks(call, call.in[5], "v_scale", kMomentBlock);
  const Update u = update_of(call, call.in[6], call.in[8]);
  if (!u.finite) return;
  const Parameters p(call.in[0], call.in[9], u);
  const float* g = call.in[1].as<float>();
  uint8_t *m = call.in[2].as<uint8_t>(), *v = call.in[4].as<uint8_t>();
  float *m_scale = call.in[3].as<float>(), *v_scale = call.in[5].as<float>();
  const uint8_t* decay = call.in[7].as<uint8_t>();

  for_chunks(call, n, kChunk, [=](int64_t begin, int64_t end) {
    alignas(64) float first[kMomentBlock], second[kMomentBlock];
    for (int64_t from = begin; from < end; from += kMomentBlock) {
      const int64_t to = end - from < kMomentBlock ? end : from + kMomentBlock, count = to - from;
      float &ms = m_scale[from / kMomentBlock], &vs = v_scale[from / kMomentBlock];
      float m_largest = 0, v_largest = 0;
      for (int64_t i = 0; i < count; ++i) {
        const float d = g[from + i] * u.scale;
        const float m0 = unpack_first(m[from + i], ms), v0 = unpack_second(v[from + i], vs);
        first[i] = m0 + (d - m0) * u.b1;
        second[i] = v0 * u.b2 + d * d * u.c2;
        const float size = __builtin_fabsf(first[i]);
        m_largest = size > m_largest ? size : m_largest;
        v_largest = second[i] > v_largest ? second[i] : v_largest;
      }
      for_lanes(from, to, [&](int64_t i, auto lanes) {
        const float keep = u.kept[decay[i / kBlock] != 0];
        const Vec f = lanes.get(first + (i - from)), s = lanes.get(second + (i - from));
        p.put(i, lanes, p.get(i, lanes) * keep - f * u.rate / (sqrt(s) * u.root + u.eps), to - i < W ? to - i : W);
      });
      ms = m_largest;
      vs = v_largest;
      for (int64_t i = 0; i < count; ++i) {
        m[from + i] = pack_first(first[i], m_largest);
        v[from + i] = pack_second(second[i], v_largest);
      }
    }
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(optimizer, {"adamw", adamw}, {"adamw_8bit", adamw_8bit})
