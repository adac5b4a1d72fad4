// Cross-entropy straight from hidden states: logits exist for one block of tokens and words at a time, and the gradient is made in the
// same call. Letters: n tokens, c width, v vocabulary, u = x w^T, z = cap tanh(u / cap), q = softmax(z).
//
// Stored: a chunk of tokens goes over the vocabulary in panels whose float32 logits stay in the L2 cache. One pass turns a panel into
// G = e^z dz/du in bf16, which lies ready for both products back, and into sums of e^z. With a cap e^z needs no maximum; the row's
// factor weight / sum is then put on the rows of x and dx, and G is never touched again. Without one, a slot's largest logit is taken
// off and G is multiplied in place when the row's sum is known.
//   Bytes to and from memory for each logit: 2 written here (4 more without a cap), 2 read by each of the two products.
//
// On Hopper a bounded pass is part of the product (product_sm90.cuh), and no float32 logits are written; G made anew is scaled like G kept.
//
// Recomputed: where so little memory is allowed that chunks would be small, and dw be read and written too often, all tokens go over
// the vocabulary twice: first for the sums, then, with logits made again, for G and the two products, panel by panel. A quarter of
// the work more, no memory that grows with n v, and each part of dw is written once.
#include "cuda/loss.cuh"
#include "cuda/product_sm90.cuh"

namespace limbeck::cuda {
namespace {

struct SlotSum {
  float top, sum;  // of e^(z - top); bounded: of e^z
  int at;          // where the largest is
};

// What a row needs for its gradient: g = e^(z - shift) factor dz/du, but at the target.
struct RowGradient {
  float shift, factor, at_target;
  int target;
};

// The slot's sum, and e^z dz/du (bounded) or e^(z - top) dz/du into g, if that is wanted.
template <class T, bool bounded>
__global__ void __launch_bounds__(kSlotThreads)
    exponentials_kernel(Logits l, Cap cap, const int* target, float* target_z, bool largest, SlotSum* sums, int slots_of_row, T* g, int64_t ldg) {
  const Place p(l);
  if (!p.any) return;
  float s[kHeld];
  p.load(l.u, s);
  using M = Math<T>;
  cap.shape<M>(s);
  if (const int y = target[p.row] - p.first; y >= 0 && y < p.left) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (p.column(i) == y) target_z[p.row] = s[i] * cap.heat;
  }
  p.end(s);
  SlotSum out{0, 0, 0};
  if (!bounded || largest) {
    const float top = p.top(s);
    if (largest) out.at = p.find(s, top);
    out.top = top * cap.heat;
  }
  const float heat = cap.heat * M::of_e, base = bounded ? 0.f : base_of(out.top) * M::of_e;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float e = M::power(s[i] * heat - base);
    out.sum += e;
    s[i] = e * cap.slope(s[i]);
  }
  out.sum = warp_reduce(out.sum, Plus{});
  const int64_t slot = p.first / kSlot;
  if (p.lane == 0) sums[p.row * static_cast<int64_t>(slots_of_row) + slot] = out;
  if (g) p.store(g + p.row * ldg + slot * kSlot, s);
}

// The same within the product (product_sm90.cuh), where no maximum is needed: float32 logits are never written. Leaves the sum of a row's
// part of each tile behind.
struct ExponentialsPass {
  Cap cap;
  const int* target;
  float* target_z;
  float* sums;  // [rows tiles], from this product's first tile on
  int tiles;    // of a row
  int first;    // the product's first word in the vocabulary

