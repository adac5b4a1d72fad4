// Attention with mma.m16n8k16, ldmatrix and cp.async: Ampere, Ada and every later GPU. Forward: FlashAttention-2 (arXiv 2307.08691).
// Rows are (position, query head of a group) pairs; a block owns BM of them and walks over the tiles of BN keys that any of them sees.
// K and V tiles go through one ring of shared memory: while one is multiplied the next ones are on their way. S, P and the output
// stay in registers: the accumulator of one product is, packed, the left operand of the next.
//
// Backward: two kernels without atomics, so that the same call gives the same bits. One owns keys (dK, dV; it walks over the queries
// of all heads of the group that see them), one owns rows (dQ; it walks over keys). Both do the same: two resident tiles, two streamed
// ones, and warps in pairs. Both warps of a pair have the same rows; one computes S, P and (1 - tanh^2), the other dP - D; each gets
// the other's half in shared memory, then each has half of the outputs in its registers: dV and dK, or the two halves of dQ's columns.
#pragma once
#include <type_traits>

#include "cuda/attention_tile.cuh"
#include "cuda/launch.h"

namespace limbeck::cuda::attention {

// s = A B^T over D: the warp's 16 M rows of A with 8 N rows of B.
template <int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&s)[M][N][4], const bf16* a, const bf16* b) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int a_row = lane % 16, a_flip = lane / 16 ^ Tile<D>::flip(a_row);
  const int b_row = lane % 8 + lane / 16 * 8, b_flip = lane / 8 % 2 ^ Tile<D>::flip(b_row);
  a += a_row * D, b += b_row * D;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t x[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) ptx::ldmatrix(x[m], a + m * 16 * D + Tile<D>::moved(2 * k, a_flip) * 8);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t y[4];
      ptx::ldmatrix(y, b + n * 8 * D + Tile<D>::moved(2 * k, b_flip) * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16(s[m][n], x[m], y[0], y[1]);
        ptx::mma_m16n8k16(s[m][n + 1], x[m], y[2], y[3]);
      }
    }
  }
}

// out += A B: A in registers, 16 K rows of B, of which the columns from piece `first`. Columns past the last are left alone.
template <int D, int M, int K, int N>
__device__ __forceinline__ void multiply_columns(float (&out)[M][N][4], const uint32_t (&x)[M][K][4], const bf16* b, int first) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane % 16, flip = lane / 16 ^ Tile<D>::flip(row);
  constexpr bool aligned = N % Tile<D>::swapped == 0;  // and with it `first`, a multiple of N
  b += row * D + (aligned ? first * 8 : 0);
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      if (N < Tile<D>::pieces && 2 * N != Tile<D>::pieces && first + n >= Tile<D>::pieces) break;
      uint32_t y[4];
      ptx::ldmatrix_transposed(y, b + k * 16 * D + (aligned ? Tile<D>::moved(n, flip) : (first + n) ^ flip) * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16(out[m][n], x[m][k], y[0], y[1]);
        ptx::mma_m16n8k16(out[m][n + 1], x[m][k], y[2], y[3]);
      }
    }
}

// Accumulators as a left operand: 8 columns of two neighbours are 16 of k.
template <int M, int N>
__device__ __forceinline__ void pack(uint32_t (&x)[M][N / 2][4], const float (&s)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x[m][n / 2][n % 2 * 2] = pack_bf16(s[m][n][0], s[m][n][1]);
      x[m][n / 2][n % 2 * 2 + 1] = pack_bf16(s[m][n][2], s[m][n][3]);
    }
}

