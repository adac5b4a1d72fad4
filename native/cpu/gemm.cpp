#include "cpu/gemm.h"

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

#if defined(__AVX512F__)
constexpr int MR = 14, NV = 2;  // 28 accumulators of 32 registers
#elif defined(__aarch64__)
constexpr int MR = 8, NV = 3;   // 24 of 32
#else
constexpr int MR = 6, NV = 2;   // 12 of 16
#endif
constexpr int NR = NV * W;
static_assert(NR == kBlockColumns);
#if defined(__AVX512F__)
constexpr int64_t KC = 512, MC = 6 * MR;            // a block of A (MC x KC) stays in L2, and a sliver of B (KC x NR) near L1
#else
constexpr int64_t KC = 256, MC = 12 * MR;
#endif
constexpr int64_t kPanelFloats = int64_t{1} << 18;  // a panel of B in L2: 1 MB
constexpr int64_t kSerialCols = 16 * NR;
constexpr int kSlot = 1;
// Rows fetched before they are packed. Rows whose distance is a multiple of 4 KB share one set of L1, which has 8 ways or more.
constexpr int64_t kPackAhead = 6;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t whole(int64_t n) { return ceil_div(n, W) * W; }
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
  int64_t step() const { return whole(height + (high > 0)); }
};

// Slivers of B: [depth][NR] one after the other, the last one padded with zeros to whole vectors.
struct Slivers {
  int64_t count, cols;

  explicit Slivers(int64_t cols) : count(ceil_div(cols, NR)), cols(cols) {}
  int64_t at(int64_t s) const { return s * NR; }
  int64_t of(int64_t s) const { return least(NR, cols - s * NR); }
  int64_t stride(int64_t s) const { return ceil_div(of(s), W) * W; }
};

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

// A is read one number at a time, so that it is copied as it lies and never transposed. A strip is [depth / W][rows][W] where k is
// contiguous, else [depth][step].
bool along_depth(const Matrix& a) { return a.row_stride != 1; }

void pack_a(const Matrix& a, int64_t i0, int64_t rows, int64_t p0, int64_t depth, float* dst) {
  const int64_t at = i0 * a.row_stride + p0 * a.col_stride;
  const Strips strips(rows);
  with_loader(a, [&](auto source) {
    if (along_depth(a)) {
      constexpr int64_t kAhead = 2;
      for (int64_t s = 0; s < strips.count; ++s) {
        const int64_t height = strips.of(s);
        float* d = dst + strips.at(s) * whole(depth);
        for (int64_t r = 0; r < height; ++r) {
          const int64_t from = at + (strips.at(s) + r) * a.row_stride;
          int64_t p = 0;
          for (; p + W <= depth; p += W) {
            source.fetch(from + p + kAhead * a.row_stride);
            store(d + p * height + r * W, source(from + p));
          }
          if (p < depth) store(d + p * height + r * W, source.part(from + p, depth - p));
        }
      }
    } else {
      const int64_t step = strips.step();
      for (int64_t p = 0; p < depth; ++p) {
        const int64_t from = at + p * a.col_stride;
        for (int64_t s = 0; s < strips.count; ++s)
          for (int64_t l = 0; l < step; l += W) {
            const int64_t i = strips.at(s) + l;
            source.fetch(from + i + kPackAhead * a.col_stride);
            store(dst + (s * depth + p) * step + l, i + W <= rows ? source(from + i) : i < rows ? source.part(from + i, rows - i) : Vec{});
          }
      }
    }
  });
}

