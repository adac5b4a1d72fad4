// Attention on Hopper: WGMMA, TMA, warp specialisation. Each function returns false where it does not take a call: then
// attention_sm80.cuh does. Arguments were checked, and there is something to compute.
#pragma once
#include "cuda/attention_sm90_backward.cuh"
#include "cuda/attention_sm90_forward.cuh"

namespace limbeck::cuda {
namespace attention::sm90 {

// Head sizes whose rows are whole 16-byte pieces and which WGMMA takes in whole steps; queries that fill a tile, or are few because
// there are no more keys (a few queries of many keys are better split along the keys).
inline bool takes(const Call& call, const Problem& p, size_t shared) {
  return p.whole_chunks && (p.t >= kRows || p.t == p.s) && shared <= device_of(call).shared_per_block;
}

// f(std::integral_constant<int, D>) for the head sizes there are; else false.
template <class F>
bool with_head(int d, const F& f) {
  switch (d) {
    case 64: return f(std::integral_constant<int, 64>{});
    case 80: return f(std::integral_constant<int, 80>{});
    case 96: return f(std::integral_constant<int, 96>{});
    case 128: return f(std::integral_constant<int, 128>{});
    case 256: return f(std::integral_constant<int, 256>{});
    default: return false;
  }
}

// x[batch, length, heads, d], in boxes of `rows` positions by 64 columns of one head.
inline TensorMap map_of(const void* x, const Problem& p, int length, int heads, int rows) {
  const int64_t dims[] = {p.d, heads, length, p.b}, row = int64_t{2} * p.d, strides[] = {row, row * heads, row * heads * length};
  const int box[] = {64, 1, rows, 1};
  return tensor_map(x, DType::bf16, 4, dims, strides, box, Swizzle::b128);
}

inline int tiles_of(int length, int rows) { return (length + rows - 1) / rows; }
// Bytes of the keys and values (or queries and their gradients) of one head that blocks running at the same time may want.
inline double reach(const Problem& p, int heads) {
  return 4.0 * p.d * heads * (p.window > 0 && p.window < p.s ? p.window : p.s);
}
// `each`: blocks that one tile of the order stands for.
inline Grid grid_of(const Order& order, int each, size_t shared, int cluster) {
  const unsigned blocks = static_cast<unsigned>(order.tiles) * static_cast<unsigned>(order.columns) * static_cast<unsigned>(each);
  return {dim3(blocks), dim3(kThreads), shared, cluster};
}

template <int D>
bool run_forward(const Call& call, const Problem& p) {
  if (!takes(call, p, kForwardShared<D>)) return false;
  Forward f{};
  f.p = p;
  f.score = score_of(p);
  f.order = order_of(tiles_of(p.t, 2 * kRows), p.b * p.h, p.group, reach(p, 1));
  f.cluster = p.group % 2 == 0 ? 2 : 1;
  f.y = call.out[0].as<bf16>();
  f.lse = call.out[1].as<float>();
  const auto kernel = p.direct ? attend<D, true> : attend<D, false>;
  launch(call, grid_of(f.order, 1, kForwardShared<D>, f.cluster), kernel, map_of(p.q, p, p.t, p.h, kRows),
         map_of(p.k, p, p.s, p.g, kForwardKeys<D> / 2), map_of(p.v, p, p.s, p.g, kForwardKeys<D> / 2),
         map_of(f.y ? f.y : p.q, p, p.t, p.h, kRows), f);
  return true;
}

inline int padded(const Problem& p) { return tiles_of(p.t, kRows) * kRows; }

template <int D>
bool run_backward(const Call& call, const Problem& p) {
  if (!takes(call, p, kQueryShared<D> > kKeyShared<D> ? kQueryShared<D> : kKeyShared<D>)) return false;
  Backward f{};
  f.p = p;
  f.score = score_of(p);
  f.dy = call.in[0].as<const bf16>();
  f.y = call.in[5].as<const bf16>();
  f.lse = call.in[6].as<const float>();
  f.padded = padded(p);
  const int64_t statistics = int64_t{p.b} * p.h * f.padded;
  f.lse2 = static_cast<float*>(call.workspace);
  f.delta = f.lse2 + statistics;
  f.ends = p.starts ? reinterpret_cast<int32_t*>(f.delta + statistics) : nullptr;
  f.dq = call.out[0].as<bf16>(), f.dk = call.out[1].as<bf16>(), f.dv = call.out[2].as<bf16>();
  f.add_dq = call.accumulate[0], f.add_dk = call.accumulate[1], f.add_dv = call.accumulate[2];

  constexpr int kRowsOfBlock = 256 / (D <= 64 ? 8 : D <= 128 ? 16 : 32);
  launch(call, Grid{dim3(static_cast<unsigned>((statistics + kRowsOfBlock - 1) / kRowsOfBlock)), dim3(256)}, prepare<D>, f);
  if (f.dk || f.dv) {
    const TensorMap k = map_of(p.k, p, p.t, p.g, kRows), v = map_of(p.v, p, p.t, p.g, kRows);
    f.cluster = D == 256 && p.t > kRows ? 2 : 1;
    f.order = order_of(tiles_of(p.t, kKeysOfBlock<D> * f.cluster), p.b * p.g, 1, reach(p, p.group));
    launch(call, grid_of(f.order, f.cluster, kKeyShared<D>, f.cluster), key_gradients<D>, map_of(p.q, p, p.t, p.h, kRows / 2),
           map_of(f.dy, p, p.t, p.h, kRows / 2), k, v, f.dk ? map_of(f.dk, p, p.t, p.g, kRows) : k,
           f.dv ? map_of(f.dv, p, p.t, p.g, kRows) : v, f);
  }
  if (f.dq) {
    f.cluster = p.group % 2 == 0 ? 2 : 1;
    f.order = order_of(tiles_of(p.t, 2 * kRows), p.b * p.h, p.group, reach(p, 1));
    launch(call, grid_of(f.order, 1, kQueryShared<D>, f.cluster), query_gradients<D>, map_of(p.q, p, p.t, p.h, kRows),
           map_of(f.dy, p, p.t, p.h, kRows), map_of(p.k, p, p.t, p.g, kGradientKeys<D> / 2), map_of(p.v, p, p.t, p.g, kGradientKeys<D> / 2),
           map_of(f.dq, p, p.t, p.h, kRows), f);
  }
  return true;
}

}  // namespace attention::sm90

inline bool attention_sm90(const Call& call) {
  const attention::Problem p = attention::problem_of(call, 0);
  return attention::sm90::with_head(p.d, [&](auto d) { return attention::sm90::run_forward<decltype(d)::value>(call, p); });
}
inline size_t attention_sm90_workspace(const Call&) { return 0; }

inline bool attention_backward_sm90(const Call& call) {
  const attention::Problem p = attention::problem_of(call, 1);
  return attention::sm90::with_head(p.d, [&](auto d) { return attention::sm90::run_backward<decltype(d)::value>(call, p); });
}
inline size_t attention_backward_sm90_workspace(const Call& call) {
  const attention::Problem p = attention::problem_of(call, 1);
  return sizeof(float) * (2 * static_cast<size_t>(p.b) * p.h * attention::sm90::padded(p) + (p.starts ? static_cast<size_t>(p.b) * p.t : 0));
}

}  // namespace limbeck::cuda