// What is not finite in a tile would reach even rows that do not see it, as 0 x NaN. Tiles that all rows see are left alone; in the
// others, if anything is not finite (rare), it is added to the rows that see it, and made zero.
template <int D, int Rows, int Threads>
__device__ __forceinline__ bool has_odd(const bf16* tile) {
  bool odd = false;
  for (int i = static_cast<int>(threadIdx.x); i < Rows * D / 8; i += Threads) {
    const uint4 x = *reinterpret_cast<const uint4*>(tile + i * 8);
    for (const uint32_t pair : {x.x, x.y, x.z, x.w}) odd |= (pair & 0x7f80) == 0x7f80 || (pair & 0x7f800000) == 0x7f800000;
  }
  return odd;
}
template <int D, int Rows, int Threads>
__device__ __forceinline__ void remove_odd(bf16* tile) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Rows * D; i += Threads)
    if ((tile[i].bits & 0x7f80) == 0x7f80) tile[i].bits = 0;
}
// sees(m, half, row): whether the thread's row 16 m + 8 half + lane / 4 of `out` sees a row of the tile.
template <int D, int Rows, int M, int N, class Sees>
__device__ __forceinline__ void add_odd(float (&out)[M][N][4], const bf16* tile, int first, Sees sees) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int row = 0; row < Rows; ++row)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (first + n >= Tile<D>::pieces) break;
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(tile + Tile<D>::at(row, first + n) + lane % 4 * 2);
      const bool low = (pair & 0x7f80) == 0x7f80, high = (pair & 0x7f800000) == 0x7f800000;
      if (!low && !high) continue;
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (sees(m, half, row)) {
            if (low) out[m][n][2 * half] += low_float(pair);
            if (high) out[m][n][2 * half + 1] += high_float(pair);
          }
    }
}

// Accumulators times a factor of each row to the warp's own rows of a tile, as bf16.
template <int D, int M, int N, class Factor>
__device__ __forceinline__ void stage(bf16* tile, const float (&out)[M][N][4], int first, Factor factor) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (first + n >= Tile<D>::pieces) break;
        const float f = factor(m, half), *x = &out[m][n][2 * half];
        *reinterpret_cast<uint32_t*>(tile + Tile<D>::at(m * 16 + half * 8 + lane / 4, first + n) + lane % 4 * 2) = pack_bf16(x[0] * f, x[1] * f);
      }
}

// Those rows to, or onto, global memory: pieces [first, last). line(row) is null for rows that do not exist.
template <int D, int Rows, class Line>
__device__ __forceinline__ void store_rows(const bf16* tile, const Problem& p, int first, int last, bool accumulate, Line line) {
  const int lane = static_cast<int>(threadIdx.x) % 32, pieces = last - first;
#pragma unroll 1
  for (int i = lane; i < Rows * pieces; i += 32) {
    const int row = i / pieces, piece = first + i % pieces;
    bf16* to = line(row);
    if (to == nullptr || piece * 8 >= p.d) continue;
    const bf16* from = tile + Tile<D>::at(row, piece);
    to += piece * 8;
    if (p.whole_chunks) {
      uint4 x = *reinterpret_cast<const uint4*>(from);
      if (accumulate) {
        const uint4 old = *reinterpret_cast<const uint4*>(to);
        const auto sum = [](uint32_t a, uint32_t b) { return pack_bf16(low_float(a) + low_float(b), high_float(a) + high_float(b)); };
        x = make_uint4(sum(x.x, old.x), sum(x.y, old.y), sum(x.z, old.z), sum(x.w, old.w));
      }
      *reinterpret_cast<uint4*>(to) = x;
      continue;
    }
#pragma unroll 1
    for (int j = 0; j < 8 && piece * 8 + j < p.d; ++j) to[j] = accumulate ? to_bf16(to_float(to[j]) + to_float(from[j])) : from[j];
  }
}

// Where a row of a pair is. Rows past the last do not exist.
struct Row {
  int position, head;
  __device__ __forceinline__ Row(const Problem& p, int pair, int row)
      : position(row / p.group), head(pair % p.g * p.group + row % p.group) {}
  __device__ __forceinline__ int64_t offset(const Problem& p, int pair) const {
    return ((static_cast<int64_t>(pair / p.g) * p.t + position) * p.h + head) * p.d;
  }
  __device__ __forceinline__ int64_t index(const Problem& p, int pair, int positions) const {
    return (static_cast<int64_t>(pair / p.g) * p.h + head) * positions + position;
  }
};
__device__ __forceinline__ int64_t key_offset(const Problem& p, int pair, int key) {
  return ((static_cast<int64_t>(pair / p.g) * p.s + key) * p.g + pair % p.g) * p.d;
}

