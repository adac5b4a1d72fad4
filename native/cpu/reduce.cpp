// Sums to one number, in float64 over chunks of a fixed size that are added in order; and reductions over the last dimension (c).
#include "core/checks.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

// Half as many doubles as a Vec has floats: one register.
typedef float HalfVec __attribute__((vector_size(2 * LIMBECK_WIDTH)));
typedef double DVec __attribute__((vector_size(4 * LIMBECK_WIDTH)));
constexpr int kDoubles = W / 2;

LIMBECK_INLINE DVec load_double(const float* p) {
  HalfVec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, DVec);
}

static size_t chunk_sums_bytes(const Call& call) {
  return sizeof(double) * static_cast<size_t>((call.in[0].size() + kChunk - 1) / kChunk);
}

// The sum of x[i] * y[i], or of x[i] where y is null.
static double total(const Call& call, const float* x, const float* y) {
  const int64_t n = call.in[0].size();
  double* sums = static_cast<double*>(call.workspace);
  for_chunks(call, n, kChunk, [=](int64_t begin, int64_t end) {
    DVec part[4] = {};
    double s = 0;
    int64_t i = begin;
    if (y) {
      for (; i + 4 * kDoubles <= end; i += 4 * kDoubles)
        for (int k = 0; k < 4; ++k) part[k] += load_double(x + i + k * kDoubles) * load_double(y + i + k * kDoubles);
      for (; i < end; ++i) s += static_cast<double>(x[i]) * y[i];
    } else {
      for (; i + 4 * kDoubles <= end; i += 4 * kDoubles)
        for (int k = 0; k < 4; ++k) part[k] += load_double(x + i + k * kDoubles);
      for (; i < end; ++i) s += x[i];
    }
    const DVec all = (part[0] + part[1]) + (part[2] + part[3]);
    for (int k = 0; k < kDoubles; ++k) s += all[k];
    sums[begin / kChunk] = s;
  });
  double s = 0;
  for (int64_t i = 0; i * kChunk < n; ++i) s += sums[i];
  return s;
}

// sum(x[*]) -> y[]
static void sum_all(const Call& call) {
  const double s = total(call, call.in[0].as<float>(), nullptr);
  if (call.out[0]) *call.out[0].as<float>() = static_cast<float>(s);
}

// mean(x[*]) -> y[]; of nothing it is NaN.
static void mean(const Call& call) {
  const double s = total(call, call.in[0].as<float>(), nullptr);
  if (call.out[0]) *call.out[0].as<float>() = static_cast<float>(s / static_cast<double>(call.in[0].size()));
}

static void spread(const Call& call, double factor) {
  const float d = static_cast<float>(*call.in[0].as<float>() * factor);
  const Sink dx(call, 0);
  for_elements(call, call.in[1].size(), [=](int64_t i, auto lanes) { dx.put(i, lanes, splat(d)); });
}

// sum_backward(dy[], x[*]) -> dx[*]+
static void sum_backward(const Call& call) { spread(call, 1); }

// mean_backward(dy[], x[*]) -> dx[*]+
static void mean_backward(const Call& call) { spread(call, 1 / static_cast<double>(call.in[1].size())); }

// dot(a[*], b[*]) -> y[]
static void dot(const Call& call) {
  const double s = total(call, call.in[0].as<float>(), call.in[1].as<float>());
  if (call.out[0]) *call.out[0].as<float>() = static_cast<float>(s);
}

// dot_backward(dy[], a[*], b[*]) -> da[*]+, db[*]+
static void dot_backward(const Call& call) {
  const float d = *call.in[0].as<float>();
  const float *a = call.in[1].as<float>(), *b = call.in[2].as<float>();
  const Sink da(call, 0), db(call, 1);
  for_elements(call, call.in[1].size(), [=](int64_t i, auto lanes) {
    da.put(i, lanes, lanes.get(b + i) * d);
    db.put(i, lanes, lanes.get(a + i) * d);
  });
}

// squared_norm(x[*], before[]:f64?) -> y[]:f64
static void squared_norm(const Call& call) {
  const double s = total(call, call.in[0].as<float>(), call.in[0].as<float>());
  if (call.out[0]) *call.out[0].as<double>() = call.in[1] ? *call.in[1].as<double>() + s : s;
}

