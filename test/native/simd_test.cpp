// exp, tanh and log against float64 over the whole range of float32, and the lane operations.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "check.h"
#include "cpu/simd.h"

using namespace limbeck::cpu::LIMBECK_ISA;

namespace {

// The largest error in units of the last place of the exact result, over every 997th float for which `inside` holds.
template <class F, class G, class Inside>
double worst_ulp(F f, G exact, Inside inside, float& where) {
  double worst = 0;
  for (uint64_t u = 0; u < (uint64_t{1} << 32); u += 997 * W) {
    float x[W], y[W];
    for (int i = 0; i < W; ++i) {
      const uint32_t bits = static_cast<uint32_t>(u + static_cast<uint64_t>(i) * 997);
      std::memcpy(&x[i], &bits, 4);
      if (!inside(x[i])) x[i] = 0.5f;
    }
    store(y, f(load(x)));
    for (int i = 0; i < W; ++i) {
      const double e = exact(static_cast<double>(x[i]));
      const float rounded = std::fabs(static_cast<float>(e));
      const double ulp = std::max<double>(std::nextafter(rounded, std::numeric_limits<float>::infinity()) - rounded, 1.4e-45);
      const double off = std::fabs(y[i] - e) / ulp;
      if (!(off <= worst)) worst = off, where = x[i];
    }
  }
  return worst;
}

template <class F>
float at(F f, float x) {
  const Vec y = f(splat(x));
  return y[W / 2];
}

constexpr float inf = std::numeric_limits<float>::infinity();
const auto e_ = [](Vec x) { return exp(x); };
const auto t_ = [](Vec x) { return tanh(x); };
// The same next to a lane that is far from 0, which makes all lanes choose.
const auto far_ = [](Vec x) {
  Vec y = x;
  y[0] = 3;
  y = tanh(y);
  y[0] = tanh(x)[0];
  return y;
};
const auto l_ = [](Vec x) { return log(x); };

}  // namespace

TEST(exp_is_exact_to_two_ulp) {
  float where = 0;
  const double worst = worst_ulp(e_, [](double x) { return std::exp(x); }, [](float x) { return x > -87.3f && x < 88.3f; }, where);
  CHECK(worst < 2, "%g ulp at %g", worst, static_cast<double>(where));
  CHECK(std::isnan(at(e_, NAN)));
  CHECK(at(e_, -inf) == 0);
  CHECK(at(e_, -200.f) == 0);
  CHECK(at(e_, 0.f) == 1);
  CHECK(at(e_, -0.f) == 1);
  CHECK(at(e_, 1e-40f) == 1);
  CHECK(at(e_, inf) > 1e38f);
}

TEST(tanh_is_exact_to_six_ulp) {
  float where = 0;
  const double worst =
      worst_ulp(t_, [](double x) { return std::tanh(x); }, [](float x) { return std::isfinite(x); }, where);
  CHECK(worst < 6, "%g ulp at %g", worst, static_cast<double>(where));
  const double beside = worst_ulp(far_, [](double x) { return std::tanh(x); }, [](float x) { return std::isfinite(x); }, where);
  CHECK(beside < 6, "%g ulp at %g", beside, static_cast<double>(where));
  const double near = worst_ulp(t_, [](double x) { return std::tanh(x); }, [](float x) { return std::fabs(x) <= kTanhNear; }, where);
  CHECK(near < 2.5, "%g ulp at %g", near, static_cast<double>(where));
  CHECK(std::isnan(at(t_, NAN)));
  // Saturation is within 6 ulp too, and never beyond 1: a soft cap stays a cap.
  CHECK(at(t_, inf) <= 1 && at(t_, inf) > 1 - 3.6e-7f);
  CHECK(at(t_, -inf) == -at(t_, inf));
  CHECK(at(t_, 0.f) == 0);
  CHECK(std::signbit(at(t_, -0.f)));
}

TEST(all_within_is_no_for_nan) {
  for (int i = 0; i < 3 * W; ++i) {
    Vecs<3> x = each<3>([](int) { return splat(-0.5f); });
    CHECK(all_within(x, 0.5f));
    for (float odd : {0.6f, -0.6f, inf, -inf, NAN, -NAN}) {
      x.v[i / W][i % W] = odd;
      CHECK(!all_within(x, 0.5f), "%g in lane %d", static_cast<double>(odd), i);
      x.v[(i / W + 1) % 3][i % W] = NAN;  // hides nothing
      CHECK(!all_within(x, 0.5f), "%g beside NaN in lane %d", static_cast<double>(odd), i);
      x.v[(i / W + 1) % 3][i % W] = 0;
    }
  }
}

TEST(tanh_has_the_same_bits_whatever_the_other_lanes_hold) {
  for (float x = -0.8f; x < 0.8f; x += 1e-4f)
    for (float other : {3.f, NAN, inf}) {
      Vec beside = splat(x);
      beside[0] = other;
      CHECK(tanh(beside)[W - 1] == at(t_, x), "%g beside %g", static_cast<double>(x), static_cast<double>(other));
    }
}

TEST(log_is_exact_to_two_ulp) {
  float where = 0;
  const double worst = worst_ulp(l_, [](double x) { return std::log(x); }, [](float x) { return x > 0 && std::isfinite(x); }, where);
  CHECK(worst < 2, "%g ulp at %g", worst, static_cast<double>(where));
  CHECK(std::isnan(at(l_, NAN)));
  CHECK(std::isnan(at(l_, -1.f)));
  CHECK(at(l_, 0.f) == -inf);
  CHECK(at(l_, inf) == inf);
  CHECK(at(l_, 1.f) == 0);
}

TEST(lanes) {
  float x[W * W], y[W * W];
  uint16_t h[W];
  for (int i = 0; i < W * W; ++i) x[i] = static_cast<float>(i + 1);
  for (int i = 0; i < W; ++i) {
    uint32_t u;
    std::memcpy(&u, &x[i], 4);
    h[i] = static_cast<uint16_t>(u >> 16);
  }
  Vec v[W];
  for (int i = 0; i < W; ++i) v[i] = load(x + i * W);
  transpose(v);
  for (int i = 0; i < W; ++i) store(y + i * W, v[i]);
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) CHECK(y[i * W + j] == x[j * W + i]);
  CHECK(sum(load(x)) == static_cast<float>(W * (W + 1) / 2));
  CHECK(std::isnan(min(splat(1.f), splat(NAN))[0]));
  for (int n = 0; n < W; ++n) {
    const Vec p = load_part(x, n), q = load_bf16_part(h, n);
    for (int i = 0; i < W; ++i) CHECK(p[i] == (i < n ? x[i] : 0) && q[i] == (i < n ? x[i] : 0), "lane %d of %d", i, n);
    for (float& f : y) f = -1;
    store_part(y, load(x), n);
    for (int i = 0; i < W; ++i) CHECK(y[i] == (i < n ? x[i] : -1), "lane %d of %d", i, n);
  }
}
