// Matrix products on Hopper whose results are used where they are made: y[rows words] = x[rows c] w[words c]^T, bf16 with float32 sums,
// handed to a pass in registers instead of being written.
//
// A block is three warpgroups. One thread of the first brings tiles by TMA through a ring of stages; the other two take turns: while
// one multiplies 128 rows by 192 words, the other passes over what it has made, so that the tensor cores never wait for a pass. Blocks
// stay, one on each processor, and walk over the tiles with the rows first, so that words are read from memory once. (Clusters of two
// that share words are no faster: 784 and 777 TFLOP/s on an H200, with an odd number of row tiles 698 and 745.)
#pragma once
#include "cuda/launch.h"
#include "cuda/lanes.cuh"
#include "cuda/ptx.cuh"
#include "cuda/warpgroup.cuh"

namespace limbeck::cuda::product_sm90 {

#if defined(LIMBECK_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LIMBECK_PRODUCT_SM90 1
#else
#define LIMBECK_PRODUCT_SM90 0
#endif

constexpr int kBlockThreads = 384;
constexpr int kTileRows = 128, kTileWords = 192, kDepth = 64, kStages = 5;
constexpr int kHalfRows = 64;                                 // what one instruction takes
constexpr int kHalfSums = kTileWords / 2;                     // a thread's results of them
constexpr int kPanel = 64;                                    // columns that are written at a time
constexpr int kRowsWords = kTileRows * kDepth / 2, kWordsWords = kTileWords * kDepth / 2;  // 32-bit words of a stage
constexpr int kPieceWords = kHalfRows * kPanel / 2;
constexpr size_t kShared = 4 * (kStages * (kRowsWords + kWordsWords) + 2 * kPieceWords) + 2 * kStages * sizeof(uint64_t) + 1024;

struct Work {
  int rows, words, steps;  // steps of kDepth along c
  int across, tiles;       // row tiles; all tiles
  bool stores;             // whether the pass leaves bf16 behind
};

// Walks over a thread's results of 64 rows, words from `word` on, two columns at a time: pair(i, u, v, has_u, has_v) makes what is stored of
// those of row thread_row() + 8 i, of which has_u and has_v are inside. put as in pass.half.
template <class Pair, class Put>
__device__ __forceinline__ void each_pair(const Work& work, const float (&sums)[kHalfSums], int word, Pair pair, Put put) {
  const int left = work.words - word - thread_column();
  const auto walk = [&]<bool whole>(std::bool_constant<whole>) {
#pragma unroll
    for (int panel = 0; panel < kTileWords / kPanel; ++panel) {
      uint32_t packed[kPanel / 8][2];
#pragma unroll
      for (int j = 0; j < kPanel / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = panel * kPanel + 8 * j, own = at / 2 + 2 * i;
          packed[j][i] = pair(i, sums[own], sums[own + 1], whole || at < left, whole || at + 1 < left);
        }
      if (work.stores) put(panel, packed);
    }
  };
  if (word + kTileWords <= work.words) walk(std::true_type{});
  else walk(std::false_type{});
}

// What a pass adds up for each row, summed over the tile, to *to(row).
template <class To>
__device__ __forceinline__ void put_row_sums(const Work& work, const float (&sum)[2], int row, To to) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float whole = quad_sum(sum[i]);
    if (const int own = row + thread_row() + 8 * i; threadIdx.x % 4 == 0 && own < work.rows) *to(own) = whole;
  }
}

