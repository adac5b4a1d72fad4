#include "cpu/gemm.h"

#include "cpu/gate.h"
#include "cpu/simd.h"

#if defined(LIMBECK_BLAS_ACCELERATE)
#include <Accelerate/Accelerate.h>
#elif defined(LIMBECK_BLAS_MKL)
#include <mkl_cblas.h>
#elif defined(LIMBECK_BLAS_CBLAS)
#include <cblas.h>
#endif

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
#if defined(__AVX512F__)
constexpr int64_t KC = 512, MC = 6 * MR;            // a block of A (MC x KC) stays in L2, and a sliver of B (KC x NR) near L1
#else
constexpr int64_t KC = 256, MC = 12 * MR;
#endif
constexpr int64_t kPanelFloats = int64_t{1} << 18;  // packed B, shared by all threads, passes through L2: 1 MB
constexpr int64_t kGroup = 8;                      // slivers packed by one task
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

// A matrix is packed in bands of lanes (rows of A, columns of B), each band [depth][ld] with ld at least its number of lanes: strips
// of A have no padding, slivers of B are padded with zeros to whole vectors.
struct Bands {
  int64_t count, width, wide;  // the first `wide` bands have width + 1 lanes, the last band ends at `lanes`
  int64_t lanes;
  bool padded;

  // As even as possible: a strip that is a little lower costs nothing, an almost empty one costs much.
  static Bands strips(int64_t rows) {
    const int64_t count = ceil_div(rows, MR);
    return {count, rows / count, rows % count, rows, false};
  }
  static Bands slivers(int64_t cols) { return {ceil_div(cols, NR), NR, 0, cols, true}; }
  int64_t at(int64_t s) const { return s * width + least(s, wide); }
  int64_t of(int64_t s) const { return least(lanes - at(s), width + (s < wide)); }
  int64_t stride(int64_t s) const { return padded ? ceil_div(of(s), W) * W : of(s); }
};

// Writes n <= W lanes of a strip. Whole vectors are fastest: what spills over lies in the next row, which is written later.
LIMBECK_INLINE void put(float* d, Vec v, int64_t n, bool spill) {
  if (spill) {
    store(d, v);
  } else {
    float lane[W];
    store(lane, v);
    for (int64_t i = 0; i < n; ++i) d[i] = lane[i];
  }
}

// Lanes are contiguous: rows of the source are read along, for all bands, a few at a time.
template <class Load>
void pack_lanes(Load source, int64_t at, int64_t stride, Bands bands, int64_t depth, float* dst) {
  constexpr int64_t kRows = 8, kAhead = 16;
  for (int64_t p0 = 0; p0 < depth; p0 += kRows) {
    const int64_t rows = least(kRows, depth - p0);
    for (int64_t s = 0; s < bands.count; ++s) {
      const int64_t first = bands.at(s), lanes = bands.of(s), ld = bands.stride(s);
      const bool inside = first + ceil_div(lanes, W) * W <= bands.lanes;  // whole vectors can be read
      int64_t from = at + p0 * stride + first;
      float* d = dst + first * depth + p0 * ld;
      for (int64_t p = 0; p < rows; ++p, from += stride, d += ld) {
        const bool spill = bands.padded || p0 + p + 1 < depth;
        for (int64_t l = 0; l < lanes; l += W) {
          const int64_t n = lanes - l;
          source.fetch(from + l + kAhead * stride);
          const Vec v = inside || n >= W ? source(from + l) : source.part(from + l, n);
          put(d + l, v, n, spill || n >= W);
        }
      }
    }
  }
}

// k is contiguous: W x W blocks are transposed in registers.
template <class Load>
void pack_depth(Load source, int64_t at, int64_t stride, Bands bands, int64_t depth, float* dst) {
  for (int64_t s = 0; s < bands.count; ++s) {
    const int64_t first = bands.at(s), lanes = bands.of(s), ld = bands.stride(s);
    for (int64_t p = 0; p < depth; p += W) {
      const int64_t n = depth - p;
      for (int64_t l = 0; l < lanes; l += W) {
        Vec v[W];
        const int64_t rows = lanes - l, from = at + (first + l) * stride + p;
        if (n >= W && rows >= W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) {
            source.fetch(from + (i + lanes) * stride);  // the next band
            v[i] = source(from + i * stride);
          }
        } else if (n >= W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) {
            source.fetch(from + (i + lanes) * stride);
            v[i] = i < rows ? source(from + i * stride) : Vec{};
          }
        } else {
          for (int i = 0; i < W; ++i) v[i] = i < rows ? source.part(from + i * stride, n) : Vec{};
        }
        transpose(v);
        float* d = dst + first * depth + p * ld + l;
        // A second vector of a strip must not spill into the next row, which has its first lanes already.
        const bool spill = bands.padded || MR <= W || l == 0 || rows >= W;
        if (n >= W && spill) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(d + i * ld, v[i]);
        } else {
          for (int i = 0; i < least(n, W); ++i) put(d + i * ld, v[i], rows, spill);
        }
      }
    }
  }
}

