// Cross-entropy straight from hidden states: logits exist for one chunk of tokens at a time, and the gradient is made in the same
// pass. Letters: n tokens, c width, v vocabulary, u = x w^T, z = cap tanh(u / cap), q = softmax(z).
#include "cpu/loss.h"

namespace limbeck::cpu::LIMBECK_ISA {
namespace {

// With a cap the logits are bounded, so exp(z) needs no maximum and can be taken as soon as a block of u is finished. The block
// then keeps e^z dz/du, which is the gradient but for a factor of its row: no second pass over the logits is needed.
struct BoundedTile {
  float* z;
  int64_t ld, slots;
  float* sums;            // [rows slots]
  const int32_t* target;  // [rows]
  float* target_z;        // [rows]
  float cap;
  bool gradient;

  static void run(void* ctx, const Block& b) {
    const BoundedTile t = *static_cast<const BoundedTile*>(ctx);
    const float inverse = 1.f / t.cap;
    each_row_of(b, [&](int64_t i, auto over) __attribute__((always_inline)) {
      if (const int64_t y = t.target[i]; y >= b.j0 && y < b.j0 + b.cols) t.target_z[i] = (tanh(splat(t.z[i * t.ld + y]) * inverse) * t.cap)[0];
      float* const row = t.z + i * t.ld + b.j0;
      Vec total{};
      over([&](int64_t k, auto lanes) __attribute__((always_inline)) {
        const auto s = tanh(lanes.get(row + k) * inverse), e = exp_inside(s * t.cap);
        add(total, lanes.keep(e));
        if (t.gradient) lanes.put(row + k, e - e * s * s);
      });
      t.sums[i * t.slots + b.sliver] = sum(total);
    });
  }
  TileHook hook() { return {run, this}; }
};

struct CrossEntropy : HeadShape {
  View x, w, targets, weights;
  double cap, zloss;
  View total, loss, lse, correct, dx, dw;
  bool gradient, bounded;
  size_t bytes;

  int32_t *token, *target;
  float *packed_w, *z, *gathered, *back, *sums, *tops, *target_z, *scale;
  double *row_lse, *row_loss;

  explicit CrossEntropy(const Call& call)
      : HeadShape(call.in[0], call.in[1], 1), x(call.in[0]), w(call.in[1]), targets(call.in[2]), weights(call.in[3]),
        cap(call.scalar[0]), zloss(call.scalar[1]),
        total(call.out[0]), loss(call.out[1]), lse(call.out[2]), correct(call.out[3]), dx(call.out[4]), dw(call.out[5]) {
    gradient = dx || dw;
    bounded = cap > 0 && cap <= kBounded && !correct;
    Layout lay{static_cast<char*>(call.workspace)};
    token = lay.take<int32_t>(n);
    target = lay.take<int32_t>(rows);
    packed_w = dx && packs() ? lay.take<float>(Packed(v, c).floats()) : nullptr;
    z = lay.take<float>(rows * ld);
    gathered = lay.take<float>(rows * c);
    back = lay.take<float>(dx ? rows * c : 0);
    sums = lay.take<float>(rows * slots);
    tops = lay.take<float>(bounded ? 0 : rows * slots);
    target_z = lay.take<float>(rows);
    scale = lay.take<float>(rows);
    row_lse = lay.take<double>(rows);
    row_loss = lay.take<double>(rows);
    bytes = lay.bytes;
  }

