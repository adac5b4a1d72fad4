// Fused causal attention. Rows: for one (batch, key/value head), a row is a (position, query head of the group) pair, positions
// first; so all heads of a group share K and V, and a block of rows spans few positions. Row i sees the keys [lo(i), hi(i)): both
// bounds never decrease with i, so each block of rows, and each panel of a block, sees one range of keys, and nothing else is touched.
//
// Scores are kept transposed (a key is a line, rows are lanes): maxima, sums and masks then work on whole vectors, and only Q has
// to be transposed. K, V, Q, dY are packed in panels of NR columns: [panel][line][NR].
#include "core/checks.h"
#include "core/fail.h"
#include "core/kernel.h"
#include "cpu/simd.h"

namespace limbeck::cpu::LIMBECK_ISA {
namespace {

constexpr int MR = W == 16 ? 8 : 6;  // lines of a register tile: MR x 2 accumulators, 2 vectors of B, one broadcast
constexpr int NR = 2 * W;
constexpr int BQ = W == 16 ? 64 : 48;  // rows of a block: a multiple of MR and NR
constexpr int KF = 96;                 // keys of a chunk, forward and backward: multiples of MR
constexpr int KB = 48;
constexpr int kTasks = 16;             // enough tasks to keep some threads busy
constexpr int kDecodeKeys = 256;  // keys of one task when a single position attends
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
// Up to this cap e^score needs no running maximum: sums of e^60 over millions of keys, and e^-60, are well inside float's range.
constexpr double kDirectCap = 60;
static_assert(BQ % MR == 0 && BQ % NR == 0 && KF % MR == 0 && KB % MR == 0);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// 2^(x f) for |x f| <= 126. The product is never rounded: it is reduced by fused multiply-add.
template <int N>
LIMBECK_INLINE Vecs<N> exp2_of(const Vecs<N>& x, Vec f) {
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23 rounds to an integer in the low mantissa bits
  const Vecs<N> t = each<N>([&](int i) { return x.v[i] * f + magic; });
  const Vecs<N> r = each<N>([&](int i) { return x.v[i] * f - (t.v[i] - magic); });
  const Vecs<N> p = horner(r, 1.32647e-3f, 9.67151e-3f, 5.550734e-2f, 2.4022242e-1f, 6.9314698e-1f, 1.f);
  return p * power_of(t);
}
// 2^x for x <= 126; 0 below -126. NaN, the second operand of max, stays NaN.
template <int N>
LIMBECK_INLINE Vecs<N> exp2_down(const Vecs<N>& x) {
  const Vecs<N> y = exp2_of(each<N>([&](int i) { return max(splat(-126.f), x.v[i]); }), splat(1.f));
  return each<N>([&](int i) { return x.v[i] < -126.f ? Vec{} : y.v[i]; });
}
LIMBECK_INLINE Vec exp2_down(Vec x) { return exp2_down(Vecs<1>{{x}}).v[0]; }

// The first n elements, where n may be anything, below 0 too; the others are zero, and their memory is left alone.
LIMBECK_INLINE Vec load_some(const float* p, int64_t n) { return n >= W ? load(p) : n > 0 ? load_part(p, n) : Vec{}; }

struct Problem {
  const float *q, *k, *v;
  const int32_t* starts;
  int64_t b, t, s, h, g, d;
  int64_t group, rows, blocks, panels, window;
  float scale, cap;
  bool capped, direct;

  // Q is packed times this: then scores come as x of cap tanh(x), or in units of log 2.
  float q_factor() const { return capped ? scale / cap : scale * kLog2e; }
  int64_t chunks(int64_t keys) const { return ceil_div(s, keys); }
  int64_t packed(int64_t lines) const { return lines * panels * NR; }  // floats of `lines` lines in panels
  // Where a key of a (batch, key/value head) pair is.
  int64_t key_offset(int64_t pair, int64_t key) const { return ((pair / g * s + key) * g + pair % g) * d; }
  // With many pairs each is one task, and what it packs stays in the cache of its thread. With few, they are split.
  bool whole_pairs() const { return b * g >= kTasks; }
};

// q, k, v, starts stand at in[first..]; scalars are scale, cap, window.
Problem problem_of(const Call& call, int first) {
  const View &q = call.in[first], &k = call.in[first + 1];
  Problem p{};
  p.q = q.as<const float>();
  p.k = k.as<const float>();
  p.v = call.in[first + 2].as<const float>();
  p.starts = call.in[first + 3].as<const int32_t>();
  p.b = q.dims[0], p.t = q.dims[1], p.h = q.dims[2], p.d = q.dims[3];
  p.s = k.dims[1], p.g = k.dims[2];
  p.group = p.g > 0 ? p.h / p.g : 0;
  p.rows = p.t * p.group;
  p.blocks = ceil_div(p.rows, BQ);
  p.panels = ceil_div(p.d, NR);
  p.scale = static_cast<float>(call.scalar[0]);
  p.cap = static_cast<float>(call.scalar[1]);
  p.window = static_cast<int64_t>(call.scalar[2]);
  p.capped = call.scalar[1] > 0;
  p.direct = p.capped && call.scalar[1] <= kDirectCap;
  return p;
}

void check(const Call& call, const Problem& p, int first, bool square) {
  check_attention(call, first, square);
  if (p.starts == nullptr) return;
  using Long = long long;
  for (int64_t i = 0; i < p.b; ++i) {
    int64_t last = 0;
    for (int64_t j = 0; j < p.t; ++j) {
      const int64_t start = p.starts[i * p.t + j];
      if (start < last || start > j)
        fail(ErrorKind::data, "ERR_ATTENTION_STARTS", call.op, "starts",
             text("starts is %lld at sequence %lld, position %lld; it should be the first position of that token's document", Long{start},
                  Long{i}, Long{j}),
             text("%lld to %lld", Long{last}, Long{j}), text("%lld", Long{start}));
      last = start;
    }
  }
}

// A block of rows: the keys that each sees. Lanes past the last row repeat it.
struct Rows {
  alignas(64) int32_t lo[BQ];
  alignas(64) int32_t hi[BQ];
  int64_t count;
  int64_t offset[BQ];  // of the row in q, y
  int64_t lse[BQ];     // and in lse

