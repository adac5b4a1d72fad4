// What the loss heads share: which tokens count, how many of them make a chunk of logits, the sums that gemm hooks leave behind,
// and the way back from a chunk's gradients to x and w. Letters: n tokens, c width, v vocabulary.
#pragma once
#include <cmath>
#include <cstring>

#include "core/checks.h"
#include "core/kernel.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace limbeck::cpu::LIMBECK_ISA {

// With |logit| <= this, sums of exp(logit) and their reciprocals stay far from float's limits: no maximum is needed.
constexpr double kBounded = 40;

// Lays out fields one after another; without a base it only counts.
struct Layout {
  char* base;
  size_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
    bytes += (static_cast<size_t>(count) * sizeof(T) + 63) & ~size_t{63};
    return p;
  }
};

// Bytes of w up to which it stays in the shared cache.
constexpr int64_t kCachedHead = 16 << 20;

// The sizes of a head that holds `buffers` matrices of logits at a time.
struct HeadShape {
  int64_t n, c, v;
  int64_t rows;   // tokens in a chunk, at most
  int64_t ld;     // row stride of a chunk's logits: not a power of two, which would let rows fight for the same cache sets
  int64_t slots;  // partial sums in a row: hooks leave one for each sliver, so that they do not depend on the number of threads

  HeadShape(const View& x, const View& w, int buffers) : n(x.rows()), c(x.cols()), v(w.dims[0]), slots(Slivers(v).count) {
    ld = (v + 15) / 16 * 16 + 16;
    // Each chunk reads w twice and adds to all of dw, so it takes up to 512 tokens: as many as 88 MiB of logits hold, or 34 MiB where w and
    // dw stay in the shared cache and the logits should too. Where that is few, 160 MiB for up to 256 tokens.
    constexpr int64_t kMost = 512, kEnough = 256;
    constexpr int64_t kSmall = 34 << 20, kUsual = 88 << 20, kLarge = 160 << 20;
    const int64_t row_bytes = buffers * ld * 4, large = kLarge / row_bytes;
    const int64_t usual = (v * c * 4 <= kCachedHead ? kSmall : kUsual) / row_bytes;
    rows = usual >= kEnough ? usual : large < kEnough ? large : kEnough;
    rows = rows > kMost ? kMost : rows < 16 ? 16 : rows / 16 * 16;
    if (rows > n) rows = n;
  }

  // Whether w is worth packing for dx: it is small, and read for each of several chunks.
  bool packs() const { return n > rows && v * c * 4 <= kCachedHead; }
};

// The chunk of tokens at work. Tokens of weight 0 are never in one.
struct Chunk {
  int64_t count;
  const int32_t* token;
  float *z, *x, *dx;  // [count ld], [count c], [count c]
};

// Calls body(row) for each row of a chunk.
template <class Body>
inline void each_row(ThreadPool& threads, int64_t rows, Body&& body) {
  constexpr int64_t kStep = 4;
  threads.parallel((rows + kStep - 1) / kStep, [&](int64_t tile, int thread) {
    const int64_t end = (tile + 1) * kStep < rows ? (tile + 1) * kStep : rows;
    for (int64_t i = tile * kStep; i < end; ++i) body(i, thread);
  });
}

// One weight for each token; without weights, 1/n: the total is then a mean.
inline float weight_of(const View& weights, int64_t n, int64_t i) { return weights ? weights.as<const float>()[i] : 1.f / static_cast<float>(n); }

// The tokens that count, in order. Returns how many.
inline int64_t list_tokens(const View& weights, int64_t n, int32_t* token) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (weight_of(weights, n, i) != 0.f) token[count++] = static_cast<int32_t>(i);
  return count;
}

inline void check_target(const Call& call, int64_t target, int64_t position, int64_t v) {
  if (target >= 0 && target < v) return;
  raise(Fault::target, call.op, position, static_cast<double>(target), v);
}

inline void zero(const View& v) {
  if (v) std::memset(v.data, 0, static_cast<size_t>(v.size()) * size_of(v.dtype));
}

inline void gather(ThreadPool& threads, const Chunk& chunk, const View& x, float* to) {
  const int64_t c = x.cols();
  each_row(threads, chunk.count, [&](int64_t i, int) { std::memcpy(to + i * c, x.as<const float>() + chunk.token[i] * c, static_cast<size_t>(c) * 4); });
}

// w as head_backward() reads it for dx: packed into `to` once for all chunks, or as it is.
inline Matrix head_rows(ThreadPool& threads, const HeadShape& s, const View& w, float* to) {
  const Matrix rows = rows_of(w.data, s.c, w.dtype);
  if (!to) return rows;
  Packed(s.v, s.c).pack(threads, rows, to);
  return Packed::matrix(to);
}

// chunk.z holds d total / d logits, but for a factor of each row in `scale` (absent: 1). w is [v c], packed or not.
// dx is added to; dw is overwritten when add_dw is false. chunk.x is lost.
inline void head_backward(ThreadPool& threads, const HeadShape& s, const Chunk& chunk, const Matrix& w, const View& dx, const View& dw, bool add_dw, const float* scale) {
  if (dx) {
    gemm(threads, chunk.count, s.c, s.v, rows_of(chunk.z, s.ld), w, chunk.dx, s.c);
    each_row(threads, chunk.count, [&](int64_t i, int) {
      float* to = dx.as<float>() + chunk.token[i] * s.c;
      const float* from = chunk.dx + i * s.c;
      const float f = scale ? scale[i] : 1.f;
      for (int64_t k = 0; k < s.c; ++k) to[k] += f * from[k];
    });
  }
  if (dw) {
    if (scale)
      each_row(threads, chunk.count, [&](int64_t i, int) {
        for (int64_t k = 0; k < s.c; ++k) chunk.x[i * s.c + k] *= scale[i];
      });
    GemmOptions options;
    options.accumulate = add_dw;
    gemm(threads, s.v, s.c, chunk.count, transposed(chunk.z, s.ld), rows_of(chunk.x, s.c), dw.as<float>(), s.c, options);
  }
}

