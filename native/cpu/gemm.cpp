#include "cpu/gemm.h"

#include <atomic>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/gate.h"
#include "cpu/simd.h"

#if defined(LIMBECK_BLAS_ACCELERATE)
#include <Accelerate/Accelerate.h>
#elif defined(LIMBECK_BLAS_MKL)
#include <mkl_cblas.h>
#elif defined(LIMBECK_BLAS_CBLAS)
#include <cblas.h>
#endif

// The product is cut as in Goto's scheme: a thread packs a panel of B into slivers of NR columns, then blocks of A into strips of at
// most MR rows, and multiplies strips by slivers in registers. Both stay in its own L2: a panel that threads share would have to
// travel between cores, which costs more than to pack it again. An element of C is always one chain of multiply-adds over each KC
// of k, in order, however the rest is cut: so the bits depend on k alone.
namespace limbeck::cpu::LIMBECK_ISA {
namespace {

constexpr int NV = kBlockVectors, NR = NV * W;
#if defined(__AVX512F__)
constexpr int MR = 14;  // 28 accumulators of 32 registers
#elif defined(__aarch64__)
constexpr int MR = 8;  // 24 of 32
#else
constexpr int MR = 6;  // 12 of 16
#endif
// A block of A (MC x KC) stays in L2, and a sliver of B (KC x NR) near L1.
#if defined(__AVX512F__)
constexpr int64_t KC = 512;
#else
constexpr int64_t KC = 256;
#endif
constexpr int64_t MC = 6 * MR;
constexpr int64_t kWideMC = 18 * MR;  // where rows of A are contiguous: short pieces of far lines come slowly from memory
constexpr int64_t kPanelFloats = int64_t{1} << 18;  // a panel of B in L2: 1 MB
constexpr int64_t kShares = 4;  // tasks that use one panel, so that threads finish together although cores differ in speed
constexpr int kSlot = 1;
// Rows packed together, and rows fetched before they are. Rows whose distance is a multiple of 4 KB share one set of L1, which has 8 ways
// or more.
constexpr int64_t kTogether = 8, kPackAhead = 6;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// k is cut evenly; a part is at most KC.
int64_t part_of(int64_t k) { return least(KC, ceil_div(ceil_div(k, ceil_div(k, KC)), 8) * 8); }

// ---- Loading: what packing reads, W elements at a time ----

struct LoadF32 {
  const float* p;
  LIMBECK_INLINE Vec operator()(int64_t i) const { return load(p + i); }
  LIMBECK_INLINE Vec part(int64_t i, int64_t n) const { return load_part(p + i, n); }
  LIMBECK_INLINE void fetch(int64_t i) const { __builtin_prefetch(p + i); }
};
struct LoadBf16 {
  const uint16_t* p;
  LIMBECK_INLINE Vec operator()(int64_t i) const { return load_bf16(p + i); }
  LIMBECK_INLINE Vec part(int64_t i, int64_t n) const { return load_bf16_part(p + i, n); }
  LIMBECK_INLINE void fetch(int64_t i) const { __builtin_prefetch(p + i); }
};
template <Gate G>
struct LoadGated {
  const float* gate;
  const float* up;
  LIMBECK_INLINE Vec operator()(int64_t i) const { return gate_value<G>(load(gate + i)) * load(up + i); }
  LIMBECK_INLINE Vec part(int64_t i, int64_t n) const { return gate_value<G>(load_part(gate + i, n)) * load_part(up + i, n); }
  LIMBECK_INLINE void fetch(int64_t i) const {
    __builtin_prefetch(gate + i);
    __builtin_prefetch(up + i);
  }
};

// ---- Packing ----

// Strips of A: as even as possible, since one that is a little lower costs nothing and an almost empty one costs much.
struct Strips {
  int64_t count, height, high;  // the first `high` strips have height + 1 rows

