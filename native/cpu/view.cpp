// Rearrangements that have to move bytes. The package reshapes to the few forms below: o and i are all dims before and after.
#include "core/checks.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

// y[b, a] = x[a, b] for a block of m by n.
static void transpose_block(const float* x, int64_t x_row, int64_t m, int64_t n, Sink y, int64_t at, int64_t y_row) {
  int64_t a = 0;
  for (; a + W <= m; a += W) {
    int64_t b = 0;
    for (; b + W <= n; b += W) {
      Vec v[W];
      for (int i = 0; i < W; ++i) v[i] = load(x + (a + i) * x_row + b);
      transpose(v);
      for (int i = 0; i < W; ++i) y.put(at + (b + i) * y_row + a, AllLanes{}, v[i]);
    }
    for (; b < n; ++b)
      for (int i = 0; i < W; ++i) y.put(at + b * y_row + a + i, SomeLanes{1}, splat(x[(a + i) * x_row + b]));
  }
  for (; a < m; ++a)
    for (int64_t b = 0; b < n; ++b) y.put(at + b * y_row + a, SomeLanes{1}, splat(x[a * x_row + b]));
}

// transpose(x[o m k n i]) -> y[o n k m i], transpose_backward(dy[o n k m i]) -> dx[o m k n i]+: y[o b c a i] = x[o a c b i].
static void transpose(const Call& call) {
  const View& x = call.in[0];
  const int64_t outer = x.dims[0], m = x.dims[1], k = x.dims[2], n = x.dims[3], inner = x.dims[4];
  const float* from = x.as<float>();
  const Sink y(call, 0);
  if (!y || x.size() == 0) return;
  constexpr int64_t T = 32;  // a tile is 64 cache lines in and 64 out
  const int64_t tiles_m = (m + T - 1) / T, tiles_n = (n + T - 1) / T, tile_size = T * T * inner;
  for_chunks(call, outer * k * tiles_m * tiles_n, rows_per_chunk(tile_size), [=](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t b0 = tile % tiles_n * T, a0 = tile / tiles_n % tiles_m * T, rest = tile / tiles_n / tiles_m;
      const int64_t c = rest % k, o = rest / k;
      const int64_t height = m - a0 < T ? m - a0 : T, width = n - b0 < T ? n - b0 : T;
      const int64_t source = (((o * m + a0) * k + c) * n + b0) * inner, target = (((o * n + b0) * k + c) * m + a0) * inner;
      if (inner == 1) {
        transpose_block(from + source, k * n, height, width, y, target, k * m);
        continue;
      }
      for (int64_t b = 0; b < width; ++b)
        for (int64_t a = 0; a < height; ++a) {
          const float* run = from + source + (a * k * n + b) * inner;
          const int64_t at = target + (b * k * m + a) * inner;
          for_lanes(0, inner, [=](int64_t i, auto lanes) { y.put(at + i, lanes, lanes.get(run + i)); });
        }
    }
  });
}

// to[o, at .. at + m, i] (of n) = or += from[o, start .. start + m, i] (of s).
static void copy_slab(const Call& call, int64_t outer, int64_t run, const float* from, int64_t from_row, int64_t from_at, Sink to,
                      int64_t to_row, int64_t to_at) {
  if (!to || run == 0) return;
  for_rows(call, outer, run, [=](int64_t o) {
    const float* source = from + o * from_row + from_at;
    const int64_t target = o * to_row + to_at;
    for_lanes(0, run, [=](int64_t i, auto lanes) { to.put(target + i, lanes, lanes.get(source + i)); });
  });
}

// concat(a[o m i], b[o n i], s) -> y[o s i], s = m + n
static void concat(const Call& call) {
  const View &a = call.in[0], &b = call.in[1];
  const int64_t inner = a.dims[2], m = a.dims[1] * inner, n = b.dims[1] * inner;
  check_concat(call);
  const Sink y(call, 0);
  copy_slab(call, a.dims[0], m, a.as<float>(), m, 0, y, m + n, 0);
  copy_slab(call, a.dims[0], n, b.as<float>(), n, 0, y, m + n, m);
}

// concat_backward(dy[o s i], a[o m i], b[o n i]) -> da[o m i]+, db[o n i]+ (a and b for their shapes)
static void concat_backward(const Call& call) {
  const View &dy = call.in[0], &a = call.in[1], &b = call.in[2];
  const int64_t inner = dy.dims[2], m = a.dims[1] * inner, n = b.dims[1] * inner;
  copy_slab(call, dy.dims[0], m, dy.as<float>(), m + n, 0, Sink(call, 0), m, 0);
  copy_slab(call, dy.dims[0], n, dy.as<float>(), m + n, m, Sink(call, 1), n, 0);
}

// slice(x[o n i], start, m) -> y[o m i]
static void slice(const Call& call) {
  const View &x = call.in[0], &y = call.out[0];
  const int64_t start = static_cast<int64_t>(call.scalar[0]), inner = x.dims[2], m = y.dims[1], n = x.dims[1];
  check_slice(call, start, m, n);
  copy_slab(call, x.dims[0], m * inner, x.as<float>(), n * inner, start * inner, Sink(call, 0), m * inner, 0);
}

// slice_backward(dy[o m i], x[o n i], start) -> dx[o n i]+ (x for its shape)
static void slice_backward(const Call& call) {
  const View &dy = call.in[0], &x = call.in[1];
  const int64_t start = static_cast<int64_t>(call.scalar[0]), inner = x.dims[2], m = dy.dims[1], n = x.dims[1];
  check_slice(call, start, m, n);
  const Sink dx(call, 0);
  if (dx && !dx.accumulate) for_elements(call, x.size(), [=](int64_t i, auto lanes) { lanes.put(dx.data + i, Vec{}); });
  copy_slab(call, x.dims[0], m * inner, dy.as<float>(), m * inner, 0, dx, n * inner, start * inner);
}

static void check_index(const Call& call, int32_t index, int64_t row, int64_t c) {
  if (index >= 0 && index < c) return;
  raise(Fault::row_index, call.op, row, index, c);
}

// pick(x[* c], ids[*]:i32) -> y[*]: one element of each row.
static void pick(const Call& call) {
  const float* x = call.in[0].as<float>();
  const int32_t* ids = call.in[1].as<int32_t>();
  const int64_t rows = call.in[0].rows(), c = call.in[0].cols();
  float* y = call.out[0].as<float>();
  if (!y) return;
  for_chunks(call, rows, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      check_index(call, ids[row], row, c);
      y[row] = x[row * c + ids[row]];
    }
  });
}

// pick_backward(dy[*], x[* c], ids[*]:i32) -> dx[* c]+ (x for its shape)
static void pick_backward(const Call& call) {
  const float* dy = call.in[0].as<float>();
  const int32_t* ids = call.in[2].as<int32_t>();
  const int64_t rows = call.in[1].rows(), c = call.in[1].cols();
  const Sink dx(call, 0);
  if (!dx) return;
  for_rows(call, rows, c, [&](int64_t row) {
    check_index(call, ids[row], row, c);
    float* to = dx.data + row * c;
    if (!dx.accumulate) std::memset(to, 0, static_cast<size_t>(c) * sizeof(float));
    to[ids[row]] += dy[row];
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(view, {"transpose", transpose}, {"transpose_backward", transpose}, {"concat", concat}, {"concat_backward", concat_backward},
                {"slice", slice}, {"slice_backward", slice_backward}, {"pick", pick}, {"pick_backward", pick_backward})
