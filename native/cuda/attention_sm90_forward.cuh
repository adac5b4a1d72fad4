// Attention forward on Hopper. A block: 128 queries of one head, resident; keys and values stream by in blocks of BN, from the right edge
// of the mask to its left. A compute warpgroup has 64 queries: scores in BN / 2 registers of a thread, outputs in D / 2, weights in
// BN / 4, which multiply the values without leaving the registers.
//
// The warpgroups take turns at the tensor cores: one makes weights while another multiplies those of its last block and makes the next
// scores. Its turn ends when these are begun, so that the tensor cores go from one to the other without a pause.
//
// Two heads that share keys and values see the same of them in the same rows: where there are such pairs, their blocks form a cluster
// and each loads half of every tile for both.
//
// Only blocks that cut the mask's edges carry mask code. With a cap up to 60 e^score fits in a float as it is: no maximum, no rescaling,
// and the outputs are touched by the tensor cores alone; otherwise softmax is online.
#pragma once
#include "cuda/attention_sm90_tile.cuh"

namespace limbeck::cuda::attention::sm90 {

// Head size 256: 64 KiB of queries and 4 * 40 of keys and values fill the shared memory.
template <int D>
constexpr int kForwardKeys = D == 256 ? 80 : 128;

template <int D>
constexpr int kForwardStages = D == 256 ? 2 : 3;

template <int D>
constexpr size_t kForwardShared = 4 * (kTileWords<D, 2 * kRows> + 2 * kForwardStages<D> * kTileWords<D, kForwardKeys<D>>) + 128;

struct Forward {
  Problem p;
  Score score;
  Order order;
  int cluster;  // blocks: 1 or 2
  bf16* y;
  float* lse;  // each of the two may be null
};

// Weights from scores. Returns nothing of them in `down` but, online, what the outputs so far are to be scaled by.
template <int N, bool Direct, bool Masked>
__device__ __forceinline__ void weigh(float (&x)[N / 2], const Seen& seen, int column, float (&sum)[2], float (&top)[2], float (&down)[2]) {
  if constexpr (Masked) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) x[i] = seen(i, column) ? x[i] : -INFINITY;
  }
  if constexpr (!Direct) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = x[2 * r];
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        if (i / 2 % 2 == r) high = fmaxf(high, x[i]);
      high = fmaxf(quad_max(high), top[r]);
      down[r] = ptx::ex2(top[r] - high);
      top[r] = high;
      sum[r] *= down[r];
    }
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int r = i / 2 % 2;
    x[i] = ptx::ex2(Direct ? x[i] : x[i] - top[r]);
    sum[r] += x[i];
  }
}

// Weights of products that are all seen, as if they were small, in one go: exponentials run beside the polynomial. Only then is known
// whether a warp's products were that; if not, nothing of this counts.
template <int N>
__device__ __forceinline__ bool weigh_small(const Score& score, const float (&x)[N / 2], uint32_t (&weights)[N / 16][4], float (&sum)[2]) {
  int largest = 0;
  float part[2] = {sum[0], sum[1]};
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const float2 s = small_scores(score, x[2 * i], x[2 * i + 1], largest), w = make_float2(ptx::ex2(s.x), ptx::ex2(s.y));
    part[i % 2] += w.x;
    part[i % 2] += w.y;
    weights[i / 4][i % 4] = pack_bf16(w.x, w.y);
  }
  if (__any_sync(0xffffffffu, __int_as_float(largest) > score.small_reach)) return false;
  sum[0] = part[0], sum[1] = part[1];
  return true;
}