  explicit Strips(int64_t rows) : count(ceil_div(rows, MR)), height(rows / count), high(rows % count) {}
  int64_t at(int64_t s) const { return s * height + least(s, high); }
  int64_t of(int64_t s) const { return height + (s < high); }
  // Where a strip lies in a packed block. What is no whole vector is stored as one, and written over by what follows; the room behind is
  // for the last.
  int64_t packed(int64_t s, int64_t depth) const { return at(s) * whole(depth) + s * W; }
};
constexpr int64_t kBlockFloats = kWideMC * KC + kWideMC / MR * W;

// Calls body(source) with the loader of a matrix.
template <class Body>
void with_loader(const Matrix& x, Body&& body) {
  if (x.up && x.gate == static_cast<int>(Gate::silu)) body(LoadGated<Gate::silu>{static_cast<const float*>(x.data), x.up});
  else if (x.up) body(LoadGated<Gate::gelu_tanh>{static_cast<const float*>(x.data), x.up});
  else if (x.bits == 8) body(LoadBlocks<8>{static_cast<const uint8_t*>(x.data), x.scales});
  else if (x.bits == 4) body(LoadBlocks<4>{static_cast<const uint8_t*>(x.data), x.scales});
  else if (x.dtype == DType::bf16) body(LoadBf16{static_cast<const uint16_t*>(x.data)});
  else body(LoadF32{static_cast<const float*>(x.data)});
}

// Columns out of `rows` rows of n, W x W at most, transposed in registers: n lines of W that lie `ld` apart, filled up with zeros. What
// lies `ahead` of each row is fetched.
template <class Load>
LIMBECK_INLINE void pack_square(Load source, int64_t from, int64_t stride, int64_t rows, int64_t n, int64_t ahead, float* to, int64_t ld) {
  Vec v[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) {
    if (r >= rows) {
      v[r] = Vec{};
      continue;
    }
    const int64_t x = from + r * stride;
    source.fetch(x + ahead);
    v[r] = n >= W ? source(x) : source.part(x, n);
  }
  transpose(v);
  if (n >= W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(to + i * ld, v[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store(to + i * ld, v[i]);
  }
}

// A strip is [depth][rows], of which the micro-kernel reads one number at a time. Vectors that are stored may reach into what follows,
// which is written later.
void pack_a(const Matrix& a, int64_t i0, int64_t rows, int64_t p0, int64_t depth, float* dst) {
  const int64_t at = i0 * a.row_stride + p0 * a.col_stride;
  const Strips strips(rows);
  with_loader(a, [&](auto source) {
    if (a.row_stride != 1) {
      constexpr int64_t kAhead = 2 * W;
      for (int64_t s = 0; s < strips.count; ++s) {
        const int64_t height = strips.of(s), from = at + strips.at(s) * a.row_stride;
        float* const d = dst + strips.packed(s, depth);
        for (int64_t p = 0; p < depth; p += W)
          for (int64_t l = (height - 1) / W * W; l >= 0; l -= W)  // downwards: what is stored too much is written over
            pack_square(source, from + l * a.row_stride + p, a.row_stride, height - l, depth - p, kAhead, d + p * height + l, height);
      }
    } else {
      for (int64_t first = 0; first < depth; first += kTogether) {
        const int64_t until = least(depth, first + kTogether);
        for (int64_t s = 0; s < strips.count; ++s) {
          const int64_t i = strips.at(s), height = strips.of(s);
          int64_t from = at + first * a.col_stride + i;
          float* d = dst + strips.packed(s, depth) + first * height;
          const auto copy = [&](auto load_at) {
            for (int64_t p = first; p < until; ++p, from += a.col_stride, d += height) {
              source.fetch(from + kPackAhead * a.col_stride);
              for (int64_t l = 0; l < whole(MR); l += W) store(d + l, load_at(l));
            }
          };
          if (i + whole(MR) <= rows) copy([&](int64_t l) { return source(from + l); });
          else copy([&](int64_t l) { return l < height ? source.part(from + l, least(W, rows - i - l)) : Vec{}; });
        }
      }
    }
  });
}

// B, with contiguous columns: its rows are read along, a few at a time.
template <class Load>
void pack_columns(Load source, int64_t at, int64_t stride, const Slivers& slivers, int64_t s0, int64_t s1, int64_t depth, float* dst) {
  for (int64_t p0 = 0; p0 < depth; p0 += kTogether) {
    const int64_t rows = least(kTogether, depth - p0);
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t first = slivers.at(s), n = slivers.of(s), ld = whole(n);
      int64_t from = at + p0 * stride + first;
      float* d = dst + (first - slivers.at(s0)) * depth + p0 * ld;
      if (n == NR) {
        for (int64_t p = 0; p < rows; ++p, from += stride, d += NR) {
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            source.fetch(from + v * W + kPackAhead * stride);
            store(d + v * W, source(from + v * W));
          }
        }
      } else {
        for (int64_t p = 0; p < rows; ++p, from += stride, d += ld)
          for (int64_t j = 0; j < n; j += W) store(d + j, n - j >= W ? source(from + j) : source.part(from + j, n - j));
      }
    }
  }
}

// B, with contiguous k.
template <class Load>
void pack_depth(Load source, int64_t at, int64_t stride, const Slivers& slivers, int64_t s0, int64_t s1, int64_t depth, float* dst) {
  for (int64_t s = s0; s < s1; ++s) {
    const int64_t first = slivers.at(s), lanes = slivers.of(s), ld = whole(lanes);
    float* const d = dst + (first - slivers.at(s0)) * depth;
    for (int64_t l = 0; l < lanes; l += W)
      for (int64_t p = 0; p < depth; p += W)
        pack_square(source, at + (first + l) * stride + p, stride, lanes - l, depth - p, W * stride, d + p * ld + l, ld);
  }
}

// Rows [p0, p0 + depth) of slivers [s0, s1).
void pack_b(const Matrix& b, int64_t p0, int64_t depth, const Slivers& slivers, int64_t s0, int64_t s1, float* dst) {
  const int64_t at = p0 * b.row_stride;
  with_loader(b, [&](auto source) {
    if (b.col_stride == 1) pack_columns(source, at, b.row_stride, slivers, s0, s1, depth, dst);
    else pack_depth(source, at, b.col_stride, slivers, s0, s1, depth, dst);
  });
}

// ---- The micro-kernel: R rows by V vectors of C ----

struct Tile {
  float* c;
  int64_t ldc;
  bool add;      // C is read
  int fetches;   // what is fetched meanwhile, of C's shape and stride: C itself and what the hook will read at the same place
  const float* fetch[1 + TileHook::kBeside];
};

// A strip and a sliver come from L2 as they are used and are fetched some steps ahead; of a sliver, of which a step reads more, farther. C
// and what lies beside it come from farther away: a row for each W steps, since many at once would hold up the loads of A and B. Nothing
// but whole vectors here: with anything more, compilers spill the accumulators.
template <int R, int V>
void multiply(int64_t depth, const float* a, const float* b, const Tile& tile) {
  constexpr int64_t kAheadA = 16, kAheadB = 24;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Vec{};
  const auto add_up = [&](int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 1
    for (int64_t q = 0; q < n; ++q) {
      __builtin_prefetch(a + kAheadA * R);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) __builtin_prefetch(b + (kAheadB * V + v) * W);
      Vec x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
      b += V * W;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) add_line(acc[r], x, a + r, r);
      a += R;
    }
  };
  const int64_t ldc = tile.ldc, quick = R * W / depth + 1;
  int64_t fetched = 0;
  for (int64_t p = W; p <= depth; p += W) {
    for (const int64_t until = least(R, fetched + quick); fetched < until; ++fetched)
      for (int x = 0; x < tile.fetches; ++x)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) __builtin_prefetch(tile.fetch[x] + fetched * ldc + v * W, 1);
    add_up(W);
  }
  if (depth % W > 0) add_up(depth % W);
  float* c = tile.c;
  if (tile.add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, c += ldc)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(c + v * W, load(c + v * W) + acc[r][v]);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, c += ldc)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(c + v * W, acc[r][v]);
  }
}