  void run(const Call& call) {
    ThreadPool& threads = *call.threads;
    for (int k = 0; k < 4; ++k) zero(call.out[k]);
    if (!call.accumulate[4]) zero(dx);
    const int64_t count = list_tokens(weights, n, token);
    if (count == 0 && !call.accumulate[5]) zero(dw);
    for (int64_t i = 0; i < count; ++i) check_target(call, targets.as<const int32_t>()[token[i]], token[i], v);

    const Matrix head = head_rows(threads, *this, w, packed_w);
    double sum_of_all = 0;
    const int64_t chunks = count == 0 ? 0 : (count + rows - 1) / rows;
    for (int64_t k = 0; k < chunks; ++k) {
      const int64_t from = count * k / chunks, to = count * (k + 1) / chunks;
      const Chunk chunk{to - from, token + from, z, gathered, back};
      logits(threads, chunk);
      each_row(threads, chunk.count, [&](int64_t i, int) { finish(i, chunk.token[i]); });
      for (int64_t i = 0; i < chunk.count; ++i) sum_of_all += row_loss[i];
      head_backward(threads, *this, chunk, head, dx, dw, call.accumulate[5] || k > 0, scale);
    }
    total.as<float>()[0] = static_cast<float>(sum_of_all);
  }

 private:
  void logits(ThreadPool& threads, const Chunk& chunk) {
    gather(threads, chunk, x, gathered);
    for (int64_t i = 0; i < chunk.count; ++i) target[i] = targets.as<const int32_t>()[chunk.token[i]];
    BoundedTile fast{z, ld, slots, sums, target, target_z, static_cast<float>(cap), gradient};
    LogitTile plain{z, ld, slots, tops, sums, nullptr, static_cast<float>(cap), 1.f};
    GemmOptions options;
    options.hook = bounded ? fast.hook() : plain.hook();
    gemm(threads, chunk.count, v, c, rows_of(gathered, c), transposed(w.data, c, w.dtype), z, ld, options);
  }

  // Loss of row i, and its gradient: weight ((1 + 2 zloss lse) q - 1[target]) dz/du, but for the factor scale[i].
  void finish(int64_t i, int64_t position) {
    float* row = z + i * ld;
    const int64_t y = target[i];
    const double weight = weight_of(weights, n, position);
    const double sum_exp = slot_lse(bounded ? nullptr : tops + i * slots, sums + i * slots, slots, 1);
    const double z_y = bounded ? target_z[i] : row[y];
    row_lse[i] = sum_exp;
    row_loss[i] = weight * (sum_exp - z_y + zloss * sum_exp * sum_exp);
    if (loss) loss.as<float>()[position] = static_cast<float>(sum_exp - z_y);
    if (lse) lse.as<float>()[position] = static_cast<float>(sum_exp);
    if (correct) correct.as<float>()[position] = row_argmax(row, v) == y ? 1.f : 0.f;
    if (!gradient) return;

    const double slope = cap > 0 ? 1 - (z_y / cap) * (z_y / cap) : 1;
    double up = 1 + 2 * zloss * sum_exp;
    if (bounded) {
      if (std::fabs(up) < 1e-6) up = 1e-6;  // the row is divided by it
      scale[i] = static_cast<float>(weight * up * std::exp(-sum_exp));
      row[y] -= static_cast<float>(slope * std::exp(sum_exp) / up);
      return;
    }
    scale[i] = 1.f;
    const Split shift(sum_exp);
    const float factor = static_cast<float>(weight * up * shift.factor());
    const float bend = cap > 0 ? static_cast<float>(1 / (cap * cap)) : 0.f;
    each_vec(row, v, [&](int64_t j, int64_t lanes, Vec u) {
      const Vec g = exp(u - shift.high) * factor;
      put(row + j, g - g * (u * u * bend), lanes);
    });
    row[y] -= static_cast<float>(weight * slope);
  }
};

}  // namespace

static size_t linear_cross_entropy_workspace(const Call& call) { return CrossEntropy(call).bytes; }

// linear_cross_entropy(x[* c], w[v c]:float, targets[*]:i32, weights[*]?, cap, zloss)
//   -> total[], loss[*], lse[*], correct[*], dx[* c]+, dw[v c]:f32+
static void linear_cross_entropy(const Call& call) { CrossEntropy(call).run(call); }

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(loss, {"linear_cross_entropy", linear_cross_entropy, linear_cross_entropy_workspace})
