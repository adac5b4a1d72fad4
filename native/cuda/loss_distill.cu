// Distillation straight from hidden states: the logits of student and teacher exist for a block of tokens at a time, and the gradient
// is made in the same call. Letters: n tokens, c width, e teacher's width, v vocabulary, m kept tokens of a sparse teacher,
// T temperature; z the capped logits of the student, t those of the teacher; q = softmax(z / T), p = softmax(t / T), d = log p - log q.
//
// The logits of both stay float32: where a student is near its teacher the gradient is the small difference of p and q, and logits
// rounded to bf16 would drown it. A block of tokens is passed over twice, for sums and for the gradient G in bf16, which a larger chunk
// of tokens collects, so that dw is read and added to a few times only. The values of forward and reverse KL come out of the sums:
// sum e^t (t - z) and sum e^z (z - t) need no normaliser. Other divergences take one more pass for values and slopes.
// On Hopper, where both caps bound the logits, sums come out of the products (product_sm90.cuh), which leave tanh in 16 bits behind: steps
// of cap / 32767, finer than what rounding hidden states to bf16 moves a logit by, and the same numbers in the sums. G takes the place
// of the student's. Bytes for each logit: 4 written, 6 for the gradient, and 4 for values, but of the forward KL.
//   Elsewhere, beside the products: sums 8, values 8 (where needed), gradient 10; a sparse teacher: 4 and 6.
//
// Every divergence D(p, q) has the gradient dD/dz_j = (s_j - q_j sum_i s_i) / T with the slope s_j = q_j dD/dq_j, so each one below
// is two expressions: what a token adds to the value, and s_j. They are written in d and e^-|d|, which stay finite where p or q vanish.
#include "core/fail.h"
#include "cuda/loss.cuh"
#include "cuda/product_sm90.cuh"

