// Rows of a table by number. The gradient sums rows with equal ids in token order, so that its bits are the same in every run: ids are
// sorted (a stable radix sort, 8 bits a pass), the sorted tokens are cut into chunks of 32, each chunk sums its runs of equal ids, and
// runs that cross chunks are added in order. Its cost depends on the tokens, not on how often an id repeats.
#include "cuda/fault.h"
#include "cuda/lanes.cuh"

namespace limbeck::cuda {

static FaultCheck table_check(const Call& call, int64_t v) { return {device_of(call).fault, Fault::table_row, call.op, v}; }

template <class T>
struct Embed {
  const int32_t* ids;
  const T* table;
  int64_t v, c;
  float scale;
  Sink<T> y;
  FaultCheck check;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t at, L lanes) const {
    const auto [row, i] = divide(at, c);
    const int32_t id = ids[row];
    const bool inside = id >= 0 && id < v;
    if (!inside && i == 0) check.refuse(row, id);
    y.put(at, lanes, inside ? lanes.get(table + id * c + i) * scale : splat<L::count>(NAN));
  }
};

// embedding(ids[*]:i32, table[v c]:float, scale) -> y[* c]
template <class T>
static void embedding(const Call& call) {
  const View &ids = call.in[0], &table = call.in[1];
  const int64_t v = table.dims[0], c = table.dims[1];
  const Embed<T> body{ids.as<int32_t>(), table.as<T>(), v, c, static_cast<float>(call.scalar[0]), Sink<T>(call, 0),
                      table_check(call, v)};
  if (body.y.data) for_elements<kVector<T>>(call, ids.size() * c, c % kVector<T> == 0 && aligned(body.table, body.y.data), body);
}

// ---- Sorting tokens by id.

constexpr int kDigits = 256, kSortWarps = 8, kSortRounds = 8, kTile = kSortWarps * kSortRounds * kWarp;

// A key and the token that has it. Before the first pass they are the ids themselves; one outside the table sorts last, as v.
struct Keys {
  const int32_t* ids;  // in the first pass
  uint32_t v;
  uint32_t *key, *token;
  __device__ __forceinline__ uint32_t key_at(int64_t i) const {
    if (!ids) return key[i];
    const uint32_t id = static_cast<uint32_t>(ids[i]);
    return id < v ? id : v;
  }
  __device__ __forceinline__ uint32_t token_at(int64_t i) const { return ids ? static_cast<uint32_t>(i) : token[i]; }
};

// counts[digit, tile]: how many keys of a tile have the digit.
static __global__ void __launch_bounds__(kDigits) sort_count_kernel(int64_t n, Keys from, int shift, FaultCheck check, int32_t* counts) {
  Shared shared;
  auto* count = shared.take<int>(kDigits);
  count[threadIdx.x] = 0;
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile, end = begin + kTile < n ? begin + kTile : n;
  for (int64_t i = begin + threadIdx.x; i < end; i += kDigits) {
    const uint32_t key = from.key_at(i);
    if (from.ids && key == from.v) check.refuse(i, from.ids[i]);
    atomicAdd(&count[key >> shift & (kDigits - 1)], 1);
  }
  __syncthreads();
  counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = count[threadIdx.x];
}

// Each count becomes the sum of those before it: where the keys of a digit and tile go.
static __global__ void __launch_bounds__(kRowThreads) sort_scan_kernel(int64_t n, int32_t* counts) {
  Shared shared;
  auto* warp_sums = shared.take<int>(kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int before = 0;
  for (int64_t begin = 0; begin < n; begin += blockDim.x) {
    const int64_t i = begin + threadIdx.x;
    const int own = i < n ? counts[i] : 0;
    int up_to = own;
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const int other = __shfl_up_sync(kAllLanes, up_to, d);
      if (lane >= d) up_to += other;
    }
    if (lane == kWarp - 1) warp_sums[warp] = up_to;
    __syncthreads();
    const int theirs = lane < warps ? warp_sums[lane] : 0;
    const int earlier = warp_reduce(lane < warp ? theirs : 0, Plus{}), all = warp_reduce(theirs, Plus{});
    if (i < n) counts[i] = before + earlier + up_to - own;
    before += all;
    __syncthreads();
  }
}

