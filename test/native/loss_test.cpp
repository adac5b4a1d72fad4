// The loss heads against float64 references: values per token, every gradient by central differences of the reference.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "check.h"
#include "core/kernel.h"

using namespace limbeck;

namespace limbeck::cpu::LIMBECK_ISA {
extern const KernelFamily loss_family, loss_distill_family;
}

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Ints = std::vector<int32_t>;

const Kernel& kernel(const char* name) {
  namespace isa = limbeck::cpu::LIMBECK_ISA;
  for (const KernelFamily* f : {&isa::loss_family, &isa::loss_distill_family})
    for (int k = 0; k < f->count; ++k)
      if (std::strcmp(f->kernels[k].name, name) == 0) return f->kernels[k];
  throw std::runtime_error("no such kernel");
}

uint64_t seed = 1;
double uniform() {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(seed >> 11) / 9007199254740992.;
}
double normal() { return std::sqrt(-2 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform()); }
Floats random(int64_t n, double scale) {
  Floats v(static_cast<size_t>(n));
  for (float& x : v) x = static_cast<float>(scale * normal());
  return v;
}

template <class T>
View view(std::vector<T>& v, std::initializer_list<int64_t> dims, DType dtype) {
  static char nothing[64];
  View x;
  x.data = v.empty() ? static_cast<void*>(nothing) : v.data();
  x.dtype = dtype;
  for (int64_t d : dims) x.dims[x.rank++] = d;
  return x;
}

// One problem, with all that either head can take. Empty vectors are absent arguments.
struct Problem {
  int64_t n = 0, c = 0, v = 0, e = 0, m = 0;
  Floats x, w, weights, tx, tw, tlogits, tlogp;
  Ints targets, tids;
  double cap = 0, tcap = 0, zloss = 0, T = 1, param = 0, param2 = 0, ce_weight = 0, kd_weight = 1;
  int divergence = 0, tail = 0;
  bool distill = false;
};

struct Result {
  Floats total, a, b, c, dx, dw;  // a, b, c: loss, lse, correct or kd, ce, agree
};

struct Want {
  bool third = true, gradient = true;
  int threads = 2;
  const Result* add_to = nullptr;
};

Result run(Problem& p, Want want = {}) {
  const Kernel& k = kernel(p.distill ? "linear_distill" : "linear_cross_entropy");
  const size_t n = static_cast<size_t>(p.n);
  Result r{Floats(1, 7), Floats(n, 7), Floats(n, 7), Floats(n, 7), Floats(p.x.size(), 7), Floats(p.w.size(), 7)};
  if (want.add_to) r.dx = want.add_to->dx, r.dw = want.add_to->dw;
  ThreadPool threads(want.threads);
  Call call;
  call.op = k.name;
  call.threads = &threads;
  call.in[0] = view(p.x, {p.n, p.c}, DType::f32);
  call.in[1] = view(p.w, {p.v, p.c}, DType::f32);
  if (!p.targets.empty() || !p.distill) call.in[2] = view(p.targets, {p.n}, DType::i32);
  if (!p.weights.empty()) call.in[3] = view(p.weights, {p.n}, DType::f32);
  if (p.distill) {
    if (p.e) call.in[4] = view(p.tx, {p.n, p.e}, DType::f32), call.in[5] = view(p.tw, {p.v, p.e}, DType::f32);
    else if (p.m) call.in[7] = view(p.tids, {p.n, p.m}, DType::i32), call.in[8] = view(p.tlogp, {p.n, p.m}, DType::f32);
    else call.in[6] = view(p.tlogits, {p.n, p.v}, DType::f32);
    const double scalars[] = {static_cast<double>(p.divergence), p.param, p.param2, p.T, p.cap, p.tcap, p.ce_weight, p.kd_weight, static_cast<double>(p.tail)};
    std::memcpy(call.scalar, scalars, sizeof scalars);
  } else {
    call.scalar[0] = p.cap;
    call.scalar[1] = p.zloss;
  }
  call.out[0] = view(r.total, {}, DType::f32);
  call.out[1] = view(r.a, {p.n}, DType::f32);
  call.out[2] = view(r.b, {p.n}, DType::f32);
  if (want.third) call.out[3] = view(r.c, {p.n}, DType::f32);
  if (want.gradient) {
    call.out[4] = view(r.dx, {p.n, p.c}, DType::f32);
    call.out[5] = view(r.dw, {p.v, p.c}, DType::f32);
    call.accumulate[4] = call.accumulate[5] = want.add_to != nullptr;
  }
  call.workspace_bytes = k.workspace(call);
  std::vector<char> memory(call.workspace_bytes + 64, 0x7f);
  call.workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  k.run(call);
  return r;
}

