// What the Hopper attention kernels are made of. A block is three warpgroups: one thread of the first moves tiles from global to shared
// memory by TMA, the other two multiply them by WGMMA, 64 rows each. Tiles pass through rings of stages, each with a "full" barrier
// (the bytes have come) and an "empty" one (all warps have read them).
//
// A tile of rows in shared memory is cut in panels of 64 columns: [panel][row][64], 128-byte rows, 128-byte swizzle. As the factor of
// scores (rows times rows) it is K-major; as the factor of outputs (weights times rows) it is MN-major: the same bytes serve both.
// Heads that are not whole panels are filled up with the zeros that TMA reads beyond a tensor.
//
// All kernels see the mask as a run of columns for each row: [from, from + count).
#pragma once
#include <algorithm>
#include <cmath>

#include "cuda/attention.cuh"
#include "cuda/launch.h"
#include "cuda/warpgroup.cuh"

namespace limbeck::cuda::attention::sm90 {

constexpr int kThreads = 384;
constexpr int kRows = 64;  // of a warpgroup's tile, and of all boxes but those of streamed keys
constexpr int kWarps = 8;  // that read a stage

template <int D>
constexpr int kPanels = (D + 63) / 64;
// A tile is taken as words, pairs of elements.
template <int D, int Rows>
constexpr int kTileWords = kPanels<D> * Rows * 32;

// Device code of sm_90a; the kernels' bodies are empty for other architectures, where the host never launches them.
#if defined(LIMBECK_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LIMBECK_HOPPER 1
#else
#define LIMBECK_HOPPER 0
#endif

// Scores in units of log 2: factor * x, or with a cap, top * tanh(factor * x).
struct Score {
  float factor, top, inverse;  // inverse: 1 / top^2
  float c[5];                  // top * tanh(factor * x) = x (c0 + c1 x^2 + ...) for |x| <= reach, to 7e-6
  float reach;                 // 1 / |factor|
  float small[3], small_reach;  // the same with three terms, for x^2 <= small_reach: scores up to two fifths of the cap
  bool capped;
};

inline Score score_of(const Problem& p) {
  Score s{};
  s.capped = p.capped;
  s.factor = p.capped ? p.soft_factor : p.factor;
  s.top = p.capped ? p.factor : 0.f;
  s.inverse = p.capped ? 1.f / (s.top * s.top) : 0.f;
  const double odd[5] = {0.99999309, -0.33298066, 0.1303681, -0.04481754, 0.00903642};
  const double small_odd[3] = {0.99999375, -0.33262579, 0.12127787};
  double power = s.factor;
  for (int i = 0; i < 5; ++i, power *= s.factor * s.factor) {
    s.c[i] = static_cast<float>(odd[i] * s.top * power);
    if (i < 3) s.small[i] = static_cast<float>(small_odd[i] * s.top * power);
  }
  // A scale so odd that the ninth power of the factor is no float gets e^2x alone.
  const float size = std::fabs(s.factor);
  s.reach = size > 1e-4f && size < 1e4f ? 1 / size : 0.f;
  s.small_reach = 0.16f * s.reach * s.reach;
  return s;
}

// Where a block works. Launch order: sections of `section` columns (heads) whose keys and values stay in the cache together; within a
// section the tiles of all columns by length, so that short ones fill the gaps at the end. Neighbours are heads that share keys.
struct Order {
  int tiles, columns, section;
};

inline Order order_of(int tiles, int columns, int sharing, double column_bytes) {
  const int groups = (columns + sharing - 1) / sharing, fit = std::max(static_cast<int>(32e6 / (column_bytes + 1)), 1);
  // As many in each: a last section of few columns could not fill the GPU.
  const int sections = (groups + fit - 1) / fit;
  return {tiles, columns, (groups + sections - 1) / sections * sharing};
}

struct Place {
  int rank, column;
};

__device__ __forceinline__ Place place_of(const Order& o, int index) {
  const int whole = o.section * o.tiles, section = index / whole, rest = index - section * whole;
  const int width = min(o.section, o.columns - section * o.section);
  return {rest / width, section * o.section + rest % width};
}

// --- The rings ------------------------------------------------------------------------------------------------------------------------
// Stage and parity of the i-th tile of a ring.
template <int Stages>
__device__ __forceinline__ int stage_of(int i) {
  return i % Stages;
}
template <int Stages>
__device__ __forceinline__ uint32_t parity_of(int i) {
  return static_cast<uint32_t>(i / Stages) & 1;
}

// The barriers of a ring that the blocks of a cluster fill for each other, by the one thread that sets them up.
template <int Stages = 2>
__device__ __forceinline__ void init_ring(uint64_t* full, uint64_t* empty, int cluster) {
  for (int i = 0; i < Stages; ++i) {
    ptx::mbarrier_init(full + i, 1);
    ptx::mbarrier_init(empty + i, kWarps * cluster);
  }
}

// A warp has read a stage. Blocks of a cluster fill each other's stages, so all of them are told.
__device__ __forceinline__ void release(uint64_t* empty, int cluster) {
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < cluster) ptx::mbarrier_arrive_cluster(ptx::mapa(empty, static_cast<uint32_t>(lane)));
}