  template <class Put>
  __device__ __forceinline__ void half(const product_sm90::Work& work, float (&u)[product_sm90::kHalfSums], int row, int word, Put put) const {
    using M = Math<bf16>;
    const int own = row + thread_row(), column = thread_column();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int y = own + 8 * i < work.rows ? target[own + 8 * i] - first - word - column : -1;
      if (y < 0 || y >= product_sm90::kTileWords || y % 8 > 1) continue;
#pragma unroll
      for (int j = 0; j < product_sm90::kTileWords / 8; ++j)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (y == 8 * j + k) target_z[own + 8 * i] = cap.shape<M>(u[4 * j + 2 * i + k]) * cap.heat;
    }
    float sum[2] = {0, 0};
    const float heat = cap.heat * M::of_e;
    const auto slope = [&](int i, float x, bool inside) {
      const float s = cap.shape<M>(x), e = inside ? M::power(s * heat) : 0.f;
      sum[i] += e;
      return e * cap.slope(s);
    };
    product_sm90::each_pair(
        work, u, word,
        [&](int i, float x, float y, bool has_x, bool has_y) {
          const float first = slope(i, x, has_x), second = slope(i, y, has_y);
          return pack_bf16(first, second);
        },
        put);
    if (sums) product_sm90::put_row_sums(work, sum, row, [&](int at) { return sums + at * static_cast<int64_t>(tiles) + word / product_sm90::kTileWords; });
  }
};

// What a row's words left behind: sums of slots, or where no maximum was taken, plain ones.
struct RowSums {
  const SlotSum* slots;
  const float* plain;
  int count;  // of a row
};

struct RowOutputs {
  float *loss, *lse, *correct;
  double* part;  // of the total, for each row of the whole list
};

// A warp for each row: loss and factors. Bounded and stored, the target's place in G is written here.
template <class T, bool bounded>
__global__ void __launch_bounds__(kSlotThreads)
    rows_kernel(Tokens tokens, Cap cap, double zloss, const int* target, const float* target_z, RowSums sums, RowOutputs out, float* scale,
                RowGradient* gradient, T* g, int64_t ldg) {
  const int row = static_cast<int>(warp_index()), slots = sums.count;
  if (row >= tokens.rows) return;
  const SlotSum* sum = sums.slots + static_cast<int64_t>(row) * slots;
  const float* plain = sums.plain + static_cast<int64_t>(row) * slots;
  double top = 0, whole;
  Best best{0, INT_MAX};
  if (!bounded || out.correct) best = best_of(slots, [&](int k) { return Best{sum[k].top, sum[k].at}; });
  if constexpr (bounded) {
    whole = sum_of(slots, [&](int k) { return static_cast<double>(sums.plain ? plain[k] : sum[k].sum); });
  } else {
    top = base_of(best.top);
    whole = sum_of(slots, [&](int k) { return sum[k].sum * exp(static_cast<double>(sum[k].top) - top); });
  }
  if (lane_index() > 0) return;

  const int position = tokens.position(row), y = target[row];
  const double weight = tokens.weight(position), lse = top + log(whole);
  const double z = y >= 0 ? static_cast<double>(target_z[row]) : static_cast<double>(NAN);
  double part = 0;
  if (position >= 0) {
    part = weight * (lse - z + zloss * lse * lse);
    if (out.loss) out.loss[position] = static_cast<float>(lse - z);
    if (out.lse) out.lse[position] = static_cast<float>(lse);
    if (out.correct) out.correct[position] = best.at == y ? 1.f : 0.f;
  }
  out.part[tokens.first + row] = part;

  // weight ((1 + 2 zloss lse) q - 1[target]) dz/du
  const double s = z / cap.heat, slope = 1 - cap.bend * s * s;
  double up = 1 + 2 * zloss * lse;
  if (scale) {
    if (fabs(up) < 1e-6) up = 1e-6;  // the row is divided by it
    scale[row] = static_cast<float>(weight * up / whole);
    const float at_target = static_cast<float>(slope * (exp(z) - whole / up));
    if (g && y >= 0) g[row * ldg + y] = from_float<T>(at_target);
    if (gradient) gradient[row] = {0, 0, at_target, y};
  } else if (gradient) {
    const Split shift(lse);
    const float factor = static_cast<float>(weight * up * shift.factor());
    gradient[row] = {shift.high, factor, static_cast<float>(weight * slope * (up * exp(z - lse) - 1)), y};
  }
}