using Multiply = void (*)(int64_t, const float*, const float*, const Tile&);
struct Multiplies {
  Multiply by[MR][NV];
};
template <int R, int V>
constexpr void fill(Multiplies& m) {
  m.by[R - 1][V - 1] = multiply<R, V>;
  if constexpr (V < NV) fill<R, V + 1>(m);
  else if constexpr (R < MR) fill<R + 1, 1>(m);
}
constexpr Multiplies table_of() {
  Multiplies m{};
  fill<1, 1>(m);
  return m;
}
constexpr Multiplies kMultiply = table_of();

// ---- Blocks ----

struct Product {
  Matrix a, b;
  int64_t m, n, k;
  float* c;
  int64_t ldc;
  const GemmOptions* options;
  Slivers slivers;

  // Of A, packed at a time.
  int64_t block_rows() const { return a.row_stride != 1 ? MC : kWideMC; }

  // A packed block of A, rows from i0, by a packed part of B: its slivers [s0, s1), `depth` rows from p0 on.
  void block(const float* a_block, int64_t i0, int64_t rows, const float* b_part, int64_t s0, int64_t s1, int64_t p0, int64_t depth) const {
    const Strips strips(rows);
    const bool finished = p0 + depth == k, add = p0 > 0 || options->accumulate;
    const float* const bias = p0 == 0 ? options->bias : nullptr;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t j = slivers.at(s), wide = slivers.of(s), vectors = ceil_div(wide, W);
      const float* const sliver = b_part + (j - slivers.at(s0)) * depth;
      for (int64_t t = 0; t < strips.count; ++t) {
        const int64_t r = strips.at(t), height = strips.of(t), at = (i0 + r) * ldc + j;
        const auto into = [&](float* to, int64_t stride, bool added) {
          Tile tile{to, stride, added, 1, {to}};
          if (finished)
            for (const float* x : options->hook.beside)
              if (x) tile.fetch[tile.fetches++] = x + at;
          kMultiply.by[height - 1][vectors - 1](depth, a_block + strips.packed(t, depth), sliver, tile);
        };
        if (wide == vectors * W && !bias) [[likely]] {
          into(c + at, ldc, add);
          continue;
        }
        alignas(64) float apart[MR * NR];
        into(apart, vectors * W, false);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t l = 0; l < wide; l += W) {
            const int64_t lanes = least(W, wide - l);
            float* const to = c + at + i * ldc + l;
            Vec y = load(apart + i * vectors * W + l);
            if (bias) y += load_part(bias + j + l, lanes);
            if (add) y += load_part(to, lanes);
            store_part(to, y, lanes);
          }
      }
      if (finished) options->hook(slivers, i0, rows, s, s + 1);
    }
  }

  // k = 0: nothing to add.
  void empty() const {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        float& x = c[i * ldc + j];
        x = (options->accumulate ? x : 0.f) + (options->bias ? options->bias[j] : 0.f);
      }
    options->hook(slivers, 0, m, 0, slivers.count);
  }
};

