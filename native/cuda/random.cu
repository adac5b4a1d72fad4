// Random tensors: element i is a function of (seed, stream, i) alone, as on the CPU. The integers are the same to the bit; the float64
// functions of host and GPU can differ in their last bit, which float32 shows once in about 10^8 numbers.
#include "core/random.h"
#include "cuda/lanes.cuh"

namespace limbeck::cuda {

template <class T>
struct Normal {
  T* y;
  uint64_t seed, stream;
  double std;

  // Elements 4 block to 4 block + 3, by Box and Muller on pairs.
  __device__ __forceinline__ Floats<4> block(int64_t index) const {
    const auto bits = random_block(seed, stream, static_cast<uint64_t>(index));
    Floats<4> v;
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      // (0, 1]: the logarithm stays finite
      const double radius = sqrt(-2.0 * log((static_cast<double>(bits[k]) + 1.0) * 0x1p-32));
      const double angle = 6.283185307179586 * static_cast<double>(bits[k + 1]) * 0x1p-32;
      double sine, cosine;
      sincos(angle, &sine, &cosine);
      v[k] = static_cast<float>(std * radius * cosine);
      v[k + 1] = static_cast<float>(std * radius * sine);
    }
    return v;
  }
  __device__ __forceinline__ void operator()(int64_t i, Lanes<4> lanes) const { lanes.put(y + i, block(i / 4)); }
  __device__ __forceinline__ void operator()(int64_t i, Lanes<1> lanes) const {
    const auto v = block(i / 4);
    const int k = static_cast<int>(i % 4);
    lanes.put(y + i, Floats<1>{{k == 0 ? v[0] : k == 1 ? v[1] : k == 2 ? v[2] : v[3]}});
  }
};

// random_normal(y[*]&, seed, stream, std) -> : normal numbers of mean 0
template <class T>
static void random_normal(const Call& call) {
  const Normal<T> body{call.in[0].as<T>(), static_cast<uint64_t>(call.scalar[0]), static_cast<uint64_t>(call.scalar[1]), call.scalar[2]};
  for_elements<4>(call, call.in[0].size(), aligned(body.y), body);
}

}  // namespace limbeck::cuda

LIMBECK_KERNELS(random, {"random_normal", by_dtype<random_normal<float>, random_normal<bf16>>})