// ---- The reference ----

double log_sum_exp(const Doubles& z) {
  double top = -INFINITY, s = 0;
  for (double x : z) top = std::max(top, x);
  for (double x : z) s += std::exp(x - top);
  return top + std::log(s);
}
double capped(double u, double cap) { return cap > 0 ? cap * std::tanh(u / cap) : u; }
double xlog(double p, double ratio) { return p == 0 ? 0 : p * std::log(ratio); }

struct Head {
  double divergence, hard, lse;
  bool agree;
};

double divergence_of(const Problem& p, const Doubles& P, const Doubles& Q, double wh) {
  double s = 0;
  const double a = p.param, b = p.param2;
  for (size_t j = 0; j < P.size(); ++j) {
    const double x = P[j], y = Q[j];
    switch (p.divergence) {
      case 0: s += xlog(x, x / y); break;
      case 1: s += xlog(y, y / x); break;
      case 2: s += a * xlog(x, x / (a * x + (1 - a) * y)) + (1 - a) * xlog(y, y / (a * x + (1 - a) * y)); break;
      case 3: s += xlog(x, x / (a * x + (1 - a) * y)); break;
      case 4: s += xlog(y, y / ((1 - a) * x + a * y)); break;
      case 5: s += std::fabs(x - y) / 2; break;
      case 6: s -= (std::pow(x, a) * std::pow(y, b) - a / (a + b) * std::pow(x, a + b) - b / (a + b) * std::pow(y, a + b)) / (a * b); break;
      default: s += wh * xlog(x, x / y) + (1 - wh) * xlog(y, y / x);
    }
  }
  return s;
}

// The adaptive divergence's head weight, by sorting.
double head_weight(const Problem& p, const Doubles& P, const Doubles& Q) {
  std::vector<size_t> order(P.size());
  for (size_t j = 0; j < P.size(); ++j) order[j] = j;
  std::sort(order.begin(), order.end(), [&](size_t i, size_t j) { return P[i] > P[j]; });
  double mass = 0, head = 0, all = 0;
  bool in_head = true;
  for (size_t k = 0; k < order.size(); ++k) {
    const size_t j = order[k];
    mass += P[j];
    if (mass > p.param) in_head = false;
    if (k == 0 || in_head) head += std::fabs(P[j] - Q[j]);
    all += std::fabs(P[j] - Q[j]);
  }
  return head / all;
}