// The keys that a query sees: [x, y).
__device__ __forceinline__ int2 keys_of(const Problem& p, int pair, int position) {
  const int last = p.s - p.t + position;
  int first = p.window > 0 ? max(0, last - p.window + 1) : 0;
  if (p.starts != nullptr) first = max(first, p.starts[static_cast<int64_t>(pair / p.g) * p.t + position]);
  return make_int2(first, last + 1);
}

// Tiles that a block walks over: first those that need masks, at both ends, then the others.
struct Walk {
  int first, inner, inner_end, end;
  // All of the block sees [all, all_end), nobody anything outside of [any, any_end).
  __device__ __forceinline__ Walk(int any, int all, int all_end, int any_end, int size) {
    end = max(0, (any_end + size - 1) / size);
    first = min(max(0, any / size), end);
    inner = min(max((all + size - 1) / size, first), end);
    inner_end = max(min(all_end / size, end), inner);
  }
  __device__ __forceinline__ void take_part(int part, int parts) {
    const int n = end - first, begin = first + static_cast<int>(static_cast<int64_t>(n) * part / parts);
    end = first + static_cast<int>(static_cast<int64_t>(n) * (part + 1) / parts);
    first = begin;
    inner = min(max(inner, first), end);
    inner_end = max(min(inner_end, end), inner);
  }
  __device__ __forceinline__ int masked() const { return end - inner_end + inner - first; }
  __device__ __forceinline__ int count() const { return end - first; }
  // The i-th tile: the last ones, then all from the first.
  __device__ __forceinline__ int tile(int i) const { return i < end - inner_end ? inner_end + i : first + i - (end - inner_end); }
};

// ---- Forward ------------------------------------------------------------------------------------------------------------------------

template <int D_, int BM_, int BN_, int Warps_, int Slots_>
struct Forward {
  static constexpr int D = D_, BM = BM_, BN = BN_, Warps = Warps_, Slots = Slots_, Threads = 32 * Warps;
  static constexpr int M = BM / 16 / Warps, N = BN / 8;
  static constexpr size_t shared = (BM + Slots * BN) * D * sizeof(bf16) + BM * sizeof(int2);
};

// When few queries see many keys, blocks share the keys of the same rows; each leaves its sums, and join() adds them up.
struct Parts {
  int count;
  float* out;    // [part][pair][row][D]
  float2* sums;  // [part][pair][row]: maximum and sum
};