// B, with contiguous columns: its rows are read along, a few at a time.
template <class Load>
void pack_columns(Load source, int64_t at, int64_t stride, int64_t cols, int64_t depth, float* dst) {
  constexpr int64_t kRows = 8;
  const Slivers slivers(cols);
  for (int64_t p0 = 0; p0 < depth; p0 += kRows) {
    const int64_t rows = least(kRows, depth - p0);
    for (int64_t s = 0; s < slivers.count; ++s) {
      const int64_t first = slivers.at(s), n = slivers.of(s), ld = slivers.stride(s);
      int64_t from = at + p0 * stride + first;
      float* d = dst + first * depth + p0 * ld;
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

// B, with contiguous k: W x W blocks are transposed in registers.
template <class Load>
void pack_depth(Load source, int64_t at, int64_t stride, int64_t cols, int64_t depth, float* dst) {
  const Slivers slivers(cols);
  for (int64_t s = 0; s < slivers.count; ++s) {
    const int64_t first = slivers.at(s), lanes = slivers.of(s), ld = slivers.stride(s);
    for (int64_t p = 0; p < depth; p += W) {
      const int64_t n = depth - p;
      for (int64_t l = 0; l < lanes; l += W) {
        Vec v[W];
        const int64_t rows = lanes - l, from = at + (first + l) * stride + p;
        if (n >= W && rows >= W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) {
            source.fetch(from + (i + lanes) * stride);  // the next sliver
            v[i] = source(from + i * stride);
          }
        } else {
          for (int i = 0; i < W; ++i) v[i] = i < rows ? source.part(from + i * stride, least(n, W)) : Vec{};
        }
        transpose(v);
        float* d = dst + first * depth + p * ld + l;
        if (n >= W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(d + i * ld, v[i]);
        } else {
          for (int64_t i = 0; i < n; ++i) store(d + i * ld, v[i]);
        }
      }
    }
  }
}

void pack_b(const Matrix& b, int64_t p0, int64_t depth, int64_t j0, int64_t cols, float* dst) {
  const int64_t at = p0 * b.row_stride + j0 * b.col_stride;
  with_loader(b, [&](auto source) {
    if (b.col_stride == 1) pack_columns(source, at, b.row_stride, cols, depth, dst);
    else pack_depth(source, at, b.col_stride, cols, depth, dst);
  });
}

// ---- The micro-kernel: R rows by V vectors of C ----

struct Tile {
  float alpha;
  const float* bias;  // at this tile's first column
  bool add;           // C is read
  const float* beside[TileHook::kBeside];  // what the hook will read at the same place; null for none
};

// A strip is [depth / W][R][W] if Along, else [depth][step]. It comes from L2, as B does where depth is large: both are fetched
// some steps ahead. C and what lies beside it come from farther away: a few lines for each W steps, since many at once would hold up
// the loads of A and B.
template <int R, int V, bool Along>
void multiply(int64_t depth, const float* a, int64_t step, const float* b, float* c, int64_t ldc, int64_t cols, const Tile& tile) {
  Vec acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = Vec{};
  constexpr int64_t kAhead = 8;
  const int64_t quick = R * W / depth + 1;
  int64_t fetched = 0;
  for (int64_t p = 0; p < depth; p += W) {
    for (const int64_t until = least(R, fetched + quick); fetched < until; ++fetched) {
      const auto fetch = [&](const float* x) {
        __builtin_prefetch(x + fetched * ldc, 1);
        if (V > 1) __builtin_prefetch(x + fetched * ldc + (V - 1) * W, 1);
      };
      fetch(c);
      for (const float* x : tile.beside)
        if (x) fetch(x);
    }
    const float* const end = b + least(W, depth - p) * (V * W);
    const float* ahead = a + (Along ? R * W : kAhead * step);
    for (; b != end; b += V * W) {
      __builtin_prefetch(ahead);
      ahead += Along ? W : step;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) __builtin_prefetch(b + (kAhead * V + v) * W);
      Vec x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec y = splat(Along ? a[r * W] : a[r]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += y * x[v];
      }
      a += Along ? 1 : step;
    }
    if (Along) a += (R - 1) * W;
  }
  // A step of its own: whether the compiler would fuse it with the additions below could differ from one R to another.
  if (tile.alpha != 1.f)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] *= tile.alpha;
  const auto put = [&](auto finish) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) finish(c + r * ldc + v * W, acc[r][v], v);
  };
  if (cols == V * W && !tile.bias) [[likely]] {
    if (tile.add) put([&](float* d, Vec y, int) { store(d, load(d) + y); });
    else put([&](float* d, Vec y, int) { store(d, y); });
    return;
  }
  put([&](float* d, Vec y, int v) {
    const int64_t n = least(W, cols - v * W);
    if (tile.bias) y += load_part(tile.bias + v * W, n);
    if (tile.add) y += load_part(d, n);
    store_part(d, y, n);
  });
}

