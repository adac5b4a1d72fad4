// What this machine can do at most: the ceiling that benchmarks are held against.
#include "core/kernel.h"
#include "cpu/simd.h"

namespace limbeck::cpu::LIMBECK_ISA {

// peak_flops(rounds) -> flops[]:f64 : `rounds` rounds of independent multiply-adds in registers on every thread; how many they were
static void peak_flops(const Call& call) {
  constexpr int chains = 10;  // latency 4 times 2 units, and some
  constexpr int64_t inner = 4096;
  const int64_t rounds = static_cast<int64_t>(call.scalar[0]);
  const int threads = call.threads->size();
  call.threads->parallel(threads * rounds, [](int64_t, int) {
    Vec sum[chains];
    for (int c = 0; c < chains; ++c) sum[c] = splat(1.f + static_cast<float>(c));
    Vec a = splat(0.999999f), b = splat(1e-6f);
    for (int64_t i = 0; i < inner; ++i) {
      asm volatile("" : "+m"(a), "+m"(b));  // or the loop would be computed away
      const Vec x = a, y = b;
      for (int k = 0; k < 8; ++k)
        for (int c = 0; c < chains; ++c) sum[c] = sum[c] * x + y;
    }
    for (int c = 0; c < chains; ++c) asm volatile("" ::"m"(sum[c]));
  });
  *call.out[0].as<double>() = 2.0 * W * chains * 8 * static_cast<double>(inner) * static_cast<double>(threads * rounds);
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(peak, {"peak_flops", peak_flops})