// Unbounded and stored: G times e^(top - lse) and the row's factor.
template <class T>
__global__ void __launch_bounds__(kSlotThreads) rescale_kernel(Logits l, const SlotSum* sums, const RowGradient* gradient, T* g, int64_t ldg) {
  const Place p(l);
  if (!p.any) return;
  const RowGradient row = gradient[p.row];
  const float factor = Math<T>::exp(base_of(sums[p.row * static_cast<int64_t>(l.slots()) + p.slot].top) - row.shift) * row.factor;
  T* at = g + p.row * ldg + static_cast<int64_t>(p.slot) * kSlot;
  constexpr int kWords = kSlot / kVector<T> / kWarp;
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    T* word = at + (k * kWarp + p.lane) * kVector<T>;
    Lanes<kVector<T>>{}.put(word, Lanes<kVector<T>>{}.get(word) * factor);
  }
  __syncwarp();
  if (const int y = row.target - p.first; p.lane == 0 && y >= 0 && y < p.left) at[y] = from_float<T>(row.at_target);
}

// Recomputed: a panel's gradient.
template <class T>
__global__ void __launch_bounds__(kSlotThreads) gradient_kernel(Logits l, Cap cap, const RowGradient* gradient, T* g) {
  const Place p(l);
  if (!p.any) return;
  const RowGradient row = gradient[p.row];
  float s[kHeld];
  p.load(l.u, s);
  using M = Math<T>;
  cap.shape<M>(s);
  const float heat = cap.heat * M::of_e, base = row.shift * M::of_e;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) s[i] = M::power(s[i] * heat - base) * row.factor * cap.slope(s[i]);
  if (const int y = row.target - p.first; y >= 0 && y < p.left) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (p.column(i) == y) s[i] = row.at_target;
  }
  p.store(g + p.at, s);
}

// Recomputed and bounded: what the rows' targets are in a panel.
template <class T>
__global__ void __launch_bounds__(kThreads) targets_gradient_kernel(Logits l, const RowGradient* gradient, T* g) {
  const int row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (row >= l.rows) return;
  if (const int64_t y = gradient[row].target - l.first; y >= 0 && y < l.cols) g[row * l.ld + y] = from_float<T>(gradient[row].at_target);
}

template <class T>
struct CrossEntropy {
  // Chunks of 4096 tokens of a vocabulary of 256000, at width 2304.
  static constexpr int64_t kUsual = int64_t{2112} << 20;
  static constexpr int64_t kPanel = int64_t{32} << 20;  // bytes of logits that stay in the L2 cache of 50 MiB
  // Below this many tokens in a chunk, reading and adding to dw takes longer than making the logits again.
  static constexpr int64_t kFewTokens = 900;

  const Call& call;
  View x, w, dx, dw;
  int64_t n, c, v;
  double cap, zloss;
  bool gradient, bounded, recompute, fused;
  int64_t rows, panel, ldg;  // tokens in a chunk; columns in a panel; row stride of g
  int slots;                 // of a row; tiles where they are fused
  size_t bytes;

  int *list, *count, *target;
  float *target_z, *scale, *u, *back;
  double* part;
  SlotSum* sums;
  float* plain_sums;
  RowGradient* row_gradient;
  T *g, *gathered, *regathered, *converted;

  explicit CrossEntropy(const Call& given)
      : call(given), x(call.in[0]), w(call.in[1]), dx(call.out[4]), dw(call.out[5]), n(x.rows()), c(x.cols()), v(w.dims[0]), cap(call.scalar[0]), zloss(call.scalar[1]) {
    gradient = dx || dw;
    bounded = cap > 0 && cap <= kBounded;
    // Passes go into the product where no maximum is needed and nobody asks for the largest.
    fused = sizeof(T) == 2 && bounded && !call.out[3] && product_sm90::takes(device_of(call), x.data, w.dtype == x.dtype ? w.data : nullptr, c);
    slots = static_cast<int>(fused ? product_sm90::tiles_of(v) : ceil_div(v, kSlot));
    choose(workspace_budget(device_of(call), kUsual));
    Layout lay{static_cast<char*>(call.workspace)};
    list = lay.take<int>(n);
    count = lay.take<int>(1);
    part = lay.take<double>(n);
    target = lay.take<int>(rows);
    target_z = lay.take<float>(rows);
    scale = lay.take<float>(rows);
    row_gradient = lay.take<RowGradient>(rows);
    sums = lay.take<SlotSum>(fused ? 0 : rows * slots);
    plain_sums = lay.take<float>(fused ? rows * slots : 0);
    u = lay.take<float>(fused ? 0 : rows * panel);
    g = lay.take<T>(gradient ? rows * ldg : 0);
    gathered = lay.take<T>(call.in[3] || dw ? rows * c : 0);
    regathered = lay.take<T>(fused && recompute && call.in[3] ? rows * c : 0);
    back = lay.take<float>(dx ? rows * c : 0);
    converted = lay.take<T>(Words<T>::room(w));
    bytes = lay.bytes;
  }