namespace limbeck::cuda {
namespace {

// A token that the teacher rules out (logit -inf) has this log-ratio to the student.
constexpr float kFarthest = 1e4f;

__device__ __forceinline__ float within(float x, float most) { return x > most ? most : x < -most ? -most : x; }  // NaN stays

struct Token {
  float p, q, d, log_p, log_q;
};
struct Terms {
  float value, slope;
};

// log of (a p + (1 - a) q) over q and over p, and over max(p, q).
template <class M>
struct Mixture {
  float over_q, over_p, over_larger;
  __device__ __forceinline__ Mixture(float d, float a) {
    const float fall = M::exp(-fabsf(d));
    over_larger = d > 0.f ? a + (1.f - a) * fall : (1.f - a) + a * fall;
    const float l = M::log(over_larger);
    over_q = fmaxf(d, 0.f) + l;
    over_p = fmaxf(-d, 0.f) + l;
  }
};

// The parameters a and b: of jsd beta; of the skews alpha; of alpha_beta both; of adaptive the weights of head and tail.
struct ForwardKl {  // KL(p | q)
  static constexpr bool value_in_sums = true;
  template <class M>
  static __device__ __forceinline__ Terms of(const Token& x, float, float) { return {x.p * x.d, -x.p}; }
};
struct ReverseKl {  // KL(q | p)
  static constexpr bool value_in_sums = true;
  template <class M>
  static __device__ __forceinline__ Terms of(const Token& x, float, float) {
    const float r = x.q * -x.d;
    return {r, r + x.q};
  }
};
struct Jsd {  // beta KL(p | m) + (1 - beta) KL(q | m), m = beta p + (1 - beta) q
  static constexpr bool value_in_sums = false;
  template <class M>
  static __device__ __forceinline__ Terms of(const Token& x, float beta, float) {
    const Mixture<M> m(x.d, beta);
    const float slope = (beta - 1.f) * x.q * m.over_q;
    return {slope - beta * x.p * m.over_p, slope};
  }
};
struct SkewForwardKl {  // KL(p | m), m = alpha p + (1 - alpha) q
  static constexpr bool value_in_sums = false;
  template <class M>
  static __device__ __forceinline__ Terms of(const Token& x, float alpha, float) {
    const Mixture<M> m(x.d, alpha);
    return {-x.p * m.over_p, M::divide((alpha - 1.f) * fminf(x.p, x.q), m.over_larger)};
  }
};
struct SkewReverseKl {  // KL(q | m), m = (1 - alpha) p + alpha q
  static constexpr bool value_in_sums = false;
  template <class M>
  static __device__ __forceinline__ Terms of(const Token& x, float alpha, float) {
    const Mixture<M> m(x.d, 1.f - alpha);
    const float value = -x.q * m.over_q;
    return {value, value + x.q - alpha * x.q * M::exp(-m.over_q)};
  }
};
struct TotalVariation {  // sum |p - q| / 2
  static constexpr bool value_in_sums = false;
  template <class M>
  static __device__ __forceinline__ Terms of(const Token& x, float, float) {
    const float half = 0.5f * x.q;
    return {0.5f * fabsf(x.p - x.q), x.q > x.p ? half : x.q < x.p ? -half : x.q * 0.f};
  }
};
struct AlphaBeta {  // (p^(a+b) a/(a+b) + q^(a+b) b/(a+b) - p^a q^b) / (a b)
  static constexpr bool value_in_sums = false;
  template <class M>
  static __device__ __forceinline__ Terms of(const Token& x, float a, float b) {
    const float pa = M::exp(a * x.log_p), qa = M::exp(a * x.log_q), pb = M::exp(b * x.log_p), qb = M::exp(b * x.log_q);
    const float both = a + b;
    return {(pa * pb * (a / both) + qa * qb * (b / both) - pa * qb) * (1.f / (a * b)), (qa - pa) * qb * (1.f / a)};
  }
};
struct Adaptive {  // head KL(p | q) + tail KL(q | p), the two weights held fixed
  static constexpr bool value_in_sums = true;
  template <class M>
  static __device__ __forceinline__ Terms of(const Token& x, float head, float tail) {
    const float r = x.q * -x.d;
    return {head * (x.p * x.d) + tail * r, tail * (r + x.q) - head * x.p};
  }
};
struct Sparse {  // what the kept tokens make of the others: a q
  template <class M>
  static __device__ __forceinline__ Terms of(const Token& x, float elsewhere, float) { return {0, elsewhere * x.q}; }
};

struct SlotSums {
  float top, sum, cold;          // of e^((z - top) / T) and e^(z - top)
  float rest;                    // sum without a sparse teacher's tokens
  float teacher_top, teacher_sum;
  float over_p, over_q;          // sum e^((t - teacher_top) / T) (t - z) / T, sum e^((z - top) / T) (z - t) / T
  int at, teacher_at;
};
struct SlotTerms {
  float value, slope;
};

// What the passes after the first need of a row.
struct Row {
  double weight, lse, cold_lse, teacher_lse, value, hard_value;
  double kept_p, kept_q;              // of a sparse teacher's tokens
  float q_high, q_low, p_high, p_low, cold_high;
  float apart;                        // teacher_lse - lse
  float soft, hot, chilled, hard;     // factors: of the slopes, of q, of e^(z - cold_high), at the target
  float slopes;                       // soft times the sum of the slopes
  float a, b;                         // the divergence's parameters
  float teacher_top;
  int target;
};

// The options as the kernels see them.
struct Options {
  Cap cap, teacher_cap;
  float inverse_t, a, b;
  double T, ce_weight, kd_weight, mass;
  int divergence, tail, m, v;
  bool dense, hard, cold, largest;
};

struct Kept {
  const int* ids;
  const float* logp;
};

// A sparse teacher's tokens that lie in a slot: bit i for the i-th value that a lane holds.
__device__ __forceinline__ unsigned kept_in(const Place& p, const int* ids, int m) {
  unsigned mask = 0;
  for (int from = 0; from < m; from += kWarp) {
    const int id = from + p.lane < m ? ids[from + p.lane] - p.first : -1;
    unsigned hits = __ballot_sync(kAllLanes, id >= 0 && id < p.left);
    while (hits) {
      const int column = __shfl_sync(kAllLanes, id, __ffs(static_cast<int>(hits)) - 1);
      hits &= hits - 1;
      if (column % (4 * kWarp) / 4 == p.lane) mask |= 1u << (column / (4 * kWarp) * 4 + column % 4);
    }
  }
  return mask;
}

// First pass: sums of a slot. t is absent for a sparse teacher.
template <class M, bool dense>
__global__ void __launch_bounds__(kSlotThreads) sums_kernel(Logits l, const float* t, Options o, Tokens tokens, Kept kept, SlotSums* sums) {
  const Place p(l);
  if (!p.any) return;
  float z[kHeld], w[dense ? kHeld : 1];
  p.load(l.u, z);
  if constexpr (dense) p.load(t, w);
  o.cap.shape<M>(z);
  p.end(z);
  SlotSums s{};
  const float top = p.top(z), heat = o.cap.heat;
  s.top = top * heat;
  if (o.largest) s.at = p.find(z, top);
  const float base = base_of(s.top), warm = heat * o.inverse_t, warm_base = base * o.inverse_t;
  if constexpr (dense) {
    o.teacher_cap.shape<M>(w);
    p.end(w);
    const float teacher_top = p.top(w), teacher_heat = o.teacher_cap.heat;
    s.teacher_top = teacher_top * teacher_heat;
    if (o.largest) s.teacher_at = p.find(w, teacher_top);
    const float teacher_warm = teacher_heat * o.inverse_t, teacher_base = base_of(s.teacher_top) * o.inverse_t;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float zt = z[i] * warm, tt = w[i] * teacher_warm;
      const float ez = M::exp(zt - warm_base), et = M::exp(tt - teacher_base), d = within(tt - zt, kFarthest);
      s.sum += ez, s.teacher_sum += et;
      s.over_p += et * d, s.over_q += ez * -d;
    }
    s.teacher_sum = warp_reduce(s.teacher_sum, Plus{});
    s.over_p = warp_reduce(s.over_p, Plus{});
    s.over_q = warp_reduce(s.over_q, Plus{});
  } else {
    const unsigned mask = kept_in(p, kept.ids + static_cast<int64_t>(max(tokens.position(p.row), 0)) * o.m, o.m);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float ez = M::exp(z[i] * warm - warm_base);
      s.sum += ez;
      if (!(mask >> i & 1)) s.rest += ez;
    }
    s.rest = warp_reduce(s.rest, Plus{});
  }
  s.sum = warp_reduce(s.sum, Plus{});
  if (o.cold) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) s.cold += M::exp(z[i] * heat - base);
    s.cold = warp_reduce(s.cold, Plus{});
  }
  if (p.lane == 0) sums[static_cast<int64_t>(p.row) * l.slots() + p.slot] = s;
}

// Sums and rounded logits of a slot, or of a tile where the product makes them.
using Rounded = int16_t;
constexpr float kSteps = 32767;

template <class M>
__device__ __forceinline__ void load_shaped(const Place& p, const float* u, const Cap& cap, float (&held)[kHeld]) {
  p.load(u, held);
  cap.shape<M>(held);
}
template <class M>
__device__ __forceinline__ void load_shaped(const Place& p, const Rounded* u, const Cap&, float (&held)[kHeld]) {
  const uint2* from = reinterpret_cast<const uint2*>(u + p.at) + p.lane;
#pragma unroll
  for (int q = 0; q < kHeld / 4; ++q) {
    const uint2 a = from[q * kWarp];
#pragma unroll
    for (int i = 0; i < 4; ++i) held[4 * q + i] = static_cast<float>(static_cast<Rounded>((i < 2 ? a.x : a.y) >> i % 2 * 16)) * (1 / kSteps);
  }
}

// Within a product: tanh in 16 bits, and e^(z / T) added up over each tile.
struct RoundingPass {
  Cap cap;
  float inverse_t;
  float* sums;         // of the first row's first tile of this product
  int64_t of_row, of_tile;  // distances of sums

