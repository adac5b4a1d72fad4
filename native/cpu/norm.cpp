// Normalisation over the last dimension (c). A row is read twice, the second time from cache.
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

// Weights are few and read once for every row: bfloat16 ones are widened first, into `room` of c floats.
static const float* widened(const View& w, float* room) {
  if (w.dtype == DType::f32) return w.as<float>();
  const uint16_t* from = w.as<uint16_t>();
  for_lanes(0, w.size(), [=](int64_t i, auto lanes) { lanes.put(room + i, lanes.get(from + i)); });
  return room;
}

// Sums over rows (dw, dbias): rows are cut into at most 64 parts, each part sums on its own, and the parts are added in order.
struct Parts {
  int64_t rows, each, count;
  Parts(int64_t rows, int64_t cols) : rows(rows) {
    const int64_t least = rows_per_chunk(cols), share = (rows + 63) / 64;
    each = share > least ? share : least;
    count = (rows + each - 1) / each;
  }
};

static void add_parts(const Call& call, const float* part, int64_t count, int64_t stride, int64_t c, Sink out) {
  if (!out) return;
  for_chunks(call, c, 256, [=](int64_t begin, int64_t end) {
    for_lanes(begin, end, [=](int64_t i, auto lanes) {
      Vec total{};
      for (int64_t p = 0; p < count; ++p) total += lanes.get(part + p * stride + i);
      out.put(i, lanes, total);
    });
  });
}

static void set_zero(float* p, int64_t n) { std::memset(p, 0, static_cast<size_t>(n) * sizeof(float)); }

static size_t widened_bytes(const Call& call) { return 2 * sizeof(float) * static_cast<size_t>(call.in[0].cols()); }

// rms_norm(x[* c], w[c]:float, eps, offset) -> y[* c], rstd[*]:f32
// rms_norm_add(x[* c], w[c]:float, residual[* c], eps, offset) -> y[* c], rstd[*]:f32
// y = x rstd (offset + w) (+ residual).
static void rms_norm(const Call& call) {
  const int64_t rows = call.in[0].rows(), c = call.in[0].cols();
  const float *x = call.in[0].as<float>(), *residual = call.in[2].as<float>();
  const float* w = widened(call.in[1], static_cast<float*>(call.workspace));
  const float eps = static_cast<float>(call.scalar[0]), offset = static_cast<float>(call.scalar[1]);
  float *y = call.out[0].as<float>(), *rstd = call.out[1].as<float>();

  for_rows(call, rows, c, [=](int64_t row) {
    const float* xr = x + row * c;
    const float squares = sum_lanes(c, [=](int64_t i, auto lanes) {
      const Vec v = lanes.get(xr + i);
      return v * v;
    });
    const float r = 1.f / __builtin_sqrtf((c > 0 ? squares / static_cast<float>(c) : 0.f) + eps);
    if (rstd) rstd[row] = r;
    if (!y) return;
    float* yr = y + row * c;
    const float* base = residual ? residual + row * c : nullptr;
    for_lanes(0, c, [=](int64_t i, auto lanes) {
      const Vec v = lanes.get(xr + i) * r * (lanes.get(w + i) + offset);
      lanes.put(yr + i, base ? lanes.get(base + i) + v : v);
    });
  });
}

static size_t rms_norm_backward_bytes(const Call& call) {
  const int64_t c = call.in[1].cols();
  return sizeof(float) * static_cast<size_t>(c * (1 + (call.out[1] ? Parts(call.in[1].rows(), c).count : 0)));
}

// rms_norm_backward(dy[* c], x[* c], w[c]:float, rstd[*]:f32, offset) -> dx[* c]+, dw[c]:f32+
// With g = offset + w and xhat = x rstd: dx = rstd (dy g - xhat mean(dy g xhat)), dw = sum of dy xhat over the rows.
static void rms_norm_backward(const Call& call) {
  const int64_t rows = call.in[1].rows(), c = call.in[1].cols();
  const float *dy = call.in[0].as<float>(), *x = call.in[1].as<float>(), *rstd = call.in[3].as<float>();
  const float offset = static_cast<float>(call.scalar[0]);
  float* room = static_cast<float*>(call.workspace);
  const float* w = widened(call.in[2], room);
  float* part = room + c;
  const Sink dx(call, 0), dw(call, 1);
  const bool want_dw = static_cast<bool>(dw);
  const Parts parts(rows, c);

  for_chunks(call, rows, parts.each, [=](int64_t begin, int64_t end) {
    float* sum_dw = part + (begin / parts.each) * c;
    if (want_dw) set_zero(sum_dw, c);
    for (int64_t row = begin; row < end; ++row) {
      const float *dyr = dy + row * c, *xr = x + row * c;
      const float r = rstd[row];
      if (dx) {
        const float dot = sum_lanes(c, [=](int64_t i, auto lanes) {
          return lanes.get(dyr + i) * (lanes.get(w + i) + offset) * lanes.get(xr + i);
        });
        const float mean = dot * r * r / static_cast<float>(c);
        for_lanes(0, c, [=](int64_t i, auto lanes) {
          const Vec d = lanes.get(dyr + i), v = lanes.get(xr + i);
          dx.put(row * c + i, lanes, (d * (lanes.get(w + i) + offset) - v * mean) * r);
          if (want_dw) lanes.put(sum_dw + i, lanes.get(sum_dw + i) + d * (v * r));
        });
      } else if (want_dw) {
        for_lanes(0, c, [=](int64_t i, auto lanes) {
          lanes.put(sum_dw + i, lanes.get(sum_dw + i) + lanes.get(dyr + i) * (lanes.get(xr + i) * r));
        });
      }
    }
  });
  add_parts(call, part, parts.count, c, c, dw);
}

