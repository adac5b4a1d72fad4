// Matrix products at training shapes, beside a BLAS if one is named:
//   gemm_bench [threads] [path of a library with cblas_sgemm] [part of a shape's name]
// One thread is measured in CPU time (robust on a shared machine), more in wall time; runs of the two are interleaved.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/simd.h"

using namespace limbeck;
using namespace limbeck::cpu::LIMBECK_ISA;

using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);

static clockid_t which_clock = CLOCK_THREAD_CPUTIME_ID;
static double now() {
  timespec t;
  clock_gettime(which_clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Multiply-adds in registers only.
static double peak() {
  double best = 0;
  for (int trial = 0; trial < 5; ++trial) {
    Vec acc[10], x = splat(0.9f), y = splat(0.999999f);
    for (int j = 0; j < 10; ++j) acc[j] = splat(static_cast<float>(j));
    const double start = now();
    for (int i = 0; i < 2000000; ++i) {
      asm volatile("" : "+x"(x), "+x"(y));
#pragma GCC unroll 10
      for (int j = 0; j < 10; ++j) acc[j] = acc[j] * x + y;
    }
    const double s = now() - start;
    for (Vec& a : acc) asm volatile("" : "+x"(a));
    best = std::max(best, 2e-9 * 10 * 2000000 * W / s);
  }
  return best;
}

struct Shape {
  std::string name;
  int64_t m, n, k;
  bool at, bt;
};

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 1;
  const char* const library = argc > 2 ? argv[2] : "";
  const char* const filter = argc > 3 ? argv[3] : "";
  if (count > 1) which_clock = CLOCK_MONOTONIC;
  Sgemm sgemm = nullptr;
  if (*library) {
    void* const handle = dlopen(library, RTLD_NOW);
    if (!handle) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    sgemm = reinterpret_cast<Sgemm>(dlsym(handle, "cblas_sgemm"));
    if (auto set = reinterpret_cast<void (*)(int)>(dlsym(handle, "openblas_set_num_threads"))) set(count);
  }
  std::vector<Shape> shapes;
  const auto add = [&](const char* what, int64_t m, int64_t n, int64_t k, bool at, bool bt) {
    shapes.push_back({std::string(what) + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k), m, n, k, at, bt});
  };
  const int64_t layers[][2] = {{256, 256}, {256, 128}, {256, 1024}, {1024, 256}, {512, 512}, {512, 2048}, {2048, 512}};
  for (const int64_t tokens : {2048, 4096})
    for (const auto& l : layers) {
      add("fwd NT", tokens, l[1], l[0], false, true);
      add("dx  NN", tokens, l[0], l[1], false, false);
      add("dw  TN", l[1], l[0], tokens, true, false);
    }
  add("head NT", 512, 8192, 256, false, true);
  add("head NT", 2048, 8192, 256, false, true);
  add("head NT", 256, 32000, 256, false, true);
  add("head NT", 512, 32000, 512, false, true);
  add("head NN", 512, 256, 8192, false, false);
  add("head NN", 512, 512, 32000, false, false);
  add("head TN", 8192, 256, 512, true, false);
  add("head TN", 32000, 512, 512, true, false);
  add("small NT", 128, 640, 640, false, true);
  add("small NT", 256, 256, 64, false, true);
  add("small NN", 256, 64, 256, false, false);
  add("small NT", 64, 64, 64, false, true);
  add("square NN", 1024, 1024, 1024, false, false);
  add("decode NT", 1, 2048, 640, false, true);
  add("decode NT", 8, 2048, 640, false, true);
  add("decode NT", 1, 9216, 2304, false, true);
  add("decode NT", 4, 9216, 2304, false, true);

  ThreadPool pool(count);
  const double top = peak() * count;
  std::printf("%d thread(s), %d lanes, peak %.1f GFLOP/s; GFLOP/s: median/best\n", count, W, top);
  double ratio = 0, share = 0;
  int rows = 0;
  for (const Shape& s : shapes) {
    if (s.name.find(filter) == std::string::npos) continue;
    std::vector<float> a(static_cast<size_t>(s.m * s.k)), b(static_cast<size_t>(s.k * s.n)), c(static_cast<size_t>(s.m * s.n));
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i % 17) - 8;
    for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i % 13) - 6;
    const double flops = 2e-9 * static_cast<double>(s.m * s.n * s.k);
    const int inner = std::max(1, static_cast<int>(0.01 / flops));
    std::vector<double> mine, other;
    double spent = 0;
    const auto ours = [&] {
      gemm(pool, s.m, s.n, s.k, s.at ? transposed(a.data(), s.m) : rows_of(a.data(), s.k),
           s.bt ? transposed(b.data(), s.k) : rows_of(b.data(), s.n), c.data(), s.n);
    };
    const auto theirs = [&] {
      sgemm(101, s.at ? 112 : 111, s.bt ? 112 : 111, static_cast<int>(s.m), static_cast<int>(s.n), static_cast<int>(s.k), 1.f, a.data(),
            static_cast<int>(s.at ? s.m : s.k), b.data(), static_cast<int>(s.bt ? s.k : s.n), 0.f, c.data(), static_cast<int>(s.n));
    };
    const auto timed = [&](auto&& f, std::vector<double>& into) {
      const double start = now();
      for (int i = 0; i < inner; ++i) f();
      const double t = now() - start;
      into.push_back(flops * inner / t);
      spent += t;
    };
    ours();
    if (sgemm) theirs();
    while (spent < 0.25 || mine.size() < 5) {
      timed(ours, mine);
      if (sgemm) timed(theirs, other);
    }
    std::sort(mine.begin(), mine.end());
    std::sort(other.begin(), other.end());
    const double x = mine[mine.size() / 2];
    std::printf("%-26s %6.1f /%6.1f", s.name.c_str(), x, mine.back());
    share += x / top;
    ++rows;
    if (sgemm) {
      const double y = other[other.size() / 2];
      std::printf("   peer %6.1f /%6.1f   x %.2f", y, other.back(), x / y);
      ratio += x / y;
    }
    std::printf("\n");
  }
  std::printf("mean share of peak %.3f", share / rows);
  if (sgemm) std::printf(", mean ratio %.3f", ratio / rows);
  std::printf("\n");
}