  Rows(const Problem& p, int64_t pair, int64_t block) : count(least(BQ, p.rows - block * BQ)) {
    const int64_t batch = pair / p.g, head = pair % p.g;
    int64_t local = block * BQ / p.group, member = block * BQ % p.group;
    for (int64_t i = 0; i < BQ; ++i) {
      const int64_t position = p.s - p.t + local, from = p.window > 0 ? most(0, position - p.window + 1) : 0;
      const int64_t q_head = head * p.group + member;
      lo[i] = static_cast<int32_t>(p.starts ? most(from, p.starts[batch * p.t + local]) : from);
      hi[i] = static_cast<int32_t>(position + 1);
      offset[i] = ((batch * p.t + local) * p.h + q_head) * p.d;
      lse[i] = (batch * p.h + q_head) * p.t + local;
      if (i + 1 >= count) continue;
      if (++member == p.group) member = 0, ++local;
    }
  }
  // The chunks that they see.
  int64_t first_chunk(int64_t keys) const { return lo[0] / keys; }
  int64_t end_chunk(int64_t keys) const { return (hi[BQ - 1] + keys - 1) / keys; }
};

// Starts to fetch the rows of a tensor that will soon be read, or written: they are too far apart for the processor to foresee.
template <bool Write>
void expect_rows(const float* base, const Rows& rows, int64_t d) {
  for (int64_t i = 0; base && i < rows.count; ++i)
    for (int64_t j = 0; j < d; j += 16) __builtin_prefetch(base + rows.offset[i] + j, Write, 2);
}

// Keys of a chunk that a panel of rows works on, relative to the chunk: [begin, end) in whole strips, of which all rows of the
// panel see [all_begin, all_end).
struct Span {
  int64_t begin, end, all_begin, all_end;
};
Span span_of(const Rows& rows, int64_t panel, int64_t key0, int64_t keys) {
  // The products take rows in strips of MR, which may reach over the panel's edges.
  const int64_t first = panel * NR / MR * MR, last = least(ceil_div((panel + 1) * NR, MR) * MR, BQ) - 1;
  Span x;
  x.begin = most(rows.lo[first] - key0, 0) / MR * MR;
  x.end = least(ceil_div(most(rows.hi[last] - key0, 0), MR) * MR, keys);
  x.end = most(x.end, x.begin);
  x.all_begin = least(most(rows.lo[least((panel + 1) * NR, BQ) - 1] - key0, x.begin), x.end);
  x.all_end = most(least(rows.hi[panel * NR] - key0, x.end), x.all_begin);
  return x;
}

// C[M][N vectors] (+)= A B over n steps. A(i, k) = a[i AI + k AK], B(k) = b[k NR], C(i) = c[i CS]. After each `span` steps a jumps.
template <int M, int N, int AI, int AK, int CS, bool Load>
void tile(const float* a, int64_t span, int64_t jump, const float* b, float* c, int64_t n) {
  Vec acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) acc[i][j] = Load ? load(c + i * CS + j * W) : Vec{};
  for (; n > 0; n -= span, a += jump) {
    const int64_t steps = n < span ? n : span;
    const float* x = a;
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; ++k, x += AK, b += NR) {
      Vec y[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) y[j] = load(b + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) add_line(acc[i], y, x + i * AI, i);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) store(c + i * CS + j * W, acc[i][j]);
}

// Copies lines of d floats into panels [panel][lines][NR], zeros around them. Returns whether all are finite.
template <class Line>
bool pack(int64_t count, int64_t lines, int64_t d, Line line, float* out) {
  const int64_t panels = ceil_div(d, NR);
  Vec odd{};  // x 0 is NaN for NaN and infinities
  for (int64_t i = 0; i < count; ++i) {
    const float* in = line(i);
    float* to = out + i * NR;
    int64_t left = d;
    for (; left >= NR; left -= NR, in += NR, to += lines * NR) {
      const Vec a = load(in), b = load(in + W);
      store(to, a);
      store(to + W, b);
      odd += a * 0.f + b * 0.f;
    }
    if (left > 0) {
      const Vec a = load_some(in, left), b = load_some(in + W, left - W);
      store(to, a);
      store(to + W, b);
      odd += a * 0.f + b * 0.f;
    }
  }
  for (int64_t panel = 0; count < lines && panel < panels; ++panel)
    std::memset(out + (panel * lines + count) * NR, 0, static_cast<size_t>((lines - count) * NR) * 4);
  return sum(odd) == 0.f;
}

// a0 b0 a1 b1 ..., first and second half.
#if LIMBECK_WIDTH == 16
#define LIMBECK_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LIMBECK_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LIMBECK_WIDTH == 8
#define LIMBECK_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define LIMBECK_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LIMBECK_LOW 0, 4, 1, 5
#define LIMBECK_HIGH 2, 6, 3, 7
#endif

// Lines of d floats, times `factor`, as columns: out[panel of lines][d][NR]; panels past the last line are left alone.
template <class Line>
void pack_transposed(int64_t count, int64_t d, float factor, Line line, float* out) {
  for (int64_t i = 0; i < ceil_div(count, NR) * NR; i += W)
    for (int64_t j = 0; j < d; j += W) {
      const int64_t left = least(d - j, W);
      Vec x[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l)
        x[l] = i + l >= count ? Vec{} : load_some(line(i + l) + j, left) * factor;
      // log2(W) perfect shuffles transpose a square.
#pragma GCC unroll 4
      for (int step = 1; step < W; step *= 2) {
        Vec y[W];
#pragma GCC unroll 8
        for (int l = 0; l < W / 2; ++l) {
          y[2 * l] = __builtin_shufflevector(x[l], x[l + W / 2], LIMBECK_LOW);
          y[2 * l + 1] = __builtin_shufflevector(x[l], x[l + W / 2], LIMBECK_HIGH);
        }
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) x[l] = y[l];
      }
      float* to = out + (i / NR * d + j) * NR + i % NR;
      for (int64_t l = 0; l < left; ++l) store(to + l * NR, x[l]);
    }
}

// One line of panels, times `factor`, to or onto contiguous memory.
void unpack(const float* from, int64_t lines, int64_t d, float factor, bool accumulate, float* to) {
  for (int64_t j = 0; j * W < d; ++j) {
    Vec v = load(from + j / 2 * lines * NR + j % 2 * W) * factor;
    const int64_t left = d - j * W;
    if (left >= W) {
      if (accumulate) v += load(to + j * W);
      store(to + j * W, v);
    } else {
      if (accumulate) v += load_part(to + j * W, left);
      store_part(to + j * W, v, left);
    }
  }
}