// ---- Sharing out ----

// C is cut into columns x rows tasks, each for one thread and with a panel of B of its own. Of all such cuts that keep the threads
// equally busy, the one for which each of them packs least.
struct Grid {
  int64_t part, panel, columns, rows;  // a panel has at most so many floats, if a part of k and one sliver allow it
  bool held;  // the threads take one panel after the other and keep it for whatever rows they get next

  Grid(const Product& q, int threads) : part(part_of(q.k)), panel((q.a.up ? 2 : 1) * kPanelFloats) {
    const int64_t slivers = q.slivers.count, least_columns = ceil_div(q.n, panel / part / NR * NR);
    const double work = 2. * static_cast<double>(q.m) * static_cast<double>(q.n) * static_cast<double>(q.k);
    const int64_t workers = least(threads, static_cast<int64_t>(work / 2e6) + 1);
    // An activation costs far more than a copy.
    const double cost_a = q.a.up ? 4 : 1, cost_b = q.b.packed ? 0 : 1;
    double lowest = 0;
    columns = 0;
    for (int64_t r = workers; r >= 1; --r) {
      if (workers % r != 0 || r > q.m) continue;
      const int64_t c = ceil_div(least_columns, workers / r) * (workers / r);
      if (c > slivers && columns > 0) continue;
      const double each = static_cast<double>(c * r) / static_cast<double>(workers);
      const double packed = each * (cost_a * static_cast<double>(q.m) / static_cast<double>(r) + cost_b * static_cast<double>(q.n) / static_cast<double>(c));
      if (columns > 0 && packed >= lowest) continue;
      lowest = packed;
      columns = least(c, slivers);
      rows = r;
    }
    held = rows == workers;
    if (held) rows = least(q.m, ceil_div(ceil_div(q.m, q.block_rows()), workers) * workers);
    else if (q.k <= part) rows *= least(kShares, ceil_div(q.m, rows * q.block_rows()));
  }
};