// One token from its student logits u (before the cap). `fixed`: the adaptive weight, once it is known.
Head reference_row(const Problem& p, int64_t i, const Doubles& u, double* fixed = nullptr) {
  const size_t v = static_cast<size_t>(p.v);
  Head h{};
  Doubles z(v), zt(v);
  for (size_t j = 0; j < v; ++j) z[j] = capped(u[j], p.cap), zt[j] = z[j] / p.T;
  h.lse = log_sum_exp(z);
  if (!p.targets.empty() && p.targets[static_cast<size_t>(i)] >= 0) h.hard = h.lse - z[static_cast<size_t>(p.targets[static_cast<size_t>(i)])];
  if (!p.distill) return h;
  const double lse = log_sum_exp(zt);
  Doubles Q(v);
  for (size_t j = 0; j < v; ++j) Q[j] = std::exp(zt[j] - lse);
  if (p.m) {
    double pk = 0, qk = 0, value = 0;
    const size_t at = static_cast<size_t>(i * p.m), m = static_cast<size_t>(p.m);
    for (size_t k = 0; k < m; ++k)
      if (p.tids[at + k] >= 0) pk += std::exp(double(p.tlogp[at + k])), qk += Q[static_cast<size_t>(p.tids[at + k])];
    double rest = 0;
    for (size_t j = 0; j < v; ++j) {
      bool kept = false;
      for (size_t k = 0; k < m; ++k) kept |= p.tids[at + k] == static_cast<int32_t>(j);
      if (!kept) rest += Q[j];
    }
    for (size_t k = 0; k < m; ++k) {
      if (p.tids[at + k] < 0) continue;
      const double P = std::exp(double(p.tlogp[at + k])), q = Q[static_cast<size_t>(p.tids[at + k])];
      value += p.tail == 0 ? P * std::log(P / q) : p.tail == 1 ? P / pk * std::log(P / pk / (q / qk)) : -P * std::log(q);
    }
    if (p.tail == 0) value += xlog(1 - pk, (1 - pk) / rest);
    h.divergence = value;
    return h;
  }
  Doubles t(v), P(v);
  for (size_t j = 0; j < v; ++j) {
    double ut = 0;
    if (p.e)
      for (int64_t k = 0; k < p.e; ++k) ut += double(p.tx[static_cast<size_t>(i * p.e + k)]) * p.tw[j * static_cast<size_t>(p.e) + static_cast<size_t>(k)];
    else ut = p.tlogits[static_cast<size_t>(i) * v + j];
    t[j] = capped(ut, p.tcap) / p.T;
  }
  const double tl = log_sum_exp(t);
  for (size_t j = 0; j < v; ++j) P[j] = std::exp(t[j] - tl);
  double wh = 0;
  if (p.divergence == 7) {
    wh = fixed && *fixed >= 0 ? *fixed : head_weight(p, P, Q);
    if (fixed) *fixed = wh;
  }
  h.divergence = divergence_of(p, P, Q, wh);
  h.agree = std::max_element(z.begin(), z.end()) - z.begin() == std::max_element(t.begin(), t.end()) - t.begin();
  return h;
}

double weight_of(const Problem& p, int64_t i) { return p.weights.empty() ? 1. / static_cast<double>(p.n) : p.weights[static_cast<size_t>(i)]; }

Doubles logits_of(const Problem& p, int64_t i, const Doubles& x, const Doubles& w) {
  Doubles u(static_cast<size_t>(p.v));
  for (int64_t j = 0; j < p.v; ++j) {
    double s = 0;
    for (int64_t k = 0; k < p.c; ++k) s += x[static_cast<size_t>(i * p.c + k)] * w[static_cast<size_t>(j * p.c + k)];
    u[static_cast<size_t>(j)] = s;
  }
  return u;
}

double contribution(const Problem& p, int64_t i, const Head& h) {
  if (weight_of(p, i) == 0) return 0;
  return weight_of(p, i) * (p.distill ? p.kd_weight * p.T * p.T * h.divergence + p.ce_weight * h.hard : h.hard + p.zloss * h.lse * h.lse);
}

struct Tolerance {
  double value = 2e-6, gradient = 4e-5;
};