template <class F, bool Direct>
__global__ __launch_bounds__(F::Threads, 1) void forward(const __grid_constant__ Problem p, bf16* y, float* lse, Parts parts) {
  constexpr int D = F::D, BM = F::BM, BN = F::BN, M = F::M, N = F::N, Slots = F::Slots, Threads = F::Threads;
  Shared shared;
  bf16* q_tile = shared.take<bf16>(BM * D);
  bf16* ring = shared.take<bf16>(Slots * BN * D);
  int2* seen = shared.take<int2>(BM);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int blocks = (p.rows + BM - 1) / BM, pair = static_cast<int>(blockIdx.x) / blocks;
  const int row0 = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * BM;  // those that see most first

  load_rows<D, BM, Threads>(q_tile, p, [&](int r) { return row0 + r < p.rows ? p.q + Row(p, pair, row0 + r).offset(p, pair) : nullptr; });
  for (int r = thread; r < BM; r += Threads) seen[r] = keys_of(p, pair, Row(p, pair, min(row0 + r, p.rows - 1)).position);
  __syncthreads();
  Walk walk(seen[0].x, seen[BM - 1].x, seen[0].y, seen[BM - 1].y, BN);
  walk.take_part(static_cast<int>(blockIdx.y), parts.count);

  // Item i of the ring: K (even) or V (odd) of tile i / 2. One group of copies for each; Q belongs to the first.
  const auto fetch = [&](int i, int to) {
    if (i < 2 * walk.count()) {
      const int key0 = walk.tile(i / 2) * BN, step = p.g * p.d;
      const bf16* base = (i % 2 == 0 ? p.k : p.v) + key_offset(p, pair, 0);
      load_rows<D, BN, Threads>(ring + to * (BN * D), p,
                                [&](int r) { return key0 + r < p.s ? base + static_cast<int64_t>(key0 + r) * step : nullptr; });
    }
    ptx::cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < Slots - 1; ++i) fetch(i, i);
  // Item i has come, and nobody reads the one before it any more.
  int slot = 0;
  const auto advance = [&](int i) {
    ptx::cp_async_wait<Slots - 2>();
    __syncthreads();
    fetch(i + Slots - 1, slot == 0 ? Slots - 1 : slot - 1);
    bf16* tile = ring + slot * (BN * D);
    slot = slot + 1 == Slots ? 0 : slot + 1;
    return tile;
  };

  const bf16* q_rows = q_tile + warp * 16 * M * D;
  const int own = warp * 16 * M + lane / 4;  // the thread's rows are own + 8 i
  float out[M][D / 8][4] = {}, sum[M][4] = {}, top[M][2];
  for (int m = 0; m < M; ++m) top[m][0] = top[m][1] = kNoScore;

  const auto step = [&](int i, auto masked) __attribute__((always_inline)) {
    constexpr bool Masked = decltype(masked)::value;
    const int key0 = Masked ? walk.tile(i) * BN : 0;
    float s[M][N][4];
    multiply_rows<D>(s, q_rows, advance(2 * i));
    if (Direct || p.capped) soft(s, p.soft_factor);
    const float factor = p.factor;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* row[N];
#pragma unroll
        for (int n = 0; n < N; ++n) row[n] = &s[m][n][2 * half];
        if constexpr (Masked) {
          const int2 keys = seen[own + 16 * m + 8 * half];
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int key = key0 + 8 * n + lane % 4 * 2 + j;
              if (key < keys.x || key >= keys.y) row[n][j] = p.hidden;
            }
        }
        float base = 0;
        if constexpr (!Direct) {
          float most = top[m][half];
#pragma unroll
          for (int n = 0; n < N; ++n) most = fmaxf(most, fmaxf(row[n][0] * factor, row[n][1] * factor));
          most = fmaxf(most, __shfl_xor_sync(kWarp, most, 1));
          most = fmaxf(most, __shfl_xor_sync(kWarp, most, 2));
          const float down = ptx::ex2(top[m][half] - most);
          top[m][half] = base = most;
          sum[m][2 * half] *= down;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) out[m][n][2 * half] *= down, out[m][n][2 * half + 1] *= down;
        }
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) row[n][j] = ptx::ex2(row[n][j] * factor - base);
      }
    uint32_t weights[M][N / 2][4];
    pack(weights, s);
    bf16* v = advance(2 * i + 1);
    if constexpr (Masked) {
      if (__syncthreads_or(has_odd<D, BN, Threads>(v))) {
        add_odd<D, BN>(out, v, 0, [&](int m, int half, int r) {
          const int2 keys = seen[own + 16 * m + 8 * half];
          return key0 + r >= keys.x && key0 + r < keys.y;
        });
        __syncthreads();
        remove_odd<D, BN, Threads>(v);
        __syncthreads();
      }
    }
    // The sum of the weights is one more column, of V = 1: then it is the sum of the rounded weights, and what a row sees alone comes
    // out as it is.
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int k = 0; k < N / 2; ++k) ptx::mma_m16n8k16(sum[m], weights[m][k], kOnes, kOnes);
    multiply_columns<D>(out, weights, v, 0);
  };
  int i = 0;
#pragma unroll 1
  for (; i < walk.masked(); ++i) step(i, std::true_type{});