// scores[key][row] = lines[key] . columns[row] for the strips and panels that meet. `lines` is a packed chunk of K or V, `columns`
// the transposed block of Q or dY.
template <int Keys>
void score(const Problem& p, const Span* spans, int64_t panels, const float* lines, const float* columns, float* scores) {
  for (int64_t key = 0; key < Keys; key += MR)
    for (int64_t panel = 0; panel < panels; ++panel)
      if (key >= spans[panel].begin && key < spans[panel].end)
        tile<MR, 2, NR, 1, BQ, false>(lines + key * NR, NR, Keys * NR, columns + panel * p.d * NR, scores + key * BQ + panel * NR, p.d);
}

// out[row] += sum over keys of weights[key][row] lines[key]: the values of a chunk of keys to a block of rows.
template <int Keys>
void add_to_rows(const Problem& p, const Rows& rows, int64_t key0, const float* weights, const float* lines, bool finite, float* out) {
  for (int64_t panel = 0; panel < p.panels; ++panel, lines += Keys * NR, out += BQ * NR) {
    if (!finite) {  // 0 x NaN is NaN, so hidden keys must really be left out
      for (int64_t i = 0; i < rows.count; ++i)
        for (int64_t key = most(rows.lo[i] - key0, 0); key < least(rows.hi[i] - key0, Keys); ++key)
          for (int j = 0; j < NR; j += W)
            store(out + i * NR + j, load(out + i * NR + j) + load(lines + key * NR + j) * weights[key * BQ + i]);
      continue;
    }
    const bool narrow = p.d - panel * NR <= W;
    for (int64_t i = 0; i < rows.count; i += MR) {
      const int64_t from = most(rows.lo[i] - key0, 0), n = least(rows.hi[i + MR - 1] - key0, Keys) - from;
      if (n <= 0) continue;
      const auto run = narrow ? tile<MR, 1, 1, BQ, NR, true> : tile<MR, 2, 1, BQ, NR, true>;
      run(weights + from * BQ + i, n, 0, lines + from * NR, out + i * NR, n);
    }
  }
}

// out[key] += sum over rows of weights[key][row] lines[row]: the values of a block of rows to a chunk of keys.
template <int Keys>
void add_to_keys(const Problem& p, const Rows& rows, int64_t key0, const float* weights, const float* lines, bool finite, float* out) {
  for (int64_t panel = 0; panel < p.panels; ++panel, lines += BQ * NR, out += Keys * NR) {
    if (!finite) {
      for (int64_t i = 0; i < rows.count; ++i)
        for (int64_t key = most(rows.lo[i] - key0, 0); key < least(rows.hi[i] - key0, Keys); ++key)
          for (int j = 0; j < NR; j += W)
            store(out + key * NR + j, load(out + key * NR + j) + load(lines + i * NR + j) * weights[key * BQ + i]);
      continue;
    }
    const bool narrow = p.d - panel * NR <= W;
    int64_t begin = 0, end = 0;  // rows that see any key of the strip
    for (int64_t key = 0; key < Keys; key += MR) {
      while (begin < rows.count && rows.hi[begin] <= key0 + key) ++begin;
      while (end < rows.count && rows.lo[end] < key0 + key + MR) ++end;
      if (begin >= end) continue;
      const auto run = narrow ? tile<MR, 1, BQ, 1, NR, true> : tile<MR, 2, BQ, 1, NR, true>;
      run(weights + key * BQ + begin, end - begin, 0, lines + begin * NR, out + key * NR, end - begin);
    }
  }
}

// Which lanes of a panel see a key.
struct Mask {
  IVec lo[2], hi[2];
  Mask(const Rows& rows, int64_t lane, int64_t key0) {
    std::memcpy(lo, rows.lo + lane, sizeof lo);
    std::memcpy(hi, rows.hi + lane, sizeof hi);
    for (int i = 0; i < 2; ++i) lo[i] -= static_cast<int32_t>(key0), hi[i] -= static_cast<int32_t>(key0);
  }
  LIMBECK_INLINE Vecs<2> keep(int64_t key, const Vecs<2>& x, float otherwise) const {
    const int32_t k = static_cast<int32_t>(key);
    return each<2>([&](int i) { return ((lo[i] <= k) & (hi[i] > k)) ? x.v[i] : splat(otherwise); });
  }
};

// Runs body(key, number of keys, masked) over a span: with masks only where some row does not see the key, else two keys at once.
template <class Body>
LIMBECK_INLINE void over(const Span& x, Body body) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  int64_t key = x.begin;
  for (; key < x.all_begin; ++key) body(key, One{}, std::true_type{});
  for (; key + 2 <= x.all_end; key += 2) body(key, Two{}, std::false_type{});
  if (key < x.all_end) body(key++, One{}, std::false_type{});
  for (; key < x.end; ++key) body(key, One{}, std::true_type{});
}

// A panel's lanes are two vectors; those of N keys.
template <int N>
LIMBECK_INLINE Vecs<2 * N> load_keys(const float* at) {
  return each<2 * N>([&](int i) { return load(at + i / 2 * BQ + i % 2 * W); });
}
template <int N>
LIMBECK_INLINE void store_keys(float* at, const Vecs<N>& x) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(at + i / 2 * BQ + i % 2 * W, x.v[i]);
}

// K and V of one key/value head in packed chunks, each with a flag: whether all of it is finite.
struct Packed {
  float *k, *v;
  int32_t *k_finite, *v_finite;
  int64_t keys, chunk_floats;