// What a task multiplies: slivers [s0, s1) of B and `deep` rows of it from d0, a panel in parts.
struct Panel {
  int64_t s0, s1, d0, deep, part;

  int64_t depth(int64_t p) const { return least(part, deep - p); }
  int64_t at(int64_t p, const Slivers& slivers) const { return p * whole(slivers.at(s1) - slivers.at(s0)); }
};

// A thread's own block of A and panel of B.
struct Packs {
  float *block, *panel;
  int64_t held = -1;  // the panel's place in B

  // Those of all threads: made before a job, in which nothing may fail.
  static std::vector<Packs> all(ThreadPool& threads, int64_t panel_floats) {
    std::vector<Packs> packs;
    for (int t = 0; t < threads.size(); ++t) {
      float* const block = static_cast<float*>(threads.scratch(t, static_cast<size_t>(kBlockFloats + panel_floats) * 4, kSlot));
      packs.push_back({block, block + kBlockFloats});
    }
    return packs;
  }

  // Packs a panel, unless it is the one that is held.
  void take(const Product& q, const Panel& x) {
    const int64_t place = x.s0 * q.k + x.d0;
    if (q.b.packed || held == place) return;
    held = place;
    for (int64_t p = 0; p < x.deep; p += x.part) pack_b(q.b, x.d0 + p, x.depth(p), q.slivers, x.s0, x.s1, panel + x.at(p, q.slivers));
  }
};

// Rows [i0, i1), at most a block of them, by a packed panel.
void multiply_rows(const Product& q, const Panel& x, const Packs& packs, int64_t i0, int64_t i1) {
  for (int64_t p = 0; p < x.deep; p += x.part) {
    const int64_t depth = x.depth(p);
    const float* const b = q.b.packed ? static_cast<const float*>(q.b.data) + Packed(q.k, q.n).at(x.d0 + p, x.s0) : packs.panel + x.at(p, q.slivers);
    pack_a(q.a, i0, i1 - i0, x.d0 + p, depth, packs.block);
    q.block(packs.block, i0, i1 - i0, b, x.s0, x.s1, x.d0 + p, depth);
  }
}