  template <class Put>
  __device__ __forceinline__ void half(const product_sm90::Work& work, float (&u)[product_sm90::kHalfSums], int row, int word, Put put) const {
    using M = Math<bf16>;
    const float warm = cap.heat * inverse_t * M::of_e / kSteps;
    float sum[2] = {0, 0};
    const auto round = [&](int i, float x, bool inside) {
      const float rounded = rintf(cap.shape<M>(x) * kSteps);
      if (inside) sum[i] += M::power(rounded * warm);
      return static_cast<uint32_t>(static_cast<int>(rounded)) & 0xffffu;
    };
    product_sm90::each_pair(
        work, u, word,
        [&](int i, float x, float y, bool has_x, bool has_y) {
          const uint32_t first = round(i, x, has_x), second = round(i, y, has_y);
          return first | second << 16;
        },
        put);
    product_sm90::put_row_sums(work, sum, row, [&](int at) { return sums + at * of_row + word / product_sm90::kTileWords * of_tile; });
  }
};

struct RowOutputs {
  float *kd, *ce, *agree;
  double* part;  // of the total, for each row of the whole list
};

__device__ void put_value(const Tokens& tokens, const Options& o, const RowOutputs& out, int row, const Row& r) {
  const int position = tokens.position(row);
  double part = 0;
  if (position >= 0) {
    if (out.kd) out.kd[position] = static_cast<float>(r.value);
    if (out.ce) out.ce[position] = static_cast<float>(r.hard_value);
    part = r.weight * (o.kd_weight * o.T * o.T * r.value + o.ce_weight * r.hard_value);
  }
  out.part[tokens.first + row] = part;
}

// A teacher of m tokens and their log-probabilities. With K those tokens, p_r and q_r what p and q leave to the others:
//   bucket       sum_K p log(p / q) + p_r log(p_r / q_r)     s: q - p in K, q (1 - p_r / q_r) elsewhere
//   renormalize  KL of p and q, both renormalised over K     s: q' - p' in K, 0 elsewhere
//   truncate     -sum_K p log q                              s: q sum_K p - p in K, q sum_K p elsewhere
template <class M>
__device__ __forceinline__ double log_q_of(const Options& o, const Row& r, const float* u, int id) {
  return static_cast<double>(o.cap.shape<M>(u[id]) * o.cap.heat) / o.T - r.lse;
}
template <class M>
__device__ void sparse_value(const Options& o, Row& r, const float* u, const int* ids, const float* logp, double rest) {
  double p_sum = 0, q_sum = 0;
  for (int k = lane_index(); k < o.m; k += kWarp) {
    if (ids[k] < 0) continue;
    p_sum += exp(static_cast<double>(logp[k]));
    q_sum += exp(log_q_of<M>(o, r, u, ids[k]));
  }
  r.kept_p = warp_reduce(p_sum, Plus{});
  r.kept_q = warp_reduce(q_sum, Plus{});
  double value = 0;
  for (int k = lane_index(); k < o.m; k += kWarp) {
    if (ids[k] < 0) continue;
    const double lp = static_cast<double>(logp[k]), p = exp(lp);
    if (p == 0) continue;
    const double log_q = log_q_of<M>(o, r, u, ids[k]);
    if (o.tail == bucket) value += p * (lp - log_q);
    else if (o.tail == truncate) value -= p * log_q;
    else value += p / r.kept_p * (lp - log(r.kept_p) - log_q + log(r.kept_q));
  }
  r.value = warp_reduce(value, Plus{});
  r.a = 0;
  if (o.tail == bucket) {
    const double rest_p = r.kept_p < 1 ? 1 - r.kept_p : r.kept_p >= 1 ? 0 : r.kept_p;  // NaN stays
    if (rest_p != 0) r.value += rest_p * (log(rest_p) - log(rest > 1e-38 ? rest : rest == rest ? 1e-38 : rest));
    r.a = static_cast<float>(1 - (rest > 0 ? rest_p / rest : rest == rest ? 0 : rest));
  } else if (o.tail == truncate) {
    r.a = static_cast<float>(r.kept_p);
  }
}

