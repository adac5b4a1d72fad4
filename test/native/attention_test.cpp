// Attention against a plain float64 reference, its gradients against the analytic ones and against finite differences.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>

#include "check.h"
#include "core/families.h"

using namespace limbeck;

namespace {

const Kernel& kernel(const char* name) {
  for (int i = 0; i < cpu_isa_count; ++i) {
    if (std::strcmp(cpu_isas[i].isa, LIMBECK_TEXT(LIMBECK_ISA)) != 0) continue;
    for (int f = 0; f < cpu_isas[i].count; ++f)
      for (int k = 0; k < cpu_isas[i].families[f]->count; ++k)
        if (std::strcmp(cpu_isas[i].families[f]->kernels[k].name, name) == 0) return cpu_isas[i].families[f]->kernels[k];
  }
  std::printf("no kernel %s\n", name);
  std::abort();
}

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

struct Case {
  int64_t b, t, s, h, g, d;
  double cap = 0;
  int64_t window = 0;
  std::vector<int64_t> documents = {};  // lengths; the last fills the sequence
  bool offset_documents = false;        // sequence 1 begins one document later
  double spread = 1;
};

struct Data {
  Case c;
  double scale;
  Floats q, k, v, dy;
  std::vector<int32_t> starts;

  int64_t start(int64_t batch, int64_t i) const { return starts.empty() ? 0 : starts[static_cast<size_t>(batch * c.t + i)]; }
};

Data make(const Case& c, uint32_t seed = 1) {
  Data x{c, 1 / std::sqrt(static_cast<double>(c.d)), {}, {}, {}, {}, {}};
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto fill = [&](Floats& to, int64_t n, double spread) {
    to.resize(static_cast<size_t>(n));
    for (float& f : to) f = normal(random) * static_cast<float>(spread);
  };
  fill(x.q, c.b * c.t * c.h * c.d, c.spread);
  fill(x.k, c.b * c.s * c.g * c.d, c.spread);
  fill(x.v, c.b * c.s * c.g * c.d, 1);
  fill(x.dy, c.b * c.t * c.h * c.d, 1);
  if (!c.documents.empty())
    for (int64_t batch = 0; batch < c.b; ++batch) {
      size_t document = batch % 2 == 1 && c.offset_documents ? 1 : 0;
      int64_t begin = 0;
      for (int64_t i = 0; i < c.t; ++i) {
        if (document < c.documents.size() && i == begin + c.documents[document]) begin = i, ++document;
        x.starts.push_back(static_cast<int32_t>(begin));
      }
    }
  return x;
}

struct Result {
  Floats y, lse, dq, dk, dv;
};

View view(const Floats& data, std::initializer_list<int64_t> dims) {
  View v{const_cast<float*>(data.data()), DType::f32, static_cast<int>(dims.size()), {}};
  int i = 0;
  for (int64_t n : dims) v.dims[i++] = n;
  return v;
}

void launch(const char* name, Call& call, ThreadPool& threads) {
  const Kernel& k = kernel(name);
  call.op = k.name;
  call.threads = &threads;
  call.workspace_bytes = k.workspace ? k.workspace(call) : 0;
  // Filled with NaN, and followed by a guard.
  const size_t n = (call.workspace_bytes + 64 + 63) / 64 * 64;
  std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(64, n), std::free);
  std::memset(memory.get(), 0xff, n);
  call.workspace = memory.get();
  k.run(call);
  for (size_t i = call.workspace_bytes; i < n; ++i) CHECK(static_cast<unsigned char*>(memory.get())[i] == 0xff);
}

void set_inputs(Call& call, int first, const Data& x) {
  const Case& c = x.c;
  call.in[first] = view(x.q, {c.b, c.t, c.h, c.d});
  call.in[first + 1] = view(x.k, {c.b, c.s, c.g, c.d});
  call.in[first + 2] = view(x.v, {c.b, c.s, c.g, c.d});
  if (!x.starts.empty()) {
    call.in[first + 3] = View{const_cast<int32_t*>(x.starts.data()), DType::i32, 2, {c.b, c.t}};
  }
  call.scalar[0] = x.scale;
  call.scalar[1] = c.cap;
  call.scalar[2] = static_cast<double>(c.window);
}

void forward(const Data& x, Result& r, ThreadPool& threads) {
  const Case& c = x.c;
  r.y.assign(x.q.size(), -77.f);
  r.lse.assign(static_cast<size_t>(c.b * c.h * c.t), -77.f);
  Call call;
  set_inputs(call, 0, x);
  call.out[0] = view(r.y, {c.b, c.t, c.h, c.d});
  call.out[1] = view(r.lse, {c.b, c.h, c.t});
  launch("attention", call, threads);
}