#pragma unroll 1
  for (; i < walk.count(); ++i) step(i, std::false_type{});

  ptx::cp_async_wait<0>();
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = sum[m][2 * half];
      const int row = row0 + own + 16 * m + 8 * half;
      if (row >= p.rows) continue;
      if (parts.count > 1) {
        const int64_t pairs = static_cast<int64_t>(p.b) * p.g, at = (static_cast<int64_t>(blockIdx.y) * pairs + pair) * p.rows + row;
        if (lane % 4 == 0) parts.sums[at] = make_float2(Direct ? 0.f : top[m][half], x);
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
          *reinterpret_cast<float2*>(parts.out + at * D + 8 * n + lane % 4 * 2) = make_float2(out[m][n][2 * half], out[m][n][2 * half + 1]);
      } else if (lse != nullptr && lane % 4 == 0) {
        lse[Row(p, pair, row).index(p, pair, p.t)] = (Direct ? 0.f : top[m][half]) * kLn2 + logf(x);
      }
    }
  if (parts.count > 1 || y == nullptr) return;
  // Each warp is the only one that reads its rows of Q.
  bf16* rows = q_tile + warp * 16 * M * D;
  __syncwarp();
  stage<D>(rows, out, 0, [&](int m, int half) { return 1.f / sum[m][2 * half]; });
  __syncwarp();
  store_rows<D, 16 * M>(rows, p, 0, Tile<D>::pieces, false, [&](int r) {
    const int row = row0 + warp * 16 * M + r;
    return row < p.rows ? y + Row(p, pair, row).offset(p, pair) : nullptr;
  });
}

// One warp for each row of a pair.
template <int D>
__global__ void join(const __grid_constant__ Problem p, bf16* y, float* lse, Parts parts) {
  const int64_t rows = static_cast<int64_t>(p.b) * p.g * p.rows, at = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, pair = static_cast<int>(at / p.rows);
  const Row row(p, pair, static_cast<int>(at % p.rows));
  float most = kNoScore, total = 0, out[D / 32 + 1] = {};
  for (int part = 0; part < parts.count; ++part) most = fmaxf(most, parts.sums[part * rows + at].x);
  for (int part = 0; part < parts.count; ++part) {
    const float2 sum = parts.sums[part * rows + at];
    const float down = ptx::ex2(sum.x - most);
    total += sum.y * down;
#pragma unroll
    for (int j = 0; j < D / 32 + 1; ++j)
      if (j * 32 + lane < D) out[j] += parts.out[(part * rows + at) * D + j * 32 + lane] * down;
  }
  if (lse != nullptr && lane == 0) lse[row.index(p, pair, p.t)] = most * kLn2 + logf(total);
  if (y == nullptr) return;
  bf16* to = y + row.offset(p, pair);
#pragma unroll
  for (int j = 0; j < D / 32 + 1; ++j)
    if (j * 32 + lane < p.d) to[j * 32 + lane] = to_bf16(out[j] / total);
}

// ---- Backward -----------------------------------------------------------------------------------------------------------------------

constexpr int kStatistics = 32;  // positions are padded to this many, with an lse of infinity: the weights of no query are zero

// For each query of [B H padded T]: lse in units of log 2, and D = dY . Y, one warp for each.
struct Statistics {
  float *lse, *delta;
  int positions;  // padded
};
static __global__ void prepare(const __grid_constant__ Problem p, const bf16* dy, const bf16* y, const float* lse, Statistics x) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= static_cast<int64_t>(p.b) * p.h * x.positions) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, position = static_cast<int>(at % x.positions);
  const int64_t sequence = at / x.positions, offset = ((sequence / p.h * p.t + position) * p.h + sequence % p.h) * p.d;
  float sum = 0;
  if (position < p.t) {
    if (p.whole_chunks) {
      if (lane * 8 < p.d) {
        const uint4 a = *reinterpret_cast<const uint4*>(dy + offset + lane * 8), b = *reinterpret_cast<const uint4*>(y + offset + lane * 8);
        const auto add = [&](uint32_t u, uint32_t v) { sum += low_float(u) * low_float(v) + high_float(u) * high_float(v); };
        add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w);
      }
    } else {
      for (int j = lane; j < p.d; j += 32) sum += to_float(dy[offset + j]) * to_float(y[offset + j]);
    }
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kWarp, sum, step);
  if (lane != 0) return;
  x.delta[at] = sum;
  x.lse[at] = position < p.t ? lse[sequence * p.t + position] * kLog2e : kInfinity;
}