// A warp for each row: normalisers, factors, and the values that need no further pass.
template <class M>
__global__ void __launch_bounds__(kSlotThreads)
    rows_kernel(Tokens tokens, Options o, Kept kept, const float* u, int64_t ld, int slots, const int* target, const SlotSums* sums, Row* rows, RowOutputs out) {
  const int row = static_cast<int>(warp_index());
  if (row >= tokens.rows) return;
  const SlotSums* s = sums + static_cast<int64_t>(row) * slots;
  const float* z = u + row * ld;
  const int position = tokens.position(row);
  const double inverse_t = static_cast<double>(o.inverse_t);
  Row r{};
  r.a = o.a, r.b = o.b;
  r.weight = tokens.weight(position);
  r.target = o.hard ? target[row] : -1;

  const Best best = best_of(slots, [&](int k) { return Best{s[k].top, s[k].at}; });
  const double top = base_of(best.top);
  const auto weigh = [&](int k, double factor) { return exp((s[k].top - top) * factor); };
  const double whole = sum_of(slots, [&](int k) { return s[k].sum * weigh(k, inverse_t); });
  r.lse = top * inverse_t + log(whole);
  r.cold_lse = o.cold ? top + log(sum_of(slots, [&](int k) { return s[k].cold * weigh(k, 1); })) : r.lse;
  if (o.dense) {
    const Best teacher = best_of(slots, [&](int k) { return Best{s[k].teacher_top, s[k].teacher_at}; });
    const double teacher_top = base_of(teacher.top);
    const auto teacher_weigh = [&](int k) { return exp((s[k].teacher_top - teacher_top) * inverse_t); };
    const double teacher_whole = sum_of(slots, [&](int k) { return s[k].teacher_sum * teacher_weigh(k); });
    r.teacher_lse = teacher_top * inverse_t + log(teacher_whole);
    r.teacher_top = teacher.top;
    const double apart = r.teacher_lse - r.lse;
    r.apart = static_cast<float>(apart);
    const double forward = sum_of(slots, [&](int k) { return s[k].over_p * teacher_weigh(k); }) / teacher_whole - apart;
    const double reverse = sum_of(slots, [&](int k) { return s[k].over_q * weigh(k, inverse_t); }) / whole + apart;
    r.value = o.divergence == reverse_kl ? reverse : forward;
    // The sum of slopes: of the forward KL -sum p, of the reverse KL its value and 1.
    r.slopes = static_cast<float>(o.divergence == reverse_kl ? reverse + 1 : -1);
    r.kept_p = forward, r.kept_q = reverse;  // both, for the adaptive divergence
    if (out.agree && position >= 0 && lane_index() == 0) out.agree[position] = best.at == teacher.at && best.at < o.v ? 1.f : 0.f;
  } else {
    const int* ids = kept.ids + static_cast<int64_t>(max(position, 0)) * o.m;
    const float* logp = kept.logp + static_cast<int64_t>(max(position, 0)) * o.m;
    const double rest = sum_of(slots, [&](int k) { return s[k].rest * weigh(k, inverse_t); }) / whole;
    if (position >= 0) sparse_value<M>(o, r, z, ids, logp, rest);
    if (out.agree && position >= 0) {
      const Best likeliest = best_of(o.m, [&](int k) { return ids[k] < 0 ? Best{-INFINITY, INT_MAX} : Best{logp[k], k}; });
      if (lane_index() == 0) out.agree[position] = likeliest.at < o.m && ids[likeliest.at] == best.at ? 1.f : 0.f;
    }
  }

  const Split q(r.lse), p(r.teacher_lse), cold(r.cold_lse);
  r.q_high = q.high, r.q_low = q.low, r.p_high = p.high, r.p_low = p.low, r.cold_high = cold.high;
  const double hard = o.hard ? r.weight * o.ce_weight : 0, soft = r.weight * o.kd_weight * o.T;  // T^2 from the loss, 1 / T from z / T
  r.soft = static_cast<float>(soft);
  r.hard = static_cast<float>(hard);
  r.hot = o.cold ? 0.f : r.hard;
  r.chilled = o.cold ? static_cast<float>(hard * cold.factor()) : 0.f;
  r.slopes *= r.soft;
  if (!o.dense) r.slopes = 0;
  if (o.hard) r.hard_value = r.target >= 0 ? r.cold_lse - static_cast<double>(o.cap.shape<M>(z[r.target]) * o.cap.heat) : position >= 0 ? static_cast<double>(NAN) : 0;
  if (lane_index() > 0) return;
  rows[row] = r;
  put_value(tokens, o, out, row, r);
}

// The i-th token that a lane holds.
struct Pair {
  float z, t;  // after the caps
  template <class M>
  __device__ __forceinline__ Token token(const Row& r, float inverse_t) const {
    Token x;
    x.log_q = z * inverse_t - r.q_high - r.q_low;
    x.log_p = t * inverse_t - r.p_high - r.p_low;
    x.q = M::exp(x.log_q);
    x.p = M::exp(x.log_p);
    x.d = within((t - z) * inverse_t - r.apart, kFarthest);
    return x;
  }
};

// Pass for the divergences whose value is not among the sums.
template <class M, class D, class U>
__global__ void __launch_bounds__(kSlotThreads) values_kernel(Logits l, const U* u, const U* t, Options o, const Row* rows, SlotTerms* terms) {
  const Place p(l);
  if (!p.any) return;
  const Row& r = rows[p.row];
  float z[kHeld], w[kHeld];
  load_shaped<M>(p, u, o.cap, z);
  load_shaped<M>(p, t, o.teacher_cap, w);
  p.end(z);
  p.end(w);
  SlotTerms s{};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const Terms y = D::template of<M>(Pair{z[i] * o.cap.heat, w[i] * o.teacher_cap.heat}.token<M>(r, o.inverse_t), r.a, r.b);
    s.value += y.value, s.slope += y.slope;
  }
  s = {warp_reduce(s.value, Plus{}), warp_reduce(s.slope, Plus{})};
  if (p.lane == 0) terms[static_cast<int64_t>(p.row) * l.slots() + p.slot] = s;
}
__global__ void __launch_bounds__(kSlotThreads) row_values_kernel(Tokens tokens, Options o, int slots, const SlotTerms* terms, Row* rows, RowOutputs out) {
  const int row = static_cast<int>(warp_index());
  if (row >= tokens.rows) return;
  const SlotTerms* s = terms + static_cast<int64_t>(row) * slots;
  const double value = sum_of(slots, [&](int k) { return static_cast<double>(s[k].value); });
  const double slopes = sum_of(slots, [&](int k) { return static_cast<double>(s[k].slope); });
  if (lane_index() > 0) return;
  Row r = rows[row];
  r.value = value;
  r.slopes = static_cast<float>(slopes * r.soft);
  rows[row] = r;
  put_value(tokens, o, out, row, r);
}

// The adaptive divergence's weight of the head: the tokens more probable to the teacher than the one at which their sum crosses the
// mass `param`, and always the most probable one; their share of sum |p - q|. That token is found from the bits of its logit, 11, 11
// and 10 at a time: a block adds up what each of 2048 values of them holds. Masses are whole numbers there, so that the order of the
// additions does not matter.
constexpr int kBins = 2048, kSelectThreads = 256;
constexpr float kMassUnit = 17592186044416.f;  // 2^44