// is_finite(x[*]) -> y[]:i32: 1 where no element is infinite or NaN.
static void is_finite(const Call& call) {
  const int64_t n = call.in[0].size();
  const float* x = call.in[0].as<float>();
  double* sums = static_cast<double*>(call.workspace);
  for_chunks(call, n, kChunk, [=](int64_t begin, int64_t end) {
    // Zero times a finite number is zero, times another it is NaN.
    sums[begin / kChunk] = sum_lanes(end - begin, [=](int64_t i, auto lanes) { return lanes.get(x + begin + i) * 0.f; });
  });
  double s = 0;
  for (int64_t i = 0; i * kChunk < n; ++i) s += sums[i];
  if (call.out[0]) *call.out[0].as<int32_t>() = s == 0;
}

// argmax(x[* c]) -> y[*]:i32: the first of equal maxima; a NaN counts as the largest, as in NumPy.
static void argmax(const Call& call) {
  const int64_t rows = call.in[0].rows(), c = call.in[0].cols();
  check_argmax(call);
  const float* x = call.in[0].as<float>();
  int32_t* y = call.out[0].as<int32_t>();
  if (!y) return;
  for_rows(call, rows, c, [=](int64_t row) {
    const float* xr = x + row * c;
    Vec best = splat(-__builtin_inff());
    IVec where{}, at{};
    for (int k = 0; k < W; ++k) at[k] = k;
    int64_t i = 0;
    for (; i + W <= c; i += W, at += W) {
      const Vec v = load(xr + i);
      const IVec better = (v > best) | ((v != v) & (best == best));
      best = better ? v : best;
      where = better ? at : where;
    }
    float top = xr[0];
    int32_t index = 0;
    const auto offer = [&](float v, int32_t j) __attribute__((always_inline)) {
      const bool better = v > top || (v != v && top == top);
      const bool equal = v == top || (v != v && top != top);
      if (better || (equal && j < index)) top = v, index = j;
    };
    if (i > 0)
      for (int k = 0; k < W; ++k) offer(best[k], where[k]);
    for (; i < c; ++i) offer(xr[i], static_cast<int32_t>(i));
    y[row] = index;
  });
}

// top_k(x[* c], k) -> values[* k], ids[* k]:i32: the largest first, the first of equals before the others; a NaN counts as the largest.
static void top_k(const Call& call) {
  check_top_k(call);
  const int64_t rows = call.in[0].rows(), c = call.in[0].cols(), k = static_cast<int64_t>(call.scalar[0]);
  const float* x = call.in[0].as<float>();
  float* values = call.out[0].as<float>();
  int32_t* ids = call.out[1].as<int32_t>();
  if (!values || !ids) return;
  for_rows(call, rows, c, [=](int64_t row) {
    const float* xr = x + row * c;
    float* best = values + row * k;
    int32_t* where = ids + row * k;
    int64_t found = 0;
    const auto above = [](float a, float b) __attribute__((always_inline)) { return a > b || (a != a && b == b); };
    const auto offer = [&](float v, int64_t i) __attribute__((always_inline)) {
      if (found == k && !above(v, best[k - 1])) return;
      int64_t at = found < k ? found++ : k - 1;
      for (; at > 0 && above(v, best[at - 1]); --at) best[at] = best[at - 1], where[at] = where[at - 1];
      best[at] = v, where[at] = static_cast<int32_t>(i);
    };
    int64_t i = 0;
    for (; i < k; ++i) offer(xr[i], i);
    // Most vectors hold nothing that counts.
    for (; i + 4 * W <= c; i += 4 * W) {
      const float least = best[k - 1];
      IVec some{};
      for (int j = 0; j < 4; ++j) {
        const Vec v = load(xr + i + j * W);
        some |= (v > least) | (v != v);
      }
      int32_t any = 0;
      for (int j = 0; j < W; ++j) any |= some[j];
      if (any)
        for (int64_t j = i; j < i + 4 * W; ++j) offer(xr[j], j);
    }
    for (; i < c; ++i) offer(xr[i], i);
  });
}

