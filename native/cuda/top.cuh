// The k largest numbers of each row, the largest first, of equals the first. A number and its column are one key of 64 bits, all of them
// different: so any order of work gives the same lists. A block finds those of a chunk of a row; lists are then merged two by two.
#pragma once
#include <algorithm>

#include "cuda/lanes.cuh"
#include "cuda/ptx.cuh"

namespace limbeck::cuda {

using Key = unsigned long long;

// Larger for a larger float, NaN the largest, and among equals for a smaller column; never 0.
__device__ __forceinline__ Key key_of(float x, int64_t column) {
  const unsigned bits = __float_as_uint(x + 0.f);  // -0 counts as 0
  const unsigned order = x != x ? 0xffff0000u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(order) << 32 | (0xffffffffu - static_cast<unsigned>(column));
}
__device__ __forceinline__ int32_t column_of(Key key) { return static_cast<int32_t>(0xffffffffu - static_cast<unsigned>(key)); }

namespace top {

constexpr int kColumns = 8192;  // of a chunk; a power of two
constexpr int kThreads = 256;
constexpr int kGroup = 4;  // neighbours that are looked at by their largest first
constexpr int kGroups = kColumns / kGroup / kThreads;  // that a thread holds
constexpr int kMergeThreads = 512;
constexpr int64_t kRowsAtOnce = 512;  // lists take room only for so many

// With m the largest of a chunk: m, and the sums of e^(x - m) and e^((x - m) / temperature).
struct Sums {
  float largest, plain, tempered;
};

// Those columns of each row that count, and what is sought in them.
struct Rows {
  int64_t stride;  // elements from one row to the next
  int columns, k, chunks;
  int room, kept;  // of a chunk's list; of what it is chosen from
  Rows(int64_t stride, int64_t columns, int64_t k)
      : stride(stride), columns(static_cast<int>(columns)), k(static_cast<int>(std::min(k, columns))),
        chunks(static_cast<int>(ceil_div(columns, kColumns))), room(std::min(this->k, kColumns)),
        kept(room < kColumns / kGroup ? room * kGroup : kColumns) {}
  // Keys of the list of `count` chunks from `chunk` on.
  __device__ __forceinline__ int length(int chunk, int count) const {
    const int64_t from = static_cast<int64_t>(chunk) * kColumns, to = from + static_cast<int64_t>(count) * kColumns;
    return static_cast<int>(min(static_cast<int64_t>(k), min(to, static_cast<int64_t>(columns)) - from));
  }
};

// A key that at least k of the block's are not below, as near to the k-th largest as matters: bit by bit, until it is that or exactly k are
// left. Keys of 0 do not count. `Bits` of their upper half differ; their lower half lies above `common` by less than kColumns.
template <int Bits, int N>
__device__ __forceinline__ Key threshold(const Key (&keys)[N], unsigned k, unsigned common, unsigned* scratch) {
  constexpr int warps = kThreads / kWarp;
  Key least = 0;
  int turn = 0;
  // Whether keys not below it are enough; if exactly so, the search is over.
  bool found = false;
  const auto enough = [&](Key bound) {
    unsigned n = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) n += keys[i] >= bound;
    n = __reduce_add_sync(kAllLanes, n);
    unsigned* counts = scratch + turn * warps;
    turn ^= 1;
    if (threadIdx.x % kWarp == 0) counts[threadIdx.x / kWarp] = n;
    __syncthreads();
    n = 0;
#pragma unroll
    for (int i = 0; i < warps; ++i) n += counts[i];
    found = n == k;
    return n >= k;
  };
#pragma unroll 1
  for (int bit = 63; bit >= 64 - Bits && !found; --bit)
    if (const Key bound = least | Key{1} << bit; enough(bound)) least = bound;
  if (found) return least;
  // bf16: what follows the bits is zeros, or of negative numbers ones.
  if (Bits < 32 && least >> 63 == 0) least |= ((Key{1} << (32 - Bits)) - 1) << 32;
  least |= common;
#pragma unroll 1
  for (int bit = kColumns / 2; bit > 0 && !found; bit /= 2)
    if (enough(least | static_cast<unsigned>(bit))) least |= static_cast<unsigned>(bit);
  return least;
}

// The list of a chunk (x) of a row (y). `whole`: vectors of kGroup can be read.
template <class T, bool Summed>
__global__ __launch_bounds__(kThreads) void list_chunks(const T* x, const Rows rows, bool whole, const float* temperature, Key* lists, Sums* sums) {
  Shared shared;
  auto* scratch = shared.take<unsigned>(2 * kThreads / kWarp);
  auto* reduced = shared.take<float>(kWarp);
  auto* count = shared.take<int>(1);
  auto* kept = shared.take<Key>(rows.kept);
  const int chunk = static_cast<int>(blockIdx.x), begin = chunk * kColumns, columns = min(rows.columns - begin, kColumns);
  const int64_t row = blockIdx.y;
  x += row * rows.stride + begin;

  Floats<kGroup> held[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int at = (g * kThreads + static_cast<int>(threadIdx.x)) * kGroup;
    held[g] = splat<kGroup>(-INFINITY);
    if (whole && at + kGroup <= columns) {
      held[g] = Lanes<kGroup>{}.get(x + at);
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (at + j < columns) held[g][j] = to_float(x[at + j]);
    }
  }
  const auto key = [&](int g, int j) {
    const int at = (g * kThreads + static_cast<int>(threadIdx.x)) * kGroup + j;
    return at < columns ? key_of(held[g][j], begin + at) : Key{0};
  };

  // Where k groups have a largest that is not below a bound, at least k columns are not, and all of those are in these groups.
  Key most[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    most[g] = key(g, 0);
#pragma unroll
    for (int j = 1; j < kGroup; ++j) most[g] = Larger{}(most[g], key(g, j));
  }
  if (threadIdx.x == 0) *count = 0;
  const unsigned common = (0xffffffffu - static_cast<unsigned>(begin)) & ~static_cast<unsigned>(kColumns - 1);
  Key bound = 1;
  if (rows.k < (columns + kGroup - 1) / kGroup) bound = threshold<8 * sizeof(T)>(most, static_cast<unsigned>(rows.k), common, scratch);
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (most[g] < bound) continue;
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (const Key own = key(g, j); own >= bound) kept[atomicAdd(count, 1)] = own;
  }
  __syncthreads();
  const int all = *count, length = rows.length(chunk, 1);
  Key* list = lists + (row * rows.chunks + chunk) * rows.room;
  for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) {
    const Key own = kept[i];
    int before = 0;
#pragma unroll 4
    for (int j = 0; j < all; ++j) before += kept[j] > own;
    if (before < length) list[before] = own;
  }

  if constexpr (Summed) {
    float largest = -INFINITY, plain = 0, tempered = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int j = 0; j < kGroup; ++j) largest = fmaxf(largest, held[g][j]);
    largest = block_reduce(largest, Larger{}, -INFINITY, reduced);
    const float base = largest == -INFINITY ? 0.f : largest, per = 1.f / temperature[row];  // -inf - -inf is no number
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float z = (held[g][j] - base) * 1.44269504f;
        plain += ptx::ex2(z);
        if (per != 1.f) tempered += ptx::ex2(z * per);
      }
    plain = block_reduce(plain, Plus{}, 0.f, reduced);
    tempered = per == 1.f ? plain : block_reduce(tempered, Plus{}, 0.f, reduced);
    if (threadIdx.x == 0) sums[row * rows.chunks + chunk] = {largest, plain, tempered};
  }
}

