// attention_step: one more token of some sequences, whose keys and values lie in rings. All that counts is to read the rings once, at
// the speed of memory. A block takes up to kPart places for one (sequence, key/value head); each of its warps takes every fourth tile
// of them through a ring of asynchronous copies of its own, so that no barrier stands between them. What the parts of a sequence leave is
// joined in order (flash decoding, arXiv 2205.14135 and pytorch.org/blog/flash-decoding). Parts are cut by the size of the ring
// alone: a recorded step serves any position, and a text's bits do not depend on what else is in its batch.
//
// Rows are the query heads of a group, 8 at a time. S = Q K^T has them as the upper half of a tile of 16; its accumulators, packed, are the
// right operand of O^T = V^T P^T, where rows are all the 8 columns there are.
//   B rows of the batch, N sequences, R places, H query heads, G key/value heads, D head size
#include <algorithm>

#include "core/checks.h"
#include "cuda/attention_tile.cuh"
#include "cuda/fault.h"
#include "cuda/launch.h"

namespace limbeck::cuda {
namespace {

using namespace attention;

constexpr int kPart = 256;      // places of a block; more where a ring would have more than kMostParts of them
constexpr int kMostParts = 128;
constexpr int kRows = 8;
constexpr int kWarps = 4;

struct Step : Scores {
  const bf16 *q, *key, *value;     // the new tokens' [B H D], [B G D]
  bf16 *keys, *values;             // [N R G D]
  const int32_t *rows, *positions; // [B]
  bf16* y;
  int b, n, r, h, g, d;
  int group, tiles;  // query heads of a key/value head; tiles of kRows of them
  int part, parts;   // places of a part; parts
  bool whole_chunks;  // as in Problem
  float* out;         // [part][B H][D]: what parts leave
  float2* sums;       // [part][B H]: maximum and sum
};

// What a row of the batch sees: the first `end` places of its sequence. The new token's is `place`.
struct Seen {
  int sequence, position, place, end;
  __device__ __forceinline__ Seen(const Step& p, int row) : sequence(p.rows[row]), position(p.positions[row]) {
    place = position % p.r;
    end = min(position, p.r - 1) + 1;
  }
  __device__ __forceinline__ bool in(const Step& p) const { return sequence >= 0 && sequence < p.n && position >= 0; }
};

template <int D_>
struct Shape {
  static constexpr int D = D_, Keys = D > 128 ? 16 : 32, Slots = 3;
  static constexpr int Stride = D + 4;  // floats from one row to the next where warps leave theirs: writes meet no bank twice
  static constexpr size_t shared = kWarps * (Slots * Keys * D * sizeof(bf16) + kRows * sizeof(float2));
  static_assert(Slots * Keys * D * sizeof(bf16) >= kRows * Stride * sizeof(float));
};

template <class F, bool Direct>
__global__ __launch_bounds__(32 * kWarps) void step(const __grid_constant__ Step p, FaultCheck bad_row, FaultCheck bad_position) {
  constexpr int D = F::D, Keys = F::Keys, Slots = F::Slots, N = Keys / 8;
  Shared shared;
  bf16* rings = shared.take<bf16>(kWarps * Slots * Keys * D);
  float2* tops = shared.take<float2>(kWarps * kRows);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  // Neighbouring blocks have the same keys: memory is read once for all of them.
  const int tile = static_cast<int>(blockIdx.x) % p.tiles, pair = static_cast<int>(blockIdx.x) / p.tiles;
  const int batch = pair / p.g, head = pair % p.g, part = static_cast<int>(blockIdx.y);
  const Seen seen(p, batch);
  if (!seen.in(p)) {
    if (part + tile + head + thread == 0) {
      if (seen.sequence < 0 || seen.sequence >= p.n) bad_row.refuse(batch, seen.sequence);
      else bad_position.refuse(batch, seen.position);
    }
    return;
  }
  const int begin = part * p.part, end = min(seen.end, begin + p.part);
  if (begin >= end) return;

  // The new key and value are read from where they came from, so that nobody waits for them to be in the ring.
  const int64_t fresh = (static_cast<int64_t>(batch) * p.g + head) * p.d;
  const int64_t first = (static_cast<int64_t>(seen.sequence) * p.r * p.g + head) * p.d, line = static_cast<int64_t>(p.g) * p.d;
  if (tile == 0 && seen.place >= begin && seen.place < end) {
    const int64_t to = first + seen.place * line;
    for (int j = thread; j < p.d; j += 32 * kWarps) p.keys[to + j] = p.key[fresh + j], p.values[to + j] = p.value[fresh + j];
  }

  // Item i of the warp's ring: K (even) or V (odd) of its tile i / 2. One group of copies for each.
  const int all = (end - begin + Keys - 1) / Keys, own = all > warp ? (all - warp + kWarps - 1) / kWarps : 0;
  bf16* ring = rings + warp * (Slots * Keys * D);
  const auto fetch = [&](int i, int slot) {
    if (i < 2 * own) {
      const int key0 = begin + (warp + i / 2 * kWarps) * Keys;
      const bf16 *old = (i % 2 == 0 ? p.keys : p.values) + first, *now = (i % 2 == 0 ? p.key : p.value) + fresh;
      load_rows<D, Keys, 32>(ring + slot * (Keys * D), p, [&](int r) -> const bf16* {
        const int place = key0 + r;
        if (place >= end) return nullptr;
        return place == seen.place ? now : old + place * line;
      });
    }
    ptx::cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < Slots - 1; ++i) fetch(i, i);
  // Item i has come, and no lane reads the one before it any more.
  int slot = 0;
  const auto advance = [&](int i) {
    ptx::cp_async_wait<Slots - 2>();
    __syncwarp();
    fetch(i + Slots - 1, slot == 0 ? Slots - 1 : slot - 1);
    const bf16* item = ring + slot * (Keys * D);
    slot = slot + 1 == Slots ? 0 : slot + 1;
    return item;
  };

  uint32_t q[D / 16][2];
  {
    const int row = tile * kRows + lane / 4;
    const bf16* from = p.q + (static_cast<int64_t>(batch) * p.h + head * p.group + row) * p.d;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 16 * k + 8 * half + lane % 4 * 2;
        q[k][half] = 0;
        if (row >= p.group || j >= p.d) continue;
        if (p.whole_chunks) q[k][half] = *reinterpret_cast<const uint32_t*>(from + j);
        else q[k][half] = from[j].bits | (j + 1 < p.d ? static_cast<uint32_t>(from[j + 1].bits) << 16 : 0u);
      }
  }

