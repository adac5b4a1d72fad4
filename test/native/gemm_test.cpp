// Matrix products against float64 loops, with the same bits for every number of threads, and the thread pool.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/threads.h"
#include "cpu/gate.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"

using namespace limbeck;
using namespace limbeck::cpu::LIMBECK_ISA;

static std::mt19937 rng(7);
static float uniform() { return std::uniform_real_distribution<float>(-1.f, 1.f)(rng); }

// A matrix of logical size rows x cols, stored by rows or by columns with some padding, as float32 or bfloat16.
struct Stored {
  int64_t rows, cols;
  bool by_column;
  DType dtype;
  int64_t stride;
  std::vector<float> f, up;
  std::vector<uint16_t> h;
  std::vector<double> value;  // rows x cols

  Stored(int64_t rows, int64_t cols, bool by_column, DType dtype, int gate = -1)
      : rows(rows), cols(cols), by_column(by_column), dtype(dtype), stride((by_column ? rows : cols) + 3) {
    // Exactly as long as the last element needs, so that a sanitizer sees any read beyond it.
    const int64_t lines = by_column ? cols : rows, line = by_column ? rows : cols;
    const size_t size = lines == 0 || line == 0 ? 0 : static_cast<size_t>((lines - 1) * stride + line);
    value.resize(static_cast<size_t>(rows * cols));
    f.resize(size);
    for (float& x : f) x = uniform();
    if (dtype == DType::bf16) {
      h.resize(size);
      for (size_t i = 0; i < size; ++i) {
        uint32_t u;
        std::memcpy(&u, &f[i], 4);
        h[i] = static_cast<uint16_t>(u >> 16);
        u &= 0xffff0000u;
        std::memcpy(&f[i], &u, 4);
      }
    }
    if (gate >= 0) {
      up.resize(size);
      for (float& x : up) x = uniform();
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        const size_t at = static_cast<size_t>(by_column ? j * stride + i : i * stride + j);
        double v = f[at];
        if (gate == 0) v = 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v))) * up[at];
        if (gate == 1) v = v / (1 + std::exp(-v)) * up[at];
        value[static_cast<size_t>(i * cols + j)] = v;
      }
    this->gate = gate;
  }
  int gate = -1;
  Matrix matrix() const {
    const void* p = dtype == DType::bf16 ? static_cast<const void*>(h.data()) : f.data();
    Matrix m = by_column ? transposed(p, stride, dtype) : rows_of(p, stride, dtype);
    if (gate >= 0) m.up = up.data(), m.gate = gate;
    return m;
  }
};

struct Pools {
  ThreadPool one{1}, two{2}, three{3}, six{6};
} static pools;

struct Cover {
  std::vector<std::atomic<int>>* seen;
  int64_t n;
};