using Multiply = void (*)(int64_t, const float*, int64_t, const float*, float*, int64_t, int64_t, const Tile&);
struct Multiplies {
  Multiply by[2][MR][NV];
};
template <int R, int V>
constexpr void fill(Multiplies& m) {
  m.by[0][R - 1][V - 1] = multiply<R, V, false>;
  m.by[1][R - 1][V - 1] = multiply<R, V, true>;
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

  // A packed block of A, rows from i0, by slivers [s0, s1) of a packed part of B whose columns [0, cols) are C's from j0.
  void block(const float* a_block, int64_t i0, int64_t rows, const float* b_part, int64_t j0, int64_t cols, int64_t s0, int64_t s1,
             int64_t p0, int64_t depth, int thread) const {
    const Strips strips(rows);
    const Slivers slivers(cols);
    const int64_t step = strips.step();
    const bool finished = p0 + depth == k, along = along_depth(a);
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t j = j0 + slivers.at(s);
      Tile tile{options->alpha, p0 == 0 && options->bias ? options->bias + j : nullptr, p0 > 0 || options->accumulate, {}};
      const float* sliver = b_part + slivers.at(s) * depth;
      const int64_t vectors = slivers.stride(s) / W, wide = slivers.of(s);
      for (int64_t t = 0; t < strips.count; ++t) {
        const int64_t r = strips.at(t), height = strips.of(t), at = (i0 + r) * ldc + j;
        if (finished)
          for (int x = 0; x < TileHook::kBeside; ++x)
            if (options->hook.beside[x]) tile.beside[x] = options->hook.beside[x] + at;
        const float* const strip = a_block + (along ? r * whole(depth) : t * depth * step);
        kMultiply.by[along][height - 1][vectors - 1](depth, strip, step, sliver, c + at, ldc, wide, tile);
      }
      if (finished) hook(i0, j, rows, wide, thread);
    }
  }

  void hook(int64_t i0, int64_t j0, int64_t rows, int64_t cols, int thread) const {
    if (options->hook.run) options->hook.run(options->hook.ctx, i0, j0, rows, cols, thread);
  }

  // k = 0: nothing to add.
  void empty() const {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        float& x = c[i * ldc + j];
        x = (options->accumulate ? x : 0.f) + (options->bias ? options->bias[j] : 0.f);
      }
    hook(0, 0, m, n, 0);
  }
};

constexpr int64_t kBlockFloats = MC / MR * whole(MR) * KC;

// ---- Sharing out ----

// C is cut into columns x rows tasks, each for one thread and with a panel of B of its own. Of all such cuts that keep the threads
// equally busy, the one for which each of them packs least.
struct Grid {
  int64_t part, panel, columns, rows;  // a panel has at most so many floats, if a part of k and one sliver allow it
  bool held;  // the threads take one panel after the other and keep it for whatever rows they get next

  Grid(const Product& q, int threads) : part(part_of(q.k)), panel((q.a.up ? 2 : 1) * kPanelFloats) {
    const int64_t slivers = ceil_div(q.n, NR), least_columns = ceil_div(q.n, panel / part / NR * NR);
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
    if (held) rows = least(q.m, ceil_div(ceil_div(q.m, MC), workers) * workers);
  }
};

// What a task multiplies: columns [j0, j0 + cols) of B and `deep` rows of it from d0, a panel in parts.
struct Panel {
  int64_t j0, cols, d0, deep, part;

