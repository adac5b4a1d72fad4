// Tiles of K, V and Q in shared memory, brought there by cp.async: for every kernel of attention that multiplies with mma.sync.
#pragma once
#include "cuda/attention.cuh"

namespace limbeck::cuda::attention {

constexpr uint32_t kOnes = 0x3f803f80;  // two of bf16
constexpr unsigned kWarp = 0xffffffffu;
constexpr float kInfinity = __builtin_inff();
// The running maximum before any key: finite, so that no difference of infinities is taken. Far below any score.
constexpr float kNoScore = -1e30f;

// A tile in shared memory: rows of D elements, in 16-byte pieces. ldmatrix reads one piece of 8 rows at once; pieces are swapped
// among the largest aligned power of two of them, so that those 8 lie in different banks for any D that is a multiple of 16.
template <int D>
struct Tile {
  static constexpr int pieces = D / 8;
  static constexpr int swapped = pieces % 8 == 0 ? 8 : pieces % 4 == 0 ? 4 : 2;
  static __device__ __forceinline__ int flip(int row) { return row / (8 / swapped) & (swapped - 1); }
  static __device__ __forceinline__ int at(int row, int piece) { return (row * pieces + (piece ^ flip(row))) * 8; }
  // piece ^ flip for a constant piece: few different sums, the rest is constant.
  static __device__ __forceinline__ int moved(int piece, int flip) { return (piece % swapped ^ flip) + piece / swapped * swapped; }
};

// By all threads of a block, or by the 32 of each warp. Rows and pieces that do not exist are zero; line(row) is null for those rows.
// Tensors whose rows are not whole pieces are copied element by element, and at once. Of a problem its q, d and whole_chunks count.
template <int D, int Rows, int Threads, class P, class Line>
__device__ __forceinline__ void load_rows(bf16* tile, const P& p, Line line) {
  constexpr int pieces = Tile<D>::pieces;
  const int thread = Threads == 32 ? static_cast<int>(threadIdx.x) % 32 : static_cast<int>(threadIdx.x);
  if (p.whole_chunks) {
    // Not unrolled: addresses computed ahead would take registers that the accumulators need.
#pragma unroll 1
    for (int i = thread; i < Rows * pieces; i += Threads) {
      const int row = i / pieces, piece = i % pieces;
      const bf16* from = line(row);
      const bool there = from != nullptr && piece * 8 < p.d;
      ptx::cp_async_16(tile + Tile<D>::at(row, piece), there ? from + piece * 8 : p.q, there ? 16 : 0);
    }
    return;
  }
#pragma unroll 1
  for (int i = thread; i < Rows * pieces; i += Threads) {
    const int row = i / pieces, piece = i % pieces;
    const bf16* from = line(row);
    bf16* to = tile + Tile<D>::at(row, piece);
#pragma unroll 1
    for (int j = 0; j < 8; ++j) to[j] = from != nullptr && piece * 8 + j < p.d ? from[piece * 8 + j] : bf16{0};
  }
}

}  // namespace limbeck::cuda::attention