// Values against the reference; d total / d u of each token by central differences, carried to x and w by the chain rule.
void compare(Problem& p, Want want = {}, Tolerance tolerance = {}) {
  const Result r = run(p, want);
  const Doubles x(p.x.begin(), p.x.end()), w(p.w.begin(), p.w.end());
  Doubles dx(x.size()), dw(w.size());
  if (want.add_to) dx.assign(want.add_to->dx.begin(), want.add_to->dx.end()), dw.assign(want.add_to->dw.begin(), want.add_to->dw.end());
  double total = 0, scale = 1;
  for (int64_t i = 0; i < p.n; ++i) {
    const size_t s = static_cast<size_t>(i);
    if (weight_of(p, i) == 0) {
      CHECK(r.a[s] == 0 && r.b[s] == 0);
      continue;
    }
    Doubles u = logits_of(p, i, x, w);
    double fixed = -1;
    const Head h = reference_row(p, i, u, &fixed);
    total += contribution(p, i, h);
    const double loose = tolerance.value * (1 + std::fabs(h.lse) + std::fabs(h.divergence) + std::fabs(h.hard));
    if (p.distill) {
      CHECK_NEAR(r.a[s], h.divergence, loose);
      if (!p.targets.empty()) CHECK_NEAR(r.b[s], h.hard, loose);
      if (want.third && !p.m) CHECK(r.c[s] == (h.agree ? 1.f : 0.f));
    } else {
      CHECK_NEAR(r.a[s], h.hard, loose);
      CHECK_NEAR(r.b[s], h.lse, loose);
      if (want.third) CHECK(r.c[s] == (std::max_element(u.begin(), u.end()) - u.begin() == p.targets[s] ? 1.f : 0.f));
    }
    scale = std::max(scale, std::fabs(total));
    if (!want.gradient) continue;
    for (int64_t j = 0; j < p.v; ++j) {
      const size_t sj = static_cast<size_t>(j);
      const double keep = u[sj], step = 1e-5;
      u[sj] = keep + step;
      const double up = contribution(p, i, reference_row(p, i, u, &fixed));
      u[sj] = keep - step;
      const double down = contribution(p, i, reference_row(p, i, u, &fixed));
      u[sj] = keep;
      const double du = (up - down) / (2 * step);
      for (int64_t k = 0; k < p.c; ++k) {
        dx[static_cast<size_t>(i * p.c + k)] += du * w[static_cast<size_t>(j * p.c + k)];
        dw[static_cast<size_t>(j * p.c + k)] += du * x[static_cast<size_t>(i * p.c + k)];
      }
    }
  }
  CHECK_NEAR(r.total[0], total, 2 * tolerance.value * scale * (p.distill ? p.T * p.T : 1));
  if (!want.gradient) return;
  const auto close = [&](const Floats& got, const Doubles& expected) {
    double worst = 0, size = 1e-2;
    for (size_t k = 0; k < got.size(); ++k) {
      size = std::max(size, std::fabs(expected[k]));
      worst = got[k] == got[k] ? std::max(worst, std::fabs(got[k] - expected[k])) : INFINITY;
    }
    CHECK_NEAR(worst / size, 0, tolerance.gradient);
  };
  close(r.dx, dx);
  close(r.dw, dw);
}

Problem cross_entropy(int64_t n, int64_t c, int64_t v, double cap) {
  Problem p;
  p.n = n, p.c = c, p.v = v, p.cap = cap;
  p.x = random(n * c, 2);
  p.w = random(v * c, 2 / std::sqrt(static_cast<double>(c)));
  for (int64_t i = 0; i < n; ++i) {
    p.targets.push_back(static_cast<int32_t>(uniform() * static_cast<double>(v)));
    p.weights.push_back(static_cast<float>(0.2 + uniform()));
  }
  return p;
}

Problem distillation(int64_t n, int64_t c, int64_t e, int64_t v, int divergence, double T, double cap) {
  Problem p = cross_entropy(n, c, v, cap);
  p.distill = true;
  p.divergence = divergence;
  p.T = T;
  p.tcap = cap > 0 ? 1.25 * cap : 0;
  if (e > 0) {
    p.e = e;
    p.tx = random(n * e, 2);
    p.tw = random(v * e, 1.5 / std::sqrt(static_cast<double>(e)));
  } else {
    p.tlogits = random(n * v, 2);
  }
  constexpr double params[] = {0, 0, 0.3, 0.1, 0.1, 0, 0.2, 0.5};
  p.param = params[divergence];
  p.param2 = divergence == 6 ? 0.7 : 0;
  return p;
}

void keep_top(Problem& p, int64_t m, double mass) {
  p.e = 0;
  p.m = m;
  p.tlogits.clear();
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t k = 0; k < m; ++k) {
      p.tids.push_back(static_cast<int32_t>((i * 5 + k * 3) % p.v));
      p.tlogp.push_back(static_cast<float>(std::log(mass * (static_cast<double>(m - k)) * 2 / static_cast<double>(m * (m + 1)))));
    }
}