static void check_product(int64_t m, int64_t n, int64_t k, bool at, bool bt, DType bd, bool bias, bool accumulate, int gate = -1,
                           bool gate_b = false, DType ad = DType::f32) {
  const Stored a(m, k, at, ad, gate_b ? -1 : gate), b(k, n, bt, bd, gate_b ? gate : -1);
  const int64_t ldc = n + 5;
  std::vector<float> start(static_cast<size_t>(m * ldc)), bv(static_cast<size_t>(n));
  for (float& x : start) x = uniform();
  for (float& x : bv) x = uniform();
  std::vector<double> want(static_cast<size_t>(m * n)), size(static_cast<size_t>(m * n));
  std::vector<double> row(static_cast<size_t>(n)), abs_row(static_cast<size_t>(n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) row[static_cast<size_t>(j)] = abs_row[static_cast<size_t>(j)] = 0;
    for (int64_t p = 0; p < k; ++p) {
      const double x = a.value[static_cast<size_t>(i * k + p)];
      const double* y = b.value.data() + p * n;
      for (int64_t j = 0; j < n; ++j) {
        row[static_cast<size_t>(j)] += x * y[j];
        abs_row[static_cast<size_t>(j)] += std::fabs(x * y[j]);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      const double c0 = accumulate ? start[static_cast<size_t>(i * ldc + j)] : 0, b0 = bias ? bv[static_cast<size_t>(j)] : 0;
      want[static_cast<size_t>(i * n + j)] = row[static_cast<size_t>(j)] + c0 + b0;
      size[static_cast<size_t>(i * n + j)] = abs_row[static_cast<size_t>(j)] + std::fabs(c0) + std::fabs(b0);
    }
  }
  std::vector<std::atomic<int>> seen(static_cast<size_t>(m * n));
  Cover cover{&seen, n};
  const TileHook hook{[](void* ctx, const Block& b) {
                        const Cover& c = *static_cast<Cover*>(ctx);
                        const Slivers slivers(c.n);
                        CHECK(b.sliver < slivers.count && b.j0 == slivers.at(b.sliver) && b.cols == slivers.of(b.sliver), "%d..%d is not sliver %d of %d columns",
                              static_cast<int>(b.j0), static_cast<int>(b.j0 + b.cols), static_cast<int>(b.sliver), static_cast<int>(c.n));
                        for (int64_t i = b.i0; i < b.i0 + b.rows; ++i)
                          for (int64_t j = b.j0; j < b.j0 + b.cols; ++j) ++(*c.seen)[static_cast<size_t>(i * c.n + j)];
                      },
                      &cover};
  const GemmOptions options{accumulate, bias ? bv.data() : nullptr, hook};
  std::vector<float> results[4];
  for (int run = 0; run < 4; ++run) {
    std::vector<float>& c = results[run];
    c = start;
    if (!accumulate)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) c[static_cast<size_t>(i * ldc + j)] = NAN;  // must not be read
    gemm(run == 0 ? pools.one : run == 1 ? pools.two : run == 2 ? pools.three : pools.six, m, n, k, a.matrix(), b.matrix(), c.data(), ldc, options);
  }
  const std::string what = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + (at ? " A^T" : "") + (bt ? " B^T" : "") +
                           (bd == DType::bf16 ? " bf16" : "") + (bias ? " bias" : "") + (accumulate ? " +=" : "") + " gate " + std::to_string(gate);
  for (int run = 1; run < 4; ++run)
    CHECK(results[0].empty() || std::memcmp(results[0].data(), results[run].data(), results[0].size() * 4) == 0, "%s: run %d has other bits",
          what.c_str(), run);
  // B packed beforehand: the same bits, but for few rows, which are otherwise not packed at all.
  if (m > 8) {
    const Packed layout(k, n);
    float* packed = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(layout.floats() * 4 + 63) / 64 * 64));
    layout.pack(pools.two, b.matrix(), packed);
    std::vector<float> c = start;
    GemmOptions quiet = options;
    quiet.hook = {};
    gemm(pools.three, m, n, k, a.matrix(), Packed::matrix(packed), c.data(), ldc, quiet);
    bool same = true;
    for (int64_t i = 0; i < m; ++i) same = same && std::memcmp(&c[static_cast<size_t>(i * ldc)], &results[0][static_cast<size_t>(i * ldc)], static_cast<size_t>(n) * 4) == 0;
    CHECK(same, "%s: packed beforehand, other bits", what.c_str());
    for (int64_t p = 0; p < k && gate < 0; p += 7)
      for (int64_t s = 0; s < Slivers(n).count; ++s)
        CHECK(packed[layout.at(p, s)] == static_cast<float>(b.value[static_cast<size_t>(p * n + Slivers(n).at(s))]), "%s: row %d of sliver %d is elsewhere",
              what.c_str(), static_cast<int>(p), static_cast<int>(s));
    std::free(packed);
  }
  // Without a hook: the same bits, unless the build leaves plain products to a BLAS.
  std::vector<float> plain = start;
  GemmOptions without = options;
  without.hook = {};
  gemm(pools.two, m, n, k, a.matrix(), b.matrix(), plain.data(), ldc, without);
  double worst = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const float x = plain[static_cast<size_t>(i * ldc + j)], y = results[0][static_cast<size_t>(i * ldc + j)];
#if defined(LIMBECK_BLAS_CBLAS)
      const double e = std::fabs(x - y) / (size[static_cast<size_t>(i * n + j)] + 1e-30);
      if (!(e <= worst)) worst = e;
#else
      if (!(x == y)) worst = 1;
#endif
    }
  CHECK(worst < 4e-7, "%s: without a hook off by %g", what.c_str(), worst);
  worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double got = results[0][static_cast<size_t>(i * ldc + j)], w = want[static_cast<size_t>(i * n + j)];
      const double e = std::fabs(got - w) / (size[static_cast<size_t>(i * n + j)] + 1e-30);
      if (!(e <= worst)) worst = e;
      const int calls = seen[static_cast<size_t>(i * n + j)];
      if (calls != 4) {
        CHECK(calls == 4, "%s: hook saw %d,%d %d times", what.c_str(), static_cast<int>(i), static_cast<int>(j), calls);
        return;
      }
    }
    for (int64_t j = n; j < ldc && i + 1 < m; ++j)
      CHECK(results[0][static_cast<size_t>(i * ldc + j)] == start[static_cast<size_t>(i * ldc + j)], "%s: wrote beyond a row", what.c_str());
  }
  CHECK(worst < (gate >= 0 ? 1e-6 : 4e-7), "%s: error %g", what.c_str(), worst);
}

