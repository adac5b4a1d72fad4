// Matrix products on packed panels. C is row-major float32; A and B are views with any unit stride, float32 or bfloat16 (widened
// while packing). The bits of a result depend on shapes and instruction set only, never on the number of threads.
#pragma once
#include "core/kernel.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"

namespace limbeck::cpu::LIMBECK_ISA {

// Element (i, j) is data[i * row_stride + j * col_stride]; one of the strides is 1.
struct Matrix {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;
  DType dtype = DType::f32;
  // With `up`, of the same layout, an element is gate_value(data) * up: the activation of a gated MLP, made while packing. f32 only.
  const float* up = nullptr;
  int gate = 0;  // Gate of gate.h
  bool packed = false;  // as Packed lays it out, strides unused; B only
  // With `bits` (8 or 4), codes in blocks with their scales, strides in elements of rows of whole blocks; B only.
  const uint16_t* scales = nullptr;
  int bits = 0;
};
inline Matrix rows_of(const void* p, int64_t stride, DType t = DType::f32) { return {p, stride, 1, t}; }
inline Matrix transposed(const void* p, int64_t stride, DType t = DType::f32) { return {p, 1, stride, t}; }

#if defined(__aarch64__)
constexpr int64_t kBlockVectors = 3;
#else
constexpr int64_t kBlockVectors = 2;
#endif

// Columns filled up to whole vectors.
constexpr int64_t whole(int64_t cols) { return (cols + W - 1) / W * W; }

// How the columns of B and C are cut: into slivers of kBlockVectors vectors. The last two share what is left evenly, because a narrow
// one reads as much of A as a wide one and multiplies less.
struct Slivers {
  static constexpr int64_t kWidest = kBlockVectors * W;
  int64_t cols, count;

  explicit Slivers(int64_t cols) : cols(cols), count((cols + kWidest - 1) / kWidest) {}
  // The first column of sliver s; of sliver `count`: cols.
  int64_t at(int64_t s) const {
    if (s >= count) return cols;
    if (s == 0 || s + 1 < count) return s * kWidest;
    const int64_t before = (s - 1) * kWidest, vectors = whole(cols - before) / W;
    return before + (vectors + 1) / 2 * W;
  }
  int64_t of(int64_t s) const { return at(s + 1) - at(s); }
};

// B [k n] as gemm() reads it: packed once for several products, or written where it is made. Parts of k, in each of them slivers, in each
// of them rows; the last sliver is padded to whole vectors, which must be zero or finite.
struct Packed {
  int64_t k, part;
  Slivers slivers;
  Packed(int64_t k, int64_t n);
  int64_t floats() const { return k * whole(slivers.cols); }
  // Row p of sliver s.
  int64_t at(int64_t p, int64_t s) const {
    const int64_t first = p / part * part, depth = k - first < part ? k - first : part;
    return first * whole(slivers.cols) + slivers.at(s) * depth + (p - first) * whole(slivers.of(s));
  }
  void pack(ThreadPool& threads, Matrix b, float* to) const;
  static Matrix matrix(const float* p) { return {p, 0, 0, DType::f32, nullptr, 0, true}; }
};

// Rows of one sliver of C.
struct Block {
  int64_t i0, rows, sliver, j0, cols;
};

// row(i, over) for each row of a block, where over(body) calls body(column, lanes) for its vectors. A sliver of just two, the usual one on
// x86-64, is taken without a loop: constants then stay in registers from row to row.
template <class Row>
LIMBECK_INLINE void each_row_of(const Block& b, Row&& row) {
  if (b.cols == 2 * W)
    for (int64_t i = b.i0; i < b.i0 + b.rows; ++i) row(i, [](auto body) __attribute__((always_inline)) { body(int64_t{0}, TwoVectors{}); });
  else
    for (int64_t i = b.i0; i < b.i0 + b.rows; ++i) row(i, [&b](auto body) __attribute__((always_inline)) { for_pairs(0, b.cols, body); });
}

// Called once for each finished block of C, on the thread that made it, while it is still in cache. How many rows are in a block depends on
// the number of threads.
struct TileHook {
  void (*run)(void* ctx, const Block& block) = nullptr;
  void* ctx = nullptr;
  // Matrices of C's shape and stride that the hook reads or writes: their lines are fetched while the block is multiplied.
  static constexpr int kBeside = 3;
  const float* beside[kBeside] = {};

  // Slivers [s0, s1) of some rows are finished.
  void operator()(const Slivers& slivers, int64_t i0, int64_t rows, int64_t s0, int64_t s1) const {
    if (run)
      for (int64_t s = s0; s < s1; ++s) run(ctx, {i0, rows, s, slivers.at(s), slivers.of(s)});
  }
};

struct GemmOptions {
  bool accumulate = false;        // C += A B instead of C = A B
  const float* bias = nullptr;    // added to every row, n values
  TileHook hook = {};
};

// C[m n] (row stride ldc) = A[m k] B[k n] (+ C) (+ bias).
void gemm(ThreadPool& threads, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options = {});

}  // namespace limbeck::cpu::LIMBECK_ISA