__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <class M>
__global__ void __launch_bounds__(kSelectThreads) adaptive_kernel(Logits l, const float* t, Options o, Tokens tokens, Row* rows, RowOutputs out) {
  Shared shared;
  auto* bins = shared.take<unsigned long long>(kBins);
  auto* groups = shared.take<unsigned long long>(kSelectThreads);
  auto* found = shared.take<unsigned long long>(2);  // the bin, and the mass above it
  auto* scratch = shared.take<double>(kWarp);
  const int row = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const Row& r = rows[row];
  const float *z = l.u + row * l.ld, *s = t + row * l.ld;
  const auto mass = static_cast<unsigned long long>(o.mass * static_cast<double>(kMassUnit));
  const auto pair = [&](int64_t j) { return Pair{o.cap.shape<M>(z[j]) * o.cap.heat, __fmul_rn(o.teacher_cap.shape<M>(s[j]), o.teacher_cap.heat)}; };

  unsigned edge = 0;
  unsigned long long above = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    for (int b = thread; b < kBins; b += kSelectThreads) bins[b] = 0;
    __syncthreads();
    for (int64_t j = thread; j < l.cols; j += kSelectThreads) {
      const Pair x = pair(j);
      const unsigned key = ordered(x.t);
      if (pass > 0 && key >> (shift + bits) != edge >> (shift + bits)) continue;
      const float p = M::exp(x.t * o.inverse_t - r.p_high - r.p_low) * kMassUnit;
      if (p >= 1.f) atomicAdd(&bins[key >> shift & ((1u << bits) - 1)], static_cast<unsigned long long>(p));
    }
    __syncthreads();
    unsigned long long group = 0;
    for (int b = 0; b < kBins / kSelectThreads; ++b) group += bins[thread * (kBins / kSelectThreads) + b];
    groups[thread] = group;
    __syncthreads();
    if (thread == 0) {
      unsigned long long sum = above;
      int at = kSelectThreads - 1;
      while (at > 0 && sum + groups[at] <= mass) sum += groups[at--];
      int bin = (at + 1) * (kBins / kSelectThreads) - 1;
      while (bin > at * (kBins / kSelectThreads) && sum + bins[bin] <= mass) sum += bins[bin--];
      found[0] = static_cast<unsigned long long>(bin);
      found[1] = sum;
    }
    __syncthreads();
    edge |= static_cast<unsigned>(found[0]) << shift;
    above = found[1];
    __syncthreads();
  }

  double head = 0, all = 0;
  for (int64_t j = thread; j < l.cols; j += kSelectThreads) {
    const Pair x = pair(j);
    const Token token = x.token<M>(r, o.inverse_t);
    const double apart = fabsf(token.p - token.q);
    all += apart;
    if (ordered(x.t) > edge || x.t >= r.teacher_top) head += apart;
  }
  head = block_reduce(head, Plus{}, 0., scratch);
  all = block_reduce(all, Plus{}, 0., scratch);
  if (thread > 0) return;
  Row made = r;
  made.a = all == 0 ? 0.5f : __fdividef(static_cast<float>(head), static_cast<float>(all));
  made.b = 1.f - made.a;
  const double forward = r.kept_p, reverse = r.kept_q;
  made.value = made.a * forward + made.b * reverse;
  made.slopes = static_cast<float>((made.b * (reverse + 1) - made.a) * made.soft);
  rows[row] = made;
  put_value(tokens, o, out, row, made);
}

// Last pass: the gradient in u, which may take its place. With terms, the values too.
template <class T, class D, bool dense, bool valued = false, class U>
__global__ void __launch_bounds__(kSlotThreads)
    gradient_kernel(Logits l, const U* u, const U* t, Options o, const Row* rows, SlotTerms* terms, T* g, int64_t ldg) {
  const Place p(l);
  if (!p.any) return;
  const Row& r = rows[p.row];
  using M = Math<T>;
  float z[kHeld], w[dense ? kHeld : 1];
  load_shaped<M>(p, u, o.cap, z);
  if constexpr (dense) load_shaped<M>(p, t, o.teacher_cap, w);
  SlotTerms s{};
  const int y = r.target - p.first;
  const bool here = r.target >= 0 && y >= 0 && y < p.left;
  const float of_q = r.hot - r.slopes;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const Pair x{z[i] * o.cap.heat, dense ? w[dense ? i : 0] * o.teacher_cap.heat : 0.f};
    const Token token = x.token<M>(r, o.inverse_t);
    const Terms made = D::template of<M>(token, r.a, r.b);
    if (valued && p.has(i)) s.value += made.value, s.slope += made.slope;
    float value = made.slope * r.soft + token.q * of_q;
    if (o.cold) value += M::exp(x.z - r.cold_high) * r.chilled;
    if (here && p.column(i) == y) value -= r.hard;
    z[i] = value * o.cap.slope(z[i]);
  }
  p.store(g + p.row * ldg + static_cast<int64_t>(p.slot) * kSlot, z);
  if constexpr (valued) {
    s = {warp_reduce(s.value, Plus{}), warp_reduce(s.slope, Plus{})};
    if (p.lane == 0) terms[static_cast<int64_t>(p.row) * l.slots() + p.slot] = s;
  }
}

// The places of a sparse teacher's tokens in G, a warp for each row. A token that is named twice gets what both add, once.
template <class T>
__global__ void __launch_bounds__(kSlotThreads) kept_kernel(Logits l, Options o, Tokens tokens, Kept kept, const Row* rows, T* g, int64_t ldg) {
  const int row = static_cast<int>(warp_index());
  if (row >= tokens.rows) return;
  const int position = tokens.position(row);
  if (position < 0) return;
  const Row& r = rows[row];
  const float* u = l.u + row * l.ld;
  const int* ids = kept.ids + static_cast<int64_t>(position) * o.m;
  const float* logp = kept.logp + static_cast<int64_t>(position) * o.m;
  for (int k = lane_index(); k < o.m; k += kWarp) {
    const int id = ids[k];
    if (id < 0) continue;
    bool first = true;
    double p = 0;
    for (int other = 0; other < o.m; ++other) {
      if (ids[other] != id) continue;
      first = first && other >= k;
      p += exp(static_cast<double>(logp[other]));
    }
    if (!first) continue;
    const float s = o.cap.shape<Math<T>>(u[id]);
    const double z = static_cast<double>(s * o.cap.heat), q = exp(z / o.T - r.lse);
    const double slope = o.tail == bucket ? q - p : o.tail == truncate ? q * r.kept_p - p : q / r.kept_q - p / r.kept_p;
    double value = static_cast<double>(r.soft) * slope + static_cast<double>(r.hard) * exp(z - r.cold_lse);
    if (id == r.target) value -= static_cast<double>(r.hard);
    g[row * ldg + id] = from_float<T>(static_cast<float>(value) * o.cap.slope(s));
  }
}