// What is not finite in a value that a row does not see came into it as 0 * x in its block. Such a row is made again, by its warp, from
// the keys that it sees. `row` of the tile, `total` the logarithm of its sum of 2^score.
template <int D>
__device__ __attribute__((noinline)) void mend_row(const Forward& f, const Place& at, int batch, int q_row, float total, uint32_t* tile, int row) {
  const Problem& p = f.p;
  const int lane = static_cast<int>(threadIdx.x) % 32, head = at.column % p.h;
  constexpr int kPairs = (D / 2 + 31) / 32;
  const auto pair_of = [lane](const bf16* line, int i) {
    return 2 * (lane + 32 * i) < D ? unpack_bf16(reinterpret_cast<const uint32_t*>(line)[lane + 32 * i]) : make_float2(0, 0);
  };
  float2 q[kPairs], sum[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    q[i] = pair_of(p.q + ((static_cast<int64_t>(batch) * p.t + q_row) * p.h + head) * D, i);
    sum[i] = make_float2(0, 0);
  }
  for (int key = first_key(p, batch, q_row); key <= p.s - p.t + q_row; ++key) {
    const int64_t line = ((static_cast<int64_t>(batch) * p.s + key) * p.g + head / p.group) * D;
    float x[1] = {0};
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 k = pair_of(p.k + line, i);
      x[0] += q[i].x * k.x + q[i].y * k.y;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x[0] += __shfl_xor_sync(0xffffffffu, x[0], step);
    to_scores(f.score, x);
    const float weight = ptx::ex2(x[0] - total);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 v = pair_of(p.v + line, i);
      sum[i].x += weight * v.x;
      sum[i].y += weight * v.y;
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
    if (2 * (lane + 32 * i) < D) tile[word_of(2 * kRows, row, 2 * (lane + 32 * i))] = pack_bf16(sum[i].x, sum[i].y);
}

template <int D, bool Direct>
__global__ void __launch_bounds__(kThreads, 1)
    attend(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
           const __grid_constant__ TensorMap y_map, const __grid_constant__ Forward f) {
#if LIMBECK_HOPPER
  if (threadIdx.x == 0)
    for (const TensorMap* map : {&q_map, &k_map, &v_map, &y_map}) ptx::prefetch_tensor_map(map);
  constexpr int BM = 2 * kRows, BN = kForwardKeys<D>, kTile = kTileWords<D, BN>, kStages = kForwardStages<D>;
  Shared shared;
  uint32_t* q = shared.take<uint32_t>(kTileWords<D, BM>, 1024);
  uint32_t* k = shared.take<uint32_t>(kStages * kTile, 1024);
  uint32_t* v = shared.take<uint32_t>(kStages * kTile, 1024);
  uint64_t* q_full = shared.take<uint64_t>(1 + 4 * kStages);
  uint64_t *k_full = q_full + 1, *v_full = k_full + kStages, *k_empty = v_full + kStages, *v_empty = k_empty + kStages;

  const Problem& p = f.p;
  const Place at = place_of(f.order, static_cast<int>(blockIdx.x));
  const int batch = at.column / p.h, head = at.column % p.h, kv_head = head / p.group;
  const int row0 = (f.order.tiles - 1 - at.rank) * BM, row_end = min(row0 + BM, p.t);
  // Keys that any of the rows sees, and those that all of them see, in blocks.
  const int back = p.s - p.t;
  const int end = (back + row_end + BN - 1) / BN, begin = max(min(first_key(p, batch, row0) / BN, end - 1), 0);
  const int all_begin = (first_key(p, batch, row_end - 1) + BN - 1) / BN, all_end = (back + row0 + 1) / BN;

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(q_full, 1);
    init_ring<kStages>(k_full, k_empty, f.cluster);
    init_ring<kStages>(v_full, v_empty, f.cluster);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(q_full, 4 * kTileWords<D, BM>);
    load_rows<D>(q, BM, q_map, q_full, head, row0, batch);
    load_rows<D>(q + kRows * 32, BM, q_map, q_full, head, row0 + kRows, batch);
  }
  __syncthreads();
  if (f.cluster > 1) ptx::cluster_sync_relaxed();

  if (warpgroup_of_thread() == 0) {
    ptx::setmaxnreg_dec<kLoadRegisters>();
    // A thread for each ring: keys do not wait for the values before them, which are read later.
    const auto load = [&](uint32_t* tiles, const TensorMap& map, uint64_t* full, uint64_t* empty) {
      Slot<kStages> slot;
      for (int block = end - 1; block >= begin; --block, slot.next()) {
        ptx::mbarrier_wait(empty + slot.stage, slot.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(full + slot.stage, 4 * kTile);
        load_shared_rows<D, BN>(tiles + slot.stage * kTile, map, full + slot.stage, kv_head, block * BN, batch, f.cluster);
      }
    };
    if (threadIdx.x == 0) load(k, k_map, k_full, k_empty);
    if (threadIdx.x == 32) load(v, v_map, v_full, v_empty);
    leave(f.cluster);
    return;
  }

  ptx::setmaxnreg_inc<kComputeRegisters>();
  const int first = row0 + (warpgroup_of_thread() - 1) * kRows;  // of this warpgroup
  uint32_t* rows = q + (warpgroup_of_thread() - 1) * kRows * 32;
  Seen seen;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = min(first + thread_row() + 8 * i, p.t - 1);
    seen.set(i, first_key(p, batch, row), back + row + 1);
  }

  float out[D / 2], sum[2] = {0, 0}, top[2] = {-3.402823466e38f, -3.402823466e38f}, down[2] = {1, 1};
  uint32_t weights[BN / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) out[i] = 0;
  bool small = Direct;
  // What the products of the next block are to the outputs.
  const auto to_weights = [&](float (&x)[BN / 2], int block) __attribute__((always_inline)) {
    const bool all = block >= all_begin && block < all_end;
    if constexpr (Direct) {
      // Where one block had larger ones, others have: they are not tried again.
      if (all && small && (small = weigh_small<BN>(f.score, x, weights, sum))) return;
    }
    to_scores(f.score, x);
    const int column = block * BN + thread_column();
    if (all)
      weigh<BN, Direct, false>(x, seen, column, sum, top, down);
    else
      weigh<BN, Direct, true>(x, seen, column, sum, top, down);
    if constexpr (!Direct) {
#pragma unroll
      for (int j = 0; j < D / 2; ++j) out[j] *= down[j / 2 % 2];
    }
    pack<BN>(x, weights);
  };

  constexpr int kTurn = 3;  // and the next: barriers of both warpgroups
  const int me = warpgroup_of_thread() - 1;
  const auto take_turn = [&](int block) __attribute__((always_inline)) {
    if (me == 1 || block < end - 1) ptx::bar_sync(kTurn + me, 256);
  };
  const auto end_turn = [&](int block) __attribute__((always_inline)) {
    if (me == 0 || block > begin) ptx::bar_arrive(kTurn + 1 - me, 256);
  };

  Slot<kStages> k_slot, v_slot;
  ptx::mbarrier_wait(q_full, 0);
  {
    float x[BN / 2];
    ptx::mbarrier_wait(k_full, 0);
    take_turn(end - 1);
    multiply_rows<BN, D>(x, rows, BM, k, BN);
    end_turn(end - 1);
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(x);
    release(k_empty, f.cluster);
    k_slot.next();
    to_weights(x, end - 1);
  }

  for (int block = end - 2; block >= begin; --block) {
    float x[BN / 2];  // of this turn: nothing of the last one stays in registers
    ptx::mbarrier_wait(v_full + v_slot.stage, v_slot.parity);
    take_turn(block);
    multiply_columns<D, BN>(out, weights, v + v_slot.stage * kTile);
    ptx::mbarrier_wait(k_full + k_slot.stage, k_slot.parity);
    multiply_rows<BN, D>(x, rows, BM, k + k_slot.stage * kTile, BN);
    end_turn(block);
    ptx::wgmma_wait<1>();
    ptx::wgmma_settle(out);
    release(v_empty + v_slot.stage, f.cluster);
    v_slot.next();
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(x);
    release(k_empty + k_slot.stage, f.cluster);
    k_slot.next();
    to_weights(x, block);
  }
  ptx::mbarrier_wait(v_full + v_slot.stage, v_slot.parity);
  multiply_columns<D, BN>(out, weights, v + v_slot.stage * kTile);
  ptx::wgmma_wait<0>();
  ptx::wgmma_settle(out);

  float odd[2] = {0, 0};  // x * 0 is NaN for what is not finite
#pragma unroll
  for (int j = 0; j < D / 2; ++j) odd[j / 2 % 2] += out[j] * 0.f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] = quad_sum(sum[i]);
    odd[i] = quad_sum(odd[i]);
  }
  to_tile<D>(out, 1.f / sum[0], 1.f / sum[1], rows, BM);
  const float total[2] = {(Direct ? 0.f : top[0]) + ptx::lg2(sum[0]), (Direct ? 0.f : top[1]) + ptx::lg2(sum[1])};
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + thread_row() + 8 * i;
    if (f.lse && lane % 4 == 0 && row < p.t) f.lse[(static_cast<int64_t>(batch) * p.h + head) * p.t + row] = total[i] * kLn2;
    uint32_t odd_rows = __ballot_sync(0xffffffffu, lane % 4 == 0 && row < p.t && odd[i] != 0.f && fabsf(total[i]) < INFINITY);
    while (odd_rows != 0) {
      const int from = __ffs(static_cast<int>(odd_rows)) - 1;
      odd_rows &= odd_rows - 1;
      __syncwarp();
      mend_row<D>(f, at, batch, __shfl_sync(0xffffffffu, row, from), __shfl_sync(0xffffffffu, total[i], from), rows,
                  __shfl_sync(0xffffffffu, thread_row() + 8 * i, from));
    }
  }
  if (f.y) store_rows<D>(y_map, rows, BM, head, first, batch);
  leave(f.cluster);
#endif
}

}  // namespace limbeck::cuda::attention::sm90