bool same(const Floats& a, const Floats& b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0; }

// x = logits, w = identity: dx is the gradient in the logits.
Problem given(Doubles z, Doubles t, int divergence, double T = 1, double param = 0, double param2 = 0) {
  Problem p;
  p.distill = true;
  p.n = 1, p.c = p.v = static_cast<int64_t>(z.size());
  p.x.assign(z.begin(), z.end());
  p.tlogits.assign(t.begin(), t.end());
  p.w.assign(z.size() * z.size(), 0);
  for (size_t k = 0; k < z.size(); ++k) p.w[k * z.size() + k] = 1;
  p.divergence = divergence, p.T = T, p.param = param, p.param2 = param2;
  p.weights = {1};
  return p;
}

void golden(Problem p, double value, Doubles dz) {
  p.kd_weight = 1 / (p.T * p.T);
  const Result r = run(p);
  CHECK_NEAR(r.a[0], value, 5e-7 * std::max(1., std::fabs(value)));
  CHECK_NEAR(r.total[0], value, 5e-7 * std::max(1., std::fabs(value)));
  for (size_t k = 0; k < dz.size(); ++k) CHECK_NEAR(r.dx[k], dz[k], p.cap > 0 ? 6e-7 : 1e-7);  // z is 20 there
}

}  // namespace

TEST(cross_entropy_at_odd_sizes) {
  for (double cap : {0., 5., 30., 60.})
    for (bool correct : {false, true})
      for (auto [n, c, v] : {std::array<int64_t, 3>{1, 1, 1}, {1, 3, 2}, {2, 5, 7}, {13, 17, 31}, {7, 9, 33}, {3, 8, 129}, {5, 7, 257}}) {
        Problem p = cross_entropy(n, c, v, cap);
        compare(p, {.third = correct});
      }
}

TEST(cross_entropy_with_weights_of_zero_and_z_loss) {
  for (double cap : {0., 30.}) {
    Problem p = cross_entropy(11, 6, 37, cap);
    p.zloss = 1e-2;
    for (size_t i : {0u, 3u, 4u, 10u}) p.weights[i] = 0, p.targets[i] = -100;
    compare(p, {.third = false});
    compare(p, {.third = true});
    const Result before = run(p);
    compare(p, {.add_to = &before});
    p.weights[2] = -0.5f;
    compare(p, {.third = false});
  }
}

TEST(cross_entropy_without_weights_is_a_mean) {
  Problem p = cross_entropy(9, 4, 21, 30);
  p.weights.clear();
  compare(p, {.third = false});
}

TEST(cross_entropy_of_many_chunks) {
  // 20000 words: fewer than 1024 tokens fit a chunk.
  Problem p = cross_entropy(1500, 2, 20000, 30), part = p;
  p.weights.assign(1500, 1.f / 1500);
  const Result whole = run(p, {.third = false});
  double total = 0;
  Doubles dw(p.w.size());
  Floats dx;
  for (int64_t k = 0; k < 1500; k += 100) {
    part.n = 100;
    part.x.assign(p.x.begin() + k * 2, p.x.begin() + (k + 100) * 2);
    part.targets.assign(p.targets.begin() + k, p.targets.begin() + k + 100);
    part.weights.assign(100, 1.f / 1500);
    const Result r = run(part, {.third = k % 200 == 0});
    total += r.total[0];
    dx.insert(dx.end(), r.dx.begin(), r.dx.end());
    for (size_t j = 0; j < dw.size(); ++j) dw[j] += r.dw[j];
  }
  CHECK_NEAR(whole.total[0], total, 1e-5);
  double worst_w = 0, worst_x = 0;
  for (size_t j = 0; j < dw.size(); ++j) worst_w = std::max(worst_w, std::fabs(whole.dw[j] - dw[j]));
  for (size_t j = 0; j < dx.size(); ++j) worst_x = std::max(worst_x, std::fabs(double(whole.dx[j]) - dx[j]));
  CHECK_NEAR(worst_w, 0, 1e-6);
  CHECK_NEAR(worst_x, 0, 1e-8);
}