  // Bytes that grow with the tokens of a chunk, beside logits and gradients.
  int64_t row_bytes() const { return slots * static_cast<int64_t>(fused ? sizeof(float) : sizeof(SlotSum)) + c * (int64_t{sizeof(T)} * (fused && recompute ? 2 : 1) + 4) + 64; }

  void choose(int64_t budget) {
    const int64_t padded = whole_slots(v);
    recompute = false;
    ldg = padded;
    const int64_t panel_bytes = fused ? 0 : budget / 8 < kPanel ? budget / 8 : kPanel;
    const int64_t fixed = n * 12 + panel_bytes + Words<T>::room(w) * int64_t{sizeof(T)};
    const int64_t stored = gradient ? padded * int64_t{sizeof(T)} : 0;
    rows = even_rows(n, whole_tiles((budget - fixed) / (row_bytes() + stored)));
    if (dw && rows < n && rows < kFewTokens && padded > kSlot) {
      recompute = true;  // which counts in row_bytes()
      // Panels of four slots where that many fit, of one where not; of more where no logits are kept.
      const int64_t of_logit = int64_t{sizeof(T)} + (fused ? 0 : 4);
      for (const int64_t columns : {9 * kSlot, 4 * kSlot, 3 * kSlot, 2 * kSlot, 1 * kSlot}) {
        if (columns > 4 * kSlot && !fused) continue;
        panel = columns < padded ? columns : padded;
        rows = even_rows(n, whole_tiles((budget - fixed + panel_bytes) / (row_bytes() + panel * of_logit)));
        if (rows >= n) break;
      }
      ldg = panel;
      return;
    }
    panel = panel_bytes / 4 / (rows > 0 ? rows : 1) / kSlot * kSlot;
    panel = panel < kSlot ? kSlot : panel < padded ? panel : padded;
  }

  void run() {
    Tokens tokens{n, call.in[3].as<const float>()};
    const int64_t kept = list_tokens(call, tokens, list, count);
    if (tokens.list) {
      for (int k = 1; k < 4; ++k) zero(call, call.out[k]);
      if (!call.accumulate[4]) zero(call, dx);
    }
    if (kept == 0 && !call.accumulate[5]) zero(call, dw);
    for (int64_t first = 0; first < kept; first += rows) {
      const Tokens chunk = tokens.chunk(first, kept - first < rows ? kept - first : rows);
      if (bounded) one<true>(chunk);
      else one<false>(chunk);
    }
    launch(call, Grid{dim3(1), dim3(1024), kWarp * sizeof(double)}, total_kernel, static_cast<const double*>(part), kept, call.out[0].as<float>());
  }

