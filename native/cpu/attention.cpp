// Fused causal attention. Rows: for one (batch, key/value head), a row is a (position, query head of the group) pair, positions
// first; so all heads of a group share K and V, and a block of rows spans few positions. Row i sees the keys [lo(i), hi(i)): both
// bounds never decrease with i, so each block of rows, and each panel of a block, sees one range of keys, and nothing else is touched.
//
// Scores are kept transposed (a key is a line, rows are lanes): maxima, sums and masks then work on whole vectors, and only Q has
// to be transposed. K, V, Q, dY are packed in panels of NR columns: [panel][line][NR].
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
constexpr int kDecodeKeys = 256;  // keys of one task when a single position attends
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
// Up to this cap e^score needs no running maximum: sums of e^60 over millions of keys, and e^-60, are well inside float's range.
constexpr double kDirectCap = 60;
static_assert(BQ % MR == 0 && BQ % NR == 0 && KF % MR == 0 && KB % MR == 0);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Clamps that keep NaN (the comparison is false, the second operand is taken).
LIMBECK_INLINE Vec at_least(Vec x, float bound) { return splat(bound) > x ? splat(bound) : x; }
LIMBECK_INLINE Vec at_most(Vec x, float bound) { return splat(bound) < x ? splat(bound) : x; }

// tanh as in simd.h, without its last select: the clamps keep NaN.
LIMBECK_INLINE Vec soft(Vec x) {
  x = at_most(at_least(x, -7.90531110763549805f), 7.90531110763549805f);
  const Vec x2 = x * x;
  Vec p = x2 * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * x2 + -8.60467152213735e-11f;
  p = p * x2 + 5.12229709037114e-08f;
  p = p * x2 + 1.48572235717979e-05f;
  p = p * x2 + 6.37261928875436e-04f;
  p = p * x2 + 4.89352455891786e-03f;
  Vec q = x2 * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * x2 + 2.26843463243900e-03f;
  q = q * x2 + 4.89352518554385e-03f;
  return x * p / q;
}

// 2^(x f) for |x f| <= 126. The product is never rounded: it is reduced by fused multiply-add.
LIMBECK_INLINE Vec exp2_of(Vec x, Vec f) {
  const Vec magic = splat(12582912.f);
  const Vec t = x * f + magic;
  const Vec n = t - magic;
  const Vec r = x * f - n;
  Vec p = r * 1.33952902e-3f + 9.61846397e-3f;
  p = p * r + 5.55036029e-2f;
  p = p * r + 2.40226486e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.f;
  return p * (Vec)(((UVec)t << 23) + 0x3f800000u);
}
// 2^x for x <= 126; 0 below -126.
LIMBECK_INLINE Vec exp2_down(Vec x) {
  const Vec y = exp2_of(at_least(x, -126.f), splat(1.f));
  return x < -126.f ? Vec{} : y;
}

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
  int64_t row_offset(int64_t batch, int64_t head, int64_t row) const {
    return ((batch * t + row / group) * h + head * group + row % group) * d;
  }
  int64_t key_offset(int64_t batch, int64_t head, int64_t key) const { return ((batch * s + key) * g + head) * d; }
  int64_t lse_offset(int64_t batch, int64_t head, int64_t row) const {
    return (batch * h + head * group + row % group) * t + row / group;
  }
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

