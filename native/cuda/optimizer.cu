// AdamW (Loshchilov and Hutter, arXiv 1711.05101) for all parameters in one launch, at the speed of memory.
#include <cmath>

#include "core/checks.h"
#include "core/moments.h"
#include "cuda/bf16.cuh"
#include "cuda/launch.h"

namespace limbeck::cuda {

namespace {

constexpr int64_t kBlock = 64;  // parameters that share one entry of the decay mask
constexpr int kThreads = 256;
constexpr int kLane = 8;        // neighbouring parameters of one thread: a warp holds one block of 8-bit moments

// The numbers of one update, made once on the device: the norm and the rates are known there only.
struct Update {
  int finite;
  float scale, b1, b2, c2, rate, root, eps, kept;
  unsigned long long seed, step;
};

struct Scalars {
  double beta1, beta2, eps, weight_decay, clip, seed;
};

__global__ void make_update(const double* norm2, const double* rates, Scalars s, Update* u) {
  const double norm = ::sqrt(*norm2), lr = rates[0], step = rates[1], ratio = s.clip / (norm + 1e-6);
  u->finite = norm <= 1.7976931348623157e308;
  u->scale = static_cast<float>(ratio < 1 ? ratio : 1);
  u->b1 = static_cast<float>(1 - s.beta1);
  u->b2 = static_cast<float>(s.beta2);
  u->c2 = static_cast<float>(1 - s.beta2);
  u->rate = static_cast<float>(lr / (1 - ::pow(s.beta1, step)));
  u->root = static_cast<float>(1 / ::sqrt(1 - ::pow(s.beta2, step)));
  u->eps = static_cast<float>(s.eps);
  u->kept = static_cast<float>(1 - lr * s.weight_decay);
  u->seed = static_cast<unsigned long long>(s.seed);
  u->step = static_cast<unsigned long long>(step);
}

// Eight neighbours that one thread moves: 16 bytes at a time where all of them exist and lie aligned, else one by one.
struct Eight {
  float v[kLane];
};
template <class T>
__device__ __forceinline__ bool whole(const T* p, int count) {
  return count == kLane && reinterpret_cast<uintptr_t>(p) % (sizeof(T) * kLane < 16 ? sizeof(T) * kLane : 16) == 0;
}
__device__ __forceinline__ Eight get(const float* p, int count) {
  Eight r = {};
  if (whole(p, count)) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }
#pragma unroll
  for (int k = 0; k < kLane; ++k)
    if (k < count) r.v[k] = p[k];
  return r;
}
__device__ __forceinline__ Eight get(const bf16* p, int count) {
  Eight r = {};
  if (whole(p, count)) {
    const uint4 w = *reinterpret_cast<const uint4*>(p);
    return {{low_float(w.x), high_float(w.x), low_float(w.y), high_float(w.y), low_float(w.z), high_float(w.z), low_float(w.w), high_float(w.w)}};
  }
#pragma unroll
  for (int k = 0; k < kLane; ++k)
    if (k < count) r.v[k] = to_float(p[k]);
  return r;
}
__device__ __forceinline__ void put(float* p, int count, const Eight& x) {
  if (whole(p, count)) {
    reinterpret_cast<float4*>(p)[0] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kLane; ++k)
    if (k < count) p[k] = x.v[k];
}
__device__ __forceinline__ void put(bf16* p, int count, const Eight& x) {
  if (whole(p, count)) {
    *reinterpret_cast<uint4*>(p) = make_uint4(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]), pack_bf16(x.v[4], x.v[5]), pack_bf16(x.v[6], x.v[7]));
    return;
  }
#pragma unroll
  for (int k = 0; k < kLane; ++k)
    if (k < count) p[k] = to_bf16(x.v[k]);
}