// A block may leave when no other will touch its shared memory. Whole warps.
__device__ __forceinline__ void leave(int cluster) {
  __syncwarp();
  if (cluster > 1) ptx::cluster_sync_relaxed();
}

// Rows [row, row + box) of one head, all panels. `rows` is the height of the tile that they are part of.
template <int D>
__device__ __forceinline__ void load_rows(uint32_t* tile, int rows, const TensorMap& map, uint64_t* full, int head, int row, int batch) {
#pragma unroll 1
  for (int panel = 0; panel < kPanels<D>; ++panel) ptx::tma_load(tile + panel * rows * 32, &map, full, panel * 64, head, row, batch);
}

// A tile of Rows that both blocks of a cluster want, in boxes of half as many: each loads one of them for both.
template <int D, int Rows>
__device__ __forceinline__ void load_shared_rows(uint32_t* tile, const TensorMap& map, uint64_t* full, int head, int row, int batch,
                                                 int cluster) {
  constexpr int kHalf = Rows / 2;
  if (cluster == 1) {
    load_rows<D>(tile, Rows, map, full, head, row, batch);
    load_rows<D>(tile + kHalf * 32, Rows, map, full, head, row + kHalf, batch);
    return;
  }
  const int part = static_cast<int>(ptx::cluster_rank()) * kHalf;
#pragma unroll 1
  for (int panel = 0; panel < kPanels<D>; ++panel)
    ptx::tma_load_multicast(tile + (panel * Rows + part) * 32, &map, full, 3, panel * 64, head, row + part, batch);
}

// --- Products -------------------------------------------------------------------------------------------------------------------------
// The products below are begun, each as a group of its own: the caller waits.
// acc[64 N] = a[64 D] b[N D]^T. a points at the 64 rows in a tile of `a_rows`.
template <int N, int D>
__device__ __forceinline__ void multiply_rows(float (&acc)[N / 2], const uint32_t* a, int a_rows, const uint32_t* b, int b_rows) {
  ptx::wgmma_fence();
  const uint64_t from_a = ptx::wgmma_descriptor(a, 16, 1024, Swizzle::b128), from_b = ptx::wgmma_descriptor(b, 16, 1024, Swizzle::b128);
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
    ptx::wgmma<N>(acc, from_a + (k / 4 * a_rows * 128 + k % 4 * 32) / 16, from_b + (k / 4 * b_rows * 128 + k % 4 * 32) / 16, k > 0);
  ptx::wgmma_commit();
}

// acc[64 D] += a[64 K] b[K D], a in registers.
template <int D, int K>
__device__ __forceinline__ void multiply_columns(float (&acc)[D / 2], const uint32_t (&a)[K / 16][4], const uint32_t* b) {
  ptx::wgmma_fence();
  const uint64_t from_b = ptx::wgmma_descriptor(b, K * 128, 1024, Swizzle::b128);
#pragma unroll
  for (int k = 0; k < K / 16; ++k) ptx::wgmma<D, true>(acc, a[k], from_b + k * 2048 / 16, 1);
  ptx::wgmma_commit();
}

// Accumulators as the left factor of the next product: 16 columns of both layouts are the same registers.
template <int N>
__device__ __forceinline__ void pack(const float (&x)[N / 2], uint32_t (&a)[N / 16][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = pack_bf16(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]);
}

struct Seen {
  int from[2];
  uint32_t count[2];
  __device__ __forceinline__ void set(int i, int first, int end) {
    from[i] = first;
    count[i] = static_cast<uint32_t>(max(end - first, 0));
  }
  // Accumulator i of a tile whose first column is `column`, counted from this thread's own.
  __device__ __forceinline__ bool operator()(int i, int column) const {
    const int row = i / 2 % 2;
    return static_cast<uint32_t>(column + i / 4 * 8 + i % 2 - from[row]) < count[row];
  }
};

// First key that a query sees; it sees all from there to its own position.
__device__ __forceinline__ int first_key(const Problem& p, int batch, int row) {
  const int position = p.s - p.t + row, from = p.window > 0 ? max(position - p.window + 1, 0) : 0;
  return p.starts ? min(max(from, p.starts[static_cast<int64_t>(batch) * p.t + row]), position + 1) : from;
}