void check(const Call& call, const Problem& p, bool square) {
  const auto refuse = [&](ErrorKind kind, const char* code, const char* argument, const Text& problem, const Text& expected,
                          int64_t actual) {
    fail(kind, code, call.op, argument, problem, expected, text("%lld", static_cast<long long>(actual)));
  };
  using Long = long long;
  if (p.g < 1 || p.h < 1 || p.h % p.g != 0)
    refuse(ErrorKind::shape, "ERR_ATTENTION_HEADS", "q",
           text("q has %lld heads, which cannot share the %lld heads of k and v evenly", Long{p.h}, Long{p.g}),
           text("a multiple of %lld heads", Long{p.g}), p.h);
  if (p.d < 1)
    refuse(ErrorKind::shape, "ERR_SHAPE", "q", text("q has heads of size 0; a head needs at least one element"), text("1 or more"), p.d);
  if (square ? p.t != p.s : p.t > p.s)
    refuse(ErrorKind::shape, "ERR_ATTENTION_LENGTH", "k",
           square ? text("q has %lld positions and k has %lld; gradients need the same in both", Long{p.t}, Long{p.s})
                  : text("q has %lld positions and k has %lld; q must be the last positions of k", Long{p.t}, Long{p.s}),
           text(square ? "%lld positions" : "at least %lld positions", Long{p.t}), p.s);
  constexpr int64_t most_rows = (int64_t{1} << 31) - 1024;
  if (p.s > most_rows || p.rows > most_rows)
    refuse(ErrorKind::shape, "ERR_ATTENTION_LENGTH", "k", text("sequences of %lld positions are not supported", Long{p.s}),
           text("at most %lld", Long{most_rows}), p.s);
  if (p.window < 0)
    refuse(ErrorKind::config, "ERR_ATTENTION_WINDOW", "window",
           text("window is %lld; give the number of keys that a query sees, itself included, or 0 for all", Long{p.window}),
           text("0 or more"), p.window);
  if (p.starts == nullptr) return;
  if (p.t != p.s)
    refuse(ErrorKind::shape, "ERR_ATTENTION_STARTS", "starts",
           text("starts is for whole sequences, but q has %lld positions and k has %lld", Long{p.t}, Long{p.s}),
           text("q and k of the same length"), p.t);
  for (int64_t i = 0; i < p.b; ++i) {
    int64_t last = 0;
    for (int64_t j = 0; j < p.t; ++j) {
      const int64_t start = p.starts[i * p.t + j];
      if (start < last || start > j)
        refuse(ErrorKind::data, "ERR_ATTENTION_STARTS", "starts",
               text("starts is %lld at sequence %lld, position %lld; it should be the first position of that token's document", Long{start},
                    Long{i}, Long{j}),
               text("%lld to %lld", Long{last}, Long{j}), start);
      last = start;
    }
  }
}

// A block of rows: the keys that each sees. Lanes past the last row repeat it.
struct Rows {
  alignas(64) int32_t lo[BQ];
  alignas(64) int32_t hi[BQ];
  int64_t first, count;

  Rows(const Problem& p, int64_t batch, int64_t block) : first(block * BQ), count(least(BQ, p.rows - block * BQ)) {
    for (int64_t i = 0; i < BQ; ++i) {
      const int64_t local = least(first + i, p.rows - 1) / p.group;
      const int64_t position = p.s - p.t + local;
      const int64_t from = p.window > 0 ? most(0, position - p.window + 1) : 0;
      lo[i] = static_cast<int32_t>(p.starts ? most(from, p.starts[batch * p.t + local]) : from);
      hi[i] = static_cast<int32_t>(position + 1);
    }
  }
};

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
      for (int i = 0; i < M; ++i) {
        const Vec xi = splat(x[i * AI]);
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) acc[i][j] += xi * y[j];
      }
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
  Vec odd{};
  for (int64_t i = 0; i < lines; ++i) {
    const float* in = i < count ? line(i) : nullptr;
    for (int64_t j = 0; j < 2 * panels; ++j) {
      const int64_t left = in ? d - j * W : 0;
      const Vec v = left >= W ? load(in + j * W) : left > 0 ? load_part(in + j * W, left) : Vec{};
      store(out + (j / 2 * lines + i) * NR + j % 2 * W, v);
      odd += v * 0.f;  // NaN for NaN and infinities
    }
  }
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
      for (int l = 0; l < W; ++l)
        x[l] = i + l >= count ? Vec{} : (left == W ? load(line(i + l) + j) : load_part(line(i + l) + j, left)) * factor;
      // log2(W) perfect shuffles transpose a square.
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

struct Mask {
  IVec lo, hi;
  Mask(const Rows& rows, int64_t lane, int64_t key0) {
    std::memcpy(&lo, rows.lo + lane, sizeof lo);
    std::memcpy(&hi, rows.hi + lane, sizeof hi);
    lo -= static_cast<int32_t>(key0);
    hi -= static_cast<int32_t>(key0);
  }
  LIMBECK_INLINE IVec operator()(int64_t key) const {
    const int32_t k = static_cast<int32_t>(key);
    return (lo <= k) & (hi > k);
  }
};

// Runs body(key, lane vector, masked) over a span: with masks only where some row does not see the key.
template <class Body>
LIMBECK_INLINE void over(const Span& x, Body body) {
  for (int64_t key = x.begin; key < x.all_begin; ++key) body(key, std::true_type{});
  for (int64_t key = x.all_begin; key < x.all_end; ++key) body(key, std::false_type{});
  for (int64_t key = x.all_end; key < x.end; ++key) body(key, std::true_type{});
}