  // Of the thread: row lane / 4 in S and `top`; in out and sum rows 2 (lane % 4) and the one after it.
  const int row16 = lane % 8 + lane / 16 * 8, flip = lane / 8 % 2 ^ Tile<D>::flip(row16);
  float out[D / 16][4] = {}, sum[4] = {}, top = kNoScore;
#pragma unroll 1
  for (int i = 0; i < own; ++i) {
    float s[1][N][4] = {};
    const bf16* k = advance(2 * i) + row16 * D;
#pragma unroll
    for (int x = 0; x < D / 16; ++x)
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t y[4];
        const uint32_t rows[4] = {q[x][0], 0, q[x][1], 0};
        ptx::ldmatrix(y, k + n * 8 * D + Tile<D>::moved(2 * x, flip) * 8);
        ptx::mma_m16n8k16(s[0][n], rows, y[0], y[1]);
        ptx::mma_m16n8k16(s[0][n + 1], rows, y[2], y[3]);
      }
    if (Direct || p.capped) soft(s, p.soft_factor);
    const int left = end - (begin + (warp + i * kWarps) * Keys) - lane % 4 * 2;  // of the tile's places, from the thread's first
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) s[0][n][j] = 8 * n + j < left ? s[0][n][j] * p.factor : -kInfinity;
    if constexpr (!Direct) {
      float most = top;
#pragma unroll
      for (int n = 0; n < N; ++n) most = fmaxf(most, fmaxf(s[0][n][0], s[0][n][1]));
      most = fmaxf(most, __shfl_xor_sync(kWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kWarp, most, 2));
      if (__any_sync(kWarp, most > top)) {
        const float down = ptx::ex2(top - most);
        const float even = __shfl_sync(kWarp, down, lane % 4 * 8), odd = __shfl_sync(kWarp, down, lane % 4 * 8 + 4);
        top = most;
        sum[0] *= even, sum[1] *= odd;
#pragma unroll
        for (int m = 0; m < D / 16; ++m) out[m][0] *= even, out[m][1] *= odd, out[m][2] *= even, out[m][3] *= odd;
      }
    }
    uint32_t weights[N / 2][2];
#pragma unroll
    for (int n = 0; n < N; ++n)
      weights[n / 2][n % 2] = pack_bf16(ptx::ex2(s[0][n][0] - (Direct ? 0.f : top)), ptx::ex2(s[0][n][1] - (Direct ? 0.f : top)));
    const bf16* v = advance(2 * i + 1) + row16 * D;
    // The sums of the weights are those of one more line of V^T, of ones: sums of the rounded weights.
#pragma unroll
    for (int x = 0; x < N / 2; ++x) {
      const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
      ptx::mma_m16n8k16(sum, ones, weights[x]);
#pragma unroll
      for (int m = 0; m < D / 16; ++m) {
        uint32_t y[4];
        ptx::ldmatrix_transposed(y, v + x * 16 * D + Tile<D>::moved(2 * m, flip) * 8);
        const uint32_t columns[4] = {y[0], y[1], y[2], y[3]};
        ptx::mma_m16n8k16(out[m], columns, weights[x]);
      }
    }
  }

  // Warps leave what they have where their rings were, and all add it up, in the order of the warps.
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* records = reinterpret_cast<float*>(rings);
  const auto record = [&](int w, int row) { return records + (w * kRows + row) * F::Stride; };