TEST(the_bits_do_not_depend_on_the_number_of_threads) {
  for (double cap : {0., 30.}) {
    Problem p = cross_entropy(150, 24, 1003, cap);
    const Result one = run(p, {.third = false, .threads = 1});
    for (int threads : {2, 3, 5}) {
      const Result many = run(p, {.third = false, .threads = threads});
      CHECK(same(one.total, many.total) && same(one.a, many.a) && same(one.b, many.b) && same(one.dx, many.dx) && same(one.dw, many.dw));
    }
    for (int divergence : {0, 2}) {
      Problem d = distillation(70, 24, 40, 1003, divergence, 1, cap);
      d.ce_weight = 0.5;
      const Result single = run(d, {.third = false, .threads = 1});
      for (int threads : {2, 3}) {
        const Result many = run(d, {.third = false, .threads = threads});
        CHECK(same(single.total, many.total) && same(single.a, many.a) && same(single.b, many.b) && same(single.dx, many.dx) && same(single.dw, many.dw));
      }
    }
  }
}

TEST(no_tokens_and_no_counting_tokens_give_zero) {
  Problem none = cross_entropy(0, 3, 5, 30);
  const Result r = run(none);
  CHECK(r.total[0] == 0);
  for (float g : r.dw) CHECK(g == 0);
  Problem ignored = cross_entropy(4, 3, 5, 30);
  ignored.weights.assign(4, 0);
  ignored.targets.assign(4, -100);
  const Result s = run(ignored);
  CHECK(s.total[0] == 0);
  for (float g : s.dx) CHECK(g == 0);
  for (float g : s.dw) CHECK(g == 0);
}

TEST(nan_gives_nan_and_extreme_logits_do_not) {
  for (double cap : {0., 30.}) {
    Problem p = cross_entropy(5, 4, 35, cap);
    p.x[6] = NAN;
    for (bool third : {false, true}) {
      const Result r = run(p, {.third = third});
      CHECK(std::isnan(r.total[0]) && std::isnan(r.a[1]) && !std::isnan(r.a[0]) && !std::isnan(r.a[2]));
    }
    Problem d = distillation(5, 4, 6, 35, 0, 1, cap);
    d.tx[7] = NAN;
    CHECK(std::isnan(run(d, {.third = false}).a[1]) && std::isnan(run(d).a[1]));

    Problem far = cross_entropy(5, 4, 35, cap);
    for (float& x : far.x) x *= 300;
    // Where tanh is within rounding of 1, its slope is known to 1e-7 only; x is near 600 here.
    compare(far, {.third = false}, {.value = 1e-5, .gradient = 1e-3});
  }
}

TEST(a_target_outside_the_vocabulary_is_named) {
  Problem p = cross_entropy(5, 4, 35, 30);
  p.targets[3] = 35;
  bool thrown = false;
  try {
    run(p);
  } catch (const Error& error) {
    thrown = true;
    CHECK(error.code == "ERR_TOKEN_RANGE" && error.kind == ErrorKind::data);
    CHECK(std::string(error.what()).find("token 35 at position 3") != std::string::npos);
  }
  CHECK(thrown);
  p.weights[3] = 0;
  CHECK(std::isfinite(run(p).total[0]));
}

