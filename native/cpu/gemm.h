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

#if defined(__aarch64__)
constexpr int64_t kBlockColumns = 3 * W;
#else
constexpr int64_t kBlockColumns = 2 * W;
#endif

// B [k n] as gemm() reads it: packed once for several products, or written where it is made. Parts of k, in each of them slivers of
// kBlockColumns, in each of them rows; the last sliver is padded to whole vectors, which must be zero or finite.
struct Packed {
  int64_t k, n, part;
  Packed(int64_t k, int64_t n);
  int64_t floats() const { return k * padded(n); }
  // Row p of the sliver that begins at column j.
  int64_t at(int64_t p, int64_t j) const {
    const int64_t first = p / part * part, depth = k - first < part ? k - first : part;
    const int64_t width = padded(n - j) < kBlockColumns ? padded(n - j) : kBlockColumns;
    return first * padded(n) + j * depth + (p - first) * width;
  }
  void pack(ThreadPool& threads, Matrix b, float* to) const;
  static Matrix matrix(const float* p) { return {p, 0, 0, DType::f32, nullptr, 0, true}; }

 private:
  static int64_t padded(int64_t cols) { return (cols + W - 1) / W * W; }
};

// Called once for each finished block of C (rows i0.., columns j0..), on the thread that made it, while it is still in cache.
// The blocks depend on the number of threads, but always begin at a multiple of kBlockColumns. The hook may use slot 0 of the pool's scratch.
struct TileHook {
  void (*run)(void* ctx, int64_t i0, int64_t j0, int64_t rows, int64_t cols, int thread) = nullptr;
  void* ctx = nullptr;
  // Matrices of C's shape and stride that the hook reads or writes: their lines are fetched while the block is multiplied.
  static constexpr int kBeside = 3;
  const float* beside[kBeside] = {};
};

struct GemmOptions {
  bool accumulate = false;        // C += A B instead of C = A B
  float alpha = 1.f;
  const float* bias = nullptr;    // added to every row, n values
  TileHook hook = {};
};

// C[m n] (row stride ldc) = alpha * A[m k] B[k n] (+ C) (+ bias).
void gemm(ThreadPool& threads, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options = {});

// The same, to the bit, on the calling thread, for use inside ThreadPool::parallel. `scratch` is gemm_scratch_bytes() bytes, 64-byte aligned.
size_t gemm_scratch_bytes();
void gemm_serial(void* scratch, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t ldc, const GemmOptions& options = {});

}  // namespace limbeck::cpu::LIMBECK_ISA
