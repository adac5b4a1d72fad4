// Fused causal attention on the GPU: what is refused, and which kernels run. bf16 in, float32 sums. On Hopper attention_sm90.cuh takes
// what it can; everything else is attention_sm80.cuh's.
#include <algorithm>

#include "core/checks.h"
#include "cuda/attention_sm80.cuh"
#include "cuda/attention_sm90.cuh"
#include "cuda/fault.h"

namespace limbeck::cuda {
namespace {

using attention::Problem;
using attention::problem_of;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What only these kernels refuse, then what every device does.
void check(const Call& call, int first, bool square) {
  attention::check_head(call, call.in[first]);
  check_attention(call, first, square);
}

__global__ void check_starts(const int32_t* starts, int t, int64_t n, FaultCheck fault) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int32_t position = static_cast<int32_t>(i % t), start = starts[i], before = position > 0 ? starts[i - 1] : 0;
  if (start < before || start > position) fault.refuse(i, start);
}

constexpr int kRows = 128;  // of a block, forward

// Tiles by head size: those of data centers' GPUs, and those that fit the 99 KB of others. No kernel may spill registers: that is
// why a tile has 48 keys where D is 128.
template <int D>
struct Tiles {
  using Forward = std::conditional_t<D == 256, attention::Forward<D, kRows, 64, 8, 3>, attention::Forward<D, kRows, D == 128 ? 48 : 64, 4, 4>>;
  using SmallForward = std::conditional_t<D == 256, attention::Forward<D, kRows, 32, 8, 2>, Forward>;
  using Backward = attention::Backward<D, D == 256 ? 1 : 2, 32, 4>;
  using SmallBackward = std::conditional_t<D == 256, attention::Backward<D, 1, 16, 3>, attention::Backward<D, D >= 96 ? 1 : 2, 32, 4>>;
};

// Blocks of rows times parts should keep a GPU busy; a part has at least a few tiles. By shape alone, so that results are too.
int parts_of(const Problem& p) {
  const int64_t blocks = static_cast<int64_t>(p.b) * p.g * ceil_div(p.rows, kRows);
  if (blocks == 0 || int64_t{4} * p.t > p.s) return 1;
  const int64_t keys = p.window > 0 ? std::min<int64_t>(p.s, int64_t{p.window} + p.t) : p.s;
  return static_cast<int>(std::clamp<int64_t>(std::min<int64_t>(128 / blocks, keys / 256), 1, 64));
}

bool on_hopper(const Call& call) { return device_of(call).architecture / 10 == 9; }

size_t part_bytes(const Problem& p, int parts, int d) {
  return parts > 1 ? static_cast<size_t>(parts) * p.b * p.g * p.rows * (d * sizeof(float) + sizeof(float2)) : 0;
}

template <class F, bool Direct>
void run_forward(const Call& call, const Problem& p) {
  const int64_t pairs = static_cast<int64_t>(p.b) * p.g;
  attention::Parts parts{parts_of(p), nullptr, nullptr};
  if (parts.count > 1) {
    parts.out = static_cast<float*>(call.workspace);
    parts.sums = reinterpret_cast<float2*>(parts.out + parts.count * pairs * p.rows * F::D);
  }
  bf16* y = call.out[0].as<bf16>();
  float* lse = call.out[1].as<float>();
  const Grid grid{dim3(static_cast<unsigned>(pairs * ceil_div(p.rows, F::BM)), static_cast<unsigned>(parts.count)), dim3(F::Threads), F::shared};
  launch(call, grid, attention::forward<F, Direct>, p, y, lse, parts);
  if (parts.count > 1)
    launch(call, Grid{dim3(static_cast<unsigned>(ceil_div(pairs * p.rows, 4))), dim3(128)}, attention::join<F::D>, p, y, lse, parts);
}

template <int D, bool Direct>
void choose_forward(const Call& call, const Problem& p) {
  using T = Tiles<D>;
  if (device_of(call).shared_per_block >= T::Forward::shared)
    run_forward<typename T::Forward, Direct>(call, p);
  else
    run_forward<typename T::SmallForward, Direct>(call, p);
}

// attention(q[b t h d], k[b s g d], v[b s g d], starts[b t]:i32?, scale, cap, window) -> y[b t h d], lse[b h t]:f32
void attention_forward(const Call& call) {
  check(call, 0, false);
  const Problem p = problem_of(call, 0);
  if (p.b == 0 || p.rows == 0) return;
  if (p.starts != nullptr) {
    const int64_t n = static_cast<int64_t>(p.b) * p.t;
    launch(call, Grid{dim3(static_cast<unsigned>(ceil_div(n, 256))), dim3(256)}, check_starts, p.starts, p.t, n,
           FaultCheck{device_of(call).fault, Fault::document_start, call.op, p.t});
  }
  if (on_hopper(call) && attention_sm90(call)) return;
  attention::with_head(p.d, [&](auto d) { p.direct ? choose_forward<d, true>(call, p) : choose_forward<d, false>(call, p); });
}

size_t attention_workspace(const Call& call) {
  const Problem p = problem_of(call, 0);
  size_t bytes = on_hopper(call) ? attention_sm90_workspace(call) : 0;
  attention::with_head(p.d, [&](auto d) { bytes = std::max(bytes, part_bytes(p, parts_of(p), d)); });
  return bytes;
}

template <class F>
void run_backward(const Call& call, const Problem& p, const attention::Gradients& x, bool keys) {
  const int64_t blocks = static_cast<int64_t>(p.b) * p.g * ceil_div(keys ? p.s : p.rows, F::Own);
  const Grid grid{dim3(static_cast<unsigned>(blocks)), dim3(F::Threads), F::shared(keys)};
  if (keys)
    p.capped ? launch(call, grid, attention::backward<F, true, true>, p, x) : launch(call, grid, attention::backward<F, true, false>, p, x);
  else
    p.capped ? launch(call, grid, attention::backward<F, false, true>, p, x) : launch(call, grid, attention::backward<F, false, false>, p, x);
}

int64_t statistics(const Problem& p) { return static_cast<int64_t>(p.b) * p.h * ceil_div(p.t, attention::kStatistics) * attention::kStatistics; }

// attention_backward(dy[b t h d], q[b t h d], k[b t g d], v[b t g d], starts[b t]:i32?, y[b t h d], lse[b h t]:f32, scale, cap, window)
//   -> dq[b t h d]+, dk[b t g d]+, dv[b t g d]+
void attention_backward(const Call& call) {
  check(call, 1, true);
  const Problem p = problem_of(call, 1);
  if (p.b == 0 || p.rows == 0) return;
  if (on_hopper(call) && attention_backward_sm90(call)) return;
  attention::Gradients x{};
  x.dy = call.in[0].as<const bf16>();
  x.statistics.lse = static_cast<float*>(call.workspace);
  x.statistics.delta = x.statistics.lse + statistics(p);
  x.statistics.positions = static_cast<int>(ceil_div(p.t, attention::kStatistics) * attention::kStatistics);
  x.dq = call.out[0].as<bf16>(), x.dk = call.out[1].as<bf16>(), x.dv = call.out[2].as<bf16>();
  x.add_dq = call.accumulate[0], x.add_dk = call.accumulate[1], x.add_dv = call.accumulate[2];
  launch(call, Grid{dim3(static_cast<unsigned>(ceil_div(statistics(p), 4))), dim3(128)}, attention::prepare, p, x.dy,
         call.in[5].as<const bf16>(), call.in[6].as<const float>(), x.statistics);
  attention::with_head(p.d, [&](auto d) {
    using T = Tiles<d>;
    for (const bool keys : {true, false}) {
      if (keys ? x.dk == nullptr && x.dv == nullptr : x.dq == nullptr) continue;
      if (device_of(call).shared_per_block >= T::Backward::shared(keys))
        run_backward<typename T::Backward>(call, p, x, keys);
      else
        run_backward<typename T::SmallBackward>(call, p, x, keys);
    }
  });
}

size_t attention_backward_workspace(const Call& call) {
  const size_t bytes = static_cast<size_t>(statistics(problem_of(call, 1))) * 2 * sizeof(float);
  return on_hopper(call) ? std::max(bytes, attention_backward_sm90_workspace(call)) : bytes;
}

}  // namespace
}  // namespace limbeck::cuda

LIMBECK_KERNELS(attention, {"attention", attention_forward, attention_workspace},
                {"attention_backward", attention_backward, attention_backward_workspace})