  static size_t bytes(const Problem& p, int64_t keys) {
    return static_cast<size_t>(2 * p.chunks(keys) * p.packed(keys) * 4 + ceil_div(2 * p.chunks(keys) * 4, 64) * 64);
  }
  Packed(const Problem& p, int64_t keys, void* memory) : keys(keys), chunk_floats(p.packed(keys)) {
    k = static_cast<float*>(memory);
    v = k + p.chunks(keys) * chunk_floats;
    k_finite = reinterpret_cast<int32_t*>(v + p.chunks(keys) * chunk_floats);
    v_finite = k_finite + p.chunks(keys);
  }
  void fill(const Problem& p, int64_t pair, int64_t chunk) {
    const int64_t from = p.key_offset(pair, chunk * keys), step = p.g * p.d, count = least(keys, p.s - chunk * keys);
    k_finite[chunk] = pack(count, keys, p.d, [&](int64_t l) { return p.k + from + l * step; }, k + chunk * chunk_floats);
    v_finite[chunk] = pack(count, keys, p.d, [&](int64_t l) { return p.v + from + l * step; }, v + chunk * chunk_floats);
  }
  // All of them, the key/value head `pair` at memory + pair * bytes(p, keys).
  static void fill_all(const Call& call, const Problem& p, int64_t keys, char* memory) {
    const int64_t chunks = p.chunks(keys);
    call.threads->parallel(p.b * p.g * chunks, [&](int64_t i, int) {
      Packed(p, keys, memory + i / chunks * static_cast<int64_t>(bytes(p, keys))).fill(p, i / chunks, i % chunks);
    });
  }
};

// A bump allocator over scratch memory, 64-byte steps.
struct Arena {
  char* at;
  float* floats(int64_t n) {
    float* p = reinterpret_cast<float*>(at);
    at += ceil_div(n * 4, 64) * 64;
    return p;
  }
};

// Turns scores into weights e^score, and adds them to the rows' sums.
void weigh_direct(const Problem& p, const Rows& rows, const Span& span, int64_t lane, int64_t key0, float* scores, float* sums) {
  const Vec factor = splat(p.cap * kLog2e);
  const Mask mask(rows, lane, key0);
  Vec sum0 = load(sums + lane), sum1 = load(sums + lane + W);
  over(span, [&](int64_t key, auto keys, auto masked) __attribute__((always_inline)) {
    constexpr int N = keys;
    float* at = scores + key * BQ + lane;
    auto w = exp2_of(tanh(load_keys<N>(at)), factor);
    if constexpr (masked) w = mask.keep(key, w, 0.f);
    store_keys(at, w);
    for (int i = 0; i < 2 * N; i += 2) sum0 += w.v[i], sum1 += w.v[i + 1];
  });
  store(sums + lane, sum0);
  store(sums + lane + W, sum1);
}

// The same with a reference m for each row, weights e^(score - m). It follows the maximum only when weights would grow past 2^8:
// then what was summed so far is scaled down.
template <bool Capped>
void weigh_online(const Problem& p, const Rows& rows, const Span& span, int64_t lane, int64_t key0, float* scores, float* sums,
                  float* reference, float* out) {
  const Vec factor = splat(p.cap * kLog2e);
  const Mask mask(rows, lane, key0);
  Vecs<2> m{{load(reference + lane), load(reference + lane + W)}}, top = m, sum{{load(sums + lane), load(sums + lane + W)}};
  over(span, [&](int64_t key, auto keys, auto masked) __attribute__((always_inline)) {
    constexpr int N = keys;
    float* at = scores + key * BQ + lane;
    auto z = load_keys<N>(at);
    if constexpr (Capped) {
      z = tanh(z);
      z = each<2 * N>([&](int i) { return z.v[i] * factor; });
    }
    if constexpr (masked) z = mask.keep(key, z, -__builtin_inff());
    if constexpr (Capped || masked) store_keys(at, z);
    for (int i = 0; i < 2 * N; ++i) top.v[i % 2] = max(z.v[i], top.v[i % 2]);
  });
  const IVec grown = (top.v[0] > m.v[0] + 8.f) | (top.v[1] > m.v[1] + 8.f);
  bool any = false;
  for (int i = 0; i < W; ++i) any |= grown[i] != 0;
  if (any) {
    alignas(64) float down[NR];
    for (int half = 0; half < 2; ++half) {
      const Vec x = exp2_down(m.v[half] - top.v[half]);
      store(down + half * W, x);
      sum.v[half] *= x;
      store(reference + lane + half * W, m.v[half] = top.v[half]);
    }
    for (int64_t panel = 0; panel < p.panels; ++panel)
      for (int i = 0; i < NR; ++i) {
        float* row = out + (panel * BQ + lane + i) * NR;
        store(row, load(row) * down[i]);
        store(row + W, load(row + W) * down[i]);
      }
  }
  over({span.begin, span.begin, span.end, span.end}, [&](int64_t key, auto keys, auto) __attribute__((always_inline)) {
    constexpr int N = keys;
    float* at = scores + key * BQ + lane;
    auto w = load_keys<N>(at);
    w = exp2_down(each<2 * N>([&](int i) { return w.v[i] - m.v[i % 2]; }));
    store_keys(at, w);
    for (int i = 0; i < 2 * N; ++i) sum.v[i % 2] += w.v[i];
  });
  store(sums + lane, sum.v[0]);
  store(sums + lane + W, sum.v[1]);
}

size_t forward_scratch(const Problem& p) {
  return static_cast<size_t>(4 * (KF * BQ + ceil_div(p.d * BQ, 16) * 16 + p.packed(BQ) + 2 * BQ));
}

void forward_block(const Call& call, const Problem& p, const Packed& packed, const Rows& rows, int thread) {
  Arena arena{static_cast<char*>(call.threads->scratch(thread, forward_scratch(p)))};
  float* scores = arena.floats(KF * BQ);
  float* columns = arena.floats(p.d * BQ);
  float* out = arena.floats(p.packed(BQ));
  float* sums = arena.floats(BQ);
  float* reference = arena.floats(BQ);
  const int64_t panels = ceil_div(rows.count, NR);
  float* y = call.out[0].as<float>();
  float* lse = call.out[1].as<float>();
  pack_transposed(rows.count, p.d, p.q_factor(), [&](int64_t i) { return p.q + rows.offset[i]; }, columns);
  expect_rows<true>(y, rows, p.d);
  std::memset(out, 0, static_cast<size_t>(p.packed(BQ)) * 4);
  for (int i = 0; i < BQ; ++i) sums[i] = 0, reference[i] = p.direct ? 0.f : -3.402823466e38f;

  for (int64_t chunk = rows.first_chunk(KF); chunk < rows.end_chunk(KF); ++chunk) {
    const int64_t key0 = chunk * KF;
    Span spans[BQ / NR];
    for (int64_t panel = 0; panel < panels; ++panel) spans[panel] = span_of(rows, panel, key0, KF);
    score<KF>(p, spans, panels, packed.k + chunk * packed.chunk_floats, columns, scores);
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (p.direct)
        weigh_direct(p, rows, spans[panel], panel * NR, key0, scores, sums);
      else if (p.capped)
        weigh_online<true>(p, rows, spans[panel], panel * NR, key0, scores, sums, reference, out);
      else
        weigh_online<false>(p, rows, spans[panel], panel * NR, key0, scores, sums, reference, out);
    }
    add_to_rows<KF>(p, rows, key0, scores, packed.v + chunk * packed.chunk_floats, packed.v_finite[chunk] != 0, out);
  }

  for (int64_t i = 0; i < rows.count; ++i) {
    if (y) unpack(out + i * NR, BQ, p.d, 1.f / sums[i], false, y + rows.offset[i]);
    if (lse) lse[rows.lse[i]] = reference[i] * kLn2 + __builtin_logf(sums[i]);
  }
}