// Reports tokens of a sparse teacher outside the vocabulary, named twice, or of more than all the mass. A warp for each token.
__global__ void __launch_bounds__(kSlotThreads) check_kernel(Tokens tokens, Kept kept, int m, bool distinct, FaultCheck outside, FaultCheck twice, FaultCheck mass) {
  const int row = static_cast<int>(warp_index());
  if (row >= tokens.rows) return;
  const int position = tokens.position(row);
  if (position < 0) return;
  const int* ids = kept.ids + static_cast<int64_t>(position) * m;
  const float* logp = kept.logp + static_cast<int64_t>(position) * m;
  int wrong = m, again = m;
  double whole = 0;
  for (int k = lane_index(); k < m; k += kWarp) {
    if (ids[k] < 0) continue;
    if (ids[k] >= outside.limit && k < wrong) wrong = k;
    whole += exp(static_cast<double>(logp[k]));
    for (int other = 0; distinct && other < k; ++other)
      if (ids[other] == ids[k] && k < again) again = k;
  }
  wrong = warp_reduce(wrong, Smaller{});
  again = warp_reduce(again, Smaller{});
  whole = warp_reduce(whole, Plus{});
  if (lane_index() > 0) return;
  if (wrong < m) outside.refuse(position, ids[wrong]);
  else if (again < m) twice.refuse(position, ids[again]);
  else if (whole > 1.01) mass.refuse(position, __float_as_int(static_cast<float>(whole)));
}

// The teacher's logits of a chunk as float32, whatever they are kept in and however they are aligned.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_logits_kernel(Tokens tokens, const T* from, int64_t v, float* to, int64_t ld) {
  const int row = static_cast<int>(blockIdx.y), position = tokens.position(row);
  const int64_t end = (static_cast<int64_t>(blockIdx.x) + 1) * (8 * kThreads);
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * (8 * kThreads) + threadIdx.x; j < end && j < v; j += kThreads)
    to[row * ld + j] = position < 0 ? 0.f : to_float(from[position * v + j]);
}

// Runs body(D{}) for the divergence.
template <class Body>
void with_divergence(int divergence, Body body) {
  switch (divergence) {
    case forward_kl: return body(ForwardKl{});
    case reverse_kl: return body(ReverseKl{});
    case jsd: return body(Jsd{});
    case skew_forward_kl: return body(SkewForwardKl{});
    case skew_reverse_kl: return body(SkewReverseKl{});
    case total_variation: return body(TotalVariation{});
    case alpha_beta: return body(AlphaBeta{});
    default: return body(Adaptive{});
  }
}

template <class T>
struct Distill {
  // Blocks of 384 tokens and chunks of 1408, of a vocabulary of 256000 at width 2304.
  static constexpr int64_t kUsual = int64_t{1500} << 20;
  // A product of this many rows takes longer to compute than its vocabulary matrix takes to read.
  static constexpr int64_t kBlock = 384;

  const Call& call;
  View x, w, targets, tx, tw, tlogits, tids, tlogp, dx, dw;
  int64_t n, c, v, e;
  double param, param2, temperature, cap, teacher_cap, ce_weight, kd_weight;
  int divergence, tail;
  bool gradient, hard, sparse, more_values, fused;
  int64_t block, rows, ld;  // tokens whose logits there are at a time; whose gradients; row stride of both
  int slots, tiles;  // of a row, in passes and in products
  size_t bytes;

  int *list, *count, *target;
  float *u, *t, *back;
  double* part;
  SlotSums* sums;
  SlotTerms* terms;
  Row* row;
  Rounded* rounded;  // the student's, then the teacher's
  T *g, *gathered, *teacher_gathered, *converted;

  explicit Distill(const Call& given)
      : call(given), x(call.in[0]), w(call.in[1]), targets(call.in[2]), tx(call.in[4]), tw(call.in[5]), tlogits(call.in[6]), tids(call.in[7]), tlogp(call.in[8]),
        dx(call.out[4]), dw(call.out[5]), n(x.rows()), c(x.cols()), v(w.dims[0]), e(tx ? tx.cols() : 0),
        param(call.scalar[1]), param2(call.scalar[2]), temperature(call.scalar[3]), cap(call.scalar[4]), teacher_cap(call.scalar[5]), ce_weight(call.scalar[6]),
        kd_weight(call.scalar[7]), divergence(static_cast<int>(call.scalar[0])), tail(static_cast<int>(call.scalar[8])) {
    gradient = dx || dw;
    hard = targets && (ce_weight != 0 || call.out[2]);
    sparse = static_cast<bool>(tids);
    more_values = !sparse && divergence != forward_kl && divergence != reverse_kl && divergence != adaptive;
    ld = whole_slots(v);
    slots = static_cast<int>(ceil_div(v, kSlot));
    tiles = static_cast<int>(product_sm90::tiles_of(v));
    const auto bounded = [&](double limit) { return limit > 0 && limit <= kBounded && limit / temperature <= kBounded; };
    fused = sizeof(T) == 2 && tx && divergence != adaptive && !hard && !call.out[3] && bounded(cap) && bounded(teacher_cap) &&
            product_sm90::takes(device_of(call), x.data, w.dtype == x.dtype ? w.data : nullptr, c) &&
            product_sm90::takes(device_of(call), tx.data, tw.dtype == tx.dtype ? tw.data : nullptr, e);
    choose(workspace_budget(device_of(call), kUsual));
    const bool gathers = static_cast<bool>(call.in[3]);
    const int64_t room = Words<T>::room(w), teacher_room = Words<T>::room(tw);
    Layout lay{static_cast<char*>(call.workspace)};
    list = lay.take<int>(n);
    count = lay.take<int>(1);
    part = lay.take<double>(n);
    target = lay.take<int>(block);
    row = lay.take<Row>(block);
    sums = lay.take<SlotSums>(block * (fused ? tiles : slots));
    terms = lay.take<SlotTerms>(more_values || fused ? block * slots : 0);
    u = lay.take<float>(fused ? 0 : block * ld);
    t = lay.take<float>(sparse || fused ? 0 : block * ld);
    rounded = lay.take<Rounded>(fused ? 2 * block * ld : 0);
    g = lay.take<T>(gradient && !fused ? rows * ld : 0);
    gathered = lay.take<T>(gathers ? rows * c : 0);
    teacher_gathered = lay.take<T>(gathers ? block * e : 0);
    back = lay.take<float>(dx ? rows * c : 0);
    converted = lay.take<T>(room > teacher_room ? room : teacher_room);
    bytes = lay.bytes;
  }