  int64_t depth(int64_t p) const { return least(part, deep - p); }
  int64_t at(int64_t p) const { return p * whole(cols); }
};

// A thread's own block of A and panel of B.
struct Packs {
  float *block, *panel;

  Packs(ThreadPool& threads, int thread, int64_t panel_floats)
      : block(static_cast<float*>(threads.scratch(thread, static_cast<size_t>(kBlockFloats + panel_floats) * 4, kSlot))), panel(block + kBlockFloats) {}
};

void pack(const Product& q, const Panel& x, float* to) {
  for (int64_t p = 0; p < x.deep; p += x.part) pack_b(q.b, x.d0 + p, x.depth(p), x.j0, x.cols, to + x.at(p));
}

// Rows [i0, i1), at most MC, by a packed panel.
void multiply_rows(const Product& q, const Panel& x, const Packs& packs, int64_t i0, int64_t i1, int thread) {
  for (int64_t p = 0; p < x.deep; p += x.part) {
    const int64_t depth = x.depth(p);
    const float* const b = q.b.packed ? static_cast<const float*>(q.b.data) + (x.d0 + p) * whole(q.n) + x.j0 * depth : packs.panel + x.at(p);
    pack_a(q.a, i0, i1 - i0, x.d0 + p, depth, packs.block);
    q.block(packs.block, i0, i1 - i0, b, x.j0, x.cols, 0, ceil_div(x.cols, NR), x.d0 + p, depth, thread);
  }
}

void by_rows(ThreadPool& threads, const Product& q, const Grid& grid) {
  const int64_t slivers = ceil_div(q.n, NR), widest = ceil_div(slivers, grid.columns) * NR, parts = grid.panel / (grid.part * widest);
  const int64_t deepest = least(ceil_div(q.k, grid.part), parts > 1 ? parts : 1) * grid.part;
  const int64_t floats = q.b.packed ? 0 : least(deepest, q.k) * widest;
  std::vector<int64_t> holds(static_cast<size_t>(threads.size()), 0);  // the number of the panel that a thread holds
  int64_t number = 0;
  for (int64_t c = 0; c < grid.columns; ++c) {
    const int64_t j0 = slivers * c / grid.columns * NR, cols = least(q.n, slivers * (c + 1) / grid.columns * NR) - j0;
    for (int64_t d0 = 0; d0 < q.k; d0 += deepest) {
      const Panel panel{j0, cols, d0, least(deepest, q.k - d0), grid.part};
      ++number;
      threads.parallel(grid.rows, [&](int64_t r, int thread) {
        const Packs packs(threads, thread, floats);
        if (!q.b.packed && holds[static_cast<size_t>(thread)] != number) pack(q, panel, packs.panel);
        holds[static_cast<size_t>(thread)] = number;
        multiply_rows(q, panel, packs, q.m * r / grid.rows, q.m * (r + 1) / grid.rows, thread);
      });
    }
  }
}

void by_columns(ThreadPool& threads, const Product& q, const Grid& grid) {
  const int64_t slivers = ceil_div(q.n, NR), floats = q.b.packed ? 0 : grid.part * ceil_div(slivers, grid.columns) * NR;
  threads.parallel(grid.columns * grid.rows, [&](int64_t task, int thread) {
    const int64_t c = task / grid.rows, r = task % grid.rows;
    const int64_t j0 = slivers * c / grid.columns * NR, cols = least(q.n, slivers * (c + 1) / grid.columns * NR) - j0;
    const int64_t first = q.m * r / grid.rows, rows = q.m * (r + 1) / grid.rows - first, blocks = ceil_div(rows, MC);
    const Packs packs(threads, thread, floats);
    for (int64_t d0 = 0; d0 < q.k; d0 += grid.part) {
      const Panel panel{j0, cols, d0, least(grid.part, q.k - d0), grid.part};
      if (!q.b.packed) pack(q, panel, packs.panel);
      for (int64_t x = 0; x < blocks; ++x) multiply_rows(q, panel, packs, first + rows * x / blocks, first + rows * (x + 1) / blocks, thread);
    }
  });
}