// A single position: K and V are read once, and nothing is packed. Each task takes kDecodeKeys keys for all heads of a group and
// leaves (sum, reference, output) of each; a second step joins them in order.
struct Decode {
  int64_t first, parts, record;

  explicit Decode(const Problem& p) {
    first = p.window > 0 ? most(0, p.s - p.window) : 0;
    parts = ceil_div(p.s - first, kDecodeKeys);
    record = ceil_div(p.d, W) * W + W;  // sum, reference, ..., output
  }
  size_t bytes(const Problem& p) const { return static_cast<size_t>(p.b * p.h * parts * record * 4); }
};

// out[n] += the rows of V of some keys, times their weights.
template <int N, int Keys>
LIMBECK_INLINE void add_values(int64_t d, int64_t step, const float* v, const float* weights, float* out, int64_t out_step) {
  for (int64_t j = 0; j < d; j += W) {
    Vec x[Keys];
#pragma GCC unroll 4
    for (int i = 0; i < Keys; ++i) x[i] = load_some(v + i * step + j, d - j);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Vec sum = load(out + n * out_step + j);
#pragma GCC unroll 4
      for (int i = 0; i < Keys; ++i) sum += x[i] * weights[n * kDecodeKeys + i];
      store(out + n * out_step + j, sum);
    }
  }
}

// Dot product and sum of N query heads at once share the loads of K and V.
template <int N>
void decode_part(const Problem& p, int64_t key_at, int64_t count, int64_t q_head, float* scores, float* record, int64_t record_step) {
  const float* q = p.q + q_head * p.d;
  const int64_t step = p.g * p.d, whole = p.d / W * W;
  const float* k = p.k + key_at;
  for (int64_t key = 0; key < count; ++key, k += step) {
    Vec acc[N] = {};
    for (int64_t j = 0; j < whole; j += W)
      for (int n = 0; n < N; ++n) acc[n] += load(k + j) * load(q + n * p.d + j);
    if (whole < p.d)
      for (int n = 0; n < N; ++n) acc[n] += load_part(k + whole, p.d - whole) * load_part(q + n * p.d + whole, p.d - whole);
    for (int n = 0; n < N; ++n) scores[n * kDecodeKeys + key] = sum(acc[n]);
  }
  const Vec factor = splat(p.q_factor()), cap = splat(p.cap * kLog2e);
  for (int n = 0; n < N; ++n) {
    float* x = scores + n * kDecodeKeys;
    for (int64_t i = count; i < ceil_div(count, W) * W; ++i) x[i] = x[0];  // whatever the factor, no larger than the largest
    Vec top = splat(-3.402823466e38f), total{};
    for (int64_t i = 0; i < count; i += W) {
      Vec z = load(x + i) * factor;
      if (p.capped) z = tanh(z) * cap;
      store(x + i, z);
      top = max(z, top);
    }
    for (int64_t i = count; i < ceil_div(count, W) * W; ++i) x[i] = -__builtin_inff();
    float m = top[0];
    for (int i = 1; i < W; ++i) m = top[i] > m ? top[i] : m;
    for (int64_t i = 0; i < count; i += W) {
      const Vec w = exp2_down(load(x + i) - m);
      store(x + i, w);
      total += w;
    }
    record[n * record_step] = sum(total);
    record[n * record_step + 1] = m;
  }
  // Rows of V are read once, four at a time; the sums stay in L1.
  for (int n = 0; n < N; ++n) std::memset(record + n * record_step + W, 0, static_cast<size_t>(ceil_div(p.d, W) * W) * 4);
  const float* v = p.v + key_at;
  int64_t key = 0;
  for (; key + 4 <= count; key += 4, v += 4 * step) add_values<N, 4>(p.d, step, v, scores + key, record + W, record_step);
  for (; key < count; ++key, v += step) add_values<N, 1>(p.d, step, v, scores + key, record + W, record_step);
}

// The keys that a query sees: those before `end` of one sequence of k and v.
struct Seen {
  int64_t sequence, end;
};

// seen(batch) tells which; prepare(batch, head, key0, end) runs before keys from key0 are read, at least once for each of them.
template <class Look, class Prepare>
void decode(const Call& call, const Problem& p, Look seen, Prepare prepare) {
  const Decode x(p);
  float* records = static_cast<float*>(call.workspace);
  const int64_t step = x.parts * x.record;  // from one query head to the next
  call.threads->parallel(p.b * p.g * x.parts, [&](int64_t i, int thread) {
    const int64_t batch = i / x.parts / p.g, head = i % p.g, part = i / p.g % x.parts;  // heads of the same keys are neighbours
    const Seen keys = seen(batch);
    const int64_t key0 = x.first + part * kDecodeKeys, count = least(kDecodeKeys, keys.end - key0);
    if (count <= 0) return;
    prepare(batch, head, key0, key0 + count);
    const int64_t at = p.key_offset(keys.sequence * p.g + head, key0);
    float* scores = static_cast<float*>(call.threads->scratch(thread, 4 * kDecodeKeys * sizeof(float)));
    for (int64_t n = 0; n < p.group;) {
      const int64_t q_head = batch * p.h + head * p.group + n, left = p.group - n;
      float* record = records + q_head * step + part * x.record;
      if (left >= 4)
        decode_part<4>(p, at, count, q_head, scores, record, step), n += 4;
      else if (left >= 2)
        decode_part<2>(p, at, count, q_head, scores, record, step), n += 2;
      else
        decode_part<1>(p, at, count, q_head, scores, record, step), n += 1;
    }
  });
  float* y = call.out[0].as<float>();
  float* lse = call.out[1].as<float>();
  for (int64_t i = 0; i < p.b * p.h; ++i) {
    const float* record = records + i * step;
    const int64_t parts = ceil_div(seen(i / p.h).end - x.first, kDecodeKeys);
    float m = record[1], total = 0;
    for (int64_t part = 1; part < parts; ++part) m = record[part * x.record + 1] > m ? record[part * x.record + 1] : m;
    for (int64_t part = 0; part < parts; ++part) {
      const float down = exp2_down(splat(record[part * x.record + 1] - m))[0];
      total += record[part * x.record] * down;
      if (y)
        for (int64_t j = 0; j < p.d; ++j) {
          float& to = y[i * p.d + j];
          to = (part > 0 ? to : 0.f) + record[part * x.record + W + j] * down;
        }
    }
    if (y)
      for (int64_t j = 0; j < p.d; ++j) y[i * p.d + j] /= total;
    if (lse) lse[i] = m * kLn2 + __builtin_logf(total);
  }
}

