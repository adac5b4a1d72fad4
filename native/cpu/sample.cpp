// What choosing the next token needs of its logits, without moving a whole vocabulary.
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

namespace {

constexpr int64_t kStep = 8 * W;  // logits that are looked at together: most hold none of the largest

// The k best so far as a heap: the worst is at the root. Of equals the one with the smaller id is better.
struct Best {
  float* values;
  int32_t* ids;
  int64_t k, count;

  bool worse(int64_t a, int64_t b) const { return values[a] < values[b] || (values[a] == values[b] && ids[a] > ids[b]); }
  void swap(int64_t a, int64_t b) {
    const float v = values[a];
    const int32_t id = ids[a];
    values[a] = values[b], ids[a] = ids[b];
    values[b] = v, ids[b] = id;
  }
  void sink(int64_t from, int64_t end) {
    for (int64_t at = from, child; (child = 2 * at + 1) < end; at = child) {
      if (child + 1 < end && worse(child + 1, child)) ++child;
      if (!worse(child, at)) return;
      swap(at, child);
    }
  }
  // Ids come in ascending order, so an equal value is worse than what is there.
  void offer(float value, int32_t id) {
    if (count < k) {
      int64_t at = count++;
      values[at] = value, ids[at] = id;
      for (int64_t parent; at > 0 && worse(at, parent = (at - 1) / 2); at = parent) swap(at, parent);
    } else if (value > values[0]) {
      values[0] = value, ids[0] = id;
      sink(0, k);
    }
  }
  // From the best to the worst.
  void sort() {
    for (int64_t end = count - 1; end > 0; --end) {
      swap(0, end);
      sink(0, end);
    }
  }
  float threshold() const { return count < k ? -__builtin_inff() : values[0]; }
};

}  // namespace

// top_logits(x[b v], temperature[b]:f32, k, n) -> values[b k]:f32, ids[b k]:i32, sums[b 2]:f32
// The k largest of the first n logits of each row, the largest first; and with that largest m the sums of e^(x - m) and
// e^((x - m) / temperature) over the n. A NaN makes the sums NaN. Where k > n, the places left over have -infinity and id -1.
static void top_logits(const Call& call) {
  const View &x = call.in[0], &values = call.out[0], &ids = call.out[1], &sums = call.out[2];
  const int64_t v = x.cols(), k = values.cols();
  const int64_t n = static_cast<int64_t>(call.scalar[1]) < v ? static_cast<int64_t>(call.scalar[1]) : v;
  if (!values || !ids || !sums || k < 1) return;
  call.threads->parallel(x.rows(), [&](int64_t row, int) {
    const float* const from = x.as<float>() + row * v;
    Best best{values.as<float>() + row * k, ids.as<int32_t>() + row * k, k, 0};
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      Vec most = load(from + i);
      for (int64_t j = W; j < kStep; j += W) most = max(most, load(from + i + j));
      const float least = best.threshold();
      bool hit = best.count < k;
      for (int j = 0; j < W; ++j) hit |= most[j] > least;
      for (int64_t j = i; hit && j < i + kStep; ++j) best.offer(from[j], static_cast<int32_t>(j));
    }
    for (; i < n; ++i) best.offer(from[i], static_cast<int32_t>(i));
    best.sort();
    for (int64_t j = best.count; j < k; ++j) best.values[j] = -__builtin_inff(), best.ids[j] = -1;

    const float top = best.count > 0 ? best.values[0] : 0.f, per = 1.f / call.in[1].as<const float>()[row];
    float* const to = sums.as<float>() + row * 2;
    to[0] = sum_lanes(n, [=](int64_t j, auto lanes) { return exp(lanes.get(from + j) - top); });
    to[1] = per == 1.f ? to[0] : sum_lanes(n, [=](int64_t j, auto lanes) { return exp((lanes.get(from + j) - top) * per); });
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(sample, {"top_logits", top_logits})