TEST(divergences_agree_with_the_published_vectors) {
  const Doubles z = {1, 2, -1, 0.5}, t = {0.5, 1.5, 0, -1};
  golden(given(z, t, 0), 0.13149077, {0.00432818, 0.01176520, -0.10302052, 0.08692714});
  golden(given(z, t, 1), 0.10996714, {-0.02028499, -0.05514033, -0.04826012, 0.12368544});
  golden(given(z, t, 2, 1, 0.1), 0.01128463, {0.00004198, 0.00011411, -0.00802974, 0.00787365});
  golden(given(z, t, 2, 1, 0.5), 0.02815585, {-0.00231421, -0.00629069, -0.01551601, 0.02412091});
  golden(given(z, t, 2, 1, 0.9), 0.00985832, {-0.00159318, -0.00433070, -0.00451719, 0.01044106});
  golden(given(z, t, 3, 1, 0.1), 0.09732796, {-0.00231321, -0.00628795, -0.06308447, 0.07168562});
  golden(given(z, t, 4, 1, 0.1), 0.08858454, {-0.01238011, -0.03365262, -0.04235141, 0.08838414});
  golden(given(z, t, 5), 0.10302052, {0.00680319, 0.01849299, -0.02942252, 0.00412634});
  golden(given(z, t, 6, 1, 0.2, 0.7), 0.14534379, {-0.01656645, -0.04634260, -0.07708403, 0.13999308});
  golden(given(z, t, 7, 1, 0.5), 0.11119617, {-0.01887955, -0.05131994, -0.05138701, 0.12158650});
  golden(given(z, t, 0, 2), 0.06205433, {0.00352958, 0.00581929, -0.05138527, 0.04203640});
  golden(given(z, t, 1, 2), 0.05705998, {-0.00393927, -0.00649475, -0.03779705, 0.04823107});
  golden(given(z, t, 2, 2, 0.5), 0.01462899, {-0.00011426, -0.00018839, -0.01067612, 0.01097877});
  golden(given(z, t, 3, 2, 0.1), 0.04881898, {0.00142672, 0.00235226, -0.03816173, 0.03438275});
  golden(given(z, t, 4, 2, 0.1), 0.04649218, {-0.00205202, -0.00338321, -0.03192276, 0.03735799});
  golden(given(z, t, 6, 2, 0.2, 0.7), 0.07005533, {-0.00198661, -0.00360321, -0.04982857, 0.05541839});
  Problem soft = given({12, 25, -8, 3}, t, 0);
  soft.cap = 30;
  golden(soft, 5.56651529, {-0.18803905, 0.21497814, -0.12431223, -0.04857439});
}

TEST(sparse_teachers_agree_with_the_published_vectors) {
  const Doubles z = {1, 2, -1, 0.5};
  Problem p = given(z, {}, 0);
  p.m = 3;
  p.tids = {1, -1, 0};
  p.tlogp = {static_cast<float>(std::log(0.59769483)), 0, static_cast<float>(std::log(0.21987964))};
  golden(p, 0.00091094, {0.00432818, 0.01176520, -0.00293584, -0.01315754});
  p.tail = 2;
  golden(p, 0.62472772, {-0.03657305, -0.09941586, 0.02480785, 0.11118107});
  p.tail = 1;
  golden(p, 0, {0, 0, 0, 0});
  // T = 2: the teacher's probabilities are those at T = 2.
  double e[4], s = 0;
  for (int k = 0; k < 4; ++k) s += e[k] = std::exp(std::array<double, 4>{0.5, 1.5, 0, -1}[static_cast<size_t>(k)] / 2);
  p.tail = 0;
  p.T = 2;
  p.tlogp = {static_cast<float>(std::log(e[1] / s)), 0, static_cast<float>(std::log(e[0] / s))};
  golden(p, 0.00081975, {0.00352958, 0.00581929, -0.00299932, -0.00634955});
}

TEST(distillation_of_every_divergence) {
  for (int divergence = 0; divergence < 8; ++divergence)
    for (double T : {1., 2.})
      for (double cap : {0., 6., 30.})
        for (double ce_weight : {0., 0.4})
          for (int64_t e : {0, 11}) {
            Problem p = distillation(3, 7, e, 45, divergence, T, cap);
            p.ce_weight = ce_weight;
            p.kd_weight = 0.7;
            const double loose = divergence == 7 || divergence == 5 ? 2e-4 : 4e-5;
            compare(p, {.third = true}, {.value = 5e-6, .gradient = loose});
            compare(p, {.third = false}, {.value = 5e-6, .gradient = loose});
          }
}