// Packs K and V, [batch][head][chunk], with a flag for each chunk that is not finite.
struct Packed {
  float *k, *v;
  int32_t *k_finite, *v_finite;
  int64_t chunks, chunk_floats;

  static size_t bytes(const Problem& p, int64_t keys) {
    const int64_t chunks = p.b * p.g * p.chunks(keys);
    return static_cast<size_t>(2 * chunks * p.packed(keys) * 4 + ceil_div(2 * chunks * 4, 64) * 64);
  }
  Packed(const Problem& p, int64_t keys, void* memory) : chunks(p.chunks(keys)), chunk_floats(p.packed(keys)) {
    const int64_t all = p.b * p.g * chunks;
    k = static_cast<float*>(memory);
    v = k + all * chunk_floats;
    k_finite = reinterpret_cast<int32_t*>(v + all * chunk_floats);
    v_finite = k_finite + all;
  }
  void fill(ThreadPool& threads, const Problem& p, int64_t keys) {
    threads.parallel(p.b * p.g * chunks, [&](int64_t i, int) {
      const int64_t batch = i / chunks / p.g, head = i / chunks % p.g, key0 = i % chunks * keys;
      const int64_t from = p.key_offset(batch, head, key0), count = least(keys, p.s - key0);
      k_finite[i] = pack(count, keys, p.d, [&](int64_t l) { return p.k + from + l * p.g * p.d; }, k + i * chunk_floats);
      v_finite[i] = pack(count, keys, p.d, [&](int64_t l) { return p.v + from + l * p.g * p.d; }, v + i * chunk_floats);
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

// Turns scores into weights e^(score - m) where m is 0, and adds them to the rows' sums.
void weigh_direct(const Problem& p, const Rows& rows, const Span& span, int64_t lane, int64_t key0, float* scores, float* sums) {
  const Vec factor = splat(p.cap * kLog2e);
  const Mask mask0(rows, lane, key0), mask1(rows, lane + W, key0);
  Vec sum0 = load(sums + lane), sum1 = load(sums + lane + W);
  over(span, [&](int64_t key, auto masked) __attribute__((always_inline)) {
    float* at = scores + key * BQ + lane;
    Vec w0 = exp2_of(soft(load(at)), factor), w1 = exp2_of(soft(load(at + W)), factor);
    if (masked) {
      w0 = mask0(key) ? w0 : Vec{};
      w1 = mask1(key) ? w1 : Vec{};
    }
    store(at, w0);
    store(at + W, w1);
    sum0 += w0;
    sum1 += w1;
  });
  store(sums + lane, sum0);
  store(sums + lane + W, sum1);
}

// The same with a running reference m for each row, which follows the maximum only when weights would grow past 2^8: then what was
// summed so far is scaled down.
template <bool Capped>
void weigh_online(const Problem& p, const Rows& rows, const Span& span, int64_t lane, int64_t key0, float* scores, float* sums,
                  float* reference, float* out) {
  const Vec factor = splat(p.cap * kLog2e), hidden = splat(-__builtin_inff());
  const Mask mask0(rows, lane, key0), mask1(rows, lane + W, key0);
  Vec m0 = load(reference + lane), m1 = load(reference + lane + W), top0 = m0, top1 = m1;
  over(span, [&](int64_t key, auto masked) __attribute__((always_inline)) {
    float* at = scores + key * BQ + lane;
    Vec z0 = load(at), z1 = load(at + W);
    if (Capped) z0 = soft(z0) * factor, z1 = soft(z1) * factor;
    if (masked) {
      z0 = mask0(key) ? z0 : hidden;
      z1 = mask1(key) ? z1 : hidden;
    }
    if (Capped || masked) store(at, z0), store(at + W, z1);
    top0 = max(z0, top0);
    top1 = max(z1, top1);
  });
  Vec sum0 = load(sums + lane), sum1 = load(sums + lane + W);
  const IVec grown = (top0 > m0 + 8.f) | (top1 > m1 + 8.f);
  bool any = false;
  for (int i = 0; i < W; ++i) any |= grown[i] != 0;
  if (any) {
    const Vec down0 = exp2_down(m0 - top0), down1 = exp2_down(m1 - top1);
    sum0 *= down0, sum1 *= down1;
    m0 = top0, m1 = top1;
    store(reference + lane, m0);
    store(reference + lane + W, m1);
    for (int64_t panel = 0; panel < p.panels; ++panel)
      for (int i = 0; i < NR; ++i) {
        float* row = out + (panel * BQ + lane + i) * NR;
        const float down = i < W ? down0[i] : down1[i - W];
        store(row, load(row) * down);
        store(row + W, load(row + W) * down);
      }
  }
  for (int64_t key = span.begin; key < span.end; ++key) {
    float* at = scores + key * BQ + lane;
    const Vec w0 = exp2_down(load(at) - m0), w1 = exp2_down(load(at + W) - m1);
    store(at, w0);
    store(at + W, w1);
    sum0 += w0;
    sum1 += w1;
  }
  store(sums + lane, sum0);
  store(sums + lane + W, sum1);
}

size_t forward_scratch(const Problem& p) {
  return static_cast<size_t>(4 * (KF * BQ + ceil_div(p.d * BQ, 16) * 16 + p.packed(BQ) + 2 * BQ));
}

// One block of rows of one key/value head.
void forward_block(const Call& call, const Problem& p, const Packed& packed, int64_t batch, int64_t head, int64_t block, void* memory) {
  Arena arena{static_cast<char*>(memory)};
  float* scores = arena.floats(KF * BQ);
  float* columns = arena.floats(p.d * BQ);
  float* out = arena.floats(p.packed(BQ));
  float* sums = arena.floats(BQ);
  float* reference = arena.floats(BQ);
  const Rows rows(p, batch, block);
  const int64_t panels = ceil_div(rows.count, NR);
  pack_transposed(rows.count, p.d, p.q_factor(), [&](int64_t i) { return p.q + p.row_offset(batch, head, rows.first + i); }, columns);
  std::memset(out, 0, static_cast<size_t>(p.packed(BQ)) * 4);
  for (int i = 0; i < BQ; ++i) sums[i] = 0, reference[i] = p.direct ? 0.f : -3.402823466e38f;

  for (int64_t chunk = rows.lo[0] / KF; chunk * KF < rows.hi[BQ - 1]; ++chunk) {
    const int64_t key0 = chunk * KF, at = (batch * p.g + head) * packed.chunks + chunk;
    Span spans[BQ / NR];
    for (int64_t panel = 0; panel < panels; ++panel) spans[panel] = span_of(rows, panel, key0, KF);
    score<KF>(p, spans, panels, packed.k + at * packed.chunk_floats, columns, scores);
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (p.direct)
        weigh_direct(p, rows, spans[panel], panel * NR, key0, scores, sums);
      else if (p.capped)
        weigh_online<true>(p, rows, spans[panel], panel * NR, key0, scores, sums, reference, out);
      else
        weigh_online<false>(p, rows, spans[panel], panel * NR, key0, scores, sums, reference, out);
    }
    add_to_rows<KF>(p, rows, key0, scores, packed.v + at * packed.chunk_floats, packed.v_finite[at] != 0, out);
  }

  float* y = call.out[0].as<float>();
  float* lse = call.out[1].as<float>();
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.first + i;
    if (y) unpack(out + i * NR, BQ, p.d, 1.f / sums[i], false, y + p.row_offset(batch, head, row));
    if (lse) lse[p.lse_offset(batch, head, row)] = reference[i] * kLn2 + __builtin_logf(sums[i]);
  }
}

// A single position: K and V are read once, and nothing is packed. Each task takes kDecodeKeys keys for all heads of a group and
// leaves (sum, reference, output) of each; a second step joins them in order.
struct Decode {
  int64_t first, parts, record;

  explicit Decode(const Problem& p) {
    first = p.window > 0 ? most(0, p.s - p.window) : 0;
    parts = ceil_div(p.s - first, kDecodeKeys);
    record = ceil_div(p.d, W) * W + W;
  }
  size_t bytes(const Problem& p) const { return static_cast<size_t>(p.b * p.h * parts * record * 4); }
};

// Dot product and sum of N query heads at once share the loads of K and V.
template <int N>
void decode_part(const Problem& p, int64_t key0, int64_t count, int64_t batch, int64_t head, int64_t first, float* scores, float* record,
                 int64_t record_step) {
  const float* q = p.q + (batch * p.h + head * p.group + first) * p.d;
  const int64_t step = p.g * p.d, whole = p.d / W * W;
  const float* k = p.k + p.key_offset(batch, head, key0);
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
    for (int64_t i = count; i < ceil_div(count, W) * W; ++i) x[i] = -__builtin_inff();
    Vec top = splat(-3.402823466e38f), total{};
    for (int64_t i = 0; i < count; i += W) {
      Vec z = load(x + i) * factor;
      if (p.capped) z = soft(z) * cap;
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
  const float* v0 = p.v + p.key_offset(batch, head, key0);
  for (int64_t j = 0; j < p.d; j += 2 * W) {
    const int64_t left0 = least(p.d - j, W), left1 = least(p.d - j - W, W);
    Vec acc[N][2] = {};
    const float* v = v0 + j;
    if (left1 == W)
      for (int64_t key = 0; key < count; ++key, v += step)
        for (int n = 0; n < N; ++n) {
          acc[n][0] += load(v) * scores[n * kDecodeKeys + key];
          acc[n][1] += load(v + W) * scores[n * kDecodeKeys + key];
        }
    else
      for (int64_t key = 0; key < count; ++key, v += step) {
        const Vec a = load_part(v, left0), b = left1 > 0 ? load_part(v + W, left1) : Vec{};
        for (int n = 0; n < N; ++n) {
          acc[n][0] += a * scores[n * kDecodeKeys + key];
          acc[n][1] += b * scores[n * kDecodeKeys + key];
        }
      }
    for (int n = 0; n < N; ++n) {
      store(record + n * record_step + W + j, acc[n][0]);
      if (left1 > 0) store(record + n * record_step + 2 * W + j, acc[n][1]);
    }
  }
}

void decode(const Call& call, const Problem& p) {
  const Decode x(p);
  float* records = static_cast<float*>(call.workspace);
  const int64_t step = x.parts * x.record;  // from one query head to the next
  call.threads->parallel(p.b * p.g * x.parts, [&](int64_t i, int thread) {
    const int64_t batch = i / x.parts / p.g, head = i / x.parts % p.g, part = i % x.parts;
    const int64_t key0 = x.first + part * kDecodeKeys, count = least(kDecodeKeys, p.s - key0);
    float* scores = static_cast<float*>(call.threads->scratch(thread, 4 * kDecodeKeys * sizeof(float)));
    for (int64_t n = 0; n < p.group;) {
      float* record = records + (batch * p.h + head * p.group + n) * step + part * x.record;
      const int64_t left = p.group - n;
      if (left >= 4)
        decode_part<4>(p, key0, count, batch, head, n, scores, record, step), n += 4;
      else if (left >= 2)
        decode_part<2>(p, key0, count, batch, head, n, scores, record, step), n += 2;
      else
        decode_part<1>(p, key0, count, batch, head, n, scores, record, step), n += 1;
    }
  });
  float* y = call.out[0].as<float>();
  float* lse = call.out[1].as<float>();
  for (int64_t i = 0; i < p.b * p.h; ++i) {
    const float* record = records + i * step;
    float m = record[1], total = 0;
    for (int64_t part = 1; part < x.parts; ++part) m = record[part * x.record + 1] > m ? record[part * x.record + 1] : m;
    for (int64_t part = 0; part < x.parts; ++part) {
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
  check(call, p, false);
  if (p.b == 0 || p.rows == 0) return;
  if (p.t == 1 && p.starts == nullptr) return decode(call, p);
  Packed packed(p, KF, call.workspace);
  packed.fill(*call.threads, p, KF);
  call.threads->parallel(p.b * p.g * p.blocks, [&](int64_t i, int thread) {
    const int64_t pair = i / p.blocks, block = p.blocks - 1 - i % p.blocks;  // long blocks first
    forward_block(call, p, packed, pair / p.g, pair % p.g, block, call.threads->scratch(thread, forward_scratch(p)));
  });
}

size_t attention_workspace(const Call& call) {
  const Problem p = problem_of(call, 0);
  if (p.t == 1 && p.starts == nullptr) return Decode(p).bytes(p);
  return Packed::bytes(p, KF);
}

// The backward pass splits the rows of a key/value head into parts, by shape alone, of about equal work. Each part adds up dK and
// dV of the keys that it sees in memory of its own; at the end they are summed in order. dQ belongs to one part each.
constexpr int kMaxParts = 8;
struct Parts {
  int count;
  int64_t block[kMaxParts + 1];                    // first block of rows of each part
  int64_t chunk[kMaxParts], chunk_end[kMaxParts];  // chunks of keys that it may see
  int64_t offset[kMaxParts + 1];                   // first chunk in the parts' memory

  explicit Parts(const Problem& p) {
    const int64_t wanted = least(ceil_div(16, most(p.b * p.g, 1)), kMaxParts);
    count = static_cast<int>(most(1, least(wanted, p.blocks / 8)));
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

// Weights and gradients of the (unscaled) scores, in place of scores and products dY . V.
template <bool Capped, bool Direct>
void differentiate(const Problem& p, const Rows& rows, const Span& span, int64_t lane, int64_t key0, const float* norm, const float* delta,
                   float* scores, float* products) {
  const Vec factor = splat(p.cap * kLog2e);
  for (int half = 0; half < 2; ++half, lane += W) {
    const Mask mask(rows, lane, key0);
    const Vec n = load(norm + lane), dy_y = load(delta + lane);
    over(span, [&](int64_t key, auto masked) __attribute__((always_inline)) {
      float *at = scores + key * BQ + lane, *dat = products + key * BQ + lane;
      Vec z = load(at), w, slope = splat(1.f);
      if (Capped) {
        z = soft(z);
        slope -= z * z;
        w = Direct ? exp2_of(z, factor) * n : exp2_down(z * factor - n);
      } else {
        w = exp2_down(z - n);
      }
      Vec dz = w * (load(dat) - dy_y) * slope;
      if (masked) {
        const IVec visible = mask(key);
        w = visible ? w : Vec{};
        dz = visible ? dz : Vec{};
      }
      store(at, w);
      store(dat, dz);
    });
  }
}

struct BackwardPass {
  const Call& call;
  const Problem& p;
  const Packed& packed;
  const float *dy, *y, *lse;
  float *dq, *dk, *dv;

  void block(const Parts& parts, int part, int64_t batch, int64_t head, int64_t index, void* memory, float* dk_sum, float* dv_sum) const {
    Arena arena{static_cast<char*>(memory)};
    float* scores = arena.floats(KB * BQ);
    float* products = arena.floats(KB * BQ);
    float* q_columns = arena.floats(p.d * BQ);
    float* dy_columns = arena.floats(p.d * BQ);
    float* q_lines = arena.floats(p.packed(BQ));
    float* dy_lines = arena.floats(p.packed(BQ));
    float* dq_sum = arena.floats(p.packed(BQ));
    float* norm = arena.floats(BQ);
    float* delta = arena.floats(BQ);
    const Rows rows(p, batch, index);
    const int64_t panels = ceil_div(rows.count, NR);
    const auto line_of = [&](const float* base) {
      return [&, base](int64_t i) { return base + p.row_offset(batch, head, rows.first + i); };
    };
    pack_transposed(rows.count, p.d, p.q_factor(), line_of(p.q), q_columns);
    pack_transposed(rows.count, p.d, 1.f, line_of(dy), dy_columns);
    const bool q_finite = pack(rows.count, BQ, p.d, line_of(p.q), q_lines);
    const bool dy_finite = pack(rows.count, BQ, p.d, line_of(dy), dy_lines);
    std::memset(dq_sum, 0, static_cast<size_t>(p.packed(BQ)) * 4);
    for (int64_t i = 0; i < BQ; ++i) {
      norm[i] = delta[i] = 0;
      if (i >= rows.count) continue;
      const float *a = line_of(dy)(i), *b = line_of(y)(i);
      Vec acc{};
      for (int64_t j = 0; j < p.d; j += W) {
        const int64_t left = p.d - j;
        acc += left >= W ? load(a + j) * load(b + j) : load_part(a + j, left) * load_part(b + j, left);
      }
      delta[i] = sum(acc);
      const float log_sum = lse[p.lse_offset(batch, head, rows.first + i)];
      norm[i] = p.direct ? __builtin_expf(-log_sum) : log_sum * kLog2e;
    }

    for (int64_t chunk = rows.lo[0] / KB; chunk * KB < rows.hi[BQ - 1]; ++chunk) {
      const int64_t key0 = chunk * KB, at = (batch * p.g + head) * packed.chunks + chunk;
      const float *k = packed.k + at * packed.chunk_floats, *v = packed.v + at * packed.chunk_floats;
      Span spans[BQ / NR];
      for (int64_t panel = 0; panel < panels; ++panel) spans[panel] = span_of(rows, panel, key0, KB);
      score<KB>(p, spans, panels, k, q_columns, scores);
      score<KB>(p, spans, panels, v, dy_columns, products);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const auto run = p.direct ? differentiate<true, true> : p.capped ? differentiate<true, false> : differentiate<false, false>;
        run(p, rows, spans[panel], panel * NR, key0, norm, delta, scores, products);
      }
      const int64_t to = (chunk - parts.chunk[part]) * packed.chunk_floats;
      if (dv) add_to_keys<KB>(p, rows, key0, scores, dy_lines, dy_finite, dv_sum + to);
      if (dk) add_to_keys<KB>(p, rows, key0, products, q_lines, q_finite, dk_sum + to);
      if (dq) add_to_rows<KB>(p, rows, key0, products, k, packed.k_finite[at] != 0, dq_sum);
    }
    if (dq)
      for (int64_t i = 0; i < rows.count; ++i)
        unpack(dq_sum + i * NR, BQ, p.d, p.scale, call.accumulate[0], dq + p.row_offset(batch, head, rows.first + i));
  }
};

// attention_backward(dy[b t h d], q[b t h d], k[b t g d], v[b t g d], starts[b t]:i32?, y[b t h d], lse[b h t]:f32, scale, cap, window)
//   -> dq[b t h d]+, dk[b t g d]+, dv[b t g d]+
void attention_backward(const Call& call) {
  const Problem p = problem_of(call, 1);
  check(call, p, true);
  if (p.b == 0 || p.rows == 0) return;
  Packed packed(p, KB, call.workspace);
  packed.fill(*call.threads, p, KB);
  const Parts parts(p);
  const BackwardPass pass{call, p, packed, call.in[0].as<const float>(), call.in[5].as<const float>(), call.in[6].as<const float>(),
                          call.out[0].as<float>(), call.out[1].as<float>(), call.out[2].as<float>()};
  float* sums = reinterpret_cast<float*>(static_cast<char*>(call.workspace) + Packed::bytes(p, KB));
  const int64_t all = parts.offset[parts.count] * packed.chunk_floats;  // of dK, and of dV, of one key/value head

  call.threads->parallel(p.b * p.g * parts.count, [&](int64_t i, int thread) {
    const int64_t pair = i / parts.count;
    const int part = parts.count - 1 - static_cast<int>(i % parts.count);
    const int64_t from = parts.offset[part] * packed.chunk_floats, n = parts.offset[part + 1] * packed.chunk_floats - from;
    float *dk_sum = sums + 2 * pair * all + from, *dv_sum = dk_sum + all;
    std::memset(dk_sum, 0, static_cast<size_t>(n) * 4);
    std::memset(dv_sum, 0, static_cast<size_t>(n) * 4);
    void* memory = call.threads->scratch(thread, backward_scratch(p));
    for (int64_t block = parts.block[part]; block < parts.block[part + 1]; ++block)
      pass.block(parts, part, pair / p.g, pair % p.g, block, memory, dk_sum, dv_sum);
  });

  call.threads->parallel(p.b * p.g * packed.chunks, [&](int64_t i, int) {
    const int64_t pair = i / packed.chunks, chunk = i % packed.chunks, key0 = chunk * KB;
    const int64_t to = p.key_offset(pair / p.g, pair % p.g, key0), step = p.g * p.d;
    for (int which = 0; which < 2; ++which) {
      float* out = which ? pass.dv : pass.dk;
      if (out == nullptr) continue;
      bool add = call.accumulate[1 + which];
      for (int part = 0; part < parts.count; ++part) {
        if (chunk < parts.chunk[part] || chunk >= parts.chunk_end[part]) continue;
        const float* from = sums + (2 * pair + which) * all + (parts.offset[part] + chunk - parts.chunk[part]) * packed.chunk_floats;
        for (int64_t l = 0; l < least(KB, p.s - key0); ++l) unpack(from + l * NR, KB, p.d, which ? 1.f : p.scale, add, out + to + l * step);
        add = true;
      }
    }
  });
}

size_t attention_backward_workspace(const Call& call) {
  const Problem p = problem_of(call, 1);
  if (p.b == 0 || p.rows == 0) return 0;
  return Packed::bytes(p, KB) + static_cast<size_t>(2 * p.b * p.g * Parts(p).offset[Parts(p).count] * p.packed(KB) * 4);
}

}  // namespace
}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(attention, {"attention", attention, attention_workspace},
                {"attention_backward", attention_backward, attention_backward_workspace})