void backward(const Data& x, Result& r, ThreadPool& threads, bool accumulate = false, unsigned wanted = 7) {
  const Case& c = x.c;
  Call call;
  call.in[0] = view(x.dy, {c.b, c.t, c.h, c.d});
  set_inputs(call, 1, x);
  call.in[5] = view(r.y, {c.b, c.t, c.h, c.d});
  call.in[6] = view(r.lse, {c.b, c.h, c.t});
  Floats* out[] = {&r.dq, &r.dk, &r.dv};
  for (unsigned i = 0; i < 3; ++i) {
    out[i]->assign(i == 0 ? x.q.size() : x.k.size(), accumulate ? 1.f : -77.f);
    if (wanted >> i & 1) call.out[i] = view(*out[i], {c.b, i == 0 ? c.t : c.s, i == 0 ? c.h : c.g, c.d});
    call.accumulate[i] = accumulate;
  }
  launch("attention_backward", call, threads);
}

struct Reference {
  Doubles y, lse, dq, dk, dv;
};

Reference reference(const Data& x) {
  const Case& c = x.c;
  Reference r;
  r.y.assign(x.q.size(), 0), r.dq = r.y;
  r.lse.assign(static_cast<size_t>(c.b * c.h * c.t), 0);
  r.dk.assign(x.k.size(), 0), r.dv = r.dk;
  Doubles score, slope, weight;
  for (int64_t batch = 0; batch < c.b; ++batch)
    for (int64_t head = 0; head < c.h; ++head)
      for (int64_t i = 0; i < c.t; ++i) {
        const int64_t position = c.s - c.t + i, kv = head / (c.h / c.g);
        int64_t from = c.window > 0 ? position - c.window + 1 : 0;
        from = std::max({from, int64_t{0}, x.start(batch, i)});
        const int64_t q0 = ((batch * c.t + i) * c.h + head) * c.d;
        const auto k0 = [&](int64_t j) { return ((batch * c.s + j) * c.g + kv) * c.d; };
        score.clear(), slope.clear(), weight.clear();
        double top = -1e300;
        for (int64_t j = from; j <= position; ++j) {
          double z = 0;
          for (int64_t e = 0; e < c.d; ++e) z += double(x.q[q0 + e]) * x.k[k0(j) + e];
          z *= x.scale;
          const double th = c.cap > 0 ? std::tanh(z / c.cap) : 0;
          score.push_back(c.cap > 0 ? c.cap * th : z);
          slope.push_back(1 - th * th);
          if (score.back() > top) top = score.back();
        }
        double total = 0;
        for (double z : score) weight.push_back(std::exp(z - top)), total += weight.back();
        r.lse[(batch * c.h + head) * c.t + i] = top + std::log(total);
        for (double& w : weight) w /= total;
        double delta = 0;
        for (int64_t e = 0; e < c.d; ++e) {
          double y = 0;
          for (int64_t j = from; j <= position; ++j) y += weight[j - from] * x.v[k0(j) + e];
          r.y[q0 + e] = y;
          delta += y * x.dy[q0 + e];
        }
        for (int64_t j = from; j <= position; ++j) {
          double dp = 0;
          for (int64_t e = 0; e < c.d; ++e) dp += double(x.dy[q0 + e]) * x.v[k0(j) + e];
          const double dz = weight[j - from] * (dp - delta) * slope[j - from] * x.scale;
          for (int64_t e = 0; e < c.d; ++e) {
            r.dv[k0(j) + e] += weight[j - from] * x.dy[q0 + e];
            r.dk[k0(j) + e] += dz * x.q[q0 + e];
            r.dq[q0 + e] += dz * x.k[k0(j) + e];
          }
        }
      }
  return r;
}

// The largest difference, relative to the root mean square of what is expected, or to 0.1: gradients that cancel (a window of 1
// has dq = dk = 0) are as exact as their terms, which are about 1.
double distance(const Floats& actual, const Doubles& expected) {
  double square = 0, worst = 0;
  for (double e : expected) square += e * e;
  const double size = std::max(std::sqrt(square / std::max<size_t>(expected.size(), 1)), 0.1);
  for (size_t i = 0; i < expected.size(); ++i) {
    const double off = std::fabs(actual[i] - expected[i]);
    if (!(off <= worst)) worst = off;
  }
  return worst / size;
}

