// The linear kernels against float64 loops; gated gradients against the analytic ones; the same bits with one thread and with three.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "check.h"
#include "core/kernel.h"

namespace limbeck::cpu::LIMBECK_ISA {
extern const KernelFamily linear_family;
}

using namespace limbeck;

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::mt19937 rng(3);

Floats random(int64_t n) {
  Floats x(static_cast<size_t>(n));
  for (float& v : x) v = std::uniform_real_distribution<float>(-2.f, 2.f)(rng);
  return x;
}

struct Weight {
  Floats f;
  std::vector<uint16_t> h;
  bool half;
  Weight(int64_t n, bool half) : f(random(n)), half(half) {
    if (!half) return;
    for (float& v : f) {
      uint32_t u;
      std::memcpy(&u, &v, 4);
      h.push_back(static_cast<uint16_t>(u >> 16));
      u &= 0xffff0000u;
      std::memcpy(&v, &u, 4);
    }
  }
  View view(int64_t n, int64_t k) const {
    const void* p = half ? static_cast<const void*>(h.data()) : f.data();
    return View{const_cast<void*>(p), half ? DType::bf16 : DType::f32, 2, {n, k}};
  }
};

View view(const Floats& x, std::initializer_list<int64_t> dims) {
  View v{const_cast<float*>(x.data()), DType::f32, 0, {}};
  for (int64_t d : dims) v.dims[v.rank++] = d;
  return v;
}

ThreadPool one(1), three(3);

void launch(const char* name, Call call, ThreadPool& threads) {
  const KernelFamily& family = cpu::LIMBECK_ISA::linear_family;
  for (int i = 0; i < family.count; ++i)
    if (std::strcmp(family.kernels[i].name, name) == 0) {
      call.op = name;
      call.threads = &threads;
      if (family.kernels[i].workspace) call.workspace_bytes = family.kernels[i].workspace(call);
      const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(64, (call.workspace_bytes + 63) / 64 * 64), std::free);
      std::memset(workspace.get(), 0x7f, call.workspace_bytes);
      call.workspace = workspace.get();
      return family.kernels[i].run(call);
    }
  CHECK(false, "no kernel %s", name);
}

// The largest error relative to the size of the terms of a sum, which is about `terms` products of numbers of size 1.
void close(const std::string& what, const Floats& got, const Doubles& want, int64_t terms) {
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double e = std::fabs(got[i] - want[i]);
    if (!(e <= worst)) worst = e;
  }
  const double limit = 2e-6 * (std::sqrt(static_cast<double>(terms)) + 1) * 4;
  CHECK(worst <= limit, "%s: off by %g, %g allowed", what.c_str(), worst, limit);
}

// out[m n] = a[m k] b[k n], any layout.
template <class A, class B>
Doubles multiply(int64_t m, int64_t n, int64_t k, A a, B b) {
  Doubles c(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double s = 0;
      for (int64_t p = 0; p < k; ++p) s += static_cast<double>(a(i, p)) * b(p, j);
      c[static_cast<size_t>(i * n + j)] = s;
    }
  return c;
}

void add_to(Doubles& x, const Floats& start) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += start[i];
}

void check_linear(int64_t m, int64_t n, int64_t k, bool half, bool bias, bool accumulate) {
  const Weight w(n * k, half);
  const Floats x = random(m * k), b = random(n), dy = random(m * n);
  const auto X = [&](int64_t i, int64_t p) { return x[static_cast<size_t>(i * k + p)]; };
  const auto Y = [&](int64_t i, int64_t j) { return dy[static_cast<size_t>(i * n + j)]; };
  const auto N = [&](int64_t j, int64_t p) { return w.f[static_cast<size_t>(j * k + p)]; };
  Doubles y = multiply(m, n, k, X, [&](int64_t p, int64_t j) { return N(j, p); });
  if (bias)
    for (size_t i = 0; i < y.size(); ++i) y[i] += b[i % static_cast<size_t>(n)];
  Doubles dx = multiply(m, k, n, Y, N);
  Doubles dw = multiply(n, k, m, [&](int64_t j, int64_t i) { return Y(i, j); }, X);
  Doubles db = multiply(1, n, m, [](int64_t, int64_t) { return 1.; }, Y);
  const Floats sx = random(m * k), sw = random(n * k), sb = random(n);
  if (accumulate) add_to(dx, sx), add_to(dw, sw), add_to(db, sb);
  const std::string what = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + (half ? " bf16" : "");
  Floats results[2][4];
  for (int run = 0; run < 2; ++run) {
    Floats* r = results[run];
    r[0] = Floats(static_cast<size_t>(m * n), NAN);
    r[1] = sx, r[2] = sw, r[3] = sb;
    Call call;
    call.in[0] = view(x, {m, k});
    call.in[1] = w.view(n, k);
    if (bias) call.in[2] = view(b, {n});
    call.out[0] = view(r[0], {m, n});
    launch("linear", call, run ? three : one);
    call = {};
    call.in[0] = view(dy, {m, n});
    call.in[1] = view(x, {m, k});
    call.in[2] = w.view(n, k);
    call.out[0] = view(r[1], {m, k});
    call.out[1] = view(r[2], {n, k});
    call.out[2] = view(r[3], {n});
    for (bool& a : call.accumulate) a = accumulate;
    launch("linear_backward", call, run ? three : one);
  }
  close(what + " y", results[0][0], y, k);
  close(what + " dx", results[0][1], dx, n);
  close(what + " dw", results[0][2], dw, m);
  close(what + " db", results[0][3], db, m);
  for (int i = 0; i < 4; ++i) CHECK(results[0][i] == results[1][i], "%s: other bits with three threads (%d)", what.c_str(), i);
}