// attention(q[b t h d], k[b s g d], v[b s g d], starts[b t]:i32?, scale, cap, window) -> y[b t h d], lse[b h t]:f32
// The queries are the last t of s positions; query head i uses key/value head i / (h / g). Query i sees keys j <= i of its own
// document (j >= starts[i]), at most `window` of them, itself included (0: no window). Scores are scale q.k, then
// cap tanh(score / cap) if cap > 0. lse is the logarithm of the sum of e^score.
void attention(const Call& call) {
  const Problem p = problem_of(call, 0);
  check(call, p, 0, false);
  if (p.b == 0 || p.rows == 0) return;
  if (p.t == 1 && p.starts == nullptr) return decode(call, p, [&](int64_t batch) { return Seen{batch, p.s}; }, [](auto...) {});
  char* memory = static_cast<char*>(call.workspace);
  const int64_t step = static_cast<int64_t>(Packed::bytes(p, KF));
  if (p.whole_pairs()) {
    call.threads->parallel(p.b * p.g, [&](int64_t pair, int thread) {
      Packed packed(p, KF, memory + thread * step);
      for (int64_t block = 0, ready = 0; block < p.blocks; ++block) {
        const Rows rows(p, pair, block);
        ready = most(ready, rows.first_chunk(KF));
        for (; ready < rows.end_chunk(KF); ++ready) packed.fill(p, pair, ready);
        if (block + 1 < p.blocks) expect_rows<false>(p.q, Rows(p, pair, block + 1), p.d);
        forward_block(call, p, packed, rows, thread);
      }
    });
  } else {
    Packed::fill_all(call, p, KF, memory);
    call.threads->parallel(p.b * p.g * p.blocks, [&](int64_t i, int thread) {
      const int64_t pair = i / p.blocks, block = p.blocks - 1 - i % p.blocks;  // long blocks first
      forward_block(call, p, Packed(p, KF, memory + pair * step), Rows(p, pair, block), thread);
    });
  }
}

size_t attention_workspace(const Call& call) {
  const Problem p = problem_of(call, 0);
  if (p.t == 1 && p.starts == nullptr) return Decode(p).bytes(p);
  return Packed::bytes(p, KF) * static_cast<size_t>(p.whole_pairs() ? call.threads->size() : p.b * p.g);
}

// attention_step's keys are a cache [n r g d], a ring of r places for each of n sequences.
Problem step_problem(const Call& call) {
  const View &q = call.in[0], &keys = call.in[3];
  Problem p{};
  p.q = q.as<const float>();
  p.k = keys.as<const float>();
  p.v = call.in[4].as<const float>();
  p.b = q.dims[0], p.t = 1, p.h = q.dims[2], p.d = q.dims[3];
  p.s = keys.dims[1], p.g = keys.dims[2];
  p.group = p.g > 0 ? p.h / p.g : 0;
  p.rows = p.group;
  p.scale = static_cast<float>(call.scalar[0]);
  p.cap = static_cast<float>(call.scalar[1]);
  p.capped = call.scalar[1] > 0;
  return p;
}

size_t attention_step_workspace(const Call& call) {
  const Problem p = step_problem(call);
  return Decode(p).bytes(p);
}

// attention_step(q[b 1 h d], k[b 1 g d], v[b 1 g d], keys[n r g d]&, values[n r g d]&, rows[b]:i32, positions[b 1]:i32, scale, cap)
//   -> y[b 1 h d]
// One more token of some sequences. Key and value of row i go to place positions[i] % r of sequence rows[i], then its query sees the
// positions[i] + 1 places that were written so far, at most all r. No sequence may be named twice.
void attention_step(const Call& call) {
  const Problem p = step_problem(call);
  check_attention_step(call);
  if (p.b == 0 || p.rows == 0 || !call.out[0]) return;
  const float *k = call.in[1].as<const float>(), *v = call.in[2].as<const float>();
  float *keys = call.in[3].as<float>(), *values = call.in[4].as<float>();
  const int32_t *rows = call.in[5].as<const int32_t>(), *positions = call.in[6].as<const int32_t>();
  const int64_t sequences = call.in[3].dims[0];
  for (int64_t i = 0; i < p.b; ++i) {
    if (rows[i] < 0 || rows[i] >= sequences) raise(Fault::cache_row, call.op, i, rows[i], sequences);
    if (positions[i] < 0) raise(Fault::cache_position, call.op, i, positions[i], 0);
    for (int64_t j = 0; j < i; ++j)
      if (rows[j] == rows[i]) raise(Fault::cache_row_twice, call.op, i, rows[i], sequences);
  }
  decode(
      call, p, [&](int64_t batch) { return Seen{rows[batch], least(int64_t{positions[batch]} + 1, p.s)}; },
      [&](int64_t batch, int64_t head, int64_t key0, int64_t end) {
        const int64_t place = positions[batch] % p.s;
        if (place < key0 || place >= end) return;
        const int64_t from = (batch * p.g + head) * p.d, to = p.key_offset(rows[batch] * p.g + head, place);
        std::memcpy(keys + to, k + from, static_cast<size_t>(p.d) * 4);
        std::memcpy(values + to, v + from, static_cast<size_t>(p.d) * 4);
      });
}

