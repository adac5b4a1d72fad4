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

template <class T>
struct Noise {
  const T* x;
  const float* size;
  Sink<T> y;
  int64_t c;
  uint64_t seed, stream;

  // Element i moved by up to its row's size, either way.
  __device__ __forceinline__ float moved(int64_t i, float from, uint32_t bits) const {
    return from + size[i / c] * (2.f * uniform(bits) - 1.f);
  }
  __device__ __forceinline__ void operator()(int64_t i, Lanes<4> lanes) const {
    const auto bits = random_block(seed, stream, static_cast<uint64_t>(i / 4));
    auto v = lanes.get(x + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = moved(i + k, v[k], bits[k]);
    y.put(i, lanes, v);
  }
  __device__ __forceinline__ void operator()(int64_t i, Lanes<1> lanes) const {
    const auto bits = random_block(seed, stream, static_cast<uint64_t>(i / 4));
    y.put(i, lanes, Floats<1>{{moved(i, lanes.get(x + i)[0], bits[static_cast<size_t>(i % 4)])}});
  }
};

// add_noise(x[* c], size[*]:f32, seed, stream) -> y[* c]
template <class T>
static void add_noise(const Call& call) {
  const int64_t n = call.in[0].size();
  const Noise<T> body{call.in[0].as<T>(),
                      call.in[1].as<float>(),
                      Sink<T>(call, 0),
                      n == 0 ? 1 : n / call.in[1].size(),
                      static_cast<uint64_t>(call.scalar[0]),
                      static_cast<uint64_t>(call.scalar[1])};
  for_elements<4>(call, n, aligned(body.x, body.y.data), body);
}

}  // namespace limbeck::cuda

LIMBECK_KERNELS(random, {"random_normal", by_dtype<random_normal<float>, random_normal<bf16>>},
                {"add_noise", by_dtype<add_noise<float>, add_noise<bf16>>})
