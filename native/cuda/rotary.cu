// Rotary position embedding in the half-split (NEOX) layout: dims i and i + d/2 turn together by position * base^(-2i/d).
// B batch, T tokens, H heads, D head size.
#include "core/checks.h"
#include "core/rope.h"
#include "cuda/lanes.cuh"

namespace limbeck::cuda {

struct Frequency {
  double* frequency;
  double base;
  int64_t d;
  RopeScaling scaling;
  __device__ __forceinline__ void operator()(int64_t i, Lanes<1>) const {
    frequency[i] = rope_frequency(i, d, base, scaling);
  }
};

template <class F>
struct Table {
  const int32_t* positions;
  const F* frequency;
  int64_t half;
  double magnitude;
  float* table;
  __device__ __forceinline__ void operator()(int64_t at, Lanes<1>) const {
    const auto [row, i] = divide(at, half);
    double sine, cosine;
    sincos(positions[row] * static_cast<double>(frequency[i]), &sine, &cosine);
    table[row * 2 * half + i] = static_cast<float>(cosine * magnitude);
    table[row * 2 * half + half + i] = static_cast<float>(sine * magnitude);
  }
};

// rope_table(positions[*]:i32, d, base, factor, low, high, context) -> table[* d]:f32: cosines, then sines; angles in float64.
static void rope_table(const Call& call) {
  const int64_t d = call.out[0].cols(), half = d / 2;
  check_even_head(call, d, "d");
  double* frequency = static_cast<double*>(call.workspace);
  if (!call.out[0]) return;
  const RopeScaling scaling{call.scalar[2], call.scalar[3], call.scalar[4], call.scalar[5]};
  for_elements<1>(call, half, false, Frequency{frequency, call.scalar[1], d, scaling});
  for_elements<1>(call, call.in[0].size() * half, false,
                  Table<double>{call.in[0].as<int32_t>(), frequency, half, 1, call.out[0].as<float>()});
}

static size_t rope_table_bytes(const Call& call) {
  return call.scalar[0] > 0 ? sizeof(double) * static_cast<size_t>(call.scalar[0] / 2 + 1) : 0;
}

// rope_angles(positions[*]:i32, frequencies[d]:f32, magnitude) -> table[* d]:f32: the same by given frequencies, of which those of the
// first half count.
static void rope_angles(const Call& call) {
  const int64_t d = call.out[0].cols(), half = d / 2;
  check_even_head(call, d, "frequencies");
  if (!call.out[0]) return;
  for_elements<1>(call, call.in[0].size() * half, false,
                  Table<float>{call.in[0].as<int32_t>(), call.in[1].as<float>(), half, call.scalar[0], call.out[0].as<float>()});
}

// Element `at` of a position's first halves, with its partner, in `together` heads that turn by the same angles. y may be x: a pair is
// read before it is written.
template <class T, int together>
struct Rotate {
  const T* x;
  const float* table;
  int64_t groups, half;  // of heads, of a position
  float direction;
  Sink<T> y;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t at, L lanes) const {
    const auto [group, i] = divide(at, half);
    const int64_t row = divide(group, groups).quotient, first = group * together * 2 * half + i;
    const float* angles = table + row * 2 * half + i;
    const auto c = lanes.get(angles), s = lanes.get(angles + half) * direction;
#pragma unroll
    for (int head = 0; head < together; ++head) {
      const int64_t place = first + head * 2 * half;
      const auto a = lanes.get(x + place), b = lanes.get(x + place + half);
      y.put(place, lanes, a * c - b * s);
      y.put(place + half, lanes, b * c + a * s);
    }
  }
};

template <class T>
static void rotate(const Call& call, double direction) {
  constexpr int N = kVector<T>;
  const View& x = call.in[0];
  const int64_t heads = x.dims[2], d = x.dims[3], half = d / 2;
  check_even_head(call, d, "x");
  const auto run = [&]<int together>(std::integral_constant<int, together>) {
    const Rotate<T, together> body{x.as<T>(), call.in[1].as<float>(), heads / together, half, static_cast<float>(direction), Sink<T>(call, 0)};
    if (!body.y.data) return;
    for_elements<N>(call, x.size() / 2 / together, half % N == 0 && aligned(body.x, body.table, body.y.data), body);
  };
  if (heads % 4 == 0) run(std::integral_constant<int, 4>{});
  else run(std::integral_constant<int, 1>{});
}

// rope(x[b t h d], table[b t d]:f32, direction) -> y[b t h d]
template <class T>
static void rope(const Call& call) { rotate<T>(call, call.scalar[0]); }

// rope_backward(dy[b t h d], table[b t d]:f32, direction) -> dx[b t h d]+: a rotation's gradient turns the other way.
template <class T>
static void rope_backward(const Call& call) { rotate<T>(call, -call.scalar[0]); }

}  // namespace limbeck::cuda

LIMBECK_KERNELS(rotary, {"rope_table", rope_table, rope_table_bytes}, {"rope_angles", rope_angles},
                {"rope", by_dtype<rope<float>, rope<bf16>>}, {"rope_backward", by_dtype<rope_backward<float>, rope_backward<bf16>>})