// Each thread takes its rows through all panels without waiting for the others. Panels below each other add to the same C: who takes
// over another's rows starts on them when their last panel is done. That one is an earlier task, so nobody waits for what nobody does.
void by_rows(ThreadPool& threads, const Product& q, const Grid& grid) {
  const int64_t slivers = q.slivers.count, widest = ceil_div(slivers, grid.columns) * NR, parts = grid.panel / (grid.part * widest);
  const int64_t deepest = least(ceil_div(q.k, grid.part), parts > 1 ? parts : 1) * grid.part, deeps = ceil_div(q.k, deepest);
  const int64_t panels = grid.columns * deeps;
  std::vector<Packs> packs = Packs::all(threads, q.b.packed ? 0 : least(deepest, q.k) * widest);
  std::vector<std::atomic<int64_t>> done(static_cast<size_t>(grid.rows));  // panels
  // A thread's share of tasks is some rows with all their panels. Where rows do not share out evenly, each panel is a job.
  const bool even = grid.rows % threads.size() == 0;
  const int64_t share = even ? grid.rows / threads.size() : grid.rows, together = even ? panels : 1;
  for (int64_t p0 = 0; p0 < panels; p0 += together) {
    threads.parallel(together * grid.rows, [&](int64_t task, int thread) {
      const int64_t r = task / (together * share) * share + task % share, p = p0 + task / share % together;
      const int64_t c = p / deeps, d0 = p % deeps * deepest;
      const Panel panel{slivers * c / grid.columns, slivers * (c + 1) / grid.columns, d0, least(deepest, q.k - d0), grid.part};
      Packs& own = packs[static_cast<size_t>(thread)];
      std::atomic<int64_t>& finished = done[static_cast<size_t>(r)];
      own.take(q, panel);
      while (!spin([&] { return finished.load(std::memory_order_acquire) == p; })) {}
      multiply_rows(q, panel, own, q.m * r / grid.rows, q.m * (r + 1) / grid.rows);
      finished.store(p + 1, std::memory_order_release);
    });
  }
}

void by_columns(ThreadPool& threads, const Product& q, const Grid& grid) {
  const int64_t slivers = q.slivers.count;
  std::vector<Packs> packs = Packs::all(threads, q.b.packed ? 0 : grid.part * ceil_div(slivers, grid.columns) * NR);
  threads.parallel(grid.columns * grid.rows, [&](int64_t task, int thread) {
    const int64_t c = task / grid.rows, r = task % grid.rows;
    const int64_t first = q.m * r / grid.rows, rows = q.m * (r + 1) / grid.rows - first, blocks = ceil_div(rows, q.block_rows());
    Packs& own = packs[static_cast<size_t>(thread)];
    for (int64_t d0 = 0; d0 < q.k; d0 += grid.part) {
      const Panel panel{slivers * c / grid.columns, slivers * (c + 1) / grid.columns, d0, least(grid.part, q.k - d0), grid.part};
      own.take(q, panel);
      for (int64_t x = 0; x < blocks; ++x) multiply_rows(q, panel, own, first + rows * x / blocks, first + rows * (x + 1) / blocks);
    }
  });
}

// ---- Few rows: nothing is worth packing, so B streams past once ----

constexpr int kFew = 8;
constexpr int64_t kFewFloats = int64_t{1} << 18;  // of rows that must be copied

LIMBECK_INLINE void finish(const Product& q, int64_t i, int64_t j, float x) {
  float& c = q.c[i * q.ldc + j];
  if (q.options->bias) x += q.options->bias[j];
  c = q.options->accumulate ? c + x : x;
}