// The backward pass splits the rows of a pair into parts, by shape alone, of about equal work. Each part adds up dK and dV of the
// keys that it sees in memory of its own; at the end they are summed in order. dQ belongs to one part each.
constexpr int kMaxParts = 8;
struct Parts {
  int count;
  int64_t block[kMaxParts + 1];                    // first block of rows of each part
  int64_t chunk[kMaxParts], chunk_end[kMaxParts];  // chunks of keys that it may see
  int64_t offset[kMaxParts + 1];                   // first chunk in the parts' memory

  explicit Parts(const Problem& p) {
    const int64_t wanted = least(ceil_div(kTasks, most(p.b * p.g, 1)), kMaxParts);
    count = static_cast<int>(p.whole_pairs() ? 1 : most(1, least(wanted, p.blocks / 4)));
    const auto position = [&](int64_t blk) { return least(blk * BQ, p.rows - 1) / p.group; };
    const auto keys = [&](int64_t blk) { return p.window > 0 ? least(position(blk), p.window) : position(blk); };
    double all = 0, sum = 0;
    for (int64_t i = 0; i < p.blocks; ++i) all += static_cast<double>(keys(i)) + BQ;
    int part = 0;
    block[0] = 0;
    for (int64_t i = 0; i < p.blocks; ++i) {
      if (part + 1 < count && sum >= all * (part + 1) / count) block[++part] = i;
      sum += static_cast<double>(keys(i)) + BQ;
    }
    count = part + 1;
    block[count] = p.blocks;
    offset[0] = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t first = position(block[i]), last = least(block[i + 1] * BQ, p.rows) - 1;
      chunk[i] = p.window > 0 ? most(0, first - p.window + 1) / KB : 0;
      chunk_end[i] = (last / p.group) / KB + 1;
      offset[i + 1] = offset[i] + chunk_end[i] - chunk[i];
    }
  }
};

size_t backward_scratch(const Problem& p) {
  return static_cast<size_t>(4 * (2 * KB * BQ + 2 * ceil_div(p.d * BQ, 16) * 16 + 3 * p.packed(BQ) + 2 * BQ));
}

// Weights and gradients of the (unscaled) scores, in place of scores and products dY . V. `norm` is e^-lse, or lse in units of log 2;
// `delta` is dY . Y.
template <bool Capped, bool Direct>
void differentiate(const Problem& p, const Rows& rows, const Span& span, int64_t lane, int64_t key0, const float* norm, const float* delta,
                   float* scores, float* products) {
  const Vec factor = splat(p.cap * kLog2e);
  const Mask mask(rows, lane, key0);
  const Vec n[2] = {load(norm + lane), load(norm + lane + W)}, y[2] = {load(delta + lane), load(delta + lane + W)};
  over(span, [&](int64_t key, auto keys, auto masked) __attribute__((always_inline)) {
    constexpr int N = keys;
    float *at = scores + key * BQ + lane, *dat = products + key * BQ + lane;
    auto z = load_keys<N>(at), dz = load_keys<N>(dat), w = z;
    if constexpr (Capped) z = tanh(z);
    if constexpr (Direct) {
      w = exp2_of(z, factor);
      w = each<2 * N>([&](int i) { return w.v[i] * n[i % 2]; });
    } else {
      w = exp2_down(each<2 * N>([&](int i) { return Capped ? z.v[i] * factor - n[i % 2] : z.v[i] - n[i % 2]; }));
    }
    dz = each<2 * N>([&](int i) { return w.v[i] * (dz.v[i] - y[i % 2]); });
    if constexpr (Capped) dz = each<2 * N>([&](int i) { return dz.v[i] - dz.v[i] * (z.v[i] * z.v[i]); });
    if constexpr (masked) {
      w = mask.keep(key, w, 0.f);
      dz = mask.keep(key, dz, 0.f);
    }
    store_keys(at, w);
    store_keys(dat, dz);
  });
}

struct BackwardPass {
  const Call& call;
  const Problem p;
  const Parts parts;
  const float *dy, *y, *lse;
  float *dq, *dk, *dv;
  int64_t chunk_floats, pair_floats;  // of dK, and of dV, of a chunk and of all parts of a pair

  explicit BackwardPass(const Call& call) : call(call), p(problem_of(call, 1)), parts(p) {
    dy = call.in[0].as<const float>();
    y = call.in[5].as<const float>();
    lse = call.in[6].as<const float>();
    dq = call.out[0].as<float>();
    dk = call.out[1].as<float>();
    dv = call.out[2].as<float>();
    chunk_floats = p.packed(KB);
    pair_floats = parts.offset[parts.count] * chunk_floats;
  }

