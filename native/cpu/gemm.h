// Matrix products on packed panels. C is row-major float32; A and B are views with any unit stride, float32 or bfloat16 (widened
// while packing). The bits of a result depend on shapes and instruction set only, never on the number of threads.
#pragma once
#include "core/kernel.h"
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

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kBlockVectors = 3;
#else
constexpr int64_t kBlockVectors = 2;
#endif

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
    const int64_t before = (s - 1) * kWidest, vectors = (cols - before + W - 1) / W;
    return before + (vectors + 1) / 2 * W;
  }
  int64_t of(int64_t s) const { return at(s + 1) - at(s); }
  // The sliver that holds column j.
  int64_t index(int64_t j) const {
    const int64_t s = j / kWidest;
    return s + 2 == count && j >= at(s + 1) ? s + 1 : s;
  }
};

// B [k n] as gemm() reads it: packed once for several products, or written where it is made. Parts of k, in each of them slivers, in each
// of them rows; the last sliver is padded to whole vectors, which must be zero or finite.
struct Packed {
  int64_t k, n, part;
  Packed(int64_t k, int64_t n);
  int64_t floats() const { return k * whole(n); }
  // Row p of sliver s.
  int64_t at(int64_t p, int64_t s) const {
    const Slivers slivers(n);
    const int64_t first = p / part * part, depth = k - first < part ? k - first : part;
    return first * whole(n) + slivers.at(s) * depth + (p - first) * whole(slivers.of(s));
  }
  void pack(ThreadPool& threads, Matrix b, float* to) const;
  static Matrix matrix(const float* p) { return {p, 0, 0, DType::f32, nullptr, 0, true}; }

 private:
  static int64_t whole(int64_t cols) { return (cols + W - 1) / W * W; }
};

// Called once for each finished block of C (rows i0.., columns j0..), on the thread that made it, while it is still in cache.
// The blocks depend on the number of threads, but are always whole slivers. The hook may use slot 0 of the pool's scratch.
struct TileHook {
  void (*run)(void* ctx, int64_t i0, int64_t j0, int64_t rows, int64_t cols, int thread) = nullptr;
  void* ctx = nullptr;
  // Matrices of C's shape and stride that the hook reads or writes: their lines are fetched while the block is multiplied.
  static constexpr int kBeside = 3;
  const float* beside[kBeside] = {};
};

struct GemmOptions {
  bool accumulate = false;        // C += A B instead of C = A B
  const float* bias = nullptr;    // added to every row, n values
  TileHook hook = {};
};

// C[m n] (row stride ldc) = A[m k] B[k n] (+ C) (+ bias).
void gemm(ThreadPool& threads, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options = {});

}  // namespace limbeck::cpu::LIMBECK_ISA
