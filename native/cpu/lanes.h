// Loops over elements and rows. Work is cut into pieces of a fixed size and sums have a fixed order: the same bits whatever the
// number of threads.
#pragma once
#include "core/kernel.h"
#include "cpu/simd.h"

namespace limbeck::cpu::LIMBECK_ISA {

LIMBECK_INLINE UVec bf16_bits(Vec v) {
  const UVec u = (UVec)v;
  const UVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return v == v ? rounded : (u >> 16) | 0x40u;                  // a NaN must not round to infinity
}

// The lanes of a vector that stand for elements: all W, or the n (< W) that are left at the end of an array.
struct AllLanes {
  LIMBECK_INLINE Vec get(const float* p) const { return load(p); }
  LIMBECK_INLINE Vec get(const uint16_t* p) const { return load_bf16(p); }
  LIMBECK_INLINE Vec keep(Vec v) const { return v; }
  LIMBECK_INLINE void put(float* p, Vec v) const { store(p, v); }
  LIMBECK_INLINE void put(uint16_t* p, Vec v) const {
    const HVec h = __builtin_convertvector(bf16_bits(v), HVec);
    std::memcpy(p, &h, sizeof h);
  }
};
struct TwoVectors {
  LIMBECK_INLINE Pair get(const float* p) const { return {load(p), load(p + W)}; }
  LIMBECK_INLINE Pair keep(const Pair& v) const { return v; }
  LIMBECK_INLINE void put(float* p, Pair v) const { store(p, v); }
};
struct SomeLanes {
  int64_t n;
  LIMBECK_INLINE Vec get(const float* p) const { return load_part(p, n); }
  LIMBECK_INLINE Vec get(const uint16_t* p) const { return load_bf16_part(p, n); }
  // Zero in the lanes that stand for nothing.
  LIMBECK_INLINE Vec keep(Vec v) const {
    IVec lane{};
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane < static_cast<int32_t>(n) ? v : Vec{};
  }
  LIMBECK_INLINE void put(float* p, Vec v) const { store_part(p, v, n); }
  LIMBECK_INLINE void put(uint16_t* p, Vec v) const {
    const UVec bits = bf16_bits(v);
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint16_t>(bits[i]);
  }
};

// An output that may be unwanted, and that either overwrites or accumulates.
struct Sink {
  float* data;
  bool accumulate;
  Sink(const Call& call, int i) : data(call.out[i].as<float>()), accumulate(call.accumulate[i]) {}
  explicit operator bool() const { return data != nullptr; }
  template <class Lanes>
  LIMBECK_INLINE void put(int64_t i, Lanes lanes, Vec v) const {
    if (!data) return;
    lanes.put(data + i, accumulate ? lanes.get(data + i) + v : v);
  }
};

// body(i, lanes) for every vector of [begin, end).
template <class Body>
LIMBECK_INLINE void for_lanes(int64_t begin, int64_t end, Body&& body) {
  int64_t i = begin;
  for (; i + W <= end; i += W) body(i, AllLanes{});
  if (i < end) body(i, SomeLanes{end - i});
}

// The same, two vectors at a time while there are as many.
template <class Body>
LIMBECK_INLINE void for_pairs(int64_t begin, int64_t end, Body&& body) {
  int64_t i = begin;
  for (; i + 2 * W <= end; i += 2 * W) body(i, TwoVectors{});
  for_lanes(i, end, body);
}

LIMBECK_INLINE void add(Vec& to, Vec v) { to += v; }
LIMBECK_INLINE void add(Vec& to, const Pair& v) { to += v.v[0] + v.v[1]; }

// The sum of value(i, lanes) over [0, n), in four chains.
template <class Value>
LIMBECK_INLINE float sum_lanes(int64_t n, Value&& value) {
  Vec part[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; ++k) part[k] += value(i + k * W, AllLanes{});
  for_lanes(i, n, [&](int64_t j, auto lanes) { part[0] += lanes.keep(value(j, lanes)); });
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

// body(begin, end) in parallel over [0, n) cut into chunks.
template <class Body>
LIMBECK_INLINE void for_chunks(const Call& call, int64_t n, int64_t chunk, Body&& body) {
  if (n <= 0) return;
  call.threads->parallel((n + chunk - 1) / chunk, [&](int64_t tile, int) {
    const int64_t begin = tile * chunk;
    body(begin, n - begin < chunk ? n : begin + chunk);
  });
}

constexpr int64_t kChunk = 16384;  // elements: some ten microseconds of memory traffic
inline int64_t rows_per_chunk(int64_t cols) { return cols > 0 && cols < kChunk ? kChunk / cols : 1; }

// body(i, lanes) in parallel for every vector of [0, n).
template <class Body>
LIMBECK_INLINE void for_elements(const Call& call, int64_t n, Body&& body) {
  for_chunks(call, n, kChunk, [&](int64_t begin, int64_t end) { for_lanes(begin, end, body); });
}

// body(row) in parallel.
template <class Body>
LIMBECK_INLINE void for_rows(const Call& call, int64_t rows, int64_t cols, Body&& body) {
  for_chunks(call, rows, rows_per_chunk(cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA
