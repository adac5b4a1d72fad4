// Distillation straight from hidden states: the logits of student and teacher exist for one chunk of tokens at a time, and the
// gradient is made in the same pass. Letters: n tokens, c width, e teacher's width, v vocabulary, m kept tokens of a sparse teacher,
// T temperature; z the capped logits of the student, t those of the teacher; q = softmax(z / T), p = softmax(t / T), d = log p - log q.
//
// Every divergence D(p, q) has the gradient dD/dz_j = (s_j - q_j sum_i s_i) / T with the slope s_j = q_j dD/dq_j, so each one below
// is two expressions: what a token adds to the value, and s_j. They are written in d and e^-|d|, which stay finite where p or q vanish.
#include "cpu/loss.h"

namespace limbeck::cpu::LIMBECK_ISA {
namespace {

// A token that the teacher rules out (logit -inf) has this log-ratio to the student.
constexpr float kFarthest = 1e4f;

LIMBECK_INLINE Vec abs(Vec x) { return max(x, -x); }

struct Token {
  Vec p, q, d, log_p, log_q;
};
struct Terms {
  Vec value, slope;
};

// log of (a p + (1 - a) q) over q and over p, and over max(p, q).
struct Mixture {
  Vec over_q, over_p, over_larger;
};
LIMBECK_INLINE Mixture mix(Vec d, float a) {
  const Vec fall = exp(-abs(d));
  const Vec larger = d > 0.f ? a + (1.f - a) * fall : (1.f - a) + a * fall;
  const Vec l = log(larger);
  return {max(d, Vec{}) + l, max(-d, Vec{}) + l, larger};
}

struct ForwardKl {  // KL(p | q)
  LIMBECK_INLINE Terms operator()(const Token& x) const { return {x.p * x.d, -x.p}; }
};
struct ReverseKl {  // KL(q | p)
  LIMBECK_INLINE Terms operator()(const Token& x) const {
    const Vec r = x.q * -x.d;
    return {r, r + x.q};
  }
};
struct Jsd {  // beta KL(p | m) + (1 - beta) KL(q | m), m = beta p + (1 - beta) q
  float beta;
  LIMBECK_INLINE Terms operator()(const Token& x) const {
    const Mixture m = mix(x.d, beta);
    const Vec slope = (beta - 1.f) * x.q * m.over_q;
    return {slope - beta * x.p * m.over_p, slope};
  }
};
struct SkewForwardKl {  // KL(p | m), m = alpha p + (1 - alpha) q
  float alpha;
  LIMBECK_INLINE Terms operator()(const Token& x) const {
    const Mixture m = mix(x.d, alpha);
    return {-x.p * m.over_p, (alpha - 1.f) * min(x.p, x.q) / m.over_larger};
  }
};
struct SkewReverseKl {  // KL(q | m), m = (1 - alpha) p + alpha q
  float alpha;
  LIMBECK_INLINE Terms operator()(const Token& x) const {
    const Mixture m = mix(x.d, 1.f - alpha);
    const Vec value = -x.q * m.over_q;
    return {value, value + x.q - alpha * x.q * exp(-m.over_q)};
  }
};
struct TotalVariation {  // sum |p - q| / 2
  LIMBECK_INLINE Terms operator()(const Token& x) const {
    const Vec half = 0.5f * x.q;
    return {0.5f * abs(x.p - x.q), x.q > x.p ? half : x.q < x.p ? -half : x.q * 0.f};
  }
};
struct AlphaBeta {  // (p^(a+b) a/(a+b) + q^(a+b) b/(a+b) - p^a q^b) / (a b)
  float a, b;
  LIMBECK_INLINE Terms operator()(const Token& x) const {
    const Vec pa = exp(a * x.log_p), qa = exp(a * x.log_q), pb = exp(b * x.log_p), qb = exp(b * x.log_q);
    const float both = a + b;
    return {(pa * pb * (a / both) + qa * qb * (b / both) - pa * qb) * (1.f / (a * b)), (qa - pa) * qb * (1.f / a)};
  }
};
struct Adaptive {  // head KL(p | q) + tail KL(q | p), the two weights held fixed
  float head, tail;
  LIMBECK_INLINE Terms operator()(const Token& x) const {
    const Vec r = x.q * -x.d;
    return {head * (x.p * x.d) + tail * r, tail * (r + x.q) - head * x.p};
  }
};

// The probability at which the running sum over the tokens, the most probable first, exceeds `mass`. Reorders p.
float crossing(float* p, int64_t n, double mass) {
  double above = 0;  // of everything before p
  while (n > 1) {
    const float pivot = p[n / 2];
    int64_t more = 0, equal = 0;
    double more_mass = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (p[j] < pivot) continue;
      const float x = p[j];
      if (x > pivot) {
        p[j] = p[more + equal];
        p[more + equal] = p[more];
        p[more++] = x;
        more_mass += x;
      } else {
        p[j] = p[more + equal];
        p[more + equal++] = x;
      }
    }
    if (above + more_mass > mass) {
      n = more;
    } else if (above + more_mass + static_cast<double>(pivot) * static_cast<double>(equal) > mass || more + equal >= n || equal == 0) {
      return pivot;
    } else {
      above += more_mass + static_cast<double>(pivot) * static_cast<double>(equal);
      p += more + equal;
      n -= more + equal;
    }
  }
  return n == 1 ? p[0] : 0.f;
}

// The student's block in the commonest case, KL(p | q) with capped logits on both sides: e^z, e^t and the sums over them while the
// block is hot. What is kept, e^(z/T) dz/du and e^(t/T) dz/du, makes the gradient without another exponential.
struct ForwardKlTile {
  float *z, *t;  // t holds the teacher's capped logits
  int64_t ld, slots;
  float *student_sums, *teacher_sums, *ratio_sums, *cold_sums;  // cold_sums: e^z at temperature 1, if wanted
  const int32_t* target;
  float* target_z;
  float cap, inverse_t;
  bool gradient;

