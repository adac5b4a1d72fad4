// What this machine can do at most: the ceiling that benchmarks are held against.
#include "core/kernel.h"
#include "cpu/simd.h"

namespace limbeck::cpu::LIMBECK_ISA {

// peak_flops(rounds) -> flops[]:f64 : `rounds` rounds of independent multiply-adds in registers on every thread; how many they were
static void peak_flops(const Call& call) {
  constexpr int chains = 12;  // latency 4 times 2 units, and some
  constexpr int64_t inner = 32768;
  const int64_t rounds = static_cast<int64_t>(call.scalar[0]);
  const int threads = call.threads->size();
  call.threads->parallel(threads * rounds, [](int64_t, int) {
    Vec x = splat(0.999999f), y = splat(1e-6f), sum[chains], total{};
    asm volatile("" : "+m"(x), "+m"(y));  // or it would be computed beforehand
    const Vec factor = x, term = y;
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) sum[c] = splat(1.f + static_cast<float>(c));
    for (int64_t i = 0; i < inner; ++i) {
#pragma GCC unroll 12
      for (int c = 0; c < chains; ++c) sum[c] = sum[c] * factor + term;
    }
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) total += sum[c];
    asm volatile("" ::"m"(total));  // or it would not be computed at all
  });
  *call.out[0].as<double>() = 2.0 * W * chains * static_cast<double>(inner) * static_cast<double>(threads * rounds);
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(peak, {"peak_flops", peak_flops})