// k is contiguous in both: J columns of B with R rows of A at a time, as dot products.
template <int R, int J, class Load>
void dots(const Product& q, Load b, const float* a, int64_t lda, int64_t i0, int64_t j) {
  Vec acc[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < J; ++c) acc[r][c] = Vec{};
  const int64_t stride = q.b.col_stride, from = j * stride;
  // Fetched ahead: what follows in a long line, of short ones the lines that come next.
  const int64_t ahead = q.k > 1024 ? 512 : J * stride;
  int64_t p = 0;
  for (; p + W <= q.k; p += W) {
    Vec y[J];
#pragma GCC unroll 4
    for (int c = 0; c < J; ++c) {
      b.fetch(from + c * stride + p + ahead);
      y[c] = b(from + c * stride + p);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x = load(a + (i0 + r) * lda + p);
#pragma GCC unroll 4
      for (int c = 0; c < J; ++c) acc[r][c] += x * y[c];
    }
  }
  if (p < q.k) {
    const int64_t n = q.k - p;
#pragma GCC unroll 4
    for (int c = 0; c < J; ++c) {
      const Vec y = b.part(from + c * stride + p, n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][c] += load_part(a + (i0 + r) * lda + p, n) * y;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < J; ++c) finish(q, i0 + r, j + c, sum(acc[r][c]));
}

// Columns are contiguous in B: V vectors of C with R rows of A at a time.
template <int R, int V, class Load>
void lanes(const Product& q, Load b, const float* a, int64_t lda, int64_t i0, int64_t j, int64_t cols) {
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Vec{};
  const int64_t stride = q.b.row_stride;
  int64_t from = j;
  for (int64_t p = 0; p < q.k; ++p, from += stride) {
    Vec y[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      b.fetch(from + v * W + 16 * stride);
      y[v] = cols == V * W ? b(from + v * W) : b.part(from + v * W, cols - v * W);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(a[(i0 + r) * lda + p]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += x * y[v];
    }
  }
  float line[V * W];
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(line + v * W, acc[r][v]);
    for (int64_t c = 0; c < cols; ++c) finish(q, i0 + r, j + c, line[c]);
  }
}

template <int R, class Load>
void few_rows(const Product& q, Load b, const float* a, int64_t lda, int64_t i0, int64_t j0, int64_t j1) {
  constexpr int J = W >= 16 || R <= 2 ? 4 : 2;
  int64_t j = j0;
  if (q.b.row_stride == 1 && (q.b.col_stride != 1 || q.n == 1)) {
    for (; j + J <= j1; j += J) dots<R, J>(q, b, a, lda, i0, j);
    for (; j < j1; ++j) dots<R, 1>(q, b, a, lda, i0, j);
  } else {
    constexpr int V = W >= 16 || R <= 2 ? 4 : 2;
    for (; j + V * W <= j1; j += V * W) lanes<R, V>(q, b, a, lda, i0, j, V * W);
    for (; j < j1; j += W) lanes<R, 1>(q, b, a, lda, i0, j, least(W, j1 - j));
  }
}

// Columns [j0, j1) for all rows; `a` holds the rows, contiguous.
void few(const Product& q, const float* a, int64_t lda, int64_t j0, int64_t j1) {
  const auto go = [&](auto b) {
    int64_t i = 0;
    for (; i + 4 <= q.m; i += 4) few_rows<4>(q, b, a, lda, i, j0, j1);
    if (q.m - i == 3) few_rows<3>(q, b, a, lda, i, j0, j1);
    else if (q.m - i == 2) few_rows<2>(q, b, a, lda, i, j0, j1);
    else if (q.m - i == 1) few_rows<1>(q, b, a, lda, i, j0, j1);
  };
  if (q.b.bits == 8) go(LoadBlocks<8>{static_cast<const uint8_t*>(q.b.data), q.b.scales});
  else if (q.b.bits == 4) go(LoadBlocks<4>{static_cast<const uint8_t*>(q.b.data), q.b.scales});
  else if (q.b.dtype == DType::bf16) go(LoadBf16{static_cast<const uint16_t*>(q.b.data)});
  else go(LoadF32{static_cast<const float*>(q.b.data)});
}

// Whether this path is taken, by shapes and layout alone.
bool is_plain(const Matrix& a) { return a.col_stride == 1 && a.dtype == DType::f32 && !a.up; }
bool is_few(const Product& q) { return q.m <= kFew && !q.b.up && !q.b.packed && (is_plain(q.a) || q.m * q.k <= kFewFloats); }

// The rows of A, copied into `to` unless they can be read where they are.
const float* rows_of_a(const Product& q, float* to, int64_t& lda) {
  lda = q.a.row_stride;
  if (is_plain(q.a)) return static_cast<const float*>(q.a.data);
  lda = q.k;
  with_loader(q.a, [&](auto source) {
    const bool along = q.a.col_stride == 1;
    for (int64_t i = 0; i < q.m; ++i)
      for (int64_t p = 0, n; p < q.k; p += n) {
        n = along ? least(W, q.k - p) : 1;
        const Vec v = source.part(i * q.a.row_stride + p * q.a.col_stride, n);
        std::memcpy(to + i * q.k + p, &v, static_cast<size_t>(n) * 4);
      }
  });
  return to;
}

#if defined(LIMBECK_BLAS_CBLAS)
// ---- A BLAS of the system, for plain products; its bits and its threads are its own ----

int64_t stride_of(const Matrix& x, bool trans, int64_t rows, int64_t cols) {
  const int64_t line = trans ? rows : cols, stride = trans ? x.col_stride : x.row_stride;
  return stride > line ? stride : line;
}

bool vendor(const Product& q) {
  const Matrix &a = q.a, &b = q.b;
  const GemmOptions& o = *q.options;
  constexpr int64_t most = INT32_MAX;
  if (a.dtype != DType::f32 || b.dtype != DType::f32 || a.up || b.up || b.packed || o.bias || o.hook.run) return false;
  const bool at = a.col_stride != 1, bt = b.col_stride != 1;
  const int64_t lda = stride_of(a, at, q.m, q.k), ldb = stride_of(b, bt, q.k, q.n);
  if (q.m > most || q.n > most || q.k > most || lda > most || ldb > most || q.ldc > most) return false;
  cblas_sgemm(CblasRowMajor, at ? CblasTrans : CblasNoTrans, bt ? CblasTrans : CblasNoTrans, static_cast<int>(q.m), static_cast<int>(q.n),
              static_cast<int>(q.k), 1.f, static_cast<const float*>(a.data), static_cast<int>(lda), static_cast<const float*>(b.data),
              static_cast<int>(ldb), o.accumulate ? 1.f : 0.f, q.c, static_cast<int>(q.ldc));
  return true;
}
#endif

}  // namespace