  static void run(void* ctx, const Block& b) {
    const ForwardKlTile x = *static_cast<const ForwardKlTile*>(ctx);
    const float inverse = 1.f / x.cap, heat = x.cap * x.inverse_t;
    each_row_of(b, [&](int64_t i, auto over) __attribute__((always_inline)) {
      if (const int64_t y = x.target ? x.target[i] : -1; y >= b.j0 && y < b.j0 + b.cols)
        x.target_z[i] = (tanh(splat(x.z[i * x.ld + y]) * inverse) * x.cap)[0];
      float *zs = x.z + i * x.ld + b.j0, *ts = x.t + i * x.ld + b.j0;
      Vec student{}, teacher{}, ratio{}, cold{};
      over([&](int64_t k, auto lanes) __attribute__((always_inline)) {
        const auto s = tanh(lanes.get(zs + k) * inverse), slope = 1.f - s * s;
        const auto zt = s * heat, tt = lanes.get(ts + k) * x.inverse_t;
        const auto ez = lanes.keep(exp_inside(zt)), et = lanes.keep(exp_inside(tt));
        add(student, ez);
        add(teacher, et);
        add(ratio, et * (tt - zt));
        if (x.cold_sums) add(cold, lanes.keep(exp_inside(s * x.cap)));
        if (x.gradient) {
          lanes.put(zs + k, ez * slope);
          lanes.put(ts + k, et * slope);
        }
      });
      const int64_t slot = i * x.slots + b.sliver;
      x.student_sums[slot] = sum(student);
      x.teacher_sums[slot] = sum(teacher);
      x.ratio_sums[slot] = sum(ratio);
      if (x.cold_sums) x.cold_sums[slot] = sum(cold);
    });
  }
  TileHook hook() { return {run, this, {t}}; }
};

struct Distill : HeadShape {
  const Call& call;
  View x, w, targets, weights, tx, tw, tlogits, tids, tlogp;
  double param, param2, T, cap, tcap, ce_weight, kd_weight;
  int divergence, tail;
  View total, kd, ce, agree, dx, dw;
  bool gradient, hard, sparse, fast, student_bounded, teacher_bounded, cold;
  float inverse_t, bend;  // dz/du = 1 - bend z^2
  size_t bytes;