// Keys of a list that are larger than `key`.
__device__ __forceinline__ int larger_in(const Key* list, int length, Key key) {
  int low = 0;
  while (low < length) {
    const int middle = (low + length) / 2;
    if (list[middle] > key) low = middle + 1;
    else length = middle;
  }
  return low;
}

// Merges the lists of a row, neighbours in every turn: a key's place is its own plus those before it in the other list. Then
// finish(row, list) has the row's k keys.
template <class Finish>
__global__ __launch_bounds__(kMergeThreads) void merge_lists(const Rows rows, Key* lists, Key* others, Finish finish) {
  const int64_t row = blockIdx.x, offset = row * rows.chunks * rows.room;
  Key *from = lists + offset, *to = others + offset;
#pragma unroll 1
  for (int chunks = 1; chunks < rows.chunks; chunks *= 2) {  // of each list
    const int count = (rows.chunks + chunks - 1) / chunks, longest = rows.length(0, chunks);
    for (int i = static_cast<int>(threadIdx.x); i < count * longest; i += kMergeThreads) {
      const int list = i / longest, at = i % longest, partner = list ^ 1;
      if (at >= rows.length(list * chunks, chunks)) continue;
      const Key key = from[static_cast<int64_t>(list) * chunks * rows.room + at];
      int place = at;
      if (partner < count)
        place += larger_in(from + static_cast<int64_t>(partner) * chunks * rows.room, rows.length(partner * chunks, chunks), key);
      if (place < rows.k) to[static_cast<int64_t>(list & ~1) * chunks * rows.room + place] = key;
    }
    __syncthreads();
    Key* const merged = to;
    to = from, from = merged;
  }
  finish(row, from);
}

// ---- Host.

inline size_t list_bytes(int64_t rows, const Rows& r) { return static_cast<size_t>(rows) * r.chunks * r.room * sizeof(Key); }

inline size_t bytes(int64_t rows, const Rows& r) {
  rows = std::min(rows, kRowsAtOnce);
  return 2 * list_bytes(rows, r) + static_cast<size_t>(rows) * r.chunks * sizeof(Sums);
}

// finish(row, keys, sums) by a block for each row, rows counted from `first` on: make_finish(first, sums).
template <bool Summed, class T, class MakeFinish>
void largest(const Call& call, const T* x, int64_t rows, const Rows& r, const float* temperature, MakeFinish make_finish) {
  char* memory = static_cast<char*>(call.workspace);
  const bool whole = reinterpret_cast<uintptr_t>(x) % (kGroup * sizeof(T)) == 0 && r.stride % kGroup == 0;
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const int64_t now = std::min(rows - first, kRowsAtOnce);
    Key *lists = reinterpret_cast<Key*>(memory), *others = reinterpret_cast<Key*>(memory + list_bytes(now, r));
    Sums* sums = reinterpret_cast<Sums*>(memory + 2 * list_bytes(now, r));
    const size_t shared = 2 * kThreads / kWarp * sizeof(unsigned) + kWarp * sizeof(float) + 16 + r.kept * sizeof(Key);
    const Grid grid{dim3(static_cast<unsigned>(r.chunks), static_cast<unsigned>(now)), dim3(kThreads), shared};
    launch(call, grid, list_chunks<T, Summed>, x + first * r.stride, r, whole, temperature ? temperature + first : nullptr, lists, sums);
    launch(call, Grid{dim3(static_cast<unsigned>(now)), dim3(kMergeThreads)}, merge_lists<decltype(make_finish(first, sums))>, r, lists, others,
           make_finish(first, sums));
  }
}

}  // namespace top
}  // namespace limbeck::cuda
