// Random tensors: element i is a function of (seed, stream, i) alone.
#include <cmath>

#include "core/kernel.h"
#include "core/random.h"

namespace limbeck::cpu::LIMBECK_ISA {

// random_normal(y[*]&, seed, stream, std) -> : normal numbers of mean 0, by Box and Muller on pairs
static void random_normal(const Call& call) {
  float* y = call.in[0].as<float>();
  const int64_t n = call.in[0].size();
  const uint64_t seed = static_cast<uint64_t>(call.scalar[0]), stream = static_cast<uint64_t>(call.scalar[1]);
  const double std = call.scalar[2];
  constexpr int64_t chunk = 4096;
  call.threads->parallel((n + chunk - 1) / chunk, [=](int64_t tile, int) {
    const int64_t end = (tile + 1) * chunk < n ? (tile + 1) * chunk : n;
    for (int64_t i = tile * chunk; i < end; i += 4) {
      const auto bits = random_block(seed, stream, static_cast<uint64_t>(i / 4));
      for (int64_t k = 0; k < 4 && i + k < end; k += 2) {
        // (0, 1]: the logarithm stays finite
        const double radius = ::sqrt(-2.0 * ::log((static_cast<double>(bits[static_cast<size_t>(k)]) + 1.0) * 0x1p-32));
        const double angle = 6.283185307179586 * static_cast<double>(bits[static_cast<size_t>(k + 1)]) * 0x1p-32;
        y[i + k] = static_cast<float>(std * radius * ::cos(angle));
        if (i + k + 1 < end) y[i + k + 1] = static_cast<float>(std * radius * ::sin(angle));
      }
    }
  });
}

// add_noise(x[* c], size[*]:f32, seed, stream) -> y[* c]: each element moved by up to its row's size, either way
static void add_noise(const Call& call) {
  const float *x = call.in[0].as<float>(), *size = call.in[1].as<float>();
  float* y = call.out[0].as<float>();
  if (!y) return;
  const int64_t n = call.in[0].size(), c = n == 0 ? 1 : n / call.in[1].size();
  const uint64_t seed = static_cast<uint64_t>(call.scalar[0]), stream = static_cast<uint64_t>(call.scalar[1]);
  constexpr int64_t chunk = 4096;
  call.threads->parallel((n + chunk - 1) / chunk, [=](int64_t tile, int) {
    const int64_t end = (tile + 1) * chunk < n ? (tile + 1) * chunk : n;
    for (int64_t i = tile * chunk; i < end; i += 4) {
      const auto bits = random_block(seed, stream, static_cast<uint64_t>(i / 4));
      for (int64_t k = i; k < i + 4 && k < end; ++k)
        y[k] = x[k] + size[k / c] * (2.f * uniform(bits[static_cast<size_t>(k - i)]) - 1.f);
    }
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(random, {"random_normal", random_normal}, {"add_noise", limbeck::cpu::LIMBECK_ISA::add_noise})
