// Rotary position embedding in the half-split (NEOX) layout: dims i and i + d/2 turn together by position * base^(-2i/d).
// B batch, T tokens, H heads, D head size.
#include <cmath>

#include "core/checks.h"
#include "core/rope.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

// Cosines, then sines, times `magnitude`; angles in float64.
template <class F>
static void fill_table(const Call& call, const F* frequency, double magnitude) {
  const int32_t* positions = call.in[0].as<int32_t>();
  const int64_t d = call.out[0].cols(), half = d / 2;
  float* table = call.out[0].as<float>();
  if (!table) return;
  for_chunks(call, call.in[0].size(), 64, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* to = table + row * d;
      for (int64_t i = 0; i < half; ++i) {
        const double angle = positions[row] * static_cast<double>(frequency[i]);
        to[i] = static_cast<float>(::cos(angle) * magnitude);
        to[half + i] = static_cast<float>(::sin(angle) * magnitude);
      }
    }
  });
}

// rope_table(positions[*]:i32, d, base, factor, low, high, context) -> table[* d]: cosines, then sines; angles in float64.
static void rope_table(const Call& call) {
  const int64_t d = call.out[0].cols(), half = d / 2;
  check_even_head(call, d, "d");
  const RopeScaling scaling{call.scalar[2], call.scalar[3], call.scalar[4], call.scalar[5]};
  double* frequency = static_cast<double*>(call.workspace);
  for (int64_t i = 0; i < half; ++i) frequency[i] = rope_frequency(i, d, call.scalar[1], scaling);
  fill_table(call, frequency, 1);
}

static size_t rope_table_bytes(const Call& call) {
  return call.scalar[0] > 0 ? sizeof(double) * static_cast<size_t>(call.scalar[0] / 2 + 1) : 0;
}

// rope_angles(positions[*]:i32, frequencies[d]:f32, magnitude) -> table[* d]:f32: the same by given frequencies, of which those of the
// first half count.
static void rope_angles(const Call& call) {
  check_even_head(call, call.out[0].cols(), "frequencies");
  fill_table(call, call.in[1].as<float>(), call.scalar[0]);
}

// y may be x: a pair is read before it is written.
static void rotate(const Call& call, float direction) {
  const View& x = call.in[0];
  const int64_t heads = x.dims[2], d = x.dims[3], half = d / 2;
  check_even_head(call, d, "x");
  const float *from = x.as<float>(), *table = call.in[1].as<float>();
  const Sink y(call, 0);
  for_rows(call, x.dims[0] * x.dims[1], heads * d, [=](int64_t row) {
    const float *cosines = table + row * d, *sines = cosines + half;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (row * heads + h) * d;
      for_lanes(0, half, [=](int64_t i, auto lanes) {
        const Vec a = lanes.get(from + at + i), b = lanes.get(from + at + half + i);
        const Vec c = lanes.get(cosines + i), s = lanes.get(sines + i) * direction;
        y.put(at + i, lanes, a * c - b * s);
        y.put(at + half + i, lanes, b * c + a * s);
      });
    }
  });
}

// rope(x[b t h d], table[b t d], direction) -> y[b t h d]
static void rope(const Call& call) { rotate(call, static_cast<float>(call.scalar[0])); }

// rope_backward(dy[b t h d], table[b t d], direction) -> dx[b t h d]+: a rotation's gradient turns the other way.
static void rope_backward(const Call& call) { rotate(call, static_cast<float>(-call.scalar[0])); }

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(rotary, {"rope_table", rope_table, rope_table_bytes}, {"rope_angles", rope_angles}, {"rope", rope},
                {"rope_backward", rope_backward})