// The largest element of a row; NaN where it holds one is not promised (the sum that follows brings it).
LIMBECK_INLINE float row_max(const float* x, int64_t c) {
  Vec m = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= c; i += W) m = max(m, load(x + i));
  float top = -__builtin_inff();
  for (int k = 0; k < W; ++k) top = m[k] > top ? m[k] : top;
  for (; i < c; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// softmax(x[* c]) -> y[* c]
static void softmax(const Call& call) {
  const int64_t rows = call.in[0].rows(), c = call.in[0].cols();
  const float* x = call.in[0].as<float>();
  float* y = call.out[0].as<float>();
  if (!y) return;
  for_rows(call, rows, c, [=](int64_t row) {
    const float* xr = x + row * c;
    float* yr = y + row * c;
    const float top = row_max(xr, c);
    const float per = 1.f / sum_lanes(c, [=](int64_t i, auto lanes) {
      const Vec e = exp(lanes.get(xr + i) - top);
      lanes.put(yr + i, e);
      return e;
    });
    for_lanes(0, c, [=](int64_t i, auto lanes) { lanes.put(yr + i, lanes.get(yr + i) * per); });
  });
}

// softmax_backward(dy[* c], y[* c]) -> dx[* c]+ = y (dy - sum(dy y))
static void softmax_backward(const Call& call) {
  const int64_t rows = call.in[0].rows(), c = call.in[0].cols();
  const float *dy = call.in[0].as<float>(), *y = call.in[1].as<float>();
  const Sink dx(call, 0);
  for_rows(call, rows, c, [=](int64_t row) {
    const float *dyr = dy + row * c, *yr = y + row * c;
    const float dot = sum_lanes(c, [=](int64_t i, auto lanes) { return lanes.get(dyr + i) * lanes.get(yr + i); });
    for_lanes(0, c, [=](int64_t i, auto lanes) { dx.put(row * c + i, lanes, lanes.get(yr + i) * (lanes.get(dyr + i) - dot)); });
  });
}

// log_softmax(x[* c]) -> y[* c]
static void log_softmax(const Call& call) {
  const int64_t rows = call.in[0].rows(), c = call.in[0].cols();
  const float* x = call.in[0].as<float>();
  const Sink y(call, 0);
  for_rows(call, rows, c, [=](int64_t row) {
    const float* xr = x + row * c;
    const float top = row_max(xr, c);
    const float log_sum = __builtin_logf(sum_lanes(c, [=](int64_t i, auto lanes) { return exp(lanes.get(xr + i) - top); }));
    // top and log_sum apart: their sum would round the small one away.
    for_lanes(0, c, [=](int64_t i, auto lanes) { y.put(row * c + i, lanes, (lanes.get(xr + i) - top) - log_sum); });
  });
}

// log_softmax_backward(dy[* c], y[* c]) -> dx[* c]+ = dy - exp(y) sum(dy)
static void log_softmax_backward(const Call& call) {
  const int64_t rows = call.in[0].rows(), c = call.in[0].cols();
  const float *dy = call.in[0].as<float>(), *y = call.in[1].as<float>();
  const Sink dx(call, 0);
  for_rows(call, rows, c, [=](int64_t row) {
    const float *dyr = dy + row * c, *yr = y + row * c;
    const float all = sum_lanes(c, [=](int64_t i, auto lanes) { return lanes.get(dyr + i); });
    for_lanes(0, c, [=](int64_t i, auto lanes) { dx.put(row * c + i, lanes, lanes.get(dyr + i) - exp(lanes.get(yr + i)) * all); });
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(reduce, {"sum", sum_all, chunk_sums_bytes}, {"sum_backward", sum_backward}, {"mean", mean, chunk_sums_bytes},
                {"mean_backward", mean_backward}, {"dot", dot, chunk_sums_bytes}, {"dot_backward", dot_backward},
                {"squared_norm", squared_norm, chunk_sums_bytes}, {"is_finite", is_finite, chunk_sums_bytes}, {"argmax", argmax}, {"top_k", top_k},
                {"softmax", softmax}, {"softmax_backward", softmax_backward}, {"log_softmax", log_softmax},
                {"log_softmax_backward", log_softmax_backward})