TEST(distillation_at_odd_sizes_with_weights_of_zero) {
  for (auto [n, c, e, v] : {std::array<int64_t, 4>{1, 1, 1, 1}, {2, 3, 5, 2}, {9, 17, 3, 33}, {4, 8, 16, 131}, {70, 3, 2, 17}}) {
    for (int divergence : {0, 1}) {
      Problem p = distillation(n, c, e, v, divergence, 1, 30);
      p.ce_weight = 0.25;
      if (n > 2) p.weights[1] = 0, p.targets[1] = -100;
      compare(p, {.third = false});
      const Result before = run(p, {.third = false});
      compare(p, {.third = false, .add_to = &before});
      compare(p, {.gradient = false});
      p.ce_weight = 0;
      p.T = 2;
      compare(p, {.third = false});
      p.targets.clear();
      compare(p, {.third = false});
    }
  }
}

TEST(distillation_from_sparse_teachers) {
  for (int tail = 0; tail < 3; ++tail)
    for (double T : {1., 1.5})
      for (double cap : {0., 30.})
        for (double ce_weight : {0., 0.4}) {
          Problem p = distillation(5, 6, 0, 41, 0, T, cap);
          p.tail = tail;
          p.ce_weight = ce_weight;
          keep_top(p, 6, 0.8);
          p.tids[8] = -1;
          compare(p, {}, {.value = 5e-6, .gradient = 4e-5});
        }
  // Samples name a token twice; its shares add up. A teacher that keeps everything leaves no tail.
  Problem samples = distillation(2, 4, 0, 19, 0, 1, 30);
  samples.tail = 2;
  keep_top(samples, 4, 1);
  samples.tids[1] = samples.tids[0];
  compare(samples);
  Problem whole = distillation(2, 4, 0, 5, 0, 1, 30);
  keep_top(whole, 5, 1);
  compare(whole, {}, {.value = 5e-6, .gradient = 4e-5});
}

TEST(sparse_teachers_are_checked) {
  const auto code_of = [](Problem p) -> std::string {
    try {
      run(p);
    } catch (const Error& error) {
      return error.code;
    }
    return "";
  };
  Problem p = distillation(3, 4, 0, 19, 0, 1, 30);
  keep_top(p, 4, 0.9);
  CHECK(code_of(p).empty());
  Problem outside = p, twice = p, logits = p, other = p;
  outside.tids[5] = 19;
  CHECK(code_of(outside) == "ERR_TOKEN_RANGE");
  twice.tids[5] = twice.tids[4];
  CHECK(code_of(twice) == "ERR_TEACHER_TOKENS");
  logits.tlogp[5] = 3;
  CHECK(code_of(logits) == "ERR_TEACHER_MASS");
  other.divergence = 1;
  CHECK(code_of(other) == "ERR_CONFIG");
}

TEST(a_teacher_may_rule_tokens_out) {
  for (int divergence = 0; divergence < 8; ++divergence) {
    Problem p = distillation(2, 4, 0, 35, divergence, 1, 30);
    p.tcap = 0;
    p.tlogits[3] = -INFINITY;
    const Result r = run(p);
    CHECK(std::isfinite(r.total[0]));
    for (float g : r.dx) CHECK(std::isfinite(g));
    if (divergence != 1 && divergence != 7) {  // these two are infinite; here they are large
      p.tlogits[3] = -1e3f;
      compare(p, {}, {.value = 5e-6, .gradient = 2e-4});
    }
  }
}

TEST(equal_distributions_have_no_divergence_and_no_gradient) {
  for (int divergence = 0; divergence < 8; ++divergence) {
    Problem p = distillation(3, 9, 9, 67, divergence, 1, 30);
    p.tcap = p.cap;
    p.tx = p.x;
    p.tw = p.w;
    for (bool third : {false, true}) {
      const Result r = run(p, {.third = third});
      for (float x : r.a) CHECK_NEAR(x, 0, 1e-6);
      for (float g : r.dx) CHECK_NEAR(g, 0, 2e-6);
    }
  }
}