// Moves keys and tokens to their places. Each warp has a run of the tile, so that equal digits keep their order.
static __global__ void __launch_bounds__(kDigits) sort_move_kernel(int64_t n, Keys from, int shift, const int32_t* counts, Keys to) {
  Shared shared;
  auto* count = shared.take<int>(kSortWarps * kDigits);  // by warp, then by digit: how many come before
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int w = 0; w < kSortWarps; ++w) count[w * kDigits + threadIdx.x] = 0;
  __syncthreads();

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile + warp * kSortRounds * kWarp;
  uint32_t key[kSortRounds];
  int place[kSortRounds];
#pragma unroll
  for (int r = 0; r < kSortRounds; ++r) {
    const int64_t i = begin + r * kWarp + lane;
    key[r] = i < n ? from.key_at(i) : 0;
    const int digit = i < n ? static_cast<int>(key[r] >> shift & (kDigits - 1)) : kDigits;  // beyond the end: a digit of its own
    const unsigned peers = __match_any_sync(kAllLanes, digit);
    int* own = &count[warp * kDigits + (i < n ? digit : 0)];
    place[r] = *own + __popc(peers & ((1u << lane) - 1));
    __syncwarp();
    if (i < n && lane == __ffs(static_cast<int>(peers)) - 1) *own += __popc(peers);
    __syncwarp();
  }
  __syncthreads();
  int start = counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x];
  for (int w = 0; w < kSortWarps; ++w) {
    const int c = count[w * kDigits + threadIdx.x];
    count[w * kDigits + threadIdx.x] = start;
    start += c;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kSortRounds; ++r) {
    const int64_t i = begin + r * kWarp + lane;
    if (i >= n) continue;
    const int64_t at = count[warp * kDigits + (key[r] >> shift & (kDigits - 1))] + place[r];
    to.key[at] = key[r];
    to.token[at] = from.token_at(i);
  }
}

// ---- Summing runs of equal ids.

constexpr int kRunChunk = 32;

template <class T>
struct Runs {
  int64_t n, c;
  uint32_t v;
  const uint32_t *key, *token;  // sorted
  const T* dy;
  float scale;
  float* part;  // [chunk 2 c]: a chunk's share of a run that began before it, and of one that goes on after it
  Sink<float> dtable;
};

// A block has the tokens of a chunk and some columns.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) runs_kernel(Runs<T> p) {
  Shared shared;
  auto* key = shared.take<uint32_t>(kRunChunk);
  auto* token = shared.take<uint32_t>(kRunChunk);
  const Lanes<N> lanes;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRunChunk;
  const int count = static_cast<int>(p.n - begin < kRunChunk ? p.n - begin : kRunChunk);
  for (int j = threadIdx.x; j < count; j += blockDim.x) {
    key[j] = p.key[begin + j];
    token[j] = p.token[begin + j];
  }
  __syncthreads();
  const int64_t i = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (i >= p.c) return;
  const bool goes_on = begin + count < p.n && p.key[begin + count] == key[count - 1];
  bool began_before = begin > 0 && p.key[begin - 1] == key[0];

  auto sum = splat<N>(0);
  constexpr int U = 4;  // rows on their way at once
  for (int j0 = 0; j0 < count; j0 += U) {
    Packed<T, N> row[U];
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (j0 + u < count) row[u] = Packed<T, N>::load(p.dy + token[j0 + u] * p.c + i);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int j = j0 + u;
      if (j >= count) break;
      sum = sum + row[u].floats();
      const bool last = j + 1 == count;
      if (!last && key[j + 1] == key[j]) continue;
      if (key[j] == p.v) return;  // ids outside the table come last
      if (began_before)
        lanes.put(p.part + (2 * blockIdx.x) * p.c + i, sum);
      else if (last && goes_on)
        lanes.put(p.part + (2 * blockIdx.x + 1) * p.c + i, sum);
      else
        p.dtable.put(key[j] * p.c + i, lanes, sum * p.scale);
      sum = splat<N>(0);
      began_before = false;
    }
  }
}

// The block of the chunk in which a long run begins adds the chunks' shares.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) long_runs_kernel(Runs<T> p) {
  const Lanes<N> lanes;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRunChunk, end = begin + kRunChunk;
  if (end >= p.n) return;
  const uint32_t id = p.key[end];
  if (id == p.v || p.key[end - 1] != id) return;
  if (begin > 0 && p.key[begin - 1] == id) return;  // it began earlier
  const int64_t i = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (i >= p.c) return;
  // The chunks that begin with the id: keys are sorted, so they end where a bisection says.
  int64_t low = blockIdx.x + 1, high = ceil_div(p.n, kRunChunk);
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.key[middle * kRunChunk] == id ? low : high) = middle;
  }
  auto sum = lanes.get(p.part + (2 * static_cast<int64_t>(blockIdx.x) + 1) * p.c + i);