  int32_t *token, *target;
  float *packed_w, *z, *t, *gathered, *back, *target_z;
  float *sums, *tops, *cold_sums, *teacher_sums, *teacher_tops;
  double* row_total;

  explicit Distill(const Call& c_)
      : HeadShape(c_.in[0], c_.in[1], c_.in[7] ? 1 : 2), call(c_),
        x(c_.in[0]), w(c_.in[1]), targets(c_.in[2]), weights(c_.in[3]), tx(c_.in[4]), tw(c_.in[5]), tlogits(c_.in[6]), tids(c_.in[7]), tlogp(c_.in[8]),
        param(c_.scalar[1]), param2(c_.scalar[2]), T(c_.scalar[3]), cap(c_.scalar[4]), tcap(c_.scalar[5]), ce_weight(c_.scalar[6]), kd_weight(c_.scalar[7]),
        divergence(static_cast<int>(c_.scalar[0])), tail(static_cast<int>(c_.scalar[8])),
        total(c_.out[0]), kd(c_.out[1]), ce(c_.out[2]), agree(c_.out[3]), dx(c_.out[4]), dw(c_.out[5]) {
    gradient = dx || dw;
    hard = targets && (ce_weight != 0 || ce);
    sparse = static_cast<bool>(tids);
    inverse_t = static_cast<float>(1 / T);
    bend = cap > 0 ? static_cast<float>(1 / (cap * cap)) : 0.f;
    student_bounded = cap > 0 && cap <= kBounded && cap / T <= kBounded;
    teacher_bounded = tcap > 0 && tcap / T <= kBounded;
    cold = hard && T != 1;
    fast = divergence == forward_kl && !sparse && student_bounded && teacher_bounded && !agree && !(cold && ce_weight != 0);

    Layout lay{static_cast<char*>(call.workspace)};
    const int64_t cells = rows * slots;
    token = lay.take<int32_t>(n);
    target = lay.take<int32_t>(rows);
    packed_w = dx && packs() ? lay.take<float>(Packed(v, c).floats()) : nullptr;
    z = lay.take<float>(rows * ld);
    t = lay.take<float>(sparse ? 0 : rows * ld);
    gathered = lay.take<float>(rows * (tx && tx.cols() > c ? tx.cols() : c));
    back = lay.take<float>(dx ? rows * c : 0);
    target_z = lay.take<float>(rows);
    sums = lay.take<float>(cells);
    tops = lay.take<float>(student_bounded && !fast ? 0 : cells);  // the fast way keeps its third sum here
    cold_sums = lay.take<float>(cold ? cells : 0);
    teacher_sums = lay.take<float>(sparse ? 0 : cells);
    teacher_tops = lay.take<float>(sparse || teacher_bounded ? 0 : cells);
    row_total = lay.take<double>(rows);
    bytes = lay.bytes;
  }

  void run() {
    check_distill(call);
    ThreadPool& threads = *call.threads;
    for (int k = 0; k < 4; ++k) zero(call.out[k]);
    if (!call.accumulate[4]) zero(dx);
    const int64_t count = list_tokens(weights, n, token);
    if (count == 0 && !call.accumulate[5]) zero(dw);
    each_row(threads, count, [&](int64_t i, int) { check_token(token[i]); });

    const Matrix head = head_rows(threads, *this, w, packed_w);
    double sum_of_all = 0;
    const int64_t chunks = count == 0 ? 0 : (count + rows - 1) / rows;
    for (int64_t k = 0; k < chunks; ++k) {
      const int64_t from = count * k / chunks, to = count * (k + 1) / chunks;
      const Chunk chunk{to - from, token + from, z, gathered, back};
      if (!sparse) teacher(threads, chunk);
      student(threads, chunk);
      each_row(threads, chunk.count, [&](int64_t i, int thread) { finish(threads, i, chunk.token[i], thread); });
      for (int64_t i = 0; i < chunk.count; ++i) sum_of_all += row_total[i];
      head_backward(threads, *this, chunk, head, dx, dw, call.accumulate[5] || k > 0, nullptr);
    }
    total.as<float>()[0] = static_cast<float>(sum_of_all);
  }

