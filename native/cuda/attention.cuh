// What the attention kernels of all architectures share: the problem and the soft cap. B batch, T queries, S keys, H query heads,
// G key/value heads, D head size.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/fail.h"
#include "core/kernel.h"
#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace limbeck::cuda::attention {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
// Up to this cap e^score needs no running maximum: sums of e^60 over millions of keys, and e^-60, are well inside float's range.
constexpr double kDirectCap = 60;
constexpr int kMaxHead = 256;

// What only GPUs refuse of q.
inline void check_head(const Call& call, const View& q) {
  const long long d = q.dims[3];
  if (q.dtype != DType::bf16)
    fail(ErrorKind::dtype, "ERR_DTYPE", call.op, "q", text("q is %s; on the GPU attention computes in bf16: cast q, k and v to bf16", name_of(q.dtype)),
         text("bf16"), text("%s", name_of(q.dtype)));
  if (d < 1 || d > kMaxHead)
    fail(ErrorKind::shape, "ERR_SHAPE", call.op, "q",
         text("q has heads of size %lld; on the GPU a head has 1 to 256 elements (fastest: 64, 80, 96, 128, 256)", d), text("1 to 256"), text("%lld", d));
}

template <int D>
using Head = std::integral_constant<int, D>;
// The smallest head size with kernels that holds d elements.
template <class Run>
void with_head(int64_t d, Run run) {
  if (d <= 64) run(Head<64>{});
  else if (d <= 80) run(Head<80>{});
  else if (d <= 96) run(Head<96>{});
  else if (d <= 128) run(Head<128>{});
  else run(Head<256>{});
}

// How scores become weights. `direct`: without a maximum.
struct Scores {
  bool capped, direct;
  float soft_factor;  // scores q.k times this are what tanh takes: scale / cap
  float factor;       // to units of log 2: of tanh's value, or where there is no cap of q.k; never 0
  float hidden;       // what times `factor` is -infinity
};

// Scalars are scale, cap, ...
inline Scores scores_of(const Call& call) {
  const double scale = call.scalar[0], cap = call.scalar[1];
  const bool capped = cap > 0;
  const float factor = static_cast<float>(capped ? cap : scale) * kLog2e;
  return {capped, capped && cap <= kDirectCap, capped ? static_cast<float>(scale / cap) : 0.f, factor == 0 ? 1e-30f : factor,
          factor < 0 ? HUGE_VALF : -HUGE_VALF};
}

// Rows: for one (batch, key/value head), a row is a (position, query head of the group) pair, positions first, so that all heads of
// a group share K and V. Row r sees the keys [lo(r), hi(r)), and both bounds never decrease with r.
struct Problem : Scores {
  const bf16 *q, *k, *v;
  const int32_t* starts;
  int b, t, s, h, g, d;
  int group, rows;  // query heads of a key/value head; rows of a pair
  int window;       // 0: none
  float scale;
  bool whole_chunks;  // rows of all tensors are whole 16-byte pieces: asynchronous copies can move them
};

// q, k, v, starts stand at in[first..]; scalars are scale, cap, window.
inline Problem problem_of(const Call& call, int first) {
  const View &q = call.in[first], &k = call.in[first + 1];
  Problem p{};
  p.q = q.as<const bf16>();
  p.k = k.as<const bf16>();
  p.v = call.in[first + 2].as<const bf16>();
  p.starts = call.in[first + 3].as<const int32_t>();
  const auto dim = [](int64_t n) { return static_cast<int>(n); };
  p.b = dim(q.dims[0]), p.t = dim(q.dims[1]), p.h = dim(q.dims[2]), p.d = dim(q.dims[3]);
  p.s = dim(k.dims[1]), p.g = dim(k.dims[2]);
  p.group = p.g > 0 ? p.h / p.g : 0;
  p.rows = p.t * p.group;
  p.scale = static_cast<float>(call.scalar[0]);
  p.window = dim(static_cast<int64_t>(call.scalar[2]));
  static_cast<Scores&>(p) = scores_of(call);
  p.whole_chunks = p.d % 8 == 0;
  for (const View* views : {call.in, call.out})
    for (int i = 0; i < kMaxTensors; ++i) p.whole_chunks &= reinterpret_cast<uintptr_t>(views[i].data) % 16 == 0;
  return p;
}

// x -> tanh(factor x). Below 1, where scores almost always are, a polynomial (relative error 7e-6: nearer than tanh.approx's 5e-4,
// which the cap would multiply) that leaves the special function unit to the exponentials; beyond, for the whole warp, by e^2x.
template <int M, int N>
__device__ __forceinline__ void soft(float (&x)[M][N][4], float factor) {
  float top = 0;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) top = fmaxf(top, fabsf(x[m][n][i]));
  if (__any_sync(0xffffffffu, top * fabsf(factor) > 1.f)) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float e = ptx::ex2(x[m][n][i] * (factor * (2 * kLog2e)));
          x[m][n][i] = 1.f - 2.f * ptx::rcp(1.f + e);
        }
    return;
  }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float y = x[m][n][i] * factor, y2 = y * y;
        x[m][n][i] = y * (0.99999309f + y2 * (-0.33298065f + y2 * (0.1303681f + y2 * (-0.04481754f + y2 * 0.00903642f))));
      }
}

}  // namespace limbeck::cuda::attention