#pragma unroll 8
  for (int64_t chunk = blockIdx.x + 1; chunk <= low; ++chunk) sum = sum + lanes.get(p.part + 2 * chunk * p.c + i);
  p.dtable.put(id * p.c + i, lanes, sum * p.scale);
}

struct Zero {
  float* x;
  template <class L>
  __device__ __forceinline__ void operator()(int64_t i, L lanes) const {
    lanes.put(x + i, splat<L::count>(0));
  }
};

// Workspace: shares of long runs, keys and tokens twice, counts.
struct SortRoom {
  int64_t tokens, tiles, part;
  explicit SortRoom(const Call& call)
      : tokens(call.in[1].size()), tiles(ceil_div(tokens, kTile)), part(ceil_div(ceil_div(tokens, kRunChunk) * 2 * call.in[2].dims[1], 4) * 4) {}
};

static size_t embedding_backward_bytes(const Call& call) {
  const SortRoom room(call);
  return 4 * static_cast<size_t>(room.part + 4 * room.tokens + kDigits * room.tiles);
}

// embedding_backward(dy[* c], ids[*]:i32, table[v c]:float, scale) -> dtable[v c]:f32+
template <class T>
static void embedding_backward(const Call& call) {
  constexpr int N = kVector<T>;
  const Sink<float> dtable(call, 0);
  if (!dtable.data) return;
  const SortRoom room(call);
  const int64_t n = room.tokens, v = call.in[2].dims[0], c = call.in[2].dims[1];
  if (!dtable.accumulate) for_elements<4>(call, v * c, aligned(dtable.data), Zero{dtable.data});
  if (n == 0 || c == 0) return;

  float* part = static_cast<float*>(call.workspace);
  uint32_t* room_of = reinterpret_cast<uint32_t*>(part + room.part);
  const Keys first{call.in[1].as<int32_t>(), static_cast<uint32_t>(v), nullptr, nullptr};
  const Keys buffer[2] = {{nullptr, first.v, room_of, room_of + n}, {nullptr, first.v, room_of + 2 * n, room_of + 3 * n}};
  int32_t* counts = reinterpret_cast<int32_t*>(room_of + 4 * n);
  const dim3 tiles(static_cast<unsigned>(room.tiles));
  Keys from = first;
  for (int shift = 0, pass = 0; pass == 0 || (v >> shift) > 0; shift += 8, ++pass) {
    const Keys to = buffer[pass % 2];
    launch(call, Grid{tiles, dim3(kDigits), kDigits * sizeof(int)}, sort_count_kernel, n, from, shift, table_check(call, v), counts);
    launch(call, Grid{dim3(1), dim3(room.tiles > 1 ? kRowThreads : kDigits), kWarp * sizeof(int)}, sort_scan_kernel, kDigits * room.tiles, counts);
    launch(call, Grid{tiles, dim3(kDigits), kSortWarps * kDigits * sizeof(int)}, sort_move_kernel, n, from, shift, counts, to);
    from = to;
  }

  const Runs<T> runs{n, c, first.v, from.key, from.token, call.in[0].as<T>(), static_cast<float>(call.scalar[0]), part, dtable};
  const bool whole = c % N == 0 && aligned(runs.dy, dtable.data);
  const int64_t vectors = whole ? c / N : c, slabs = ceil_div(vectors, 128);
  const unsigned threads = static_cast<unsigned>(ceil_div(ceil_div(vectors, slabs), kWarp) * kWarp);
  const dim3 blocks(static_cast<unsigned>(ceil_div(n, kRunChunk)), static_cast<unsigned>(slabs));
  launch(call, Grid{blocks, dim3(threads), 2 * kRunChunk * sizeof(uint32_t)}, whole ? runs_kernel<T, N> : runs_kernel<T, 1>, runs);
  launch(call, Grid{blocks, dim3(threads)}, whole ? long_runs_kernel<T, N> : long_runs_kernel<T, 1>, runs);
}

}  // namespace limbeck::cuda

LIMBECK_KERNELS(embedding, {"embedding", by_dtype<embedding<float>, embedding<bf16>, 1>},
                {"embedding_backward", by_dtype<embedding_backward<float>, embedding_backward<bf16>>, embedding_backward_bytes})