 private:
  void check_token(int64_t position) const {
    if (hard) check_target(call, targets.as<const int32_t>()[position], position, v);
    if (!sparse) return;
    const int64_t m = tids.cols();
    const int32_t* id = tids.as<const int32_t>() + position * m;
    const float* logp = tlogp.as<const float>() + position * m;
    double mass = 0;
    for (int64_t k = 0; k < m; ++k) {
      if (id[k] < 0) continue;
      if (id[k] >= v) raise(Fault::teacher_token, call.op, position, id[k], v);
      mass += std::exp(static_cast<double>(logp[k]));
      if (tail == truncate) continue;  // samples may name a token twice
      int32_t twice = 0;
      for (int64_t l = 0; l < k; ++l) twice |= id[l] == id[k];
      if (twice) raise(Fault::teacher_twice, call.op, position, id[k], v);
    }
    if (mass > 1.01) raise(Fault::teacher_mass, call.op, position, mass, v);
  }

  void teacher(ThreadPool& threads, const Chunk& chunk) {
    LogitTile tile{t, ld, slots, teacher_bounded ? nullptr : teacher_tops, fast ? nullptr : teacher_sums, nullptr, static_cast<float>(tcap), inverse_t};
    if (tlogits) {
      each_row(threads, chunk.count, [&](int64_t i, int) {
        std::memcpy(t + i * ld, tlogits.as<const float>() + chunk.token[i] * v, static_cast<size_t>(v) * 4);
        tile.hook()(Slivers(v), i, 1, 0, slots);
      });
      return;
    }
    const int64_t e = tx.cols();
    gather(threads, chunk, tx, gathered);
    GemmOptions options;
    options.hook = tile.hook();
    gemm(threads, chunk.count, v, e, rows_of(gathered, e), transposed(tw.data, e, tw.dtype), t, ld, options);
  }

  void student(ThreadPool& threads, const Chunk& chunk) {
    gather(threads, chunk, x, gathered);
    if (hard)
      for (int64_t i = 0; i < chunk.count; ++i) target[i] = targets.as<const int32_t>()[chunk.token[i]];
    LogitTile plain{z, ld, slots, student_bounded ? nullptr : tops, sums, cold ? cold_sums : nullptr, static_cast<float>(cap), inverse_t};
    ForwardKlTile quick{z, t, ld, slots, sums, teacher_sums, tops, cold ? cold_sums : nullptr, hard ? target : nullptr, target_z, static_cast<float>(cap), inverse_t, gradient};
    GemmOptions options;
    options.hook = fast ? quick.hook() : plain.hook();
    gemm(threads, chunk.count, v, c, rows_of(gathered, c), transposed(w.data, c, w.dtype), z, ld, options);
  }

  // ---- One row: the values, and its gradient in z ----

  struct Row {
    float *z, *t;
    int64_t position;
    double weight, lse, cold_lse;
    double hard_factor;  // of the cross-entropy's gradient
    double soft_factor;  // of the divergence's: T^2 from the loss, 1 / T from z / T
  };

  void finish(ThreadPool& threads, int64_t i, int64_t position, int thread) {
    Row r{z + i * ld, sparse ? nullptr : t + i * ld, position, weight_of(weights, n, position), 0, 0, 0, 0};
    r.lse = slot_lse(student_bounded ? nullptr : tops + i * slots, sums + i * slots, slots, inverse_t);
    r.cold_lse = cold ? slot_lse(student_bounded ? nullptr : tops + i * slots, cold_sums + i * slots, slots, 1.f) : r.lse;
    r.hard_factor = hard ? r.weight * ce_weight : 0;
    r.soft_factor = r.weight * kd_weight * T;
    const int64_t y = hard ? target[i] : -1;
    const double z_y = !hard ? 0 : fast ? target_z[i] : r.z[y];

    if (agree) agree.as<float>()[position] = agrees(r) ? 1.f : 0.f;
    const double divergence_value = fast ? forward_kl_row(r, i) : sparse ? sparse_row(threads, r, thread) : dense_row(threads, r, i, thread);
    const double hard_value = hard ? r.cold_lse - z_y : 0;
    if (gradient && hard) r.z[y] -= static_cast<float>(r.hard_factor * (cap > 0 ? 1 - (z_y / cap) * (z_y / cap) : 1));
    if (kd) kd.as<float>()[position] = static_cast<float>(divergence_value);
    if (ce) ce.as<float>()[position] = static_cast<float>(hard_value);
    row_total[i] = r.weight * (kd_weight * T * T * divergence_value + ce_weight * hard_value);
  }

