// One pass over one, two or three arrays: as fast as memory.
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

// add(a[*], b[*]) -> y[*]
static void add(const Call& call) {
  const float *a = call.in[0].as<float>(), *b = call.in[1].as<float>();
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { y.put(i, lanes, lanes.get(a + i) + lanes.get(b + i)); });
}

// sub(a[*], b[*]) -> y[*]
static void sub(const Call& call) {
  const float *a = call.in[0].as<float>(), *b = call.in[1].as<float>();
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { y.put(i, lanes, lanes.get(a + i) - lanes.get(b + i)); });
}

// sub_backward(dy[*]) -> db[*]+
static void sub_backward(const Call& call) {
  const float* dy = call.in[0].as<float>();
  const Sink db(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { db.put(i, lanes, -lanes.get(dy + i)); });
}

// mul(a[*], b[*]) -> y[*]
static void mul(const Call& call) {
  const float *a = call.in[0].as<float>(), *b = call.in[1].as<float>();
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { y.put(i, lanes, lanes.get(a + i) * lanes.get(b + i)); });
}

// mul_backward(dy[*], a[*], b[*]) -> da[*]+, db[*]+
static void mul_backward(const Call& call) {
  const float *dy = call.in[0].as<float>(), *a = call.in[1].as<float>(), *b = call.in[2].as<float>();
  const Sink da(call, 0), db(call, 1);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) {
    const Vec d = lanes.get(dy + i);
    da.put(i, lanes, d * lanes.get(b + i));
    db.put(i, lanes, d * lanes.get(a + i));
  });
}

// scale(x[*], s) -> y[*], scale_backward(dy[*], s) -> dx[*]+
static void scale(const Call& call) {
  const float* x = call.in[0].as<float>();
  const float s = static_cast<float>(call.scalar[0]);
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { y.put(i, lanes, lanes.get(x + i) * s); });
}

// fill(x[*]:float&, value)
static void fill(const Call& call) {
  const Vec value = splat(static_cast<float>(call.scalar[0]));
  const auto set = [&](auto* x) {
    for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { lanes.put(x + i, value); });
  };
  if (call.in[0].dtype == DType::bf16) set(call.in[0].as<uint16_t>());
  else set(call.in[0].as<float>());
}

// copy(x[*]) -> y[*], copy_backward(dy[*]) -> dx[*]+
static void copy(const Call& call) {
  const float* x = call.in[0].as<float>();
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { y.put(i, lanes, lanes.get(x + i)); });
}

// copy_(y[*]:float&, x[*]:float)
static void copy_into(const Call& call) {
  const auto convert = [&](auto* y, const auto* x) {
    for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { lanes.put(y + i, lanes.get(x + i)); });
  };
  const View &y = call.in[0], &x = call.in[1];
  const bool narrow = y.dtype == DType::bf16, from_narrow = x.dtype == DType::bf16;
  if (narrow && from_narrow) convert(y.as<uint16_t>(), x.as<const uint16_t>());
  else if (narrow) convert(y.as<uint16_t>(), x.as<const float>());
  else if (from_narrow) convert(y.as<float>(), x.as<const uint16_t>());
  else convert(y.as<float>(), x.as<const float>());
}

// add_(y[*]&, x[*])
static void add_into(const Call& call) {
  float* y = call.in[0].as<float>();
  const float* x = call.in[1].as<float>();
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { lanes.put(y + i, lanes.get(y + i) + lanes.get(x + i)); });
}

// to_bf16(x[*]:float) -> y[*]:bf16, rounded to nearest, ties to even
static void to_bf16(const Call& call) {
  uint16_t* y = call.out[0].as<uint16_t>();
  if (!y) return;
  if (call.in[0].dtype == DType::bf16) {
    const uint16_t* x = call.in[0].as<uint16_t>();
    for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { lanes.put(y + i, lanes.get(x + i)); });
    return;
  }
  const float* x = call.in[0].as<float>();
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { lanes.put(y + i, lanes.get(x + i)); });
}

static void widen(const Call& call, const View& from) {
  const Sink y(call, 0);
  if (from.dtype == DType::bf16) {
    const uint16_t* x = from.as<uint16_t>();
    for_elements(call, from.size(), [=](int64_t i, auto lanes) { y.put(i, lanes, lanes.get(x + i)); });
  } else {
    const float* x = from.as<float>();
    for_elements(call, from.size(), [=](int64_t i, auto lanes) { y.put(i, lanes, lanes.get(x + i)); });
  }
}

// to_f32(x[*]:float) -> y[*]:f32
static void to_f32(const Call& call) { widen(call, call.in[0]); }

// to_f32_backward(x[*]:float, dy[*]:f32) -> dx[*]+, to_bf16_backward(x[*]:float, dy[*]:float) -> dx[*]+
static void cast_backward(const Call& call) { widen(call, call.in[1]); }

// softcap(x[*], cap) -> y[*] = cap tanh(x / cap)
static void softcap(const Call& call) {
  const float* x = call.in[0].as<float>();
  const float cap = static_cast<float>(call.scalar[0]), per = static_cast<float>(1 / call.scalar[0]);
  const Sink y(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) { y.put(i, lanes, tanh(lanes.get(x + i) * per) * cap); });
}

// softcap_backward(dy[*], y[*], cap) -> dx[*]+ = dy (1 - (y / cap)^2)
static void softcap_backward(const Call& call) {
  const float *dy = call.in[0].as<float>(), *y = call.in[1].as<float>();
  const float per = static_cast<float>(1 / call.scalar[0]);
  const Sink dx(call, 0);
  for_elements(call, call.in[0].size(), [=](int64_t i, auto lanes) {
    const Vec t = lanes.get(y + i) * per;
    dx.put(i, lanes, lanes.get(dy + i) * (1.f - t * t));
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(elementwise, {"add", add}, {"sub", sub}, {"sub_backward", sub_backward}, {"mul", mul}, {"mul_backward", mul_backward},
                {"scale", scale}, {"scale_backward", scale}, {"fill", fill}, {"copy", copy}, {"copy_backward", copy},
                {"copy_", copy_into}, {"add_", add_into},
                {"to_bf16", to_bf16}, {"to_f32", to_f32},
                {"to_bf16_backward", cast_backward}, {"to_f32_backward", cast_backward}, {"softcap", softcap}, {"softcap_backward", softcap_backward})