// layer_norm(x[* c], w[c]:float, bias[c]:float?, eps) -> y[* c], mean[*]:f32, rstd[*]:f32
static void layer_norm(const Call& call) {
  const int64_t rows = call.in[0].rows(), c = call.in[0].cols();
  const float* x = call.in[0].as<float>();
  float* room = static_cast<float*>(call.workspace);
  const float* w = widened(call.in[1], room);
  const float* bias = call.in[2] ? widened(call.in[2], room + c) : nullptr;
  const float eps = static_cast<float>(call.scalar[0]), per = c > 0 ? 1.f / static_cast<float>(c) : 0.f;
  float *y = call.out[0].as<float>(), *mean = call.out[1].as<float>(), *rstd = call.out[2].as<float>();

  for_rows(call, rows, c, [=](int64_t row) {
    const float* xr = x + row * c;
    const float m = per * sum_lanes(c, [=](int64_t i, auto lanes) { return lanes.get(xr + i); });
    const float variance = per * sum_lanes(c, [=](int64_t i, auto lanes) {
      const Vec v = lanes.get(xr + i) - m;
      return v * v;
    });
    const float r = 1.f / __builtin_sqrtf(variance + eps);
    if (mean) mean[row] = m;
    if (rstd) rstd[row] = r;
    if (!y) return;
    float* yr = y + row * c;
    for_lanes(0, c, [=](int64_t i, auto lanes) {
      const Vec v = (lanes.get(xr + i) - m) * r * lanes.get(w + i);
      lanes.put(yr + i, bias ? v + lanes.get(bias + i) : v);
    });
  });
}

static size_t layer_norm_backward_bytes(const Call& call) {
  const int64_t c = call.in[1].cols();
  return sizeof(float) * static_cast<size_t>(c * (1 + 2 * Parts(call.in[1].rows(), c).count));
}

// layer_norm_backward(dy[* c], x[* c], w[c]:float, mean[*]:f32, rstd[*]:f32) -> dx[* c]+, dw[c]:f32+, dbias[c]:f32+
static void layer_norm_backward(const Call& call) {
  const int64_t rows = call.in[1].rows(), c = call.in[1].cols();
  const float *dy = call.in[0].as<float>(), *x = call.in[1].as<float>();
  const float *mean = call.in[3].as<float>(), *rstd = call.in[4].as<float>();
  float* room = static_cast<float*>(call.workspace);
  const float* w = widened(call.in[2], room);
  float* part = room + c;
  const Sink dx(call, 0), dw(call, 1), dbias(call, 2);
  const Parts parts(rows, c);

  for_chunks(call, rows, parts.each, [=](int64_t begin, int64_t end) {
    float* sum_dw = part + (begin / parts.each) * 2 * c;
    float* sum_db = sum_dw + c;
    set_zero(sum_dw, 2 * c);
    for (int64_t row = begin; row < end; ++row) {
      const float *dyr = dy + row * c, *xr = x + row * c;
      const float m = mean[row], r = rstd[row];
      float mean_d = 0, mean_dx = 0;
      if (dx) {
        const float per = 1.f / static_cast<float>(c);
        mean_d = per * sum_lanes(c, [=](int64_t i, auto lanes) { return lanes.get(dyr + i) * lanes.get(w + i); });
        mean_dx = per * sum_lanes(c, [=](int64_t i, auto lanes) {
          return lanes.get(dyr + i) * lanes.get(w + i) * ((lanes.get(xr + i) - m) * r);
        });
      }
      for_lanes(0, c, [=](int64_t i, auto lanes) {
        const Vec d = lanes.get(dyr + i), xhat = (lanes.get(xr + i) - m) * r;
        dx.put(row * c + i, lanes, (d * lanes.get(w + i) - mean_d - xhat * mean_dx) * r);
        lanes.put(sum_dw + i, lanes.get(sum_dw + i) + d * xhat);
        lanes.put(sum_db + i, lanes.get(sum_db + i) + d);
      });
    }
  });
  add_parts(call, part, parts.count, 2 * c, c, dw);
  add_parts(call, part + c, parts.count, 2 * c, c, dbias);
}

}  // namespace limbeck::cpu::LIMBECK_ISA

// The gradient of the residual is dy itself, so rms_norm_add shares the backward kernel.
LIMBECK_KERNELS(norm, {"rms_norm", rms_norm, widened_bytes}, {"rms_norm_backward", rms_norm_backward, rms_norm_backward_bytes},
                {"rms_norm_add", rms_norm, widened_bytes}, {"rms_norm_add_backward", rms_norm_backward, rms_norm_backward_bytes},
                {"layer_norm", layer_norm, widened_bytes}, {"layer_norm_backward", layer_norm_backward, layer_norm_backward_bytes})