bool close(const char* what, const Case& c, const Floats& actual, const Doubles& expected, double tolerance) {
  const double off = distance(actual, expected);
  if (off <= tolerance) return true;
  std::printf("  %s off by %g: b %d t %d s %d h %d g %d d %d cap %g window %d documents %d spread %g\n", what, off, int(c.b), int(c.t),
              int(c.s), int(c.h), int(c.g), int(c.d), c.cap, int(c.window), int(c.documents.size()), c.spread);
  return false;
}

ThreadPool& pool() {
  static ThreadPool threads(2);
  return threads;
}

void compare(const Case& c, double tolerance = 2e-5) {
  const Data x = make(c);
  const Reference want = reference(x);
  Result got;
  forward(x, got, pool());
  CHECK(close("y", c, got.y, want.y, tolerance));
  CHECK(close("lse", c, got.lse, want.lse, tolerance));
  if (c.s != c.t) return;
  backward(x, got, pool());
  CHECK(close("dq", c, got.dq, want.dq, 4 * tolerance));
  CHECK(close("dk", c, got.dk, want.dk, 4 * tolerance));
  CHECK(close("dv", c, got.dv, want.dv, 4 * tolerance));
}

bool same(const Floats& a, const Floats& b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0; }

}  // namespace

TEST(lengths_windows_and_caps) {
  for (int64_t t : {1, 2, 3, 31, 64, 65, 127, 257})
    for (int64_t window : {0, 1, 2, 7, 64, 65, 300})
      for (double cap : {0., 5., 50.}) compare({1, t, t, 2, 1, 8, cap, window});
}

TEST(head_sizes) {
  for (int64_t d : {1, 2, 7, 8, 17, 31, 32, 33, 64, 80, 96, 128, 256})
    for (double cap : {0., 50.}) compare({1, 67, 67, 2, 2, d, cap, 30});
}

TEST(head_groups) {
  for (int64_t group : {1, 2, 3, 5, 8})
    for (int64_t t : {1, 31, 65, 127})
      for (int64_t window : {0, 7, 64}) compare({2, t, t, 2 * group, 2, 16, 50, window});
}

TEST(packed_documents) {
  const std::vector<std::vector<int64_t>> packings = {{1, 1, 1}, {13, 1, 1, 31}, {64, 64}, {97, 3}, {50, 100}, {128, 7, 1, 1, 1, 60}};
  for (const auto& documents : packings)
    for (int64_t window : {0, 1, 7, 64})
      for (double cap : {0., 50.}) {
        compare({2, 257, 257, 4, 2, 8, cap, window, documents, true});
        compare({1, 131, 131, 3, 1, 17, cap, window, documents});
      }
}

TEST(queries_at_the_end_of_more_keys) {
  for (int64_t t : {1, 2, 5, 40, 64})
    for (int64_t s : {64, 65, 300, 1100})
      for (int64_t window : {0, 1, 33, 300})
        for (double cap : {0., 50.}) compare({2, t, s, 6, 2, 24, cap, window});
  for (int64_t group : {1, 2, 3, 4, 7}) compare({1, 1, 700, group, 1, 17, 50, 0});
}

// Floats that end where memory does: to read one too many ends the process.
class AtTheEdge {
 public:
  explicit AtTheEdge(const Floats& from) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), bytes_((from.size() * 4 / page_ + 2) * page_) {
    base_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + bytes_ - page_, page_, PROT_NONE);
    data = reinterpret_cast<float*>(base_ + bytes_ - page_) - from.size();
    std::copy(from.begin(), from.end(), data);
  }
  ~AtTheEdge() { munmap(base_, bytes_); }
  AtTheEdge(const AtTheEdge&) = delete;
  float* data;

 private:
  size_t page_, bytes_;
  char* base_;
};