// The codes of eight moments, the first in the low byte.
__device__ __forceinline__ uint64_t get_codes(const uint8_t* p, int count) {
  if (whole(p, count)) return *reinterpret_cast<const uint64_t*>(p);
  uint64_t codes = 0;
  for (int k = 0; k < count; ++k) codes |= static_cast<uint64_t>(p[k]) << 8 * k;
  return codes;
}
__device__ __forceinline__ void put_codes(uint8_t* p, int count, uint64_t codes) {
  if (whole(p, count)) {
    *reinterpret_cast<uint64_t*>(p) = codes;
    return;
  }
  for (int k = 0; k < count; ++k) p[k] = static_cast<uint8_t>(codes >> 8 * k);
}

// float32 parameters with a rounded copy where one is wanted, or bf16 ones alone, rounded up or down by chance.
__device__ __forceinline__ void put_parameters(float* p, bf16* copy, int64_t i, int count, const Eight& x, const Update&) {
  put(p + i, count, x);
  if (copy) put(copy + i, count, x);
}
__device__ __forceinline__ void put_parameters(bf16* p, bf16*, int64_t i, int count, const Eight& x, const Update& u) {
  const Chances chances(u.seed, u.step, static_cast<uint64_t>(i));
  uint16_t rounded[kLane];
#pragma unroll
  for (int k = 0; k < kLane; ++k) rounded[k] = round_by_chance(x.v[k], chances[k]);
  if (whole(p + i, count)) {
    const auto pair = [&](int k) { return rounded[k] | static_cast<uint32_t>(rounded[k + 1]) << 16; };
    *reinterpret_cast<uint4*>(p + i) = make_uint4(pair(0), pair(2), pair(4), pair(6));
    return;
  }
#pragma unroll
  for (int k = 0; k < kLane; ++k)
    if (k < count) p[i + k].bits = rounded[k];
}

template <class P>
__global__ void __launch_bounds__(kThreads) update_f32(P* p, const float* g, float* m, float* v, const uint8_t* decay, bf16* copy, int64_t n, const Update* update) {
  const Update u = *update;
  if (!u.finite) return;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kLane;
  if (i >= n) return;
  const int count = static_cast<int>(n - i < kLane ? n - i : kLane);
  const float keep = decay[i / kBlock] != 0 ? u.kept : 1.f;
  const Eight d = get(g + i, count);
  Eight first = get(m + i, count), second = get(v + i, count), x = get(p + i, count);
#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    const float dk = d.v[k] * u.scale;
    first.v[k] += (dk - first.v[k]) * u.b1;
    second.v[k] = second.v[k] * u.b2 + dk * dk * u.c2;
    x.v[k] = x.v[k] * keep - first.v[k] * u.rate / (sqrtf(second.v[k]) * u.root + u.eps);
  }
  put(m + i, count, first);
  put(v + i, count, second);
  put_parameters(p, copy, i, count, x, u);
}

__device__ __forceinline__ float warp_largest(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// A warp holds one block of moments, so that its scales are a reduction in registers.
template <class P>
__global__ void __launch_bounds__(kThreads) update_8bit(P* p, const float* g, uint8_t* m, float* m_scale, uint8_t* v, float* v_scale, const uint8_t* decay,
                                                        bf16* copy, int64_t n, const Update* update) {
  const Update u = *update;
  if (!u.finite) return;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kLane, block = i / kMomentBlock;
  if (block * kMomentBlock >= n) return;
  const int count = i >= n ? 0 : static_cast<int>(n - i < kLane ? n - i : kLane);
  const Eight d = get(g + i, count);
  Eight x = get(p + i, count), first, second;
  const uint64_t m_codes = get_codes(m + i, count), v_codes = get_codes(v + i, count);
  const float keep = count > 0 && decay[i / kBlock] != 0 ? u.kept : 1.f, ms = m_scale[block], vs = v_scale[block];
  float m_largest = 0, v_largest = 0;
#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    const float dk = d.v[k] * u.scale, m0 = unpack_first(static_cast<uint8_t>(m_codes >> 8 * k), ms),
                v0 = unpack_second(static_cast<uint8_t>(v_codes >> 8 * k), vs);
    first.v[k] = m0 + (dk - m0) * u.b1;
    second.v[k] = v0 * u.b2 + dk * dk * u.c2;
    m_largest = fmaxf(m_largest, fabsf(first.v[k]));
    v_largest = fmaxf(v_largest, second.v[k]);
    x.v[k] = x.v[k] * keep - first.v[k] * u.rate / (sqrtf(second.v[k]) * u.root + u.eps);
  }
  m_largest = warp_largest(m_largest);
  v_largest = warp_largest(v_largest);
  __syncwarp();  // all have read the old scales
  if (i % kMomentBlock == 0) m_scale[block] = m_largest, v_scale[block] = v_largest;
  uint64_t m_new = 0, v_new = 0;
#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    m_new |= static_cast<uint64_t>(pack_first(first.v[k], m_largest)) << 8 * k;
    v_new |= static_cast<uint64_t>(pack_second(second.v[k], v_largest)) << 8 * k;
  }
  put_codes(m + i, count, m_new);
  put_codes(v + i, count, v_new);
  put_parameters(p, copy, i, count, x, u);
}