// ---- Few rows: nothing is worth packing, so B streams past once ----

constexpr int kFew = 8;
constexpr int64_t kFewFloats = KC * kSerialCols;  // rows of A that must be copied fit in gemm_serial's scratch

LIMBECK_INLINE void finish(const Product& q, int64_t i, int64_t j, float x) {
  float& c = q.c[i * q.ldc + j];
  x *= q.options->alpha;
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
              static_cast<int>(q.k), o.alpha, static_cast<const float*>(a.data), static_cast<int>(lda), static_cast<const float*>(b.data),
              static_cast<int>(ldb), o.accumulate ? 1.f : 0.f, q.c, static_cast<int>(q.ldc));
  return true;
}
#endif

}  // namespace

Packed::Packed(int64_t k, int64_t n) : k(k), n(n), part(k > 0 ? part_of(k) : 1) {}
void Packed::pack(ThreadPool& threads, Matrix b, float* to) const {
  constexpr int64_t kCols = 8 * NR;  // of one task
  const int64_t groups = ceil_div(n, kCols);
  threads.parallel(ceil_div(k, part) * groups, [&](int64_t task, int) {
    const int64_t p = task / groups * part, depth = least(part, k - p), j = task % groups * kCols;
    pack_b(b, p, depth, j, least(kCols, n - j), to + p * whole(n) + j * depth);
  });
}

void gemm(ThreadPool& threads, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options) {
  if (m <= 0 || n <= 0) return;
  const Product product{a, b, m, n, k, c, ldc, &options};
  if (k <= 0) return product.empty();

  if (is_few(product)) {
    int64_t lda;
    const bool copy = !is_plain(a);
    const float* rows = rows_of_a(product, copy ? static_cast<float*>(threads.scratch(0, static_cast<size_t>(m * k + W) * 4, kSlot)) : nullptr, lda);
    // A task reads some 64 KB of B; dot products can be cut finer, so that few columns still share out evenly.
    const int64_t unit = b.row_stride == 1 ? NR : 2 * NR;
    const int64_t width = ceil_div(least(n, (int64_t{1} << 14) / k + 1), unit) * unit;
    threads.parallel(ceil_div(n, width), [&](int64_t task, int thread) {
      const int64_t j0 = task * width, j1 = least(n, j0 + width);
      few(product, rows, lda, j0, j1);
      product.hook(0, j0, m, j1 - j0, thread);
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

size_t gemm_scratch_bytes() { return static_cast<size_t>(kBlockFloats + 64 + KC * kSerialCols) * 4; }

void gemm_serial(void* scratch, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options) {
  if (m <= 0 || n <= 0) return;
  const Product product{a, b, m, n, k, c, ldc, &options};
  if (k <= 0) return product.empty();
  float* const panel = static_cast<float*>(scratch);
  if (is_few(product)) {
    int64_t lda;
    const float* rows = rows_of_a(product, panel, lda);
    few(product, rows, lda, 0, n);
    return product.hook(0, 0, m, n, 0);
  }
  float* const strips = panel + KC * kSerialCols;
  const int64_t part = part_of(k);
  for (int64_t j0 = 0; j0 < n; j0 += kSerialCols) {
    const int64_t cols = least(kSerialCols, n - j0), slivers = ceil_div(cols, NR);
    for (int64_t p = 0; p < k; p += part) {
      const int64_t depth = least(part, k - p);
      pack_b(b, p, depth, j0, cols, panel);
      for (int64_t i0 = 0; i0 < m; i0 += MC) {
        const int64_t rows = least(MC, m - i0);
        pack_a(a, i0, rows, p, depth, strips);
        product.block(strips, i0, rows, panel, j0, cols, 0, slivers, p, depth, 0);
      }
    }
  }
}

}  // namespace limbeck::cpu::LIMBECK_ISA