  bool agrees(const Row& r) const {
    const int64_t mine = row_argmax(r.z, v);
    if (!sparse) return mine >= 0 && mine == row_argmax(r.t, v);
    const int64_t m = tids.cols();
    const int32_t* id = tids.as<const int32_t>() + r.position * m;
    const float* logp = tlogp.as<const float>() + r.position * m;
    int64_t best = -1;
    for (int64_t k = 0; k < m; ++k)
      if (id[k] >= 0 && (best < 0 || logp[k] > logp[best])) best = k;
    return best >= 0 && mine == id[best];
  }

  double forward_kl_row(const Row& r, int64_t i) const {
    const double teacher_sum = slot_sum(teacher_sums + i * slots, slots), teacher_lse = std::log(teacher_sum);
    if (gradient) {
      const float a = static_cast<float>((r.soft_factor + r.hard_factor) * std::exp(-r.lse)), b = static_cast<float>(r.soft_factor / teacher_sum);
      each_vec(r.z, v, [&](int64_t j, int64_t lanes, Vec u) { put(r.z + j, u * a - load_upto(r.t + j, lanes) * b, lanes); });
    }
    return slot_sum(tops + i * slots, slots) / teacher_sum + (r.lse - teacher_lse);
  }

  double dense_row(ThreadPool& threads, const Row& r, int64_t i, int thread) const {
    const double teacher_lse = slot_lse(teacher_bounded ? nullptr : teacher_tops + i * slots, teacher_sums + i * slots, slots, inverse_t);
    const float a = static_cast<float>(param), b = static_cast<float>(param2);
    switch (divergence) {
      case forward_kl: return walk(r, teacher_lse, ForwardKl{});
      case reverse_kl: return walk(r, teacher_lse, ReverseKl{});
      case jsd: return walk(r, teacher_lse, Jsd{a});
      case skew_forward_kl: return walk(r, teacher_lse, SkewForwardKl{a});
      case skew_reverse_kl: return walk(r, teacher_lse, SkewReverseKl{a});
      case total_variation: return walk(r, teacher_lse, TotalVariation{});
      case alpha_beta: return walk(r, teacher_lse, AlphaBeta{a, b});
      default: {
        const float head = head_weight(r, teacher_lse, static_cast<float*>(threads.scratch(thread, static_cast<size_t>(v) * 4)));
        return walk(r, teacher_lse, Adaptive{head, 1.f - head});
      }
    }
  }

  // body(j, lanes, z, token) over a row.
  template <class Body>
  LIMBECK_INLINE void each_token(const Row& r, double teacher_lse, int64_t from, int64_t to, Body&& body) const {
    const Split lse_q(r.lse), lse_p(teacher_lse);
    const float apart = static_cast<float>(teacher_lse - r.lse);
    each_vec(r.z + from, to - from, [&](int64_t k, int64_t lanes, Vec u) {
      const int64_t j = from + k;
      const Vec s = load_upto(r.t + j, lanes);
      Token x;
      x.log_q = u * inverse_t - lse_q.high - lse_q.low;
      x.log_p = s * inverse_t - lse_p.high - lse_p.low;
      x.q = keep(exp(x.log_q), lanes);
      x.p = keep(exp(x.log_p), lanes);
      const Vec d = (s - u) * inverse_t - apart;
      x.d = min(splat(kFarthest), max(splat(-kFarthest), d));
      body(j, lanes, u, x);
    });
  }

