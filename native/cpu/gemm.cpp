#include "cpu/gemm.h"

#include "cpu/gate.h"
#include "cpu/simd.h"

// The product is cut as in Goto's scheme: B is packed once, by all threads, into slivers of NR columns; then each task packs
// blocks of A (kept in its own L2) into strips of at most MR rows and multiplies strips by slivers in registers. An element of C is
// always one chain of multiply-adds over each KC of k, in order, however the rest is cut: so the bits depend on k alone.
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
constexpr int64_t KC = 256;                        // a sliver of B (KC x NR) stays in L1 while strips of A stream past it
constexpr int64_t MC = 12 * MR;                    // a block of A (MC x KC) stays in L2
constexpr int64_t kPanelFloats = int64_t{2} << 20; // packed B, shared by all threads: 8 MB, from L3
constexpr int64_t kDepth = 8192;                   // k packed at once
constexpr int64_t kSerialCols = 16 * NR;
constexpr int kSlotA = 1, kSlotB = 2;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// k is cut evenly; a part is at most KC.
int64_t part_of(int64_t k) { return least(KC, ceil_div(ceil_div(k, ceil_div(k, KC)), 8) * 8); }

// ---- Loading: what packing reads, W elements at a time ----

struct LoadF32 {
  const float* p;
  LIMBECK_INLINE Vec operator()(int64_t i) const { return load(p + i); }
  LIMBECK_INLINE Vec part(int64_t i, int64_t n) const { return load_part(p + i, n); }
};
struct LoadBf16 {
  const uint16_t* p;
  LIMBECK_INLINE Vec operator()(int64_t i) const { return load_bf16(p + i); }
  LIMBECK_INLINE Vec part(int64_t i, int64_t n) const { return load_bf16_part(p + i, n); }
};
template <Gate G>
struct LoadGated {
  const float* gate;
  const float* up;
  LIMBECK_INLINE Vec operator()(int64_t i) const { return gate_value<G>(load(gate + i)) * load(up + i); }
  LIMBECK_INLINE Vec part(int64_t i, int64_t n) const { return gate_value<G>(load_part(gate + i, n)) * load_part(up + i, n); }
};

// ---- Packing: dst[p * ld + lane] = source(lane, p), lanes beyond `lanes` are zero up to a whole vector ----

template <class Load>
void pack_lanes(Load source, int64_t at, int64_t stride, int64_t lanes, int64_t depth, float* dst, int64_t ld) {
  // Lanes are contiguous.
  const int64_t whole = lanes / W * W;
  for (int64_t p = 0; p < depth; ++p, at += stride, dst += ld) {
    for (int64_t l = 0; l < whole; l += W) store(dst + l, source(at + l));
    if (whole < lanes) store(dst + whole, source.part(at + whole, lanes - whole));
  }
}

template <class Load>
void pack_depth(Load source, int64_t at, int64_t stride, int64_t lanes, int64_t depth, float* dst, int64_t ld) {
  // k is contiguous: W x W blocks are transposed in registers.
  for (int64_t p = 0; p < depth; p += W) {
    const int64_t n = depth - p;
    for (int64_t l = 0; l < lanes; l += W) {
      Vec v[W];
      const int64_t from = at + l * stride + p;
      if (n >= W && lanes - l >= W) {
        for (int i = 0; i < W; ++i) v[i] = source(from + i * stride);
      } else {
        for (int i = 0; i < W; ++i) {
          if (i >= lanes - l) v[i] = Vec{};
          else v[i] = n >= W ? source(from + i * stride) : source.part(from + i * stride, n);
        }
      }
      transpose(v);
      float* d = dst + p * ld + l;
      if (MR > W && l > 0 && l + W > ld) {  // must not spill into the next row, which already has its first lanes
        for (int i = 0; i < W; ++i)
          if (i < n) store_part(d + i * ld, v[i], ld - l);
      } else if (n >= W) {
        for (int i = 0; i < W; ++i) store(d + i * ld, v[i]);
      } else {
        for (int i = 0; i < W; ++i)
          if (i < n) store(d + i * ld, v[i]);
      }
    }
  }
}

template <class Load>
void pack(Load source, int64_t at, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t depth, float* dst, int64_t ld) {
  if (lane_stride == 1) pack_lanes(source, at, k_stride, lanes, depth, dst, ld);
  else pack_depth(source, at, lane_stride, lanes, depth, dst, ld);
}

