// AdamW (Loshchilov and Hutter, arXiv 1711.05101) for all parameters in one launch.
#include <cmath>

#include "core/fail.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

constexpr int64_t kBlock = 64;  // parameters that share one entry of the decay mask

LIMBECK_INLINE Vec sqrt(Vec v) {
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

// adamw(p[n]&, g[n], m[n]&, v[n]&, norm2[]:f64, decay[k]:u8, lr, beta1, beta2, eps, weight_decay, step, clip) ->
// One pass: reads p, g, m, v and writes p, m, v (28 bytes a parameter). The gradient is scaled to a norm of at most `clip`, from its
// squared norm in norm2; where that is not finite nothing is updated. Weight decay holds for blocks whose mask is not 0.
static void adamw(const Call& call) {
  const int64_t n = call.in[0].size(), blocks = (n + kBlock - 1) / kBlock;
  if (call.in[5].size() != blocks)
    fail(ErrorKind::shape, "ERR_SHAPE", call.op, "decay",
         text("decay has %lld entries, but %lld parameters are %lld blocks of %lld", static_cast<long long>(call.in[5].size()),
              static_cast<long long>(n), static_cast<long long>(blocks), static_cast<long long>(kBlock)),
         text("[%lld]", static_cast<long long>(blocks)), text("[%lld]", static_cast<long long>(call.in[5].size())));
  const double norm = __builtin_sqrt(*call.in[4].as<double>());
  if (!(norm <= __DBL_MAX__)) return;

  const double lr = call.scalar[0], beta1 = call.scalar[1], beta2 = call.scalar[2], step = call.scalar[5], clip = call.scalar[6];
  const double ratio = clip / (norm + 1e-6);
  const float scale = static_cast<float>(ratio < 1 ? ratio : 1);
  const float b1 = static_cast<float>(1 - beta1), b2 = static_cast<float>(beta2), c2 = static_cast<float>(1 - beta2);
  const float rate = static_cast<float>(lr / (1 - ::pow(beta1, step)));
  const float root = static_cast<float>(1 / __builtin_sqrt(1 - ::pow(beta2, step)));
  const float eps = static_cast<float>(call.scalar[3]);
  const float kept[2] = {1.f, static_cast<float>(1 - lr * call.scalar[4])};
  float *p = call.in[0].as<float>(), *m = call.in[2].as<float>(), *v = call.in[3].as<float>();
  const float* g = call.in[1].as<float>();
  const uint8_t* decay = call.in[5].as<uint8_t>();

  for_chunks(call, n, kChunk, [=](int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end; from += kBlock) {
      const float keep = kept[decay[from / kBlock] != 0];
      for_lanes(from, end - from < kBlock ? end : from + kBlock, [=](int64_t i, auto lanes) {
        const Vec d = lanes.get(g + i) * scale;
        Vec first = lanes.get(m + i), second = lanes.get(v + i) * b2 + d * d * c2;
        first += (d - first) * b1;
        lanes.put(m + i, first);
        lanes.put(v + i, second);
        lanes.put(p + i, lanes.get(p + i) * keep - first * rate / (sqrt(second) * root + eps));
      });
    }
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(optimizer, {"adamw", adamw})