  // First everything of the gradient but q sum(s), with q dz/du kept beside it; then the rest.
  template <class D>
  __attribute__((noinline)) double walk(const Row& r, double teacher_lse, D terms) const {
    constexpr int64_t kRun = 1024;  // vectors add up this many columns, float64 the rest
    const float soft = static_cast<float>(r.soft_factor), hot = cold ? 0.f : static_cast<float>(r.hard_factor);
    const Split chill(r.cold_lse);
    const float chilled = static_cast<float>(r.hard_factor * chill.factor());
    double value = 0, slopes = 0;
    for (int64_t from = 0; from < v; from += kRun) {
      Vec value_part{}, slope_part{};
      each_token(r, teacher_lse, from, from + kRun < v ? from + kRun : v, [&](int64_t j, int64_t lanes, Vec u, const Token& x) {
        const Terms y = terms(x);
        value_part += keep(y.value, lanes);
        slope_part += keep(y.slope, lanes);
        if (!gradient) return;
        const Vec dz_du = 1.f - u * u * bend;
        Vec g = y.slope * soft + x.q * hot;
        if (cold) g += exp(u - chill.high) * chilled;
        put(r.t + j, g * dz_du, lanes);
        put(r.z + j, x.q * dz_du, lanes);
      });
      value += sum(value_part);
      slopes += sum(slope_part);
    }
    if (gradient) {
      const float s = static_cast<float>(r.soft_factor * slopes);
      each_vec(r.z, v, [&](int64_t j, int64_t lanes, Vec q) { put(r.z + j, load_upto(r.t + j, lanes) - q * s, lanes); });
    }
    return value;
  }

  // The adaptive divergence's weight of the head: the tokens more probable to the teacher than the one at which their sum crosses
  // the mass `param`, and always the most probable one. It is the head's share of sum |p - q|.
  float head_weight(const Row& r, double teacher_lse, float* p) const {
    each_token(r, teacher_lse, 0, v, [&](int64_t j, int64_t lanes, Vec, const Token& x) { put(p + j, x.p, lanes); });
    const float most = row_max(p, v), edge = crossing(p, v, param);
    Vec head{}, all{};
    each_token(r, teacher_lse, 0, v, [&](int64_t, int64_t lanes, Vec, const Token& x) {
      const Vec apart = keep(abs(x.p - x.q), lanes);
      all += apart;
      head += x.p > edge ? apart : x.p >= most ? apart : Vec{};
    });
    const double whole = sum(all);
    return whole == 0 ? 0.5f : static_cast<float>(sum(head) / whole);
  }