void pack(const Matrix& x, int64_t at, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t depth, float* dst, int64_t ld) {
  const auto go = [&](auto source) { pack(source, at, lane_stride, k_stride, lanes, depth, dst, ld); };
  if (x.up && x.gate == static_cast<int>(Gate::silu)) go(LoadGated<Gate::silu>{static_cast<const float*>(x.data), x.up});
  else if (x.up) go(LoadGated<Gate::gelu_tanh>{static_cast<const float*>(x.data), x.up});
  else if (x.dtype == DType::bf16) go(LoadBf16{static_cast<const uint16_t*>(x.data)});
  else go(LoadF32{static_cast<const float*>(x.data)});
}

// Rows [i0, i0 + rows) in strips, each [depth][height]. Vectors are stored whole: what spills over is overwritten by the next row,
// so strips are packed in order, and the buffer has W floats to spare.
struct Strips {
  int64_t count, height, tall;  // the first `tall` strips have height + 1 rows
  explicit Strips(int64_t rows) : count(ceil_div(rows, MR)), height(rows / count), tall(rows % count) {}
  int64_t at(int64_t s) const { return s * height + least(s, tall); }
  int of(int64_t s) const { return static_cast<int>(height + (s < tall)); }
};

void pack_a(const Matrix& a, int64_t i0, int64_t rows, int64_t p0, int64_t depth, float* dst) {
  const Strips strips(rows);
  for (int64_t s = 0; s < strips.count; ++s) {
    const int64_t r = strips.at(s);
    pack(a, (i0 + r) * a.row_stride + p0 * a.col_stride, a.row_stride, a.col_stride, strips.of(s), depth, dst + r * depth, strips.of(s));
  }
}

// Columns [j0, j0 + cols), cols <= NR, in one sliver [depth][width], width = cols in whole vectors.
constexpr int64_t width_of(int64_t cols) { return ceil_div(cols, W) * W; }

void pack_b(const Matrix& b, int64_t p0, int64_t depth, int64_t j0, int64_t cols, float* dst) {
  pack(b, p0 * b.row_stride + j0 * b.col_stride, b.col_stride, b.row_stride, cols, depth, dst, width_of(cols));
}

// ---- The micro-kernel: R rows by V vectors of C ----

struct Tile {
  float alpha;
  const float* bias;  // at this tile's first column
  bool add;           // C is read
};