const Update* prepare(const Call& call, const View& norm2, const View& rates) {
  const Scalars s = {call.scalar[0], call.scalar[1], call.scalar[2], call.scalar[3], call.scalar[4], call.scalar[5]};
  auto* update = static_cast<Update*>(call.workspace);
  launch(call, {dim3(1), dim3(1)}, make_update, norm2.as<const double>(), rates.as<const double>(), s, update);
  return update;
}

Grid grid_of(int64_t n) { return {dim3(static_cast<unsigned>((n + kThreads * kLane - 1) / (kThreads * kLane))), dim3(kThreads)}; }

size_t update_bytes(const Call&) { return sizeof(Update); }

// adamw(p[n]:float&, g[n]:f32, m[n]:f32&, v[n]:f32&, norm2[]:f64, decay[k]:u8, rates[2]:f64, copy[n]:bf16?&, beta1, beta2, eps,
//       weight_decay, clip, seed) ->
void adamw(const Call& call) {
  const int64_t n = call.in[0].size();
  check_blocks(call, call.in[5], "decay", kBlock);
  const Update* u = prepare(call, call.in[4], call.in[6]);
  const auto run = [&](auto* p) {
    launch(call, grid_of(n), update_f32<std::remove_pointer_t<decltype(p)>>, p, call.in[1].as<const float>(), call.in[2].as<float>(), call.in[3].as<float>(),
           call.in[5].as<const uint8_t>(), call.in[7].as<bf16>(), n, u);
  };
  if (call.in[0].dtype == DType::bf16) run(call.in[0].as<bf16>());
  else run(call.in[0].as<float>());
}

// adamw_8bit(p[n]:float&, g[n]:f32, m[n]:u8&, m_scale[j]:f32&, v[n]:u8&, v_scale[j]:f32&, norm2[]:f64, decay[k]:u8, rates[2]:f64,
//            copy[n]:bf16?&, beta1, beta2, eps, weight_decay, clip, seed) ->
void adamw_8bit(const Call& call) {
  const int64_t n = call.in[0].size();
  check_blocks(call, call.in[7], "decay", kBlock);
  check_blocks(call, call.in[3], "m_scale", kMomentBlock);
  check_blocks(call, call.in[5], "v_scale", kMomentBlock);
  const Update* u = prepare(call, call.in[6], call.in[8]);
  const auto run = [&](auto* p) {
    launch(call, grid_of(n), update_8bit<std::remove_pointer_t<decltype(p)>>, p, call.in[1].as<const float>(), call.in[2].as<uint8_t>(), call.in[3].as<float>(),
           call.in[4].as<uint8_t>(), call.in[5].as<float>(), call.in[7].as<const uint8_t>(), call.in[9].as<bf16>(), n, u);
  };
  if (call.in[0].dtype == DType::bf16) run(call.in[0].as<bf16>());
  else run(call.in[0].as<float>());
}

}  // namespace

}  // namespace limbeck::cuda

LIMBECK_KERNELS(optimizer, {"adamw", adamw, update_bytes}, {"adamw_8bit", adamw_8bit, update_bytes})