  // A teacher of m tokens and their log-probabilities. With K those tokens, p_r and q_r what p and q leave to the others:
  //   bucket       sum_K p log(p / q) + p_r log(p_r / q_r)     s: q - p in K, q (1 - p_r / q_r) elsewhere
  //   renormalize  KL of p and q, both renormalised over K     s: q' - p' in K, 0 elsewhere
  //   truncate     -sum_K p log q                              s: q sum_K p - p in K, q sum_K p elsewhere
  double sparse_row(ThreadPool& threads, const Row& r, int thread) const {
    const int64_t m = tids.cols();
    const int32_t* id = tids.as<const int32_t>() + r.position * m;
    const float* logp = tlogp.as<const float>() + r.position * m;
    double* const log_q = static_cast<double*>(threads.scratch(thread, static_cast<size_t>(m) * 8));
    double kept_p = 0, kept_q = 0;
    for (int64_t k = 0; k < m; ++k) {
      if (id[k] < 0) continue;
      log_q[k] = static_cast<double>(r.z[id[k]]) / T - r.lse;
      kept_p += std::exp(static_cast<double>(logp[k]));
      kept_q += std::exp(log_q[k]);
    }
    double value = 0;
    double elsewhere = 0;  // s_j / q_j outside K
    if (tail == bucket) {
      const double rest_p = kept_p < 1 ? 1 - kept_p : kept_p >= 1 ? 0 : kept_p;  // NaN stays
      const double rest_q = rest_of(r, id, m);
      if (rest_p != 0) value = rest_p * (std::log(rest_p) - std::log(rest_q > 1e-38 ? rest_q : rest_q == rest_q ? 1e-38 : rest_q));
      elsewhere = 1 - (rest_q > 0 ? rest_p / rest_q : rest_q == rest_q ? 0 : rest_q);
    } else if (tail == truncate) {
      elsewhere = kept_p;
    }
    for (int64_t k = 0; k < m; ++k) {
      if (id[k] < 0) continue;
      const double p = std::exp(static_cast<double>(logp[k]));
      if (p == 0) continue;
      if (tail == bucket) value += p * (logp[k] - log_q[k]);
      else if (tail == truncate) value -= p * log_q[k];
      else value += p / kept_p * (logp[k] - std::log(kept_p) - log_q[k] + std::log(kept_q));
    }
    if (!gradient) return value;

    // The gradient of the kept tokens: whole, or what samples add to that of the others. Made before z is overwritten.
    for (int64_t k = 0; k < m; ++k) {
      if (id[k] < 0) continue;
      const double p = std::exp(static_cast<double>(logp[k])), q = std::exp(log_q[k]), zk = r.z[id[k]];
      const double slope = tail == bucket ? q - p : tail == truncate ? -p : q / kept_q - p / kept_p;
      const double hard_part = tail == truncate ? 0 : r.hard_factor * std::exp(zk - r.cold_lse);
      log_q[k] = (r.soft_factor * slope + hard_part) * (1 - zk * zk * bend);
    }
    const Split lse(r.lse), chill(r.cold_lse);
    const float warm = static_cast<float>((r.soft_factor * elsewhere + (cold ? 0 : r.hard_factor)) * lse.factor());
    const float chilled = static_cast<float>(r.hard_factor * chill.factor());
    each_vec(r.z, v, [&](int64_t j, int64_t lanes, Vec u) {
      Vec g = exp(u * inverse_t - lse.high) * warm;
      if (cold) g += exp(u - chill.high) * chilled;
      put(r.z + j, g - g * (u * u * bend), lanes);
    });
    for (int64_t k = 0; k < m; ++k)
      if (id[k] >= 0) r.z[id[k]] = (tail == truncate ? r.z[id[k]] : 0.f) + static_cast<float>(log_q[k]);
    return value;
  }

  // The student's mass outside the kept tokens, added up directly: 1 - (theirs) would lose it to rounding when it is small.
  double rest_of(const Row& r, const int32_t* id, int64_t m) const {
    constexpr int64_t kRun = 1024;
    const Split lse(r.lse);
    double rest = 0;
    for (int64_t from = 0; from < v; from += kRun) {
      const int64_t to = from + kRun < v ? from + kRun : v;
      float q[kRun];
      each_vec(r.z + from, to - from, [&](int64_t j, int64_t lanes, Vec u) { put(q + j, exp(u * inverse_t - lse.high), lanes); });
      for (int64_t k = 0; k < m; ++k)
        if (id[k] >= from && id[k] < to) q[id[k] - from] = 0.f;
      Vec part{};
      each_vec(q, to - from, [&](int64_t, int64_t, Vec u) { part += u; });
      rest += sum(part);
    }
    return rest * lse.factor();
  }
};

}  // namespace

static size_t linear_distill_workspace(const Call& call) { return Distill(call).bytes; }

// linear_distill(x[* c], w[v c]:float, targets[*]:i32?, weights[*]?, tx[* e]?, tw[v e]:float?, tlogits[* v]?, tids[* m]:i32?, tlogp[* m]?,
//   divergence, param, param2, temperature, cap, tcap, ce_weight, kd_weight, tail) -> total[], kd[*], ce[*], agree[*], dx[* c]+, dw[v c]:f32+
static void linear_distill(const Call& call) { Distill(call).run(); }

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(loss_distill, {"linear_distill", linear_distill, linear_distill_workspace})
