// What choosing the next token needs of its logits, without moving a whole vocabulary.
#include "cuda/top.cuh"

namespace limbeck::cuda {

template <class T>
struct TopLogits {
  const T* x;  // of the first row
  top::Rows rows;
  const top::Sums* chunks;
  int64_t k;
  float *values, *sums;
  int32_t* ids;
  const float* temperature;

  __device__ __forceinline__ void operator()(int64_t row, const Key* keys) const {
    for (int64_t i = threadIdx.x; i < k; i += blockDim.x) {
      const int32_t id = i < rows.k ? column_of(keys[i]) : -1;
      ids[row * k + i] = id;
      values[row * k + i] = id < 0 ? -INFINITY : to_float(x[row * rows.stride + id]);
    }
    if (threadIdx.x >= kWarp) return;
    const top::Sums* own = chunks + row * rows.chunks;
    float largest = -INFINITY, plain = 0, tempered = 0;
    for (int i = static_cast<int>(threadIdx.x); i < rows.chunks; i += kWarp) largest = fmaxf(largest, own[i].largest);
    largest = warp_reduce(largest, Larger{});
    const float per = 1.f / temperature[row];
    for (int i = static_cast<int>(threadIdx.x); i < rows.chunks; i += kWarp) {
      const float z = (own[i].largest - largest) * 1.44269504f;
      plain += own[i].plain * ptx::ex2(z);
      tempered += own[i].tempered * ptx::ex2(z * per);
    }
    plain = warp_reduce(plain, Plus{}), tempered = warp_reduce(tempered, Plus{});
    if (threadIdx.x == 0) sums[2 * row] = plain, sums[2 * row + 1] = tempered;
  }
};

static top::Rows rows_of(const Call& call) {
  const int64_t v = call.in[0].cols();
  return {v, std::min<int64_t>(static_cast<int64_t>(call.scalar[1]), v), static_cast<int64_t>(call.scalar[0])};
}

// top_logits(x[b v], temperature[b]:f32, k, n) -> values[b k]:f32, ids[b k]:i32, sums[b 2]:f32
// The k largest of the first n logits of each row, the largest first; and with that largest m the sums of e^(x - m) and
// e^((x - m) / temperature) over the n. A NaN makes the sums NaN. Where k > n, the places left over have -infinity and id -1.
template <class T>
static void top_logits(const Call& call) {
  const View &x = call.in[0], &values = call.out[0], &ids = call.out[1], &sums = call.out[2];
  const top::Rows rows = rows_of(call);
  if (!values || !ids || !sums || rows.k < 1) return;
  const float* temperature = call.in[1].as<const float>();
  const int64_t k = values.cols();
  top::largest<true>(call, x.as<const T>(), x.rows(), rows, temperature, [&](int64_t first, const top::Sums* chunks) {
    return TopLogits<T>{x.as<const T>() + first * x.cols(), rows, chunks, k, values.as<float>() + first * k, sums.as<float>() + 2 * first,
                        ids.as<int32_t>() + first * k, temperature + first};
  });
}

static size_t top_logits_bytes(const Call& call) { return top::bytes(call.in[0].rows(), rows_of(call)); }

}  // namespace limbeck::cuda

LIMBECK_KERNELS(sample, {"top_logits", by_dtype<top_logits<float>, top_logits<bf16>>, top_logits_bytes})
