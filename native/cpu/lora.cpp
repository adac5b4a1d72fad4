// What adapters of low rank need beside products: lengths of rows, columns scaled to new lengths, dropout.
#include <cmath>

#include "core/random.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

template <class T>
static void squares_of(const Call& call, const T* w, float* s) {
  const int64_t n = call.in[0].dims[0], k = call.in[0].dims[1];
  for_rows(call, n, k, [=](int64_t row) {
    s[row] = sum_lanes(k, [=](int64_t i, auto lanes) {
      const Vec v = lanes.get(w + row * k + i);
      return v * v;
    });
  });
}

// row_squares(w[n k]:float) -> s[n]:f32
static void row_squares(const Call& call) {
  const View &w = call.in[0], &s = call.out[0];
  if (!s) return;
  if (w.dtype == DType::bf16) squares_of(call, w.as<uint16_t>(), s.as<float>());
  else squares_of(call, w.as<float>(), s.as<float>());
}

// low_rank_norms(squares[n]:f32, p[r n], b[n r]:float, g[r r], scale) -> norm[n]:f32
// |w + s b a|² = |w|² + 2 s b·(a w) + s² b (a aᵀ) bᵀ for a row w of W and a row b of B; p = A Wᵀ, g = A Aᵀ.
static void low_rank_norms(const Call& call) {
  const View &squares = call.in[0], &p = call.in[1], &b = call.in[2], &g = call.in[3], &norm = call.out[0];
  if (!norm) return;
  const int64_t n = squares.dims[0], r = p.dims[0];
  const float scale = static_cast<float>(call.scalar[0]);
  const auto weight = [&](int64_t i) { return b.dtype == DType::bf16 ? from_bf16(b.as<uint16_t>()[i]) : b.as<float>()[i]; };
  for_rows(call, n, r * r, [&](int64_t row) {
    float sum = 0;
    for (int64_t i = 0; i < r; ++i) {
      float inner = 0;
      for (int64_t j = 0; j < r; ++j) inner += g.as<float>()[i * r + j] * weight(row * r + j);
      sum += weight(row * r + i) * (2.f * p.as<float>()[i * n + row] + scale * inner);
    }
    const float square = squares.as<float>()[row] + scale * sum;
    norm.as<float>()[row] = square < 0.f ? 0.f : ::sqrtf(square);
  });
}

// m / norm, in the workspace.
static const float* gains(const Call& call, const View& m, const View& norm) {
  float* const gain = static_cast<float*>(call.workspace);
  for_lanes(0, norm.size(), [&](int64_t i, auto lanes) {
    const Vec v = m.dtype == DType::bf16 ? lanes.get(m.as<uint16_t>() + i) : lanes.get(m.as<float>() + i);
    lanes.put(gain + i, v / lanes.get(norm.as<float>() + i));
  });
  return gain;
}

// scale_columns(x[* n], m[n]:float, norm[n]:f32, bias[n]?) -> y[* n]
static void scale_columns(const Call& call) {
  const View &x = call.in[0], &bias = call.in[3], &y = call.out[0];
  if (!y) return;
  const float* const gain = gains(call, call.in[1], call.in[2]);
  const int64_t n = x.cols();
  for_rows(call, x.rows(), n, [&](int64_t row) {
    for_lanes(0, n, [&](int64_t i, auto lanes) {
      const Vec v = lanes.get(x.as<float>() + row * n + i) * lanes.get(gain + i);
      lanes.put(y.as<float>() + row * n + i, bias ? v + lanes.get(bias.as<float>() + i) : v);
    });
  });
}

// scale_columns_backward(dy[* n], x[* n], m[n]:float, norm[n]:f32) -> dx[* n]+, dm[n]:f32+
static void scale_columns_backward(const Call& call) {
  const View &dy = call.in[0], &x = call.in[1], &norm = call.in[3];
  const Sink dx(call, 0), dm(call, 1);
  const int64_t rows = dy.rows(), n = norm.size();
  if (dx) {
    const float* const gain = gains(call, call.in[2], norm);
    for_rows(call, rows, n, [&](int64_t row) {
      for_lanes(0, n, [&](int64_t i, auto lanes) { dx.put(row * n + i, lanes, lanes.get(dy.as<float>() + row * n + i) * lanes.get(gain + i)); });
    });
  }
  if (!dm) return;
  // Rows are summed in runs of a fixed length, which keeps the error of long sums small.
  constexpr int64_t kRun = 64;
  call.threads->parallel((n + W - 1) / W, [&](int64_t tile, int) {
    for_lanes(tile * W, tile * W + W < n ? tile * W + W : n, [&](int64_t j, auto lanes) {
      Vec all{};
      for (int64_t begin = 0; begin < rows; begin += kRun) {
        Vec run{};
        for (int64_t i = begin; i < rows && i < begin + kRun; ++i)
          run += lanes.get(dy.as<float>() + i * n + j) * lanes.get(x.as<float>() + i * n + j);
        all += run;
      }
      dm.put(j, lanes, all / lanes.get(norm.as<float>() + j));
    });
  });
}

static size_t scale_columns_workspace(const Call& call) { return static_cast<size_t>(call.in[0].cols()) * sizeof(float); }

// dropout(x[*], rate, seed, stream) -> y[*]; dropout_backward is the same of dy.
static void dropout(const Call& call) {
  const float* const x = call.in[0].as<float>();
  const Sink y(call, 0);
  if (!y) return;
  const float rate = static_cast<float>(call.scalar[0]), by = 1.f / (1.f - rate);
  const uint64_t seed = static_cast<uint64_t>(call.scalar[1]), stream = static_cast<uint64_t>(call.scalar[2]);
  for_chunks(call, call.in[0].size(), kChunk, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 4) {
      const auto bits = random_block(seed, stream, static_cast<uint64_t>(i / 4));
      for (int64_t k = i; k < i + 4 && k < end; ++k) {
        const float v = uniform(bits[static_cast<size_t>(k - i)]) < rate ? 0.f : x[k] * by;
        y.data[k] = y.accumulate ? y.data[k] + v : v;
      }
    }
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(lora, {"row_squares", row_squares}, {"low_rank_norms", low_rank_norms}, {"scale_columns", scale_columns, scale_columns_workspace},
                {"scale_columns_backward", scale_columns_backward, scale_columns_workspace}, {"dropout", dropout}, {"dropout_backward", dropout})