  void choose(int64_t budget) {
    const int64_t some = n > 0 ? n : 1;
    const int64_t of_block = ld * 4 * (sparse ? 1 : 2) + slots * int64_t{sizeof(SlotSums) + sizeof(SlotTerms)} + e * int64_t{sizeof(T)} + int64_t{sizeof(Row)};
    const int64_t of_row = (gradient ? ld * int64_t{sizeof(T)} : 0) + c * (int64_t{sizeof(T)} + 4);
    budget -= n * 12 + (Words<T>::room(w) > Words<T>::room(tw) ? Words<T>::room(w) : Words<T>::room(tw)) * int64_t{sizeof(T)};
    if (fused) {
      const int64_t of_token = ld * 4 + tiles * int64_t{sizeof(SlotSums)} + slots * int64_t{sizeof(SlotTerms)} + int64_t{sizeof(Row)} +
                               e * int64_t{sizeof(T)} + c * (int64_t{sizeof(T)} + 4);
      block = rows = even_rows(some, whole_tiles(budget / of_token));
      return;
    }
    // A chunk's gradients are kept for dw alone; else a block's are enough.
    block = whole_tiles(dw ? budget * 11 / 20 / of_block : budget / (of_block + of_row));
    block = block < kBlock ? block : kBlock;
    const int64_t fit = dw ? whole_tiles((budget - block * of_block) / of_row) : block;
    rows = even_rows(some, fit > block ? fit : block);
    if (block > some) block = some;
    if (rows > some) rows = some;
  }

  Options options() const {
    return {Cap(cap), Cap(teacher_cap), static_cast<float>(1 / temperature), static_cast<float>(param), static_cast<float>(param2), temperature, ce_weight, kd_weight,
            param, divergence, tail, static_cast<int>(tids ? tids.cols() : 0), static_cast<int>(v), !sparse, hard, hard && temperature != 1, static_cast<bool>(call.out[3])};
  }

  void run() {
    check_distill(call);
    Tokens tokens{n, call.in[3].as<const float>()};
    const int64_t counted = list_tokens(call, tokens, list, count);
    for (int k = 1; k < 4; ++k)
      if (tokens.list || (k == 2 && !hard)) zero(call, call.out[k]);
    if (tokens.list && !call.accumulate[4]) zero(call, dx);
    if (counted == 0 && !call.accumulate[5]) zero(call, dw);
    for (int64_t first = 0; first < counted; first += rows) chunk(tokens.chunk(first, counted - first < rows ? counted - first : rows));
    launch(call, Grid{dim3(1), dim3(1024), kWarp * sizeof(double)}, total_kernel, static_cast<const double*>(part), counted, call.out[0].as<float>());
  }

  void chunk(const Tokens& tokens) {
    const Words<T> words{&w, converted};
    const T* hidden = x.as<const T>() + tokens.first * c;
    if (tokens.list) {
      gather<T>(call, tokens, x, nullptr, gathered);
      hidden = gathered;
    }
    if (fused) return fused_chunk(tokens, words, hidden);
    for (int64_t at = 0; at < tokens.rows; at += block) {
      const int64_t many = tokens.rows - at < block ? tokens.rows - at : block;
      const Logits l{u, ld, static_cast<int>(many), 0, v};
      const Tokens some = tokens.chunk(tokens.first + at, many);
      if (!sparse) teacher(some);
      make_logits(call, hidden + at * c, words, l);
      passes(some, l, g + at * ld);
    }
    backward(tokens, words, hidden, g);
  }

  // A chunk whose sums are made in the products.
  void fused_chunk(const Tokens& tokens, const Words<T>& words, const T* hidden) {
    if constexpr (sizeof(T) == 2) {
      const int64_t many = tokens.rows, of_slot = sizeof(SlotSums) / sizeof(float);
      const Options o = options();
      Rounded* const told = rounded + block * ld;
      check(cudaMemsetAsync(sums, 0, static_cast<size_t>(many * tiles) * sizeof(SlotSums), device_of(call).stream), call.op);
      const auto product = [&](const T* from, const Words<T>& matrix, int64_t width, Rounded* to, const Cap& cap_of, float* sum) {
        matrix.each(call, 0, v, [&](int64_t first, int64_t count, const Matrix& m) {
          const RoundingPass pass{cap_of, o.inverse_t, sum + product_sm90::tiles_of(first) * of_slot, tiles * of_slot, of_slot};
          product_sm90::run(call, from, many, static_cast<const T*>(m.data), count, width, reinterpret_cast<T*>(to) + first, ld, pass);
        });
      };
      product(teacher_hidden(tokens), Words<T>{&tw, converted}, e, told, o.teacher_cap, &sums->teacher_sum);
      product(hidden, words, c, rounded, o.cap, &sums->sum);

      const RowOutputs out{call.out[1].as<float>(), nullptr, nullptr, part};
      launch(call, warps(many), rows_kernel<Math<T>>, tokens, o, Kept{nullptr, nullptr}, nullptr, ld, tiles, target, sums, row, out);
      const Logits l{nullptr, ld, static_cast<int>(many), 0, v};
      T* const to = reinterpret_cast<T*>(rounded);
      with_divergence(divergence, [&]<class D>(D) {
        const Grid grid = warps(many * slots);
        if constexpr (std::is_same_v<D, ForwardKl>) {  // its gradient needs no value
          if (gradient) launch(call, grid, gradient_kernel<T, D, true, true, Rounded>, l, rounded, told, o, row, terms, to, ld);
          else launch(call, grid, values_kernel<Math<T>, D, Rounded>, l, rounded, told, o, row, terms);
          launch(call, warps(many), row_values_kernel, tokens, o, slots, terms, row, out);
        } else if constexpr (!std::is_same_v<D, Adaptive>) {
          launch(call, grid, values_kernel<Math<T>, D, Rounded>, l, rounded, told, o, row, terms);
          launch(call, warps(many), row_values_kernel, tokens, o, slots, terms, row, out);
          if (gradient) launch(call, grid, gradient_kernel<T, D, true, false, Rounded>, l, rounded, told, o, row, nullptr, to, ld);
        }
      });
      if (gradient) backward(tokens, words, hidden, to);
    }
  }