TEST(nothing_behind_the_inputs_is_read) {
  for (const int64_t d : {1, 3, 8, 12, 16, 17, 24, 33, 40}) {
    const Data x = make({2, 19, 19, 4, 2, d});
    Result expected, r;
    forward(x, expected, pool());
    backward(x, expected, pool());
    const AtTheEdge q(x.q), k(x.k), v(x.v), dy(x.dy);
    r.y.assign(x.q.size(), -77.f), r.lse.assign(expected.lse.size(), -77.f);
    r.dq.assign(x.q.size(), -77.f), r.dk.assign(x.k.size(), -77.f), r.dv = r.dk;
    const auto inputs = [&](Call& call, int first) {
      set_inputs(call, first, x);
      call.in[first].data = q.data, call.in[first + 1].data = k.data, call.in[first + 2].data = v.data;
    };
    Call there, back;
    inputs(there, 0);
    there.out[0] = view(r.y, {2, 19, 4, d});
    there.out[1] = view(r.lse, {2, 4, 19});
    launch("attention", there, pool());
    back.in[0] = view(x.dy, {2, 19, 4, d});
    back.in[0].data = dy.data;
    inputs(back, 1);
    back.in[5] = view(r.y, {2, 19, 4, d});
    back.in[6] = view(r.lse, {2, 4, 19});
    back.out[0] = view(r.dq, {2, 19, 4, d});
    back.out[1] = view(r.dk, {2, 19, 2, d});
    back.out[2] = view(r.dv, {2, 19, 2, d});
    launch("attention_backward", back, pool());
    CHECK(r.y == expected.y && r.lse == expected.lse && r.dq == expected.dq && r.dk == expected.dk && r.dv == expected.dv, "head size %d",
          static_cast<int>(d));
  }
}

TEST(many_parts_of_a_long_sequence) {
  compare({1, 1500, 1500, 1, 1, 16, 50, 0}, 4e-5);
  compare({1, 1300, 1300, 2, 1, 16, 0, 200}, 4e-5);
  compare({1, 1300, 1300, 2, 1, 8, 50, 0, {600, 1, 100}}, 4e-5);
}

TEST(many_pairs) {
  compare({9, 130, 130, 4, 2, 16, 50, 20, {40, 90}, true});
  compare({4, 300, 300, 8, 4, 8, 0, 0});
}

TEST(large_scores) {
  // Scores reach hundreds: a running maximum, or caps that bite. float32 rounds a score of 300 by 2e-5.
  for (double cap : {0., 30., 60., 61., 200., 1000.}) compare({1, 150, 150, 2, 1, 16, cap, 0, {}, false, 8.}, 1e-3);
}

TEST(gradients_by_finite_differences) {
  for (double cap : {0., 2., 70.}) {
    Data x = make({1, 9, 9, 4, 2, 5, cap, 4, {3, 4}});
    Result r;
    forward(x, r, pool());
    backward(x, r, pool());
    const auto loss = [&] {
      const Reference at = reference(x);
      double total = 0;
      for (size_t i = 0; i < at.y.size(); ++i) total += at.y[i] * x.dy[i];
      return total;
    };
    Floats* inputs[] = {&x.q, &x.k, &x.v};
    const Floats* gradients[] = {&r.dq, &r.dk, &r.dv};
    for (int which = 0; which < 3; ++which)
      for (size_t i = 0; i < inputs[which]->size(); i += 7) {
        float& value = (*inputs[which])[i];
        const float old = value;
        value = old + 1e-3f;
        const double up = loss(), step_up = value;
        value = old - 1e-3f;
        const double down = loss(), step_down = value;
        value = old;
        CHECK_NEAR((*gradients[which])[i], (up - down) / (step_up - step_down), 2e-5);
      }
  }
}

TEST(the_number_of_threads_changes_no_bit) {
  for (const Case& c :
       {Case{1, 900, 900, 4, 1, 32, 50, 0}, Case{2, 500, 500, 4, 2, 17, 0, 100, {100, 7, 300}}, Case{1, 1, 3000, 4, 2, 64, 50, 0},
        Case{8, 200, 200, 4, 2, 16, 50, 50}}) {
    const Data x = make(c);
    ThreadPool one(1), three(3);
    Result a, b;
    forward(x, a, one);
    forward(x, b, three);
    CHECK(same(a.y, b.y) && same(a.lse, b.lse));
    if (c.s != c.t) continue;
    backward(x, a, one);
    backward(x, b, three);
    CHECK(same(a.dq, b.dq) && same(a.dk, b.dk) && same(a.dv, b.dv));
  }
}

TEST(accumulation_and_outputs_that_are_not_wanted) {
  const Case c{1, 600, 600, 2, 1, 16, 50, 0};
  const Data x = make(c);
  Result plain, onto;
  forward(x, plain, pool());
  onto = plain;
  backward(x, plain, pool());
  backward(x, onto, pool(), true);
  for (size_t i = 0; i < plain.dq.size(); ++i) CHECK_NEAR(onto.dq[i], plain.dq[i] + 1.f, 1e-6);
  for (size_t i = 0; i < plain.dk.size(); ++i) CHECK_NEAR(onto.dk[i], plain.dk[i] + 1.f, 1e-5);
  for (size_t i = 0; i < plain.dv.size(); ++i) CHECK_NEAR(onto.dv[i], plain.dv[i] + 1.f, 1e-5);
  for (unsigned wanted : {1u, 2u, 4u, 6u}) {
    Result some = plain;
    backward(x, some, pool(), false, wanted);
    if (wanted & 1) CHECK(same(some.dq, plain.dq));
    if (wanted & 2) CHECK(same(some.dk, plain.dk));
    if (wanted & 4) CHECK(same(some.dv, plain.dv));
  }
}