void pack(const Matrix& x, int64_t at, int64_t lane_stride, int64_t k_stride, Bands bands, int64_t depth, float* dst) {
  const auto go = [&](auto source) {
    if (lane_stride == 1) pack_lanes(source, at, k_stride, bands, depth, dst);
    else pack_depth(source, at, lane_stride, bands, depth, dst);
  };
  if (x.up && x.gate == static_cast<int>(Gate::silu)) go(LoadGated<Gate::silu>{static_cast<const float*>(x.data), x.up});
  else if (x.up) go(LoadGated<Gate::gelu_tanh>{static_cast<const float*>(x.data), x.up});
  else if (x.dtype == DType::bf16) go(LoadBf16{static_cast<const uint16_t*>(x.data)});
  else go(LoadF32{static_cast<const float*>(x.data)});
}

void pack_a(const Matrix& a, int64_t i0, int64_t rows, int64_t p0, int64_t depth, float* dst) {
  pack(a, i0 * a.row_stride + p0 * a.col_stride, a.row_stride, a.col_stride, Bands::strips(rows), depth, dst);
}
void pack_b(const Matrix& b, int64_t p0, int64_t depth, int64_t j0, int64_t cols, float* dst) {
  pack(b, p0 * b.row_stride + j0 * b.col_stride, b.col_stride, b.row_stride, Bands::slivers(cols), depth, dst);
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
  for (int r = 0; r < R; ++r) {
    __builtin_prefetch(c + r * ldc, 1);
    if (V > 1) __builtin_prefetch(c + r * ldc + (V - 1) * W, 1);
  }
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
      if (n >= W) [[likely]] {
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

struct Product {
  Matrix a, b;
  int64_t m, n, k;
  float* c;
  int64_t ldc;
  const GemmOptions* options;

  // A packed block of A, rows from i0, by slivers [s0, s1) of a packed part of B whose columns [0, cols) are C's from j0.
  void block(const float* a_block, int64_t i0, int64_t rows, const float* b_part, int64_t j0, int64_t cols, int64_t s0, int64_t s1,
             int64_t p0, int64_t depth, int thread) const {
    const Bands strips = Bands::strips(rows), slivers = Bands::slivers(cols);
    const bool finished = p0 + depth == k;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t j = j0 + slivers.at(s);
      const Tile tile{options->alpha, p0 == 0 && options->bias ? options->bias + j : nullptr, p0 > 0 || options->accumulate};
      const float* sliver = b_part + slivers.at(s) * depth;
      const int64_t vectors = slivers.stride(s) / W, wide = slivers.of(s);
      for (int64_t t = 0; t < strips.count; ++t) {
        const int64_t r = strips.at(t), height = strips.of(t);
        kMultiply.by[height - 1][vectors - 1](depth, a_block + r * depth, sliver, c + (i0 + r) * ldc + j, ldc, wide, tile);
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

constexpr int64_t kBlockFloats = MC * KC + W;

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
  int64_t p = 0;
  for (; p + W <= q.k; p += W) {
    Vec y[J];
#pragma GCC unroll 4
    for (int c = 0; c < J; ++c) {
      b.fetch(from + c * stride + p + 512);
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
  if (q.b.dtype == DType::bf16) go(LoadBf16{static_cast<const uint16_t*>(q.b.data)});
  else go(LoadF32{static_cast<const float*>(q.b.data)});
}

// Whether this path is taken, by shapes and layout alone.
bool is_plain(const Matrix& a) { return a.col_stride == 1 && a.dtype == DType::f32 && !a.up; }
bool is_few(const Product& q) { return q.m <= kFew && !q.b.up && (is_plain(q.a) || q.m * q.k <= kFewFloats); }

// The rows of A, copied into `to` unless they can be read where they are.
const float* rows_of_a(const Product& q, float* to, int64_t& lda) {
  lda = q.a.row_stride;
  if (is_plain(q.a)) return static_cast<const float*>(q.a.data);
  lda = q.k;
  for (int64_t i = 0; i < q.m; ++i)
    pack(q.a, i * q.a.row_stride, q.a.col_stride, 1, Bands{1, q.k, 0, q.k, false}, 1, to + i * q.k);
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
  if (a.dtype != DType::f32 || b.dtype != DType::f32 || a.up || b.up || o.bias || o.hook.run) return false;
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

void gemm(ThreadPool& threads, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options) {
  if (m <= 0 || n <= 0) return;
  const Product product{a, b, m, n, k, c, ldc, &options};
  if (k <= 0) return product.empty();

  if (is_few(product)) {
    int64_t lda;
    const bool copy = !is_plain(a);
    const float* rows = rows_of_a(product, copy ? static_cast<float*>(threads.scratch(0, static_cast<size_t>(m * k + W) * 4, kSlotA)) : nullptr, lda);
    // A task reads some 64 KB of B.
    const int64_t width = ceil_div(least(n, (int64_t{1} << 14) / k + 1), 2 * NR) * 2 * NR;
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

  // The panel takes all columns if it can, else an even share; then as many parts of k as there is room for.
  // An activation is made once for each panel of columns: fewer and larger panels then.
  const int64_t part = part_of(k), floats = kPanelFloats * (a.up ? 8 : 1), most = floats / part;
  const int64_t panel_cols = ceil_div(ceil_div(n, ceil_div(n, most)), NR) * NR;
  const int64_t depth_max = least(ceil_div(k, part), floats / (part * panel_cols) > 1 ? floats / (part * panel_cols) : 1) * part;
  float* const panel = static_cast<float*>(threads.scratch(0, static_cast<size_t>(panel_cols * depth_max) * 4, kSlotB));

  for (int64_t j0 = 0; j0 < n; j0 += panel_cols) {
    const int64_t cols = least(panel_cols, n - j0), slivers = ceil_div(cols, NR);
    // Tasks: blocks of rows, an equal number for each thread while they are few. Where there are fewer than threads, blocks of
    // columns too (each packs its rows of A again), and at last shorter blocks of rows, which waste the micro-kernel.
    const double work = 2. * static_cast<double>(m) * static_cast<double>(cols) * static_cast<double>(k);
    const int64_t want = least(threads.size(), static_cast<int64_t>(work / 5e5) + 1);
    int64_t row_blocks = ceil_div(m, MC), col_blocks = 1;
    if (row_blocks < want) col_blocks = least(ceil_div(want, row_blocks), ceil_div(slivers, 2));
    if (row_blocks * col_blocks < want) row_blocks = least(ceil_div(want, col_blocks), ceil_div(m, 4 * MR));
    if (row_blocks > 1 && row_blocks * col_blocks % threads.size() != 0 && row_blocks * col_blocks < 16 * threads.size())
      row_blocks = least(m, ceil_div(row_blocks, threads.size()) * threads.size());

    const int64_t padded = ceil_div(cols, W) * W;
    for (int64_t d0 = 0; d0 < k; d0 += depth_max) {
      const int64_t deep = least(depth_max, k - d0), parts = ceil_div(deep, part), groups = ceil_div(slivers, kGroup);
      threads.parallel(parts * groups, [&](int64_t task, int) {
        const int64_t p = task / groups * part, depth = least(part, deep - p), j = task % groups * (kGroup * NR);
        pack_b(b, d0 + p, depth, j0 + j, least(kGroup * NR, cols - j), panel + p * padded + j * depth);
      });
      threads.parallel(row_blocks * col_blocks, [&](int64_t task, int thread) {
        const int64_t rb = task / col_blocks, cb = task % col_blocks;
        const int64_t i0 = m * rb / row_blocks, i1 = m * (rb + 1) / row_blocks;
        const int64_t s0 = slivers * cb / col_blocks, s1 = slivers * (cb + 1) / col_blocks;
        float* const strips = static_cast<float*>(threads.scratch(thread, kBlockFloats * 4, kSlotA));
        for (int64_t p = 0; p < deep; p += part) {
          const int64_t depth = least(part, deep - p);
          pack_a(a, i0, i1 - i0, d0 + p, depth, strips);
          product.block(strips, i0, i1 - i0, panel + p * padded, j0, cols, s0, s1, d0 + p, depth, thread);
        }
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
