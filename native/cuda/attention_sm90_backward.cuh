// Attention backward on Hopper: seven products in two kernels, so that every sum has one owner and one order: no atomics, no float
// buffers, the same bits always. With s a score, t = tanh, P = e^(s - lse), D = sum(dY Y) of a query:
//   dS = P (dY V^T - D) (1 - t^2),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dY.
//
// query_gradients: a block is 128 queries of one head (Q and dY resident, 64 rows for each compute warpgroup), keys stream by.
// key_gradients: a block is the keys of one key/value head (K and V resident), and walks over the queries, 64 at a time, of all heads
// that share them: dK and dV stay in registers. Scores are transposed: rows are keys, so that P^T and dS^T multiply from registers.
// Up to head size 128 it has 128 keys, 64 for each compute warpgroup. With 256 the sums of 64 keys fill two warpgroups: both have the
// same keys, one makes P and dV, the other dS and dK, of P (1 - t^2) that the first leaves in shared memory.
//
// Blocks that stream the same tiles form clusters of two, and each loads half of every tile for both: in query_gradients two heads that
// share keys, in key_gradients (head size 256, where a block's 64 keys make little of what they load) neighbouring keys.
#pragma once
#include "cuda/attention_sm90_tile.cuh"

namespace limbeck::cuda::attention::sm90 {

struct Backward {
  Problem p;
  Score score;
  Order order;
  int cluster;  // blocks: 1 or 2
  const bf16 *dy, *y;
  const float* lse;
  float *lse2, *delta;  // [B H padded]: lse / log 2, D
  int32_t* ends;        // [B T] end of each token's document, or null
  int padded;           // positions, to a multiple of kRows
  bf16 *dq, *dk, *dv;   // null: not wanted
  bool add_dq, add_dk, add_dv;
};

// --- D, and the logarithms in units of log 2, in the order in which the kernels below read them ---------------------------------------
template <int D>
__global__ void __launch_bounds__(256) prepare(const __grid_constant__ Backward f) {
#if LIMBECK_HOPPER
  constexpr int kLanes = D <= 64 ? 8 : D <= 128 ? 16 : 32;  // of a row: 16 bytes each
  const Problem& p = f.p;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, head = static_cast<int>(index % p.h);
  const int row = static_cast<int>(index / p.h % f.padded);
  const int64_t batch = index / p.h / f.padded;
  float sum = 0;
  if (batch < p.b && row < p.t && lane * 8 < D) {
    const int64_t at = ((batch * p.t + row) * p.h + head) * D + lane * 8;
    const uint4 a = *reinterpret_cast<const uint4*>(f.dy + at), b = *reinterpret_cast<const uint4*>(f.y + at);
    const auto dot = [](uint32_t x, uint32_t y) { return low_float(x) * low_float(y) + high_float(x) * high_float(y); };
    sum = (dot(a.x, b.x) + dot(a.y, b.y)) + (dot(a.z, b.z) + dot(a.w, b.w));
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (batch >= p.b || lane != 0) return;
  const int64_t pair = batch * p.h + head;
  f.delta[pair * f.padded + row] = sum;
  f.lse2[pair * f.padded + row] = row < p.t ? f.lse[pair * p.t + row] * kLog2e : 0.f;
  if (f.ends == nullptr || head != 0 || row >= p.t) return;
  const int32_t* starts = p.starts + batch * p.t;
  int low = row + 1, high = p.t;  // the first token of a later document
  while (low < high) {
    const int middle = (low + high) / 2;
    if (starts[middle] > row)
      high = middle;
    else
      low = middle + 1;
  }
  f.ends[batch * p.t + row] = low;
#endif
}

// --- dQ -------------------------------------------------------------------------------------------------------------------------------
template <int D>
constexpr int kGradientKeys = D == 256 ? 64 : D == 64 ? 128 : 96;
template <int D>
constexpr int kValueStages = D == 256 ? 1 : 2;  // 128 KiB of Q and dY leave room for three tiles of 32

template <int D>
constexpr size_t kQueryShared = 4 * (2 * kTileWords<D, 2 * kRows> + (2 + kValueStages<D>)*kTileWords<D, kGradientKeys<D>>) + 128;

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    query_gradients(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap dy_map,
                    const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                    const __grid_constant__ TensorMap dq_map, const __grid_constant__ Backward f) {
#if LIMBECK_HOPPER
  constexpr int BM = 2 * kRows, BN = kGradientKeys<D>, kTile = kTileWords<D, BN>, VS = kValueStages<D>;
  Shared shared;
  uint32_t* q = shared.take<uint32_t>(kTileWords<D, BM>, 1024);
  uint32_t* dy = shared.take<uint32_t>(kTileWords<D, BM>, 1024);
  uint32_t* k = shared.take<uint32_t>(2 * kTile, 1024);
  uint32_t* v = shared.take<uint32_t>(VS * kTile, 1024);
  uint64_t* barriers = shared.take<uint64_t>(11);
  uint64_t* old_full = barriers + 9;  // for each compute warpgroup
  uint64_t *rows_full = barriers, *k_full = barriers + 1, *v_full = barriers + 3, *k_empty = barriers + 5, *v_empty = barriers + 7;

  const Problem& p = f.p;
  const Place at = place_of(f.order, static_cast<int>(blockIdx.x));
  const int batch = at.column / p.h, head = at.column % p.h, kv_head = head / p.group;
  const int row0 = (f.order.tiles - 1 - at.rank) * BM, row_end = min(row0 + BM, p.t);
  const int end = (row_end + BN - 1) / BN, begin = max(min(first_key(p, batch, row0) / BN, end - 1), 0);
  const int all_begin = (first_key(p, batch, row_end - 1) + BN - 1) / BN, all_end = (row0 + 1) / BN;

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(rows_full, 1);
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(old_full + i, 1);
    init_ring(k_full, k_empty, f.cluster);
    init_ring(v_full, v_empty, f.cluster);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (f.cluster > 1) ptx::cluster_sync();

  if (warpgroup_of_thread() == 0) {
    ptx::setmaxnreg_dec<kLoadRegisters>();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(rows_full, 8 * kTileWords<D, BM>);
      for (int i = 0; i < 2; ++i) {
        load_rows<D>(q + i * kRows * 32, BM, q_map, rows_full, head, row0 + i * kRows, batch);
        load_rows<D>(dy + i * kRows * 32, BM, dy_map, rows_full, head, row0 + i * kRows, batch);
      }
      for (int i = 0; i < end - begin; ++i) {
        const int key = (end - 1 - i) * BN, k_stage = stage_of<2>(i), v_stage = stage_of<VS>(i);
        ptx::mbarrier_wait(k_empty + k_stage, parity_of<2>(i) ^ 1);
        ptx::mbarrier_arrive_expect_tx(k_full + k_stage, 4 * kTile);
        load_shared_rows<D, BN>(k + k_stage * kTile, k_map, k_full + k_stage, kv_head, key, batch, f.cluster);
        ptx::mbarrier_wait(v_empty + v_stage, parity_of<VS>(i) ^ 1);
        ptx::mbarrier_arrive_expect_tx(v_full + v_stage, 4 * kTile);
        load_shared_rows<D, BN>(v + v_stage * kTile, v_map, v_full + v_stage, kv_head, key, batch, f.cluster);
      }
    }
    leave(f.cluster);
    return;
  }

  ptx::setmaxnreg_inc<kComputeRegisters>();
  const int part = (warpgroup_of_thread() - 1) * kRows, first = row0 + part;
  uint32_t *q_rows = q + part * 32, *dy_rows = dy + part * 32;
  Seen seen;
  float lse2[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = min(first + thread_row() + 8 * i, p.t - 1);
    seen.set(i, first_key(p, batch, row), row + 1);
    lse2[i] = f.lse2[static_cast<int64_t>(at.column) * f.padded + row];
    delta[i] = f.delta[static_cast<int64_t>(at.column) * f.padded + row];
  }

  float out[D / 2];
  uint32_t ds[BN / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) out[i] = 0;

  const int blocks = end - begin;
  ptx::mbarrier_wait(rows_full, 0);
  for (int i = 0; i < blocks; ++i) {
    const int k_stage = stage_of<2>(i), v_stage = stage_of<VS>(i), block = end - 1 - i;
    float x[BN / 2], dp[BN / 2];
    ptx::mbarrier_wait(k_full + k_stage, parity_of<2>(i));
    multiply_rows<BN, D>(x, q_rows, BM, k + k_stage * kTile, BN);
    ptx::mbarrier_wait(v_full + v_stage, parity_of<VS>(i));
    multiply_rows<BN, D>(dp, dy_rows, BM, v + v_stage * kTile, BN);
    ptx::wgmma_wait<1>();  // the scores, and before them the last block's part of dQ
    ptx::wgmma_settle(x);
    if (i > 0) release(k_empty + (k_stage ^ 1), f.cluster);
    to_scores(f.score, x);
#pragma unroll
    for (int j = 0; j < BN / 2; ++j) x[j] = ptx::ex2(x[j] - lse2[j / 2 % 2]) * (1.f - x[j] * x[j] * f.score.inverse);
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(x);
    ptx::wgmma_settle(dp);
    release(v_empty + v_stage, f.cluster);
#pragma unroll
    for (int j = 0; j < BN / 2; ++j) x[j] *= dp[j] - delta[j / 2 % 2];
    if (block < all_begin || block >= all_end) {
#pragma unroll
      for (int j = 0; j < BN / 2; ++j) x[j] = seen(j, block * BN + thread_column()) ? x[j] : 0.f;
    }
    pack<BN>(x, ds);
    multiply_columns<D, BN>(out, ds, k + k_stage * kTile);
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_settle(out);
  put_rows<D>(out, p.scale, f.add_dq, dq_map, q_rows, BM, old_full + part / kRows, head, first, batch);
  leave(f.cluster);
#endif
}

// --- dK and dV ------------------------------------------------------------------------------------------------------------------------
// Sums and tiles fill the registers: what a step asks for once, or nothing before the end, waits in shared memory.
struct Aside {
  int begin, end, all_begin, all_end;  // blocks of queries; those that no edge cuts
  int batch, head, key;
};

template <int D>
constexpr int kKeysOfBlock = D == 256 ? kRows : 2 * kRows;

// Of queries and their gradients. With 256 there is room for no more.
template <int D>
constexpr int kQueryStages = D == 256 ? 2 : 3;

template <int D>
constexpr size_t kKeyShared = 4 * (2 * kTileWords<D, kKeysOfBlock<D>> + 2 * kQueryStages<D>*(kTileWords<D, kRows> + kRows)) +
                              (D == 256 ? 8192 : 0) + 256 * sizeof(Seen) + 256;

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    key_gradients(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap dy_map, const __grid_constant__ TensorMap k_map,
                  const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dk_map, const __grid_constant__ TensorMap dv_map,
                  const __grid_constant__ Backward f) {
#if LIMBECK_HOPPER
  constexpr bool kSplit = D == 256;
  constexpr int BM = kKeysOfBlock<D>, BN = kRows, kTile = kTileWords<D, BN>, kStages = kQueryStages<D>;
  Shared shared;
  uint32_t* k = shared.take<uint32_t>(kTileWords<D, BM>, 1024);
  uint32_t* v = shared.take<uint32_t>(kTileWords<D, BM>, 1024);
  uint32_t* q = shared.take<uint32_t>(kStages * kTile, 1024);
  uint32_t* dy = shared.take<uint32_t>(kStages * kTile, 1024);
  uint4* passed = kSplit ? shared.take<uint4>(4 * 128) : nullptr;
  float* lse2 = shared.take<float>(kStages * BN);  // each comes with the tile that the warpgroup reads first
  float* delta = shared.take<float>(kStages * BN);
  Seen* seen_by = shared.take<Seen>(256);  // what each thread's rows see, for the few steps that ask
  Aside* aside = shared.take<Aside>(1);
  uint64_t* barriers = shared.take<uint64_t>(5 + 4 * kStages);
  uint64_t *keys_full = barriers, *old_full = barriers + 1;  // that for each compute warpgroup's dK and dV
  uint64_t *q_full = barriers + 5, *dy_full = q_full + kStages, *q_empty = dy_full + kStages, *dy_empty = q_empty + kStages;

  const Problem& p = f.p;
  const int cluster = kSplit ? f.cluster : 1;
  // The blocks of a cluster have neighbouring keys and walk over the queries that see any of them.
  const Place at = place_of(f.order, static_cast<int>(blockIdx.x) / cluster);
  const int batch = at.column / p.g, kv_head = at.column % p.g;
  const int cluster_key = at.rank * cluster * BM, cluster_last = min(cluster_key + cluster * BM, p.t) - 1;
  const int key0 = cluster_key + static_cast<int>(blockIdx.x) % cluster * BM, key_last = min(key0 + BM, p.t) - 1;
  const auto end_of = [&](int key) {  // the queries that see a key are [key, end)
    const int window = p.window > 0 && p.window < p.t - key ? key + p.window : p.t;
    return f.ends ? min(window, f.ends[static_cast<int64_t>(batch) * p.t + key]) : window;
  };
  const int begin = cluster_key / BN, end = max((end_of(cluster_last) + BN - 1) / BN, begin + 1);
  const int all_begin = (key_last + BN - 1) / BN, all_end = end_of(min(key0, key_last)) / BN;
  const int blocks = end - begin, steps = blocks * p.group;

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(keys_full, 1);
    for (int i = 0; i < 4; ++i) ptx::mbarrier_init(old_full + i, 1);
    *aside = {begin, end, all_begin, all_end, batch, kv_head, key0};
    init_ring<kStages>(q_full, q_empty, cluster);
    init_ring<kStages>(dy_full, dy_empty, cluster);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (cluster > 1) ptx::cluster_sync();

  if (warpgroup_of_thread() == 0) {
    ptx::setmaxnreg_dec<kLoadRegisters>();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(keys_full, 8 * kTileWords<D, BM>);
      for (int i = 0; i < BM / kRows; ++i) {
        load_rows<D>(k + i * kRows * 32, BM, k_map, keys_full, kv_head, key0 + i * kRows, batch);
        load_rows<D>(v + i * kRows * 32, BM, v_map, keys_full, kv_head, key0 + i * kRows, batch);
      }
      int head = kv_head * p.group, block = begin;
      for (int i = 0; i < steps; ++i) {
        const int stage = stage_of<kStages>(i);
        const int64_t statistics = (static_cast<int64_t>(batch) * p.h + head) * f.padded + block * BN;
        ptx::mbarrier_wait(q_empty + stage, parity_of<kStages>(i) ^ 1);
        ptx::mbarrier_arrive_expect_tx(q_full + stage, 4 * (kTile + BN));
        load_shared_rows<D, BN>(q + stage * kTile, q_map, q_full + stage, head, block * BN, batch, cluster);
        ptx::bulk_load(lse2 + stage * BN, f.lse2 + statistics, 4 * BN, q_full + stage);
        ptx::mbarrier_wait(dy_empty + stage, parity_of<kStages>(i) ^ 1);
        ptx::mbarrier_arrive_expect_tx(dy_full + stage, 4 * (kTile + BN));
        load_shared_rows<D, BN>(dy + stage * kTile, dy_map, dy_full + stage, head, block * BN, batch, cluster);
        ptx::bulk_load(delta + stage * BN, f.delta + statistics, 4 * BN, dy_full + stage);
        if (++block == end) block = begin, ++head;
      }
    }
    leave(cluster);
    return;
  }

  ptx::setmaxnreg_inc<kComputeRegisters>();
  const int part = kSplit ? 0 : (warpgroup_of_thread() - 1) * kRows, first = key0 + part;
  uint32_t *k_rows = k + part * 32, *v_rows = v + part * 32;
  {
    Seen seen;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = first + thread_row() + 8 * i;
      seen.set(i, key, end_of(min(key, p.t - 1)));
    }
    seen_by[threadIdx.x - 128] = seen;
  }
  const int own = thread_column();
  // From scores P, four of eight columns at a time to keep(columns / 8, P), and P (1 - t^2) as pairs.
  const auto weigh_queries = [&](float (&x)[BN / 2], uint32_t (&damped)[BN / 16][4], const float* lse, int block,
                                 auto keep) __attribute__((always_inline)) {
    to_scores(f.score, x);
    const auto weigh = [&](auto masked) __attribute__((always_inline)) {
      Seen seen{};
      if constexpr (decltype(masked)::value) seen = seen_by[threadIdx.x - 128];
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        const float2 l = *reinterpret_cast<const float2*>(lse + 8 * j + own);
        float weight[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float z = x[4 * j + i];
          weight[i] = ptx::ex2(z - (i % 2 ? l.y : l.x));
          if constexpr (decltype(masked)::value) weight[i] = seen(4 * j + i, block * BN + own) ? weight[i] : 0.f;
          y[i] = weight[i] * (1.f - z * z * f.score.inverse);
        }
        keep(j, weight);
        damped[j / 2][j % 2 * 2] = pack_bf16(y[0], y[1]);
        damped[j / 2][j % 2 * 2 + 1] = pack_bf16(y[2], y[3]);
      }
    };
    if (block >= aside->all_begin && block < aside->all_end)
      weigh(std::false_type{});
    else
      weigh(std::true_type{});
  };
  // dS = P (1 - t^2) (dP - D), in place of dP.
  const auto differentiate = [&](const uint32_t (&damped)[BN / 16][4], float (&dp)[BN / 2], const float* d,
                                 int block) __attribute__((always_inline)) {
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      const float2 l = *reinterpret_cast<const float2*>(d + 8 * j + own);
      const float2 a = unpack_bf16(damped[j / 2][j % 2 * 2]), b = unpack_bf16(damped[j / 2][j % 2 * 2 + 1]);
      dp[4 * j] = a.x * (dp[4 * j] - l.x);
      dp[4 * j + 1] = a.y * (dp[4 * j + 1] - l.y);
      dp[4 * j + 2] = b.x * (dp[4 * j + 2] - l.x);
      dp[4 * j + 3] = b.y * (dp[4 * j + 3] - l.y);
    }
    if (block < aside->all_begin || block >= aside->all_end) {
      const Seen seen = seen_by[threadIdx.x - 128];
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) dp[i] = seen(i, block * BN + own) ? dp[i] : 0.f;
    }
  };

  ptx::mbarrier_wait(keys_full, 0);
  if constexpr (!kSplit) {
    float dk[D / 2], dv[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;
    uint32_t ds[BN / 16][4];
    // The sums are waited for when the next scores are begun, which takes registers that there are not with 128.
    constexpr bool kAhead = D < 128;
    int block = aside->begin;
    for (int i = 0; i < steps; ++i) {
      const int stage = stage_of<kStages>(i);
      float x[BN / 2], dp[BN / 2];
      uint32_t weights[BN / 16][4], damped[BN / 16][4];
      ptx::mbarrier_wait(q_full + stage, parity_of<kStages>(i));
      multiply_rows<BN, D>(x, k_rows, BM, q + stage * kTile, BN);
      ptx::mbarrier_wait(dy_full + stage, parity_of<kStages>(i));
      multiply_rows<BN, D>(dp, v_rows, BM, dy + stage * kTile, BN);
      ptx::wgmma_wait<1>();  // the scores, and before them the last queries' parts of dK and dV
      ptx::wgmma_settle(x);
      if (kAhead && i > 0) {
        release(q_empty + stage_of<kStages>(i - 1), 1);
        release(dy_empty + stage_of<kStages>(i - 1), 1);
      }
      weigh_queries(x, damped, lse2 + stage * BN, block, [&weights](int j, const float (&w)[4]) __attribute__((always_inline)) {
        weights[j / 2][j % 2 * 2] = pack_bf16(w[0], w[1]);
        weights[j / 2][j % 2 * 2 + 1] = pack_bf16(w[2], w[3]);
      });
      multiply_columns<D, BN>(dv, weights, dy + stage * kTile);
      ptx::wgmma_wait<1>();
      ptx::wgmma_settle(dp);
      differentiate(damped, dp, delta + stage * BN, block);
      pack<BN>(dp, ds);
      multiply_columns<D, BN>(dk, ds, q + stage * kTile);
      if constexpr (!kAhead) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_settle(dk);
        ptx::wgmma_settle(dv);
        release(q_empty + stage, 1);
        release(dy_empty + stage, 1);
      }
      if (++block == aside->end) block = aside->begin;
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(dk);
    ptx::wgmma_settle(dv);
    if (f.dk) put_rows<D>(dk, p.scale, f.add_dk, dk_map, k_rows, BM, old_full + 2 * part / kRows, aside->head, aside->key + part, aside->batch);
    if (f.dv) put_rows<D>(dv, 1.f, f.add_dv, dv_map, v_rows, BM, old_full + 2 * part / kRows + 1, aside->head, aside->key + part, aside->batch);
  } else {
    // Each warpgroup begins its sum and then its next scores, and computes while the other's products run. What a sum has read is
    // released before the scores are there, so that a stage is filled again during a whole step.
    constexpr int kPassed = 3, kTaken = 4;  // barriers of both warpgroups
    uint4* mine = passed + threadIdx.x % 128;
    float sum[D / 2], x[BN / 2];
    uint32_t factor[BN / 16][4], damped[BN / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sum[i] = 0;
    int block = aside->begin;
    if (warpgroup_of_thread() == 1) {
      const auto begin_scores = [&](int i) __attribute__((always_inline)) {
        ptx::mbarrier_wait(q_full + stage_of<2>(i), parity_of<2>(i));
        multiply_rows<BN, D>(x, k, BM, q + stage_of<2>(i) * kTile, BN);
      };
      const auto step = [&](int i, auto more) __attribute__((always_inline)) {
        const int stage = stage_of<2>(i);
        ptx::wgmma_wait<0>();
        ptx::wgmma_settle(x);
        weigh_queries(x, damped, lse2 + stage * BN, block, [&x](int j, const float (&w)[4]) __attribute__((always_inline)) {
          for (int l = 0; l < 4; ++l) x[4 * j + l] = w[l];
        });
        if (++block == aside->end) block = aside->begin;
        release(q_empty + stage, f.cluster);
        if (i > 0) ptx::bar_sync(kTaken, 256);
#pragma unroll
        for (int j = 0; j < BN / 16; ++j) mine[j * 128] = make_uint4(damped[j][0], damped[j][1], damped[j][2], damped[j][3]);
        ptx::bar_arrive(kPassed, 256);
        pack<BN>(x, factor);
        ptx::mbarrier_wait(dy_full + stage, parity_of<2>(i));
        multiply_columns<D, BN>(sum, factor, dy + stage * kTile);
        if constexpr (decltype(more)::value) begin_scores(i + 1);
        ptx::wgmma_wait<decltype(more)::value ? 1 : 0>();
        ptx::wgmma_settle(sum);
        release(dy_empty + stage, f.cluster);
      };
      begin_scores(0);
      for (int i = 0; i + 1 < steps; ++i) step(i, std::true_type{});
      step(steps - 1, std::false_type{});
      if (f.dv) put_rows<D>(sum, 1.f, f.add_dv, dv_map, k, BM, old_full + 1, aside->head, aside->key + part, aside->batch);
    } else {
      const auto begin_slopes = [&](int i) __attribute__((always_inline)) {
        ptx::mbarrier_wait(dy_full + stage_of<2>(i), parity_of<2>(i));
        multiply_rows<BN, D>(x, v, BM, dy + stage_of<2>(i) * kTile, BN);
      };
      const auto step = [&](int i, auto more) __attribute__((always_inline)) {
        const int stage = stage_of<2>(i);
        ptx::bar_sync(kPassed, 256);
#pragma unroll
        for (int j = 0; j < BN / 16; ++j) {
          const uint4 w = mine[j * 128];
          damped[j][0] = w.x, damped[j][1] = w.y, damped[j][2] = w.z, damped[j][3] = w.w;
        }
        if constexpr (decltype(more)::value) ptx::bar_arrive(kTaken, 256);
        ptx::wgmma_wait<0>();
        ptx::wgmma_settle(x);
        differentiate(damped, x, delta + stage * BN, block);
        if (++block == aside->end) block = aside->begin;
        release(dy_empty + stage, f.cluster);
        pack<BN>(x, factor);
        ptx::mbarrier_wait(q_full + stage, parity_of<2>(i));
        multiply_columns<D, BN>(sum, factor, q + stage * kTile);
        if constexpr (decltype(more)::value) begin_slopes(i + 1);
        ptx::wgmma_wait<decltype(more)::value ? 1 : 0>();
        ptx::wgmma_settle(sum);
        release(q_empty + stage, f.cluster);
      };
      begin_slopes(0);
      for (int i = 0; i + 1 < steps; ++i) step(i, std::true_type{});
      step(steps - 1, std::false_type{});
      if (f.dk) put_rows<D>(sum, p.scale, f.add_dk, dk_map, v, BM, old_full, aside->head, aside->key + part, aside->batch);
    }
  }
  leave(cluster);
#endif
}

}  // namespace limbeck::cuda::attention::sm90