// What is not a number stays where it can be seen: queries after it within window and document, and their keys.
TEST(nan_and_infinity_do_not_leak) {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
  for (float poison : bad)
    for (double cap : {0., 50.})
      for (int64_t window : {0, 20})
        for (int which = 0; which < 4; ++which) {
          const Case c{1, 150, 150, 2, 1, 16, cap, window, {40, 60}};
          Data clean = make(c);
          Result want;
          forward(clean, want, pool());
          backward(clean, want, pool());
          Data x = clean;
          const int64_t at = 61, heads = which == 0 || which == 3 ? 2 : 1;  // in the document [40, 100)
          Floats& target = which == 0 ? x.q : which == 1 ? x.k : which == 2 ? x.v : x.dy;
          target[at * heads * 16 + 3] = poison;
          Result got;
          forward(x, got, pool());
          // Queries that see the position (as a key), or are it.
          const auto sees = [&](int64_t i) { return i >= at && i < 100 && (window == 0 || i < at + window); };
          if (which != 3)
            for (int64_t i = 0; i < 150; ++i)
              for (int64_t e = 0; e < 32; ++e) {
                const float y = got.y[i * 32 + e];
                const bool touched = which == 0 ? i == at && e < 16 : sees(i);
                if (!touched) CHECK(y == want.y[i * 32 + e]);
                if (touched && std::isnan(poison) && (which != 2 || e % 16 == 3)) CHECK(std::isnan(y));
              }
          if (std::isinf(poison)) continue;  // backward of infinities mixes NaN into legal places; NaN covers the ranges
          got.dq.clear();
          backward(x, got, pool());
          for (int64_t i = 0; i < 150; ++i) {
            const bool as_query = which == 0 || which == 3 ? i == at : sees(i);
            for (int64_t e = 0; e < 32; ++e)
              if (!as_query) CHECK(got.dq[i * 32 + e] == want.dq[i * 32 + e]);
            // Keys seen by a touched query.
            const bool as_key = which == 0 || which == 3 ? i >= 40 && i <= at && (window == 0 || i > at - window)
                                                         : i >= 40 && i < 100 && (window == 0 || (i > at - window && i < at + window));
            for (int64_t e = 0; e < 16; ++e)
              if (!as_key) CHECK(got.dk[i * 16 + e] == want.dk[i * 16 + e] && got.dv[i * 16 + e] == want.dv[i * 16 + e]);
          }
        }
}

TEST(nothing_in_nothing_out) {
  compare({0, 5, 5, 2, 1, 8});
  compare({1, 0, 0, 2, 1, 8});
}

TEST(bad_arguments_are_refused) {
  const auto code = [](Data x, bool gradients = false) -> std::string {
    Result r;
    try {
      r.y.assign(x.q.size(), 0);
      r.lse.assign(static_cast<size_t>(x.c.b * x.c.h * x.c.t), 0);
      if (gradients)
        backward(x, r, pool());
      else
        forward(x, r, pool());
    } catch (const Error& error) {
      return error.code + (error.op.empty() || error.argument.empty() || error.expected.empty() ? "?" : "");
    }
    return "";
  };
  CHECK(code(make({1, 4, 4, 3, 2, 8})) == "ERR_ATTENTION_HEADS");
  CHECK(code(make({1, 5, 4, 2, 2, 8})) == "ERR_ATTENTION_LENGTH");
  CHECK(code(make({1, 4, 5, 2, 2, 8}), true) == "ERR_ATTENTION_LENGTH");
  CHECK(code(make({1, 4, 4, 2, 2, 8, 0, -1})) == "ERR_ATTENTION_WINDOW");
  Data x = make({1, 4, 4, 2, 2, 8});
  for (const auto& starts : std::vector<std::vector<int32_t>>{{0, 0, 3, 3}, {0, 1, 0, 0}, {-1, 0, 0, 0}}) {
    x.starts = starts;
    CHECK(code(x) == "ERR_ATTENTION_STARTS");
  }
  x = make({1, 2, 4, 2, 2, 8});
  x.starts = {0, 0};
  CHECK(code(x) == "ERR_ATTENTION_STARTS");
}