// A block owns 16 M rows for each pair of warps; BN rows are streamed at a time, in two stages.
template <int D_, int M_, int BN_, int Pairs_>
struct Backward {
  static constexpr int D = D_, M = M_, BN = BN_, Pairs = Pairs_, Threads = 64 * Pairs;
  static constexpr int Own = 16 * M * Pairs, N = BN / 8;
  static constexpr int Half = (D / 8 + 3) / 4 * 2;  // pieces of dQ for the first warp of a pair; the rest is the second's
  static constexpr size_t shared(bool keys) {
    return (2 * Own + 4 * BN) * D * sizeof(bf16) + (keys ? 1 : 2) * Own * BN * sizeof(float) + (keys ? 4 * BN * sizeof(float) : 0) +
           (keys ? BN : Own) * sizeof(int2);
  }
  static_assert(kStatistics % BN == 0);
};

struct Gradients {
  const bf16* dy;
  Statistics statistics;
  bf16 *dq, *dk, *dv;
  bool add_dq, add_dk, add_dv;
};

// The first position of the sequence whose document starts behind `key`; starts never decrease. All lanes look.
__device__ __forceinline__ int documents_end(const Problem& p, int pair, int key) {
  const int32_t* starts = p.starts + static_cast<int64_t>(pair / p.g) * p.t;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int low = 0, high = p.t;  // the answer is in [low, high]
  while (low < high) {
    const int step = (high - low + 31) / 32, at = low + lane * step;
    const int before = __popc(__ballot_sync(kWarp, at < high && starts[at] <= key));
    if (before == 0) return low;
    high = min(high, low + before * step);
    low += (before - 1) * step + 1;
  }
  return low;
}