TEST(slivers) {
  for (int64_t n = 1; n < 12 * Slivers::kWidest; ++n) {
    const Slivers slivers(n);
    CHECK(slivers.at(0) == 0 && slivers.at(slivers.count) == n, "%d columns: begins or ends elsewhere", static_cast<int>(n));
    for (int64_t s = 0; s < slivers.count; ++s) {
      const int64_t wide = slivers.of(s);
      CHECK(wide > 0 && wide <= Slivers::kWidest && slivers.at(s) % W == 0, "%d columns: sliver %d", static_cast<int>(n), static_cast<int>(s));
    }
  }
}

TEST(products) {
  const int64_t sizes[] = {0, 1, 2, 3, 5, 6, 7, 8, 13, 14, 15, 16, 17, 31, 32, 33, 47, 64, 65, 80, 97, 128, 129, 144, 145, 168, 169, 256, 257};
  constexpr int count = sizeof sizes / sizeof *sizes;
  for (int t = 0; t < 600; ++t) {
    const int64_t m = sizes[rng() % count], n = sizes[rng() % count], k = sizes[rng() % count];
    const bool at = rng() & 1, bt = rng() & 1;
    check_product(m, n, k, at, bt, rng() & 1 ? DType::bf16 : DType::f32, rng() & 1, rng() & 1, -1, false,
                  rng() % 4 ? DType::f32 : DType::bf16);
  }
  for (int64_t m = 1; m <= 18; ++m)
    for (int64_t n : {1, 7, 16, 33, 70})
      for (int form = 0; form < 4; ++form)
        check_product(m, n, 9 + m, form & 1, form & 2, m & 1 ? DType::bf16 : DType::f32, m & 2, m & 4);
  for (int form = 0; form < 4; ++form) {
    check_product(301, 530, 777, form & 1, form & 2, DType::f32, true, true);
    check_product(40, 1111, 1025, form & 1, form & 2, DType::bf16, true, false);
    check_product(19, 37, 20000, form & 1, form & 2, DType::f32, true, true);
    check_product(3, 300, 9001, form & 1, form & 2, DType::bf16, true, true);
    check_product(1, 70000, 35, form & 1, form & 2, DType::f32, true, false);
    check_product(33, 9000, 300, form & 1, form & 2, DType::f32, false, false);
    for (int gate = 0; gate < 2; ++gate)
      for (int64_t m : {1, 5, 70}) {
        check_product(m, 45, 270, form & 1, form & 2, DType::bf16, false, false, gate);
        check_product(m, 45, 270, form & 1, form & 2, DType::f32, false, true, gate, true);
      }
  }
}

TEST(thread_pool) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads, "size %d", pool.size());
    for (int job = 0; job < 20000; ++job) {
      const int64_t tiles = job % 7 == 0 ? 100 : job % 5;
      std::atomic<int64_t> total{0};
      pool.parallel(tiles, [&](int64_t tile, int thread) {
        if (thread < 0 || thread >= threads) std::abort();
        total.fetch_add(tile + 1, std::memory_order_relaxed);
      });
      if (total != tiles * (tiles + 1) / 2) {
        CHECK(false, "job %d of %d threads: tiles lost or repeated", job, threads);
        return;
      }
      if (job % 4000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // let the workers fall asleep
    }
    for (int job = 0; job < 300; ++job) {
      int caught = -1;
      try {
        pool.parallel(50, [&](int64_t tile, int) {
          if (tile % 10 == 7) throw static_cast<int>(tile);
        });
      } catch (int tile) {
        caught = tile;
      }
      CHECK(caught == 7, "%d was thrown", caught);
      bool refused = false;
      try {
        pool.parallel(3, [&](int64_t, int) { pool.parallel(1, [](int64_t, int) {}); });
      } catch (const Error& e) {
        refused = e.code == "ERR_POOL_BUSY";
      }
      CHECK(refused, "a nested call was not refused");
    }
    int64_t many = 0;
    std::vector<int64_t> count(static_cast<size_t>(threads) * 16);
    pool.parallel(int64_t{40} << 20, [&](int64_t, int thread) { ++count[static_cast<size_t>(thread) * 16]; });
    for (int64_t c : count) many += c;
    CHECK(many == int64_t{40} << 20, "%lld tiles were run", static_cast<long long>(many));
    std::vector<void*> seen;
    for (int t = 0; t < threads; ++t)
      for (int slot = 0; slot < ThreadPool::kSlots; ++slot) {
        void* p = pool.scratch(t, 1000, slot);
        CHECK(reinterpret_cast<uintptr_t>(p) % 64 == 0, "not aligned");
        CHECK(pool.scratch(t, 10, slot) == p, "moved");
        for (void* other : seen) CHECK(other != p, "shared");
        seen.push_back(p);
      }
  }
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(3);
    if (i % 2) pool.parallel(i, [](int64_t, int) {});
  }
}
