// Matrix products with a weight [n k], and the second half of a gated MLP, whose activation is made while packing and never stored.
#include "cpu/gate.h"
#include "cpu/gemm.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

// dbias: rows are summed in runs of a fixed length, which keeps the error of long sums small.
static void sum_rows(ThreadPool& threads, const float* x, int64_t rows, int64_t cols, float* total, bool accumulate) {
  constexpr int64_t kRun = 64;
  threads.parallel((cols + W - 1) / W, [&](int64_t tile, int) {
    for_lanes(tile * W, tile * W + W < cols ? tile * W + W : cols, [&](int64_t j, auto lanes) {
      Vec all = accumulate ? lanes.get(total + j) : Vec{};
      for (int64_t begin = 0; begin < rows; begin += kRun) {
        Vec run{};
        for (int64_t i = begin; i < rows && i < begin + kRun; ++i) run += lanes.get(x + i * cols + j);
        all += run;
      }
      lanes.put(total + j, all);
    });
  });
}

// linear(x[* k], w[n k]:float, bias[n]?) -> y[* n]
static void linear(const Call& call) {
  const View &x = call.in[0], &w = call.in[1], &bias = call.in[2], &y = call.out[0];
  if (!y) return;
  const int64_t n = w.dims[0], k = w.dims[1];
  GemmOptions options;
  options.bias = bias.as<float>();
  gemm(*call.threads, x.rows(), n, k, rows_of(x.data, k), transposed(w.data, k, w.dtype), y.as<float>(), n, options);
}

// linear_backward(dy[* n], x[* k], w[n k]:float) -> dx[* k]+, dw[n k]:f32+, dbias[n]+
static void linear_backward(const Call& call) {
  const View &dy = call.in[0], &x = call.in[1], &w = call.in[2];
  const View &dx = call.out[0], &dw = call.out[1], &dbias = call.out[2];
  const int64_t m = dy.rows(), n = w.dims[0], k = w.dims[1];
  GemmOptions options;
  if (dx) {
    options.accumulate = call.accumulate[0];
    gemm(*call.threads, m, k, n, rows_of(dy.data, n), rows_of(w.data, k, w.dtype), dx.as<float>(), k, options);
  }
  if (dw) {
    options.accumulate = call.accumulate[1];
    gemm(*call.threads, n, k, m, transposed(dy.data, n), rows_of(x.data, k), dw.as<float>(), k, options);
  }
  if (dbias) sum_rows(*call.threads, dy.as<float>(), m, n, dbias.as<float>(), call.accumulate[2]);
}

static Matrix gated(const View& gate, const View& up, int64_t f, double kind) {
  Matrix a = rows_of(gate.data, f);
  a.up = up.as<float>();
  a.gate = static_cast<int>(kind);
  return a;
}

// gated_linear(gate[* f], up[* f], w[n f]:float, kind) -> y[* n]
static void gated_linear(const Call& call) {
  const View &gate = call.in[0], &w = call.in[2], &y = call.out[0];
  if (!y) return;
  const int64_t n = w.dims[0], f = w.dims[1];
  gemm(*call.threads, gate.rows(), n, f, gated(gate, call.in[1], f, call.scalar[0]), transposed(w.data, f, w.dtype), y.as<float>(), n);
}

// What the gradient of the activation is turned into, block by block, in the place where the product left it.
struct Slopes {
  const float *gate, *up;
  float *dact, *dgate, *dup;
  int64_t f;

  template <Gate G>
  static void run(void* ctx, int64_t i0, int64_t j0, int64_t rows, int64_t cols, int) {
    const Slopes s = *static_cast<const Slopes*>(ctx);
    for (int64_t i = i0; i < i0 + rows; ++i)
      for_lanes(i * s.f + j0, i * s.f + j0 + cols, [&](int64_t at, auto lanes) {
        Vec value, slope;
        gate_slope<G>(lanes.get(s.gate + at), value, slope);
        const Vec d = lanes.get(s.dact + at);
        if (s.dgate) lanes.put(s.dgate + at, d * lanes.get(s.up + at) * slope);
        if (s.dup) lanes.put(s.dup + at, d * value);
      });
  }
};

// gated_linear_backward(dy[* n], gate[* f], up[* f], w[n f]:float, kind) -> dgate[* f], dup[* f], dw[n f]:f32+
static void gated_linear_backward(const Call& call) {
  const View &dy = call.in[0], &gate = call.in[1], &up = call.in[2], &w = call.in[3];
  const View &dgate = call.out[0], &dup = call.out[1], &dw = call.out[2];
  const int64_t m = dy.rows(), n = w.dims[0], f = w.dims[1];
  GemmOptions options;
  if (dgate || dup) {
    Slopes slopes{gate.as<float>(), up.as<float>(), dup ? dup.as<float>() : dgate.as<float>(), dgate.as<float>(), dup.as<float>(), f};
    const bool silu = static_cast<int>(call.scalar[0]) == static_cast<int>(Gate::silu);
    options.hook = {silu ? Slopes::run<Gate::silu> : Slopes::run<Gate::gelu_tanh>, &slopes};
    gemm(*call.threads, m, f, n, rows_of(dy.data, n), rows_of(w.data, f, w.dtype), slopes.dact, f, options);
    options.hook = {};
  }
  if (dw) {
    options.accumulate = call.accumulate[2];
    gemm(*call.threads, n, f, m, transposed(dy.data, n), gated(gate, up, f, call.scalar[0]), dw.as<float>(), f, options);
  }
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(linear, {"linear", linear}, {"linear_backward", linear_backward}, {"gated_linear", gated_linear},
                {"gated_linear_backward", gated_linear_backward})