// With a cap: whether the polynomial holds for all of a warp's products. Several chains, so that none is waited for.
template <int N>
__device__ __forceinline__ bool all_near(const Score& s, const float (&x)[N]) {
  constexpr int kChains = N < 4 ? N : 4;
  float high[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) high[i] = fabsf(x[i]);
#pragma unroll
  for (int i = kChains; i < N; ++i) high[i % kChains] = fmaxf(high[i % kChains], fabsf(x[i]));
#pragma unroll
  for (int i = 1; i < kChains; ++i) high[0] = fmaxf(high[0], high[i]);
  return !__any_sync(0xffffffffu, high[0] > s.reach);
}
__device__ __forceinline__ float near_score(const Score& s, float x) {
  const float x2 = x * x;
  return x * (s.c[0] + x2 * (s.c[1] + x2 * (s.c[2] + x2 * (s.c[3] + x2 * s.c[4]))));
}

// The same of two small x. `largest` becomes the largest x^2 so far: bits of floats that are not negative are ordered as these.
__device__ __forceinline__ float2 small_scores(const Score& s, float x, float y, int& largest) {
  const float x2 = x * x, y2 = y * y;
  largest = ptx::max(largest, __float_as_int(x2), __float_as_int(y2));
  return make_float2(x * (s.small[0] + x2 * (s.small[1] + x2 * s.small[2])), y * (s.small[0] + y2 * (s.small[1] + y2 * s.small[2])));
}

// Products to scores. With a cap: within reach, where scores nearly always are, a polynomial that leaves the special function unit to
// the exponentials; where a warp has larger ones, those by e^2x.
template <int N>
__device__ __forceinline__ void to_scores(const Score& s, float (&x)[N]) {
  if (!s.capped) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= s.factor;
  } else if (all_near(s, x)) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = near_score(s, x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float far = 1.f - 2.f * ptx::rcp(1.f + ptx::ex2(x[i] * s.factor * (2 * kLog2e)));
      x[i] = fabsf(x[i]) > s.reach ? far * s.top : near_score(s, x[i]);
    }
  }
}

// --- Results --------------------------------------------------------------------------------------------------------------------------
// Word of a row's column pair in a tile of `rows` rows.
__device__ __forceinline__ int word_of(int rows, int row, int column) {
  return column / 64 * rows * 32 + row * 32 + ((column % 64 / 8) ^ (row % 8)) * 4 + column % 8 / 2;
}

// A warpgroup's accumulators, times a factor for each row, to a tile of `rows` rows that begins at `tile`.
template <int D>
__device__ __forceinline__ void to_tile(const float (&x)[D / 2], float factor0, float factor1, uint32_t* tile, int rows) {
  const int row = thread_row(), column = thread_column();
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    tile[word_of(rows, row, 8 * j + column)] = pack_bf16(x[4 * j] * factor0, x[4 * j + 1] * factor0);
    tile[word_of(rows, row + 8, 8 * j + column)] = pack_bf16(x[4 * j + 2] * factor1, x[4 * j + 3] * factor1);
  }
}

// The tile's 64 rows go to global memory; rows beyond the tensor are left out. All threads of the warpgroup, which has barrier 1 + its
// number.
template <int D>
__device__ __forceinline__ void store_rows(const TensorMap& map, uint32_t* tile, int rows, int head, int row, int batch) {
  ptx::fence_proxy_async();
  ptx::bar_sync(static_cast<int>(threadIdx.x) / 128, 128);
  if (threadIdx.x % 128 != 0) return;
#pragma unroll
  for (int panel = 0; panel < kPanels<D>; ++panel) ptx::tma_store(&map, tile + panel * rows * 32, panel * 64, head, row, batch);
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
}

// x * factor to rows [row, row + 64) of `head`, by way of the tile; or that added to what is there, which TMA brings to the tile first,
// with a barrier that nobody else uses.
template <int D>
__device__ __forceinline__ void put_rows(float (&x)[D / 2], float factor, bool add, const TensorMap& map, uint32_t* tile, int rows,
                                         uint64_t* old_full, int head, int row, int batch) {
  if (add) {
    ptx::bar_sync(static_cast<int>(threadIdx.x) / 128, 128);  // all warps are done with the tile
    if (threadIdx.x % 128 == 0) {
      ptx::mbarrier_arrive_expect_tx(old_full, 4 * kTileWords<D, kRows>);
      load_rows<D>(tile, rows, map, old_full, head, row, batch);
    }
    ptx::mbarrier_wait(old_full, 0);
    const int own_row = thread_row(), column = thread_column();
#pragma unroll
    for (int i = 0; i < D / 4; ++i) {
      const float2 old = unpack_bf16(tile[word_of(rows, own_row + i % 2 * 8, i / 2 * 8 + column)]);
      x[2 * i] = x[2 * i] * factor + old.x;
      x[2 * i + 1] = x[2 * i + 1] * factor + old.y;
    }
    factor = 1.f;
  }
  to_tile<D>(x, factor, factor, tile, rows);
  store_rows<D>(map, tile, rows, head, row, batch);
}

}  // namespace limbeck::cuda::attention::sm90