#pragma unroll
  for (int m = 0; m < D / 16; ++m)
#pragma unroll
    for (int e = 0; e < 4; ++e) record(warp, lane % 4 * 2 + e % 2)[16 * m + e / 2 * 8 + lane / 4] = out[m][e];
  if (lane % 4 == 0) tops[warp * kRows + lane / 4].x = Direct ? 0.f : top;
  if (lane < 4) tops[warp * kRows + 2 * lane].y = sum[0], tops[warp * kRows + 2 * lane + 1].y = sum[1];
  __syncthreads();
  const int count = min(kRows, p.group - tile * kRows);
  for (int i = thread; i < count * D; i += 32 * kWarps) {
    const int row = i / D, j = i % D;
    const int64_t at = static_cast<int64_t>(batch) * p.h + head * p.group + tile * kRows + row;
    float most = tops[row].x, total = 0, x = 0;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) most = fmaxf(most, tops[w * kRows + row].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 t = tops[w * kRows + row];
      const float down = ptx::ex2(t.x - most);
      total += t.y * down;
      x += record(w, row)[j] * down;
    }
    if (p.parts == 1) {
      if (j < p.d) p.y[at * p.d + j] = to_bf16(x / total);
    } else {
      const int64_t to = static_cast<int64_t>(part) * p.b * p.h + at;
      p.out[to * D + j] = x;
      if (j == 0) p.sums[to] = make_float2(most, total);
    }
  }
}

// A block of D threads for each query. The first warp turns maxima into factors; then all loads of a thread are known at once.
template <int D>
__global__ __launch_bounds__(D) void join(const __grid_constant__ Step p) {
  Shared shared;
  float* factors = shared.take<float>(kMostParts);
  float* total = shared.take<float>(1);
  const int64_t at = blockIdx.x, all = static_cast<int64_t>(p.b) * p.h;
  const Seen seen(p, static_cast<int>(at / p.h));
  if (!seen.in(p)) return;
  const int parts = (seen.end + p.part - 1) / p.part, j = static_cast<int>(threadIdx.x);
  if (j < 32) {
    float2 own[kMostParts / 32];
    float most = kNoScore, sum = 0;
#pragma unroll
    for (int i = 0; i < kMostParts / 32; ++i) {
      own[i] = 32 * i + j < parts ? p.sums[(32 * i + j) * all + at] : make_float2(kNoScore, 0);
      most = fmaxf(most, own[i].x);
    }
    for (int lane = 16; lane > 0; lane /= 2) most = fmaxf(most, __shfl_xor_sync(kWarp, most, lane));
#pragma unroll
    for (int i = 0; i < kMostParts / 32; ++i) {
      const float factor = ptx::ex2(own[i].x - most);
      factors[32 * i + j] = factor;
      sum += own[i].y * factor;
    }
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(kWarp, sum, lane);
    if (j == 0) *total = sum;
  }
  __syncthreads();
  if (j >= p.d) return;
  float x = 0;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) x += p.out[(part * all + at) * D + j] * factors[part];
  p.y[at * p.d + j] = to_bf16(x / *total);
}