// Keys: the block owns keys, and walks over the queries of the group's heads; else it owns rows and walks over keys.
template <class F, bool Keys, bool Capped>
__global__ __launch_bounds__(F::Threads, 1) void backward(const __grid_constant__ Problem p, const __grid_constant__ Gradients x) {
  constexpr int D = F::D, M = F::M, BN = F::BN, N = F::N, Own = F::Own, Threads = F::Threads;
  Shared shared;
  bf16* resident = shared.take<bf16>(2 * Own * D);   // K and V, or Q and dY
  bf16* streamed = shared.take<bf16>(4 * BN * D);    // of each stage Q and dY, or K and V
  float* exchange = shared.take<float>((Keys ? 1 : 2) * Own * BN);
  float* columns = Keys ? shared.take<float>(4 * BN) : nullptr;  // of each stage lse and D of the queries
  int2* seen = shared.take<int2>(Keys ? BN : Own);  // the keys of each query, owned or (where masks are needed) streamed
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int role = warp % 2, rows0 = warp / 2 * 16 * M;
  const int extent = Keys ? p.s : p.rows, blocks = (extent + Own - 1) / Own;
  const int pair = static_cast<int>(blockIdx.x) / blocks, index = static_cast<int>(blockIdx.x) % blocks;
  const int own0 = (Keys ? index : blocks - 1 - index) * Own;  // the longest walks first

  for (int which = 0; which < 2; ++which) {
    const bf16* base = Keys ? (which ? p.v : p.k) + key_offset(p, pair, 0) : (which ? x.dy : p.q);
    load_rows<D, Own, Threads>(resident + which * Own * D, p, [&](int r) -> const bf16* {
      if (own0 + r >= extent) return nullptr;
      return base + (Keys ? static_cast<int64_t>(own0 + r) * (p.g * p.d) : Row(p, pair, own0 + r).offset(p, pair));
    });
  }
  // What the block sees, and all of it sees.
  int any, all, all_end, any_end;
  float own_statistic[M][2];  // lse or D of the thread's rows
  if constexpr (Keys) {
    const int last = min(own0 + Own, p.s) - 1;
    any = own0, all = last, all_end = any_end = p.t;
    if (p.window > 0) all_end = min(all_end, own0 + p.window), any_end = min(any_end, last + p.window);
    if (p.starts != nullptr)
      all_end = min(all_end, documents_end(p, pair, own0)), any_end = min(any_end, documents_end(p, pair, last));
    if (all_end == p.t) all_end = x.statistics.positions;  // queries that do not exist have no weight
  } else {
    for (int r = thread; r < Own; r += Threads) seen[r] = keys_of(p, pair, Row(p, pair, min(own0 + r, p.rows - 1)).position);
    __syncthreads();
    any = seen[0].x, all = seen[Own - 1].x, all_end = seen[0].y, any_end = seen[Own - 1].y;
    const float* from = role == 0 ? x.statistics.lse : x.statistics.delta;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(own0 + rows0 + 16 * m + 8 * half + lane / 4, p.rows - 1);
        own_statistic[m][half] = from[Row(p, pair, row).index(p, pair, x.statistics.positions)];
      }
  }
  const Walk walk(any, all, all_end, any_end, BN);
  const int heads = Keys ? p.group : 1, masked_items = walk.masked() * heads, items = walk.count() * heads;
  // Item i: a tile and, where queries are streamed, a head of the group.
  const auto place = [&](int i) {
    if (!Keys) return make_int2(walk.tile(i) * BN, 0);
    const bool edge = i < masked_items;
    const int n = edge ? walk.masked() : walk.count() - walk.masked();
    if (!edge) i -= masked_items;
    return make_int2(walk.tile((edge ? 0 : walk.masked()) + i % n) * BN, i / n);
  };
  const auto fetch = [&](int i) {
    if (i < items) {
      const int2 at = place(i);
      bf16* to = streamed + i % 2 * (2 * BN * D);
      const int64_t base = Keys ? Row(p, pair, at.y).offset(p, pair) : key_offset(p, pair, 0);
      const int step = (Keys ? p.h : p.g) * p.d, limit = Keys ? p.t : p.s;
#pragma unroll 1
      for (int which = 0; which < 2; ++which) {
        const bf16* from = (Keys ? (which ? x.dy : p.q) : (which ? p.v : p.k)) + base;
        load_rows<D, BN, Threads>(to + which * BN * D, p,
                                  [&](int r) { return at.x + r < limit ? from + static_cast<int64_t>(at.x + r) * step : nullptr; });
      }
      if constexpr (Keys) {
        if (thread < BN / 2) {
          const float* from = (thread < BN / 4 ? x.statistics.lse : x.statistics.delta) +
                              Row(p, pair, at.y).index(p, pair, x.statistics.positions) + at.x;
          ptx::cp_async_16(columns + i % 2 * (2 * BN) + thread * 4, from + thread % (BN / 4) * 4);
        }
      }
    }
    ptx::cp_async_commit();
  };
  fetch(0);

  const bf16* own_rows = resident + (role * Own + rows0) * D;
  const int own_piece = Keys ? 0 : role * F::Half;
  float out[M][Keys ? D / 8 : F::Half][4] = {};

  const auto step = [&](int i, auto masked) __attribute__((always_inline)) {
    constexpr bool Masked = decltype(masked)::value;
    ptx::cp_async_wait<0>();
    __syncthreads();
    fetch(i + 1);
    bf16* stage0 = streamed + i % 2 * (2 * BN * D);
    const int first = Masked ? place(i).x : 0;
    // Whether the thread's row 16 m + 8 half and row r of the streamed tile meet.
    const auto sees = [&](int m, int half, int r) {
      const int row = rows0 + 16 * m + 8 * half + lane / 4, key = Keys ? own0 + row : first + r;
      const int2 keys = seen[Keys ? r : row];
      return key >= keys.x && key < keys.y;
    };
    if constexpr (Keys && Masked)
      if (thread < BN) seen[thread] = keys_of(p, pair, min(first + thread, p.t - 1));
    float s[M][N][4];
    multiply_rows<D>(s, own_rows, stage0 + role * BN * D);
    if constexpr (Keys && Masked) __syncthreads();

    // The first warp of a pair has the scores: of them come the weights, and the weights times the slope of the soft cap. The second
    // has dP. Their product, that slope times (dP - D), is the gradient of the scores.
    uint32_t operand[M][N / 2][4];
    [[maybe_unused]] const float* column = Keys ? columns + i % 2 * (2 * BN) + role * BN + lane % 4 * 2 : nullptr;
    if (role == 0) {
      if constexpr (Capped) soft(s, p.soft_factor);
      const float factor = p.factor;
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) {
          float2 norm = make_float2(0, 0), weight[2];
          if constexpr (Keys) norm = *reinterpret_cast<const float2*>(column + 8 * n);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float &x = s[m][n][j], w = ptx::ex2(x * factor - (Keys ? (j % 2 ? norm.y : norm.x) : own_statistic[m][j / 2]));
            x = Capped ? w - w * (x * x) : w;
            if constexpr (Masked)
              if (!sees(m, j / 2, 8 * n + lane % 4 * 2 + j % 2)) x = w = 0;
            (j % 2 ? weight[j / 2].y : weight[j / 2].x) = w;
          }
          if constexpr (Keys)
            for (int half = 0; half < 2; ++half) operand[m][n / 2][n % 2 * 2 + half] = pack_bf16(weight[half].x, weight[half].y);
        }
    } else {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) {
          float2 delta = make_float2(0, 0);
          if constexpr (Keys) delta = *reinterpret_cast<const float2*>(column + 8 * n);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[m][n][j] -= Keys ? (j % 2 ? delta.y : delta.x) : own_statistic[m][j / 2];
            if constexpr (Masked)
              if (!sees(m, j / 2, 8 * n + lane % 4 * 2 + j % 2)) s[m][n][j] = 0;
          }
        }
    }
    // Dk and dQ need the product; dV, which the first warp has where keys are owned, only the weights.
    float4* const words = reinterpret_cast<float4*>(exchange) + warp / 2 * (M * N * 32) + lane;
    if (!Keys || role == 0) {
      float4* to = words + role * (Own * BN / 4);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) to[(m * N + n) * 32] = make_float4(s[m][n][0], s[m][n][1], s[m][n][2], s[m][n][3]);
    }
    bool odd = false;
    if constexpr (Masked)
      odd = __syncthreads_or(has_odd<D, (Keys ? 2 : 1) * BN, Threads>(stage0));
    else
      ptx::bar_sync(1 + warp / 2, 64);
    if (!Keys || role == 1) {
      const float4* from = words + (Keys ? 0 : (1 - role) * (Own * BN / 4));
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float4 y = from[(m * N + n) * 32];
          s[m][n][0] *= y.x, s[m][n][1] *= y.y, s[m][n][2] *= y.z, s[m][n][3] *= y.w;
        }
      pack(operand, s);
    }
    const bf16* lines = stage0 + (Keys ? (1 - role) * BN * D : 0);
    if (Masked && odd) {
      add_odd<D, BN>(out, lines, own_piece, sees);
      __syncthreads();
      remove_odd<D, (Keys ? 2 : 1) * BN, Threads>(stage0);
      __syncthreads();
    }
    multiply_columns<D>(out, operand, lines, own_piece);
  };
  int i = 0;
#pragma unroll 1
  for (; i < masked_items; ++i) step(i, std::true_type{});
#pragma unroll 1
  for (; i < items; ++i) step(i, std::false_type{});

  // Each warp is the only one that reads its resident rows.
  ptx::cp_async_wait<0>();
  if (items == 0) __syncthreads();
  bf16* to = Keys ? (role == 0 ? x.dv : x.dk) : x.dq;
  if (to == nullptr) return;
  bf16* rows = resident + (role * Own + rows0) * D;
  const float factor = Keys && role == 0 ? 1.f : p.scale;
  __syncwarp();
  stage<D>(rows, out, own_piece, [&](int, int) { return factor; });
  __syncwarp();
  const int last_piece = Keys ? Tile<D>::pieces : min(own_piece + F::Half, Tile<D>::pieces);
  store_rows<D, 16 * M>(rows, p, own_piece, last_piece, Keys ? (role == 0 ? x.add_dv : x.add_dk) : x.add_dq, [&](int r) -> bf16* {
    const int row = own0 + rows0 + r;
    if (row >= extent) return nullptr;
    return to + (Keys ? key_offset(p, pair, row) : Row(p, pair, row).offset(p, pair));
  });
}

}  // namespace limbeck::cuda::attention