  template <bool is_bounded>
  void one(const Tokens& tokens) {
    const int64_t many = tokens.rows;
    const Words<T> words{&w, converted};
    const FaultCheck outside{device_of(call).fault, Fault::target, call.op, v};
    launch(call, Grid{dim3(static_cast<unsigned>(ceil_div(many, kThreads))), dim3(kThreads)}, targets_kernel, tokens, call.in[2].as<const int>(), outside, target);
    const T* hidden = x.as<const T>() + tokens.first * c;
    if (tokens.list) {
      gather<T>(call, tokens, x, nullptr, gathered);
      hidden = gathered;
    }
    const bool stored = gradient && !recompute;
    const Logits whole{nullptr, ldg, tokens.rows, 0, v};
    if (fused) {
      fuse(hidden, many, words, 0, v, stored ? g : nullptr);
    } else {
      each_panel(tokens.rows, [&](const Logits& l) {
        make_logits(call, hidden, words, l);
        launch(call, warps(many * l.slots()), exponentials_kernel<T, is_bounded>, l, Cap(cap), target, target_z, static_cast<bool>(call.out[3]), sums, slots,
               stored ? g : nullptr, ldg);
      });
    }
    const bool scaled = gradient && is_bounded && (stored || fused);
    const RowOutputs out{call.out[1].as<float>(), call.out[2].as<float>(), call.out[3].as<float>(), part};
    launch(call, warps(many), rows_kernel<T, is_bounded>, tokens, Cap(cap), zloss, target, target_z, RowSums{sums, fused ? plain_sums : nullptr, slots},
           out, scaled ? scale : nullptr, gradient && !(scaled && stored) ? row_gradient : nullptr, stored ? g : nullptr, ldg);
    if (!gradient) return;

    const bool add = call.accumulate[5] || tokens.first > 0;
    const T* factors = hidden;  // of G, in dw
    if (dw && scaled) {
      T* const to = recompute && tokens.list ? regathered : gathered;
      gather<T>(call, tokens, x, scale, to);
      factors = to;
    }
    if (recompute) {
      each_panel(tokens.rows, [&](const Logits& l) {
        if (fused) {
          fuse(hidden, many, words, l.first, l.cols, g);
          launch(call, Grid{dim3(static_cast<unsigned>(ceil_div(many, kThreads))), dim3(kThreads)}, targets_gradient_kernel<T>, l, row_gradient, g);
        } else {
          make_logits(call, hidden, words, l);
          launch(call, warps(many * l.slots()), gradient_kernel<T>, l, Cap(cap), row_gradient, g);
        }
        if (dx) back_to_x(call, g, ldg, many, words, l.first, l.cols, back, l.first > 0);
        if (dw) back_to_w(call, g, ldg, many, factors, c, l.first, l.cols, dw.as<float>(), add);
      });
    } else {
      if (!is_bounded) launch(call, warps(many * slots), rescale_kernel<T>, whole, sums, row_gradient, g, ldg);
      if (dx) back_to_x(call, g, ldg, many, words, 0, v, back, false);
      if (dw) back_to_w(call, g, ldg, many, factors, c, 0, v, dw.as<float>(), add);
    }
    if (dx) scatter(call, tokens, back, scaled ? scale : nullptr, c, Sink<T>(call, 4));
  }

  // The pass within the product, over words [first, first + count); G begins at `to`. Sums are left behind when all words are passed.
  void fuse(const T* hidden, int64_t many, const Words<T>& words, int64_t first, int64_t count, T* to) {
    if constexpr (sizeof(T) == 2)
      words.each(call, first, count, [&](int64_t at, int64_t some, const Matrix& m) {
        const ExponentialsPass pass{Cap(cap), target, target_z, count == v ? plain_sums + product_sm90::tiles_of(at) : nullptr, slots, static_cast<int>(at)};
        product_sm90::run(call, hidden, many, static_cast<const T*>(m.data), some, c, to ? to + (at - first) : nullptr, ldg, pass);
      });
  }

  template <class Body>
  void each_panel(int many, Body body) {
    for (int64_t first = 0; first < v; first += panel) body(Logits{u, panel, many, first, v - first < panel ? v - first : panel});
  }
};

size_t linear_cross_entropy_workspace(const Call& call) { return call.in[0].dtype == DType::bf16 ? CrossEntropy<bf16>(call).bytes : CrossEntropy<float>(call).bytes; }

// linear_cross_entropy(x[* c], w[v c]:float, targets[*]:i32, weights[*]:f32?, cap, zloss)
//   -> total[]:f32, loss[*]:f32, lse[*]:f32, correct[*]:f32, dx[* c]+, dw[v c]:f32+
void linear_cross_entropy(const Call& call) {
  if (call.in[0].dtype == DType::bf16) CrossEntropy<bf16>(call).run();
  else CrossEntropy<float>(call).run();
}

}  // namespace
}  // namespace limbeck::cuda

LIMBECK_KERNELS(loss, {"linear_cross_entropy", linear_cross_entropy, linear_cross_entropy_workspace})