// q[b 1 h d], k[b 1 g d], v[b 1 g d], keys[n r g d]&, values[n r g d]&, rows[b]:i32, positions[b 1]:i32; scalars are scale, cap.
Step step_of(const Call& call) {
  const View &q = call.in[0], &keys = call.in[3];
  const auto dim = [](int64_t n) { return static_cast<int>(n); };
  Step p{};
  p.q = q.as<const bf16>(), p.key = call.in[1].as<const bf16>(), p.value = call.in[2].as<const bf16>();
  p.keys = keys.as<bf16>(), p.values = call.in[4].as<bf16>();
  p.rows = call.in[5].as<const int32_t>(), p.positions = call.in[6].as<const int32_t>();
  p.y = call.out[0].as<bf16>();
  p.b = dim(q.dims[0]), p.h = dim(q.dims[2]), p.d = dim(q.dims[3]);
  p.n = dim(keys.dims[0]), p.r = dim(keys.dims[1]), p.g = dim(keys.dims[2]);
  p.group = p.g > 0 ? p.h / p.g : 0;
  p.tiles = (p.group + kRows - 1) / kRows;
  p.part = std::max(kPart, ((p.r + kMostParts - 1) / kMostParts + kPart - 1) / kPart * kPart);
  p.parts = (p.r + p.part - 1) / p.part;
  static_cast<Scores&>(p) = scores_of(call);
  p.whole_chunks = p.d % 8 == 0;
  for (int i = 0; i < 5; ++i) p.whole_chunks &= reinterpret_cast<uintptr_t>(call.in[i].data) % 16 == 0;
  return p;
}

template <class F>
void run(const Call& call, const Step& p) {
  const FaultCheck bad_row{device_of(call).fault, Fault::cache_row, call.op, p.n};
  const FaultCheck bad_position{device_of(call).fault, Fault::cache_position, call.op, int64_t{1} << 31};
  const Grid grid{dim3(static_cast<unsigned>(p.b * p.g * p.tiles), static_cast<unsigned>(p.parts)), dim3(32 * kWarps), F::shared};
  p.direct ? launch(call, grid, step<F, true>, p, bad_row, bad_position) : launch(call, grid, step<F, false>, p, bad_row, bad_position);
  if (p.parts > 1) launch(call, Grid{dim3(static_cast<unsigned>(p.b * p.h)), dim3(F::D), (kMostParts + 4) * sizeof(float)}, join<F::D>, p);
}

// attention_step(q[b 1 h d], k[b 1 g d], v[b 1 g d], keys[n r g d]&, values[n r g d]&, rows[b]:i32, positions[b 1]:i32, scale, cap)
//   -> y[b 1 h d]
// As on the CPU (cpu/attention.cpp).
void attention_step(const Call& call) {
  check_head(call, call.in[0]);
  check_attention_step(call);
  Step p = step_of(call);
  if (p.b == 0 || p.y == nullptr) return;
  with_head(p.d, [&](auto d) {
    if (p.parts > 1) {
      p.out = static_cast<float*>(call.workspace);
      p.sums = reinterpret_cast<float2*>(p.out + int64_t{p.parts} * p.b * p.h * d);
    }
    run<Shape<d>>(call, p);
  });
}

size_t attention_step_workspace(const Call& call) {
  const Step p = step_of(call);
  size_t bytes = 0;
  with_head(p.d, [&](auto d) { bytes = static_cast<size_t>(p.parts) * p.b * p.h * (d * sizeof(float) + sizeof(float2)); });
  return p.parts > 1 ? bytes : 0;
}

}  // namespace
}  // namespace limbeck::cuda

LIMBECK_KERNELS(attention_step, {"attention_step", attention_step, attention_step_workspace})
