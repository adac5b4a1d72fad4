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

// What the gradient of the activation is turned into, block by block. The activation itself is made on the way, packed as the product for
// dw reads it. dgate may be gate, and dup may be up: an element is read before it is written.
struct Slopes {
  const float *gate, *up, *dact;
  float *dgate, *dup;
  int64_t f;
  float* act;
  Packed layout;

  template <Gate G>
  static void run(void* ctx, const Block& block) {
    const Slopes s = *static_cast<const Slopes*>(ctx);
    each_row_of(block, [&](int64_t i, auto over) __attribute__((always_inline)) {
      const int64_t first = i * s.f + block.j0;
      float* const act = s.act ? s.act + s.layout.at(i, block.sliver) : nullptr;
      over([&](int64_t k, auto lanes) __attribute__((always_inline)) {
        const int64_t at = first + k;
        const auto gate = lanes.get(s.gate + at), up = lanes.get(s.up + at), d = lanes.get(s.dact + at);
        auto value = gate, slope = gate;
        gate_slope<G>(gate, value, slope);
        if (act) store(act + k, value * up);
        if (s.dgate) lanes.put(s.dgate + at, d * up * slope);
        if (s.dup) lanes.put(s.dup + at, d * value);
      });
    });
  }
};

// Tokens are taken in runs: the gradients of their activations, and the activations, then stay in the caches and take little memory.
constexpr int64_t kGatedRun = 512;
static int64_t gated_run(int64_t m) { return m < kGatedRun ? m : kGatedRun; }

static size_t gated_linear_backward_workspace(const Call& call) {
  const View &w = call.in[3], &dgate = call.out[0], &dup = call.out[1], &dw = call.out[2];
  const int64_t f = w.dims[1], run = gated_run(call.in[0].rows());
  if (!dgate && !dup) return 0;
  return static_cast<size_t>(run * f + (dw ? Packed(run, f).floats() : 0)) * 4;
}

// gated_linear_backward(dy[* n], gate[* f], up[* f], w[n f]:float, kind) -> dgate[* f], dup[* f], dw[n f]:f32+
static void gated_linear_backward(const Call& call) {
  const View &dy = call.in[0], &gate = call.in[1], &up = call.in[2], &w = call.in[3];
  const View &dgate = call.out[0], &dup = call.out[1], &dw = call.out[2];
  const int64_t all = dy.rows(), n = w.dims[0], f = w.dims[1], run = gated_run(all);
  const bool silu = static_cast<int>(call.scalar[0]) == static_cast<int>(Gate::silu);
  if (!dgate && !dup) {
    if (!dw) return;
    GemmOptions options;
    options.accumulate = call.accumulate[2];
    gemm(*call.threads, n, f, all, transposed(dy.data, n), gated(gate, up, f, call.scalar[0]), dw.as<float>(), f, options);
    return;
  }
  const int64_t runs = all > 0 ? (all + run - 1) / run : 1;  // without tokens dw is still made zero
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t i = r * run, m = all - i < run ? all - i : run;
    const auto from = [&](const View& v) { return v ? v.as<float>() + i * f : nullptr; };
    const float* const d = dy.as<float>() + i * n;
    float* const dact = static_cast<float*>(call.workspace);
    float* const act = dw ? dact + run * f : nullptr;
    Slopes slopes{from(gate), from(up), dact, from(dgate), from(dup), f, act, Packed(m, f)};
    GemmOptions options;
    options.hook = {silu ? Slopes::run<Gate::silu> : Slopes::run<Gate::gelu_tanh>, &slopes, {slopes.gate, slopes.up, slopes.dgate == slopes.gate ? nullptr : slopes.dgate}};
    gemm(*call.threads, m, f, n, rows_of(d, n), rows_of(w.data, f, w.dtype), dact, f, options);
    if (dw) {
      options.hook = {};
      options.accumulate = call.accumulate[2] || i > 0;
      gemm(*call.threads, n, f, m, transposed(d, n), Packed::matrix(act), dw.as<float>(), f, options);
    }
  }
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(linear, {"linear", linear}, {"linear_backward", linear_backward}, {"gated_linear", gated_linear},
                {"gated_linear_backward", gated_linear_backward, gated_linear_backward_workspace})