Packed::Packed(int64_t k, int64_t n) : k(k), part(k > 0 ? part_of(k) : 1), slivers(n) {}
void Packed::pack(ThreadPool& threads, Matrix b, float* to) const {
  constexpr int64_t kGroup = 8;  // slivers of one task
  const int64_t groups = ceil_div(slivers.count, kGroup);
  threads.parallel(ceil_div(k, part) * groups, [&](int64_t task, int) {
    const int64_t p = task / groups * part, depth = least(part, k - p), s = task % groups * kGroup;
    pack_b(b, p, depth, slivers, s, least(slivers.count, s + kGroup), to + at(p, s));
  });
}

void gemm(ThreadPool& threads, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options) {
  if (m <= 0 || n <= 0) return;
  const Product product{a, b, m, n, k, c, ldc, &options, Slivers(n)};
  if (k <= 0) return product.empty();

  if (is_few(product)) {
    int64_t lda;
    const bool copy = !is_plain(a);
    const float* rows = rows_of_a(product, copy ? static_cast<float*>(threads.scratch(0, static_cast<size_t>(m * k + W) * 4, kSlot)) : nullptr, lda);
    // A task reads some 64 KB of B; dot products can be cut finer, so that few columns still share out evenly.
    const Slivers& slivers = product.slivers;
    const int64_t unit = b.row_stride == 1 ? 1 : 2, each = ceil_div(least(n, (int64_t{1} << 14) / k + 1), unit * NR) * unit;
    threads.parallel(ceil_div(slivers.count, each), [&](int64_t task, int) {
      const int64_t s0 = task * each, s1 = least(slivers.count, s0 + each);
      few(product, rows, lda, slivers.at(s0), slivers.at(s1));
      options.hook(slivers, 0, m, s0, s1);
    });
    return;
  }

#if defined(LIMBECK_BLAS_CBLAS)
  if (vendor(product)) return;
#endif

  const Grid grid(product, threads.size());
  if (grid.held) by_rows(threads, product, grid);
  else by_columns(threads, product, grid);
}

}  // namespace limbeck::cpu::LIMBECK_ISA