  // dq of a block of rows, and what they add to dk and dv of the chunks that they see.
  void block(const Packed& packed, const Rows& rows, int part, float* dk_sum, float* dv_sum, int thread) const {
    Arena arena{static_cast<char*>(call.threads->scratch(thread, backward_scratch(p)))};
    float* scores = arena.floats(KB * BQ);
    float* products = arena.floats(KB * BQ);
    float* q_columns = arena.floats(p.d * BQ);
    float* dy_columns = arena.floats(p.d * BQ);
    float* q_lines = arena.floats(p.packed(BQ));
    float* dy_lines = arena.floats(p.packed(BQ));
    float* dq_sum = arena.floats(p.packed(BQ));
    float* norm = arena.floats(BQ);
    float* delta = arena.floats(BQ);
    const int64_t panels = ceil_div(rows.count, NR);
    const auto line_of = [&rows](const float* base) { return [&rows, base](int64_t i) { return base + rows.offset[i]; }; };
    pack_transposed(rows.count, p.d, p.q_factor(), line_of(p.q), q_columns);
    pack_transposed(rows.count, p.d, 1.f, line_of(dy), dy_columns);
    const bool q_finite = pack(rows.count, BQ, p.d, line_of(p.q), q_lines);
    const bool dy_finite = pack(rows.count, BQ, p.d, line_of(dy), dy_lines);
    expect_rows<true>(dq, rows, p.d);
    std::memset(dq_sum, 0, static_cast<size_t>(p.packed(BQ)) * 4);
    for (int64_t i = 0; i < BQ; ++i) {
      norm[i] = delta[i] = 0;
      if (i >= rows.count) continue;
      const float *a = dy + rows.offset[i], *b = y + rows.offset[i];
      Vec acc{};
      for (int64_t j = 0; j < p.d; j += W) acc += load_some(a + j, p.d - j) * load_some(b + j, p.d - j);
      delta[i] = sum(acc);
      const float log_sum = lse[rows.lse[i]];
      norm[i] = p.direct ? __builtin_expf(-log_sum) : log_sum * kLog2e;
    }

    for (int64_t chunk = rows.first_chunk(KB); chunk < rows.end_chunk(KB); ++chunk) {
      const int64_t key0 = chunk * KB;
      const float *k = packed.k + chunk * chunk_floats, *v = packed.v + chunk * chunk_floats;
      Span spans[BQ / NR];
      for (int64_t panel = 0; panel < panels; ++panel) spans[panel] = span_of(rows, panel, key0, KB);
      score<KB>(p, spans, panels, k, q_columns, scores);
      score<KB>(p, spans, panels, v, dy_columns, products);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const auto run = p.direct ? differentiate<true, true> : p.capped ? differentiate<true, false> : differentiate<false, false>;
        run(p, rows, spans[panel], panel * NR, key0, norm, delta, scores, products);
      }
      const int64_t to = (chunk - parts.chunk[part]) * chunk_floats;
      if (dv) add_to_keys<KB>(p, rows, key0, scores, dy_lines, dy_finite, dv_sum + to);
      if (dk) add_to_keys<KB>(p, rows, key0, products, q_lines, q_finite, dk_sum + to);
      if (dq) add_to_rows<KB>(p, rows, key0, products, k, packed.k_finite[chunk] != 0, dq_sum);
    }
    if (dq)
      for (int64_t i = 0; i < rows.count; ++i) unpack(dq_sum + i * NR, BQ, p.d, p.scale, call.accumulate[0], dq + rows.offset[i]);
  }

  // Writes dk and dv of a chunk: the sum over parts, in order. `sums` is the pair's.
  void join(int64_t pair, int64_t chunk, const float* sums) const {
    const int64_t to = p.key_offset(pair, chunk * KB), step = p.g * p.d, count = least(KB, p.s - chunk * KB);
    for (int which = 0; which < 2; ++which) {
      float* out = which ? dv : dk;
      if (out == nullptr) continue;
      bool add = call.accumulate[1 + which];
      for (int part = 0; part < parts.count; ++part) {
        if (chunk < parts.chunk[part] || chunk >= parts.chunk_end[part]) continue;
        const float* from = sums + which * pair_floats + (parts.offset[part] + chunk - parts.chunk[part]) * chunk_floats;
        for (int64_t l = 0; l < count; ++l) unpack(from + l * NR, KB, p.d, which ? 1.f : p.scale, add, out + to + l * step);
        add = true;
      }
    }
  }

  // A part of a pair. A whole pair is packed as it goes along, and joined as soon as no later row sees a chunk.
  void part(Packed packed, int64_t pair, int part, float* sums, int thread) const {
    const bool whole = p.whole_pairs();
    float *dk_sum = sums + parts.offset[part] * chunk_floats, *dv_sum = dk_sum + pair_floats;
    int64_t ready = parts.chunk[part], joined = 0;
    for (int64_t index = parts.block[part]; index < parts.block[part + 1]; ++index) {
      const Rows rows(p, pair, index);
      for (; whole && joined < rows.first_chunk(KB); ++joined) join(pair, joined, sums);
      for (; ready < rows.end_chunk(KB); ++ready) {
        if (whole) packed.fill(p, pair, ready);
        const int64_t to = (ready - parts.chunk[part]) * chunk_floats;
        std::memset(dk_sum + to, 0, static_cast<size_t>(chunk_floats) * 4);
        std::memset(dv_sum + to, 0, static_cast<size_t>(chunk_floats) * 4);
      }
      if (index + 1 < p.blocks) {
        const Rows next(p, pair, index + 1);
        for (const float* base : {p.q, dy, y}) expect_rows<false>(base, next, p.d);
      }
      block(packed, rows, part, dk_sum, dv_sum, thread);
    }
    for (; whole && joined < p.chunks(KB); ++joined) join(pair, joined, sums);
  }

  // Packed keys and sums: of each thread for whole pairs, else of each pair.
  int64_t owners() const { return p.whole_pairs() ? call.threads->size() : p.b * p.g; }
  int64_t packed_bytes() const { return static_cast<int64_t>(Packed::bytes(p, KB)); }
  size_t workspace() const { return static_cast<size_t>(owners() * (packed_bytes() + 2 * pair_floats * 4)); }

  void run() const {
    char* memory = static_cast<char*>(call.workspace);
    float* sums = reinterpret_cast<float*>(memory + owners() * packed_bytes());
    if (p.whole_pairs()) {
      call.threads->parallel(p.b * p.g, [&](int64_t pair, int thread) {
        part(Packed(p, KB, memory + thread * packed_bytes()), pair, 0, sums + 2 * thread * pair_floats, thread);
      });
      return;
    }
    Packed::fill_all(call, p, KB, memory);
    call.threads->parallel(p.b * p.g * parts.count, [&](int64_t i, int thread) {
      const int64_t pair = i / parts.count;
      part(Packed(p, KB, memory + pair * packed_bytes()), pair, static_cast<int>(i % parts.count), sums + 2 * pair * pair_floats, thread);
    });
    const int64_t chunks = p.chunks(KB);
    call.threads->parallel(p.b * p.g * chunks,
                           [&](int64_t i, int) { join(i / chunks, i % chunks, sums + 2 * (i / chunks) * pair_floats); });
  }
};

// attention_backward(dy[b t h d], q[b t h d], k[b t g d], v[b t g d], starts[b t]:i32?, y[b t h d], lse[b h t]:f32, scale, cap, window)
//   -> dq[b t h d]+, dk[b t g d]+, dv[b t g d]+
void attention_backward(const Call& call) {
  check(call, problem_of(call, 1), 1, true);
  const BackwardPass pass(call);
  if (pass.p.b > 0 && pass.p.rows > 0) pass.run();
}

size_t attention_backward_workspace(const Call& call) {
  const BackwardPass pass(call);
  return pass.p.b > 0 && pass.p.rows > 0 ? pass.workspace() : 0;
}

}  // namespace
}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(attention, {"attention", attention, attention_workspace}, {"attention_step", attention_step, attention_step_workspace},
                {"attention_backward", attention_backward, attention_backward_workspace})