// pass.half(sums, row, word, put) gets 64 rows from `row` on, words from `word` on, and calls put(panel, packed) with 64 columns at a
// time of what is to be stored: packed[j][i] are columns 8 j + thread_column() of thread_row() + 8 i. What lies beyond rows and words is
// zero.
template <class Pass>
__global__ void __launch_bounds__(kBlockThreads, 1)
    product_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap y_map,
                   const __grid_constant__ Work work, const __grid_constant__ Pass pass) {
#if LIMBECK_PRODUCT_SM90
  Shared shared;
  auto* rows = shared.take<uint32_t>(kStages * kRowsWords, 1024);
  auto* words = shared.take<uint32_t>(kStages * kWordsWords, 1024);
  auto* pieces = shared.take<uint32_t>(2 * kPieceWords, 1024);
  auto* full = shared.take<uint64_t>(kStages);
  auto* empty = shared.take<uint64_t>(kStages);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, 4);  // the warps of one warpgroup
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int first = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x), count = (work.tiles - first + blocks - 1) / blocks;
  const auto row_of = [&](int t) { return (first + t * blocks) % work.across * kTileRows; };
  const auto word_of = [&](int t) { return (first + t * blocks) / work.across * kTileWords; };

  if (warpgroup_of_thread() == 0) {
    ptx::setmaxnreg_dec<kLoadRegisters>();
    if (threadIdx.x == 0) {
      Slot<kStages> slot{0, 1};
      for (int t = 0; t < count; ++t) {
        const int row = row_of(t), word = word_of(t);
#pragma unroll 1
        for (int step = 0; step < work.steps; ++step) {
          ptx::mbarrier_wait(empty + slot.stage, slot.parity);
          ptx::mbarrier_arrive_expect_tx(full + slot.stage, 4 * (kRowsWords + kWordsWords));
          ptx::tma_load(rows + slot.stage * kRowsWords, &x_map, full + slot.stage, step * kDepth, row);
          ptx::tma_load(words + slot.stage * kWordsWords, &w_map, full + slot.stage, step * kDepth, word);
          slot.next();
        }
      }
    }
    return;
  }

  ptx::setmaxnreg_inc<kComputeRegisters>();
  constexpr int kTurn = 3;  // and the next: barriers of both warpgroups; 1 and 2 are their own
  const int me = warpgroup_of_thread() - 1, lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t* const piece = pieces + me * kPieceWords;
  const auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty + stage);
  };

  for (int t = me; t < count; t += 2) {
    float sums[2][kHalfSums];
    if (t > 0) ptx::bar_sync(kTurn + me, 256);
    const int before = t * work.steps;
    Slot<kStages> slot{before % kStages, static_cast<uint32_t>(before / kStages) & 1};
    int last = 0;
#pragma unroll 1
    for (int step = 0; step < work.steps; ++step) {
      ptx::mbarrier_wait(full + slot.stage, slot.parity);
      ptx::wgmma_fence();
      const uint64_t a = ptx::wgmma_descriptor(rows + slot.stage * kRowsWords, 16, 1024, Swizzle::b128),
                     b = ptx::wgmma_descriptor(words + slot.stage * kWordsWords, 16, 1024, Swizzle::b128);
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          ptx::wgmma<kTileWords>(sums[half], a + (half * kHalfRows * 128 + k * 32) / 16, b + k * 32 / 16, step + k > 0);
      ptx::wgmma_commit();
      if (step > 0) {
        ptx::wgmma_wait<1>();
        release(last);
      }
      last = slot.stage;
      slot.next();
    }
    if (t + 1 < count) ptx::bar_arrive(kTurn + 1 - me, 256);
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(sums[0]);
    ptx::wgmma_settle(sums[1]);
    release(last);

    const int row = row_of(t), word = word_of(t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pass.half(work, sums[half], row + half * kHalfRows, word, [&](int panel, const uint32_t(&packed)[kPanel / 8][2]) {
        if (threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();
        ptx::bar_sync(1 + me, 128);  // the last piece has gone
#pragma unroll
        for (int j = 0; j < kPanel / 8; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = thread_row() + 8 * i;
            piece[at * 32 + (j ^ (at % 8)) * 4 + thread_column() / 2] = packed[j][i];
          }
        ptx::fence_proxy_async();
        ptx::bar_sync(1 + me, 128);
        if (threadIdx.x % 128 == 0) {
          ptx::tma_store(&y_map, piece, word + panel * kPanel, row + half * kHalfRows);
          ptx::bulk_commit();
        }
      });
    }
  }
  if (threadIdx.x % 128 == 0) ptx::bulk_wait<0>();
#endif
}

// ---- Host.

// Whether x and w are such as TMA takes, on such a device.
inline bool takes(const Device& device, const void* x, const void* w, int64_t c) {
  return device.architecture == 90 && kShared <= device.shared_per_block && c > 0 && c % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(w) % 16 == 0;
}

inline TensorMap map_of(const void* data, int64_t columns, int64_t rows, int64_t ld, int box_columns, int box_rows) {
  const int64_t dims[] = {columns, rows}, strides[] = {ld * 2};
  const int box[] = {box_columns, box_rows};
  return tensor_map(data, DType::bf16, 2, dims, strides, box, Swizzle::b128);
}

// Tiles along the words: what a pass may leave behind for each of them.
constexpr int64_t tiles_of(int64_t words) { return ceil_div(words, kTileWords); }

// The pass over x[rows c] w[words c]^T; what it stores goes to y[rows words], rows `ld` elements apart. Without y it stores nothing.
template <class Pass>
void run(const Call& call, const bf16* x, int64_t rows, const bf16* w, int64_t words, int64_t c, bf16* y, int64_t ld, const Pass& pass) {
  if (rows == 0 || words == 0) return;
  Work work{};
  work.rows = static_cast<int>(rows);
  work.words = static_cast<int>(words);
  work.steps = static_cast<int>(ceil_div(c, kDepth));
  work.across = static_cast<int>(ceil_div(rows, kTileRows));
  work.tiles = work.across * static_cast<int>(tiles_of(words));
  work.stores = y != nullptr;
  const TensorMap x_map = map_of(x, c, rows, c, kDepth, kTileRows), w_map = map_of(w, c, words, c, kDepth, kTileWords);
  const int most = device_of(call).processors, blocks = work.tiles < most ? work.tiles : most;
  launch(call, Grid{dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads), kShared}, product_kernel<Pass>, x_map, w_map,
         y ? map_of(y, words, rows, ld, kPanel, kHalfRows) : x_map, work, pass);
}

}  // namespace limbeck::cuda::product_sm90