LIMBECK_INLINE IVec lanes_below(int64_t n) {
  IVec lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n);
}

// body(column, lanes, values) over a row of n floats; `lanes` is less than W at the end, and values there are zero.
template <class Body>
LIMBECK_INLINE void each_vec(const float* row, int64_t n, Body&& body) {
  int64_t j = 0;
  for (; j + W <= n; j += W) body(j, int64_t{W}, load(row + j));
  if (j < n) body(j, n - j, load_part(row + j, n - j));
}
LIMBECK_INLINE void put(float* p, Vec v, int64_t lanes) {
  if (lanes == W) store(p, v);
  else store_part(p, v, lanes);
}
LIMBECK_INLINE Vec keep(Vec v, int64_t lanes) { return lanes == W ? v : lanes_below(lanes) ? v : Vec{}; }

LIMBECK_INLINE float highest(Vec v) {
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] = v[i] > v[i + step] ? v[i] : v[i + step];
  return v[0];
}
LIMBECK_INLINE float row_max(const float* row, int64_t n) {
  Vec top = splat(-INFINITY);
  each_vec(row, n, [&](int64_t, int64_t lanes, Vec z) { top = max(lanes == W ? z : lanes_below(lanes) ? z : top, top); });
  return highest(top);
}
// The first column that holds the row's maximum; -1 when there is none (all NaN).
inline int64_t row_argmax(const float* row, int64_t n) {
  const float best = row_max(row, n);
  for (int64_t j = 0; j < n; ++j)
    if (row[j] == best) return j;
  return -1;
}

// Makes the capped logits of a chunk and, for each sliver, their maximum and the sum of exp((z - maximum) / temperature).
struct LogitTile {
  float* z;
  int64_t ld, slots;
  float *tops, *sums, *cold_sums;  // [rows slots]. No tops: the logits are bounded, 0 stands for the maximum. cold_sums: at temperature 1
  float cap, inverse_t;

  static void run(void* ctx, const Block& b) {
    const LogitTile t = *static_cast<const LogitTile*>(ctx);
    if (t.cap > 0) t.bend(b);
    if (!t.sums) return;
    for (int64_t i = b.i0; i < b.i0 + b.rows; ++i) t.add_up(t.z + i * t.ld + b.j0, b.cols, i * t.slots + b.sliver);
  }
  TileHook hook() { return {run, this}; }

  LIMBECK_INLINE void bend(const Block& b) const {
    const float inverse = 1.f / cap;
    each_row_of(b, [&](int64_t i, auto over) __attribute__((always_inline)) {
      float* const row = z + i * ld + b.j0;
      over([&](int64_t k, auto lanes) __attribute__((always_inline)) { lanes.put(row + k, tanh(lanes.get(row + k) * inverse) * cap); });
    });
  }

  LIMBECK_INLINE void add_up(const float* row, int64_t n, int64_t slot) const {
    const float top = tops ? row_max(row, n) : 0.f;
    Vec warm{};
    each_vec(row, n, [&](int64_t, int64_t lanes, Vec u) { warm += keep(tops ? exp((u - top) * inverse_t) : exp_inside(u * inverse_t), lanes); });
    sums[slot] = sum(warm);
    if (tops) tops[slot] = top;
    if (!cold_sums) return;
    Vec cold{};
    each_vec(row, n, [&](int64_t, int64_t lanes, Vec u) { cold += keep(exp(u - top), lanes); });
    cold_sums[slot] = sum(cold);
  }
};

// The sum of a row's slots in a fixed order: vectors over short runs, then float64.
template <class Term>
LIMBECK_INLINE double slot_sum(int64_t count, Term&& term) {
  double total = 0;
  for (int64_t k = 0; k < count; k += 8 * W) {
    Vec part{};
    const int64_t end = k + 8 * W < count ? k + 8 * W : count;
    for (int64_t s = k; s < end; s += W) part += term(s, end - s < W ? end - s : W);
    total += sum(part);
  }
  return total;
}
LIMBECK_INLINE Vec load_upto(const float* p, int64_t n) { return n == W ? load(p) : load_part(p, n); }
inline double slot_sum(const float* slot, int64_t count) {
  return slot_sum(count, [&](int64_t s, int64_t n) { return load_upto(slot + s, n); });
}
// log sum exp(z / temperature) of a row from its slots.
inline double slot_lse(const float* tops, const float* sums, int64_t count, float inverse_t) {
  if (!tops) return std::log(slot_sum(sums, count));
  const float top = row_max(tops, count);
  const double total = slot_sum(count, [&](int64_t s, int64_t n) { return load_upto(sums + s, n) * exp((load_upto(tops + s, n) - top) * inverse_t); });
  return static_cast<double>(top) * inverse_t + std::log(total);
}

// A log-sum-exp of 20 rounded to float would put an error of 1e-6 on every probability of its row.
struct Split {
  float high, low;
  explicit Split(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - high)) {}
  double factor() const { return std::exp(-static_cast<double>(low)); }  // exp(u - x) = exp(u - high) factor
};

}  // namespace limbeck::cpu::LIMBECK_ISA