double act(int kind, double v) {
  return kind == 0 ? 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v))) : v / (1 + std::exp(-v));
}
double slope(int kind, double v) { return (act(kind, v + 1e-5) - act(kind, v - 1e-5)) / 2e-5; }

void check_gated(int64_t m, int64_t n, int64_t f, bool half, int kind, int wanted) {
  const Weight w(n * f, half);
  const Floats gate = random(m * f), up = random(m * f), dy = random(m * n), start = random(n * f);
  Doubles a(static_cast<size_t>(m * f));
  for (size_t i = 0; i < a.size(); ++i) a[i] = act(kind, gate[i]) * up[i];
  const auto A = [&](int64_t i, int64_t p) { return a[static_cast<size_t>(i * f + p)]; };
  const auto Y = [&](int64_t i, int64_t j) { return dy[static_cast<size_t>(i * n + j)]; };
  const auto N = [&](int64_t j, int64_t p) { return w.f[static_cast<size_t>(j * f + p)]; };
  const Doubles y = multiply(m, n, f, A, [&](int64_t p, int64_t j) { return N(j, p); });
  Doubles dw = multiply(n, f, m, [&](int64_t j, int64_t i) { return Y(i, j); }, A);
  Doubles dgate = multiply(m, f, n, Y, N), dup = dgate;
  for (size_t i = 0; i < dgate.size(); ++i) {
    dgate[i] *= up[i] * slope(kind, gate[i]);
    dup[i] *= act(kind, gate[i]);
  }
  add_to(dw, start);
  const std::string what = "gated " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(f) + (half ? " bf16" : "");
  Floats results[2][4];
  for (int run = 0; run < 2; ++run) {
    Floats* r = results[run];
    r[0] = Floats(static_cast<size_t>(m * n), NAN);
    r[1] = r[2] = Floats(static_cast<size_t>(m * f), NAN);
    r[3] = start;
    Call call;
    call.in[0] = view(gate, {m, f});
    call.in[1] = view(up, {m, f});
    call.in[2] = w.view(n, f);
    call.scalar[0] = kind;
    call.out[0] = view(r[0], {m, n});
    launch("gated_linear", call, run ? three : one);
    call = {};
    call.in[0] = view(dy, {m, n});
    call.in[1] = view(gate, {m, f});
    call.in[2] = view(up, {m, f});
    call.in[3] = w.view(n, f);
    call.scalar[0] = kind;
    if (wanted & 1) call.out[0] = view(r[1], {m, f});
    if (wanted & 2) call.out[1] = view(r[2], {m, f});
    if (wanted & 4) call.out[2] = view(r[3], {n, f}), call.accumulate[2] = true;
    launch("gated_linear_backward", call, run ? three : one);
  }
  close(what + " y", results[0][0], y, 4 * f);
  if (wanted & 1) close(what + " dgate", results[0][1], dgate, 16 * n);
  if (wanted & 2) close(what + " dup", results[0][2], dup, 4 * n);
  if (wanted & 4) close(what + " dw", results[0][3], dw, 4 * m);
  for (int i = 0; i < 4; ++i)
    CHECK(results[0][i].empty() || std::memcmp(results[0][i].data(), results[1][i].data(), results[0][i].size() * 4) == 0, "%s: other bits with three threads (%d)",
          what.c_str(), i);
}

}  // namespace

TEST(linear_layers) {
  for (int64_t m : {0, 1, 2, 7, 8, 9, 33, 130})
    for (int64_t n : {1, 5, 16, 33, 67})
      for (int64_t k : {1, 3, 17, 64, 101}) {
        const int form = static_cast<int>(m + n + k);
        check_linear(m, n, k, form & 1, form & 2, form & 4);
      }
  check_linear(300, 270, 530, true, true, true);
}

TEST(gated_layers) {
  for (int64_t m : {0, 1, 3, 8, 9, 40, 129})
    for (int64_t n : {1, 16, 35})
      for (int64_t f : {1, 17, 64, 99})
        for (int kind : {0, 1}) {
          const int form = static_cast<int>(m + n + f);
          check_gated(m, n, f, form & 1, kind, form % 7 + 1);
        }
  check_gated(200, 130, 700, false, 0, 7);
  check_gated(530, 5, 4200, false, 1, 7);  // more than one run of tokens
}