  void backward(const Tokens& tokens, const Words<T>& words, const T* hidden, const T* gradients) {
    if (dx) {
      back_to_x(call, gradients, ld, tokens.rows, words, 0, v, back, false);
      scatter(call, tokens, back, nullptr, c, Sink<T>(call, 4));
    }
    if (dw) back_to_w(call, gradients, ld, tokens.rows, hidden, c, 0, v, dw.as<float>(), call.accumulate[5] || tokens.first > 0);
  }

  const T* teacher_hidden(const Tokens& tokens) {
    if (!tokens.list) return tx.as<const T>() + tokens.first * e;
    gather<T>(call, tokens, tx, nullptr, teacher_gathered);
    return teacher_gathered;
  }

  void teacher(const Tokens& tokens) {
    if (tlogits) {
      const dim3 blocks(static_cast<unsigned>(ceil_div(v, 8 * kThreads)), static_cast<unsigned>(tokens.rows));
      launch(call, Grid{blocks, dim3(kThreads)}, gather_logits_kernel<T>, tokens, tlogits.as<const T>(), v, t, ld);
      return;
    }
    make_logits(call, teacher_hidden(tokens), Words<T>{&tw, converted}, Logits{t, ld, tokens.rows, 0, v});
  }

  void passes(const Tokens& tokens, const Logits& l, T* to) {
    using M = Math<T>;
    const Options o = options();
    const RowOutputs out{call.out[1].as<float>(), hard ? call.out[2].as<float>() : nullptr, call.out[3].as<float>(), part};
    const Kept kept{tids.as<const int>(), tlogp.as<const float>()};
    FaultRecord* fault = device_of(call).fault;
    const int64_t many = tokens.rows;
    if (hard) {
      const Grid grid{dim3(static_cast<unsigned>(ceil_div(many, kThreads))), dim3(kThreads)};
      launch(call, grid, targets_kernel, tokens, targets.as<const int>(), FaultCheck{fault, Fault::target, call.op, v}, target);
    }
    if (sparse) {
      launch(call, warps(many), check_kernel, tokens, kept, o.m, tail != truncate, FaultCheck{fault, Fault::teacher_token, call.op, v},
             FaultCheck{fault, Fault::teacher_twice, call.op, v}, FaultCheck{fault, Fault::teacher_mass, call.op, v});
      launch(call, warps(many * slots), sums_kernel<M, false>, l, nullptr, o, tokens, kept, sums);
    } else {
      launch(call, warps(many * slots), sums_kernel<M, true>, l, t, o, tokens, kept, sums);
    }
    launch(call, warps(many), rows_kernel<M>, tokens, o, kept, u, ld, slots, target, sums, row, out);
    if (more_values) {
      with_divergence(divergence, [&]<class D>(D) {
        if constexpr (!D::value_in_sums) launch(call, warps(many * slots), values_kernel<M, D, float>, l, u, t, o, row, terms);
      });
      launch(call, warps(many), row_values_kernel, tokens, o, slots, terms, row, out);
    } else if (!sparse && divergence == adaptive) {
      const size_t shared = (kBins + kSelectThreads + 2) * sizeof(unsigned long long) + kWarp * sizeof(double);
      launch(call, Grid{dim3(static_cast<unsigned>(many)), dim3(kSelectThreads), shared}, adaptive_kernel<M>, l, t, o, tokens, row, out);
    }
    if (!gradient) return;
    if (sparse) {
      launch(call, warps(many * slots), gradient_kernel<T, Sparse, false, false, float>, l, u, nullptr, o, row, nullptr, to, ld);
      launch(call, warps(many), kept_kernel<T>, l, o, tokens, kept, row, to, ld);
    } else {
      with_divergence(divergence, [&]<class D>(D) { launch(call, warps(many * slots), gradient_kernel<T, D, true, false, float>, l, u, t, o, row, nullptr, to, ld); });
    }
  }
};

size_t linear_distill_workspace(const Call& call) { return call.in[0].dtype == DType::bf16 ? Distill<bf16>(call).bytes : Distill<float>(call).bytes; }

// linear_distill(x[* c], w[v c]:float, targets[*]:i32?, weights[*]:f32?, tx[* e]?, tw[v e]:float?, tlogits[* v]?, tids[* m]:i32?,
//   tlogp[* m]:f32?, divergence, param, param2, temperature, cap, tcap, ce_weight, kd_weight, tail)
//   -> total[]:f32, kd[*]:f32, ce[*]:f32, agree[*]:f32, dx[* c]+, dw[v c]:f32+
void linear_distill(const Call& call) {
  if (call.in[0].dtype == DType::bf16) Distill<bf16>(call).run();
  else Distill<float>(call).run();
}

}  // namespace
}  // namespace limbeck::cuda

LIMBECK_KERNELS(loss_distill, {"linear_distill", linear_distill, linear_distill_workspace})
