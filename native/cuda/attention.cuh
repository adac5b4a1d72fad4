// What the attention kernels of all architectures share: the problem and the soft cap. B batch, T queries, S keys, H query heads,
// G key/value heads, D head size.
#pragma once
#include <cstdint>

#include "core/kernel.h"
#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace limbeck::cuda::attention {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
// Up to this cap e^score needs no running maximum: sums of e^60 over millions of keys, and e^-60, are well inside float's range.
constexpr double kDirectCap = 60;
constexpr int kMaxHead = 256;

// Rows: for one (batch, key/value head), a row is a (position, query head of the group) pair, positions first, so that all heads of
// a group share K and V. Row r sees the keys [lo(r), hi(r)), and both bounds never decrease with r.
struct Problem {
  const bf16 *q, *k, *v;
  const int32_t* starts;
  int b, t, s, h, g, d;
  int group, rows;  // query heads of a key/value head; rows of a pair
  int window;       // 0: none
  float scale;
  bool capped, direct;
  float soft_factor;  // scores q.k times this are what tanh takes: scale / cap
  float factor;       // to units of log 2: of tanh's value, or where there is no cap of q.k
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
  p.capped = call.scalar[1] > 0;
  p.direct = p.capped && call.scalar[1] <= kDirectCap;
  p.soft_factor = p.capped ? static_cast<float>(call.scalar[0] / call.scalar[1]) : 0.f;
  p.factor = static_cast<float>(call.scalar[p.capped ? 1 : 0]) * kLog2e;
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