template <int R, int V>
void multiply(int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t cols, const Tile& tile) {
  Vec acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = Vec{};
  for (int r = 0; r < R; ++r) __builtin_prefetch(c + r * ldc, 1);
  for (int64_t p = 0; p < depth; ++p, a += R, b += V * W) {
    Vec x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec y = splat(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += y * x[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t n = cols - v * W;
      float* d = c + r * ldc + v * W;
      Vec y = acc[r][v] * tile.alpha;
      if (n >= W) {
        if (tile.bias) y += load(tile.bias + v * W);
        if (tile.add) y += load(d);
        store(d, y);
      } else {
        if (tile.bias) y += load_part(tile.bias + v * W, n);
        if (tile.add) y += load_part(d, n);
        store_part(d, y, n);
      }
    }
  }
}

using Multiply = void (*)(int64_t, const float*, const float*, float*, int64_t, int64_t, const Tile&);
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

// A block of packed A (rows from i0) by slivers [s0, s1) of packed B, whose first column is column j0 of C.
struct Product {
  Matrix a, b;
  int64_t m, n, k;
  float* c;
  int64_t ldc;
  const GemmOptions* options;

  // `panel` holds columns [j0, j0 + cols) of B in slivers [depth_all][width]; this part of k starts `skip` rows into it.
  void block(const float* strips_of_a, int64_t i0, int64_t rows, const float* panel, int64_t depth_all, int64_t skip, int64_t j0,
             int64_t cols, int64_t s0, int64_t s1, int64_t p0, int64_t depth) const {
    const Strips strips(rows);
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t wide = least(NR, cols - s * NR), width = width_of(wide), j = j0 + s * NR;
      const float* sliver = panel + s * NR * depth_all + skip * width;
      const Tile tile{options->alpha, p0 == 0 && options->bias ? options->bias + j : nullptr, p0 > 0 || options->accumulate};
      for (int64_t t = 0; t < strips.count; ++t) {
        const int64_t r = strips.at(t);
        const int height = strips.of(t);
        kMultiply.by[height - 1][width / W - 1](depth, strips_of_a + r * depth, sliver, c + (i0 + r) * ldc + j, ldc, wide, tile);
      }
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

constexpr int64_t kBlockFloats = MC * KC + W;

}  // namespace

void gemm(ThreadPool& threads, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options) {
  if (m <= 0 || n <= 0) return;
  const Product product{a, b, m, n, k, c, ldc, &options};
  if (k <= 0) return product.empty();

  const int64_t part = part_of(k), depth_max = least(k, kDepth / part * part);
  const int64_t panel_cols = [&] {
    const int64_t most = kPanelFloats / depth_max / NR * NR;
    return ceil_div(ceil_div(n, ceil_div(n, most > NR ? most : NR)), NR) * NR;
  }();
  float* const panel = static_cast<float*>(threads.scratch(0, static_cast<size_t>(panel_cols * depth_max) * 4, kSlotB));

  for (int64_t j0 = 0; j0 < n; j0 += panel_cols) {
    const int64_t cols = least(panel_cols, n - j0), slivers = ceil_div(cols, NR);
    // Tasks: blocks of rows; of columns too where rows are few. At least four for a thread, unless they become too small.
    const double work = 2. * static_cast<double>(m) * static_cast<double>(cols) * static_cast<double>(k);
    const int64_t want = threads.size() == 1 ? 1 : least(4 * threads.size(), static_cast<int64_t>(work / 5e5) + 1);
    int64_t row_blocks = ceil_div(m, MC), col_blocks = 1;
    if (row_blocks < want) row_blocks = least(want, ceil_div(m, 4 * MR));
    if (row_blocks < want) col_blocks = least(ceil_div(want, row_blocks), ceil_div(slivers, 2));
    if (col_blocks == 1 && row_blocks > 1 && row_blocks < 16 * threads.size())
      row_blocks = least(m, ceil_div(row_blocks, threads.size()) * threads.size());

    for (int64_t d0 = 0; d0 < k; d0 += depth_max) {
      const int64_t deep = least(depth_max, k - d0);
      threads.parallel(slivers, [&](int64_t s, int) {
        const int64_t wide = least(NR, cols - s * NR);
        pack_b(b, d0, deep, j0 + s * NR, wide, panel + s * NR * deep);
      });
      threads.parallel(row_blocks * col_blocks, [&](int64_t task, int thread) {
        const int64_t rb = task / col_blocks, cb = task % col_blocks;
        const int64_t i0 = m * rb / row_blocks, i1 = m * (rb + 1) / row_blocks;
        const int64_t s0 = slivers * cb / col_blocks, s1 = slivers * (cb + 1) / col_blocks;
        float* const strips = static_cast<float*>(threads.scratch(thread, kBlockFloats * 4, kSlotA));
        for (int64_t p = 0; p < deep; p += part) {
          const int64_t depth = least(part, deep - p);
          pack_a(a, i0, i1 - i0, d0 + p, depth, strips);
          product.block(strips, i0, i1 - i0, panel, deep, p, j0, cols, s0, s1, d0 + p, depth);
        }
        if (d0 + deep == k) product.hook(i0, j0 + s0 * NR, i1 - i0, least(cols, s1 * NR) - s0 * NR, thread);
      });
    }
  }
}

size_t gemm_scratch_bytes() { return static_cast<size_t>(kBlockFloats + 64 + KC * kSerialCols) * 4; }

void gemm_serial(void* scratch, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options) {
  if (m <= 0 || n <= 0) return;
  const Product product{a, b, m, n, k, c, ldc, &options};
  if (k <= 0) return product.empty();
  float* const panel = static_cast<float*>(scratch);
  float* const strips = panel + KC * kSerialCols;
  const int64_t part = part_of(k);
  for (int64_t j0 = 0; j0 < n; j0 += kSerialCols) {
    const int64_t cols = least(kSerialCols, n - j0), slivers = ceil_div(cols, NR);
    for (int64_t p = 0; p < k; p += part) {
      const int64_t depth = least(part, k - p);
      for (int64_t s = 0; s < slivers; ++s) pack_b(b, p, depth, j0 + s * NR, least(NR, cols - s * NR), panel + s * NR * depth);
      for (int64_t i0 = 0; i0 < m; i0 += MC) {
        const int64_t rows = least(MC, m - i0);
        pack_a(a, i0, rows, p, depth, strips);
        product.block(strips, i0, rows, panel, depth, 0, j0, cols, 0, slivers, p, depth);
        if (p + depth == k) product.hook(i0, j0, rows, cols, 0);
      }
    }
  }
}

}  // namespace limbeck::cpu::LIMBECK_ISA
