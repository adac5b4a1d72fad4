// Every instruction that CUDA C++ does not spell: tensor cores, asynchronous copies, their barriers, approximate functions. Each is a
// function of two bodies: inline PTX here, and for the host a model written from the instruction's definition (emulate/ptx.h).
// Instructions of sm_90 compile to a trap for older architectures: the host chooses kernels by architecture.
#pragma once
#include <cstdint>

#include "core/float8.h"
#include "cuda/bf16.cuh"
#include "cuda/runtime.h"
#include "cuda/tensor_map.h"

#ifdef LIMBECK_EMULATE
#include "cuda/emulate/ptx.h"
#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define LIMBECK_SM90(...) __trap()
#else
#define LIMBECK_SM90(...) asm volatile(__VA_ARGS__)
#endif
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LIMBECK_SM90A(...) __trap()
#else
#define LIMBECK_SM90A(...) asm volatile(__VA_ARGS__)
#endif
#define LIMBECK_DEVICE __device__ __forceinline__

#include "cuda/wgmma.cuh"

namespace limbeck::cuda::ptx {

// Approximate functions: relative errors of about 2^-22 (ex2, lg2, rsqrt, rcp) and 2^-11 (tanh).
LIMBECK_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LIMBECK_DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LIMBECK_DEVICE float tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LIMBECK_DEVICE float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LIMBECK_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The largest of three: one instruction of sm_90.
LIMBECK_DEVICE int max(int a, int b, int c) { return __vimax3_s32(a, b, c); }

// Two numbers in fp8 (e4m3), the first in the low byte: to the nearest, beyond 448 to 448. Before sm_89 there is no instruction.
LIMBECK_DEVICE uint32_t pack_float8(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return float8_from(low) | static_cast<uint32_t>(float8_from(high)) << 8;
#endif
}

// Where a pointer to shared memory points to, as instructions take it.
LIMBECK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// --- Tensor cores of sm_80: all 32 lanes take part -----------------------------------------------------------------------------------
// d[16 8] += a[16 16] * b[16 8]. With g = lane / 4 and t = lane % 4: d = (g, 2t), (g, 2t + 1), (g + 8, ..) twice;
// a pairs = (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b pairs = (2t, g), (2t + 8, g), both along k.
LIMBECK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LIMBECK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16(d, a, b[0], b[1]); }

// 8x8 matrices of 16-bit elements: lane 8i + r gives the address of row r of matrix i (16 bytes, aligned); lane l receives of matrix i
// the elements (l / 4, 2(l % 4)) and the one after it; transposed: (2(l % 4), l / 4) and the one below it.
LIMBECK_DEVICE void ldmatrix(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
LIMBECK_DEVICE void ldmatrix(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
LIMBECK_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LIMBECK_DEVICE void ldmatrix_transposed(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
LIMBECK_DEVICE void ldmatrix_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
LIMBECK_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The inverse of ldmatrix (sm_90).
LIMBECK_DEVICE void stmatrix(void* row, const uint32_t (&r)[1]) {
  LIMBECK_SM90("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared_address(row)), "r"(r[0]) : "memory");
}
LIMBECK_DEVICE void stmatrix(void* row, const uint32_t (&r)[2]) {
  LIMBECK_SM90("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]) : "memory");
}
LIMBECK_DEVICE void stmatrix(void* row, const uint32_t (&r)[4]) {
  LIMBECK_SM90("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
}
LIMBECK_DEVICE void stmatrix_transposed(void* row, const uint32_t (&r)[1]) {
  LIMBECK_SM90("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared_address(row)), "r"(r[0]) : "memory");
}
LIMBECK_DEVICE void stmatrix_transposed(void* row, const uint32_t (&r)[2]) {
  LIMBECK_SM90("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]) : "memory");
}
LIMBECK_DEVICE void stmatrix_transposed(void* row, const uint32_t (&r)[4]) {
  LIMBECK_SM90("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// --- Asynchronous copies of sm_80: global to shared, by each thread for itself -------------------------------------------------------
// 16 bytes, both ends aligned; only `bytes` of them are read, the others are written as zero (0 reads nothing, but the pointer must
// still be a valid one).
LIMBECK_DEVICE void cp_async_16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
LIMBECK_DEVICE void cp_async_8(void* shared, const void* global, int bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
LIMBECK_DEVICE void cp_async_4(void* shared, const void* global, int bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
LIMBECK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's newest groups are unfinished. A barrier must follow before others read.
template <int N>
LIMBECK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- mbarrier (sm_90): a phase ends when all arrivals and all announced bytes have come ----------------------------------------------
LIMBECK_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  LIMBECK_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
LIMBECK_DEVICE void mbarrier_inval(uint64_t* barrier) {
  LIMBECK_SM90("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
LIMBECK_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  LIMBECK_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
LIMBECK_DEVICE void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  LIMBECK_SM90("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
LIMBECK_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  LIMBECK_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// True when the phase of that parity has ended. A fresh barrier is in phase 0, so that parity 1 is true at once. May time out: loop.
LIMBECK_DEVICE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  LIMBECK_SM90(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
LIMBECK_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
// After mbarrier_init, by the thread that did it, before a __syncthreads or cluster_sync.
LIMBECK_DEVICE void fence_mbarrier_init() { LIMBECK_SM90("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// What this thread wrote to shared memory (or saw written, after a barrier) becomes visible to TMA and wgmma.
LIMBECK_DEVICE void fence_proxy_async() { LIMBECK_SM90("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory, where a TMA load reads what the same kernel wrote.
LIMBECK_DEVICE void fence_proxy_async_global() { LIMBECK_SM90("fence.proxy.async.global;" ::: "memory"); }

// --- TMA (sm_90): one thread issues. Coordinates are in elements, innermost first ----------------------------------------------------
LIMBECK_DEVICE void prefetch_tensor_map(const TensorMap* map) { LIMBECK_SM90("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Loads a box to `shared` (128-byte aligned; to the size of its swizzle pattern) and completes its whole bytes on the barrier.
#define LIMBECK_LOAD(n, places)                                                                                                        \
  "cp.async.bulk.tensor." n "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, " places "], [%2];" ::"r"(            \
      shared_address(shared)),                                                                                                          \
      "l"(map), "r"(shared_address(barrier))
LIMBECK_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
  LIMBECK_SM90(LIMBECK_LOAD("2", "{%3,%4}"), "r"(c0), "r"(c1) : "memory");
}
LIMBECK_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  LIMBECK_SM90(LIMBECK_LOAD("3", "{%3,%4,%5}"), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
LIMBECK_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  LIMBECK_SM90(LIMBECK_LOAD("4", "{%3,%4,%5,%6}"), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
LIMBECK_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
  LIMBECK_SM90(LIMBECK_LOAD("5", "{%3,%4,%5,%6,%7}"), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}
#undef LIMBECK_LOAD
// To the same place in every block of the cluster whose bit is set, each completing on its own barrier at the same place.
#define LIMBECK_LOAD(n, places)                                                                                                        \
  "cp.async.bulk.tensor." n                                                                                                             \
  "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, " places "], [%2], %3;" ::"r"(               \
      shared_address(shared)),                                                                                                          \
      "l"(map), "r"(shared_address(barrier)), "h"(blocks)
LIMBECK_DEVICE void tma_load_multicast(void* shared, const TensorMap* map, uint64_t* barrier, uint16_t blocks, int c0, int c1) {
  LIMBECK_SM90A(LIMBECK_LOAD("2", "{%4,%5}"), "r"(c0), "r"(c1) : "memory");
}
LIMBECK_DEVICE void tma_load_multicast(void* shared, const TensorMap* map, uint64_t* barrier, uint16_t blocks, int c0, int c1, int c2) {
  LIMBECK_SM90A(LIMBECK_LOAD("3", "{%4,%5,%6}"), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
LIMBECK_DEVICE void tma_load_multicast(void* shared, const TensorMap* map, uint64_t* barrier, uint16_t blocks, int c0, int c1, int c2,
                                       int c3) {
  LIMBECK_SM90A(LIMBECK_LOAD("4", "{%4,%5,%6,%7}"), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
#undef LIMBECK_LOAD

// Stores a box, or adds it (f32 elements: add; bf16: add with rounding). Belongs to this thread's bulk group.
#define LIMBECK_STORES(name, prefix, suffix)                                                                                            \
  LIMBECK_DEVICE void name(const TensorMap* map, const void* shared, int c0, int c1) {                                                  \
    LIMBECK_SM90(prefix ".2d.global.shared::cta" suffix ".tile.bulk_group [%0, {%2,%3}], [%1];" ::"l"(map),                             \
                 "r"(shared_address(shared)), "r"(c0), "r"(c1)                                                                          \
                 : "memory");                                                                                                           \
  }                                                                                                                                     \
  LIMBECK_DEVICE void name(const TensorMap* map, const void* shared, int c0, int c1, int c2) {                                          \
    LIMBECK_SM90(prefix ".3d.global.shared::cta" suffix ".tile.bulk_group [%0, {%2,%3,%4}], [%1];" ::"l"(map),                          \
                 "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2)                                                                 \
                 : "memory");                                                                                                           \
  }                                                                                                                                     \
  LIMBECK_DEVICE void name(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {                                  \
    LIMBECK_SM90(prefix ".4d.global.shared::cta" suffix ".tile.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::"l"(map),                       \
                 "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)                                                        \
                 : "memory");                                                                                                           \
  }                                                                                                                                     \
  LIMBECK_DEVICE void name(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3, int c4) {                          \
    LIMBECK_SM90(prefix ".5d.global.shared::cta" suffix ".tile.bulk_group [%0, {%2,%3,%4,%5,%6}], [%1];" ::"l"(map),                    \
                 "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)                                               \
                 : "memory");                                                                                                           \
  }
LIMBECK_STORES(tma_store, "cp.async.bulk.tensor", "")
LIMBECK_STORES(tma_reduce_add, "cp.reduce.async.bulk.tensor", ".add")
#undef LIMBECK_STORES

// Plain runs of bytes: a multiple of 16, both ends 16-byte aligned.
LIMBECK_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  LIMBECK_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
LIMBECK_DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes) {
  LIMBECK_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)), "r"(bytes) : "memory");
}
LIMBECK_DEVICE void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
  LIMBECK_SM90("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
// Shared memory of this block to shared memory of another of the cluster; both addresses of the other block as mapa gives them.
LIMBECK_DEVICE void bulk_copy_to_cluster(uint32_t to, const void* shared, uint32_t bytes, uint32_t barrier) {
  LIMBECK_SM90("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(shared_address(shared)), "r"(bytes), "r"(barrier)
               : "memory");
}
LIMBECK_DEVICE void bulk_commit() { LIMBECK_SM90("cp.async.bulk.commit_group;" ::: "memory"); }
// At most N of this thread's newest groups are unfinished: the writes have landed; or (read) shared memory may be used again.
template <int N>
LIMBECK_DEVICE void bulk_wait() {
  LIMBECK_SM90("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N>
LIMBECK_DEVICE void bulk_wait_read() {
  LIMBECK_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// --- Tensor cores of sm_90a: a warpgroup of 128 threads -------------------------------------------------------------------------------
LIMBECK_DEVICE void wgmma_fence() { LIMBECK_SM90A("wgmma.fence.sync.aligned;" ::: "memory"); }
LIMBECK_DEVICE void wgmma_commit() { LIMBECK_SM90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
LIMBECK_DEVICE void wgmma_wait() {
  LIMBECK_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// What wgmma leaves in registers exists only after the wait: the compiler must not compute from it, nor overwrite it, any earlier.
template <int N>
LIMBECK_DEVICE void wgmma_settle(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
// An operand in shared memory. `stride` is the distance of groups of 8 rows (K-major) or of 8 k (MN-major), `leading` that of the next
// swizzle span along MN (MN-major; ignored for K-major with a swizzle), in bytes.
__host__ __device__ inline uint64_t wgmma_descriptor(uint32_t shared_address, int leading, int stride, Swizzle swizzle) {
  const uint64_t code = swizzle == Swizzle::none ? 0 : 4 - static_cast<int>(swizzle);
  return (static_cast<uint64_t>(shared_address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | code << 62;
}
LIMBECK_DEVICE uint64_t wgmma_descriptor(const void* shared, int leading, int stride, Swizzle swizzle) {
  uint64_t d = wgmma_descriptor(shared_address(shared), leading, stride, swizzle);
  // Opaque, so that a loop makes it anew: else one register for each of its steps along k is held all the time.
  asm volatile("" : "+l"(d));
  return d;
}
// d[64 N] = a[64 16] * b[16 N] (+ d where add is not 0). Thread t of warp w holds in d[4j + i] row 16w + t / 4 + 8 (i / 2), column
// 8j + 2(t % 4) + i % 2; a in registers has the layout of mma_m16n8k16. Transposed: the operand is MN-major in shared memory.
// Accumulators and registers of a may be touched again after wgmma_wait only.
template <int N, bool TransposedA = false, bool TransposedB = false>
LIMBECK_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
  Wgmma<N>::template run<TransposedA, TransposedB>(d, a, b, add);
}
template <int N, bool TransposedB = false>
LIMBECK_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {
  Wgmma<N>::template run<TransposedB>(d, a, b, add);
}

// Moves registers between warpgroups: the sum over all threads must stay within what the kernel was compiled for, else it hangs.
template <int Registers>
LIMBECK_DEVICE void setmaxnreg_inc() {
  LIMBECK_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
LIMBECK_DEVICE void setmaxnreg_dec() {
  LIMBECK_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// --- Named barriers: ids 1 to 15 (0 is __syncthreads), `threads` a multiple of 32 ----------------------------------------------------
LIMBECK_DEVICE void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
LIMBECK_DEVICE void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// One lane of a full warp.
LIMBECK_DEVICE bool elect_one() {
  uint32_t elected = 0;
  LIMBECK_SM90("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
}

// --- Clusters (sm_90) ----------------------------------------------------------------------------------------------------------------
LIMBECK_DEVICE uint32_t cluster_rank() {
  uint32_t r = 0;
  LIMBECK_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
LIMBECK_DEVICE uint32_t cluster_size() {
  uint32_t r = 1;
  LIMBECK_SM90("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
// All threads of the cluster; what was written before arriving is seen after waiting.
LIMBECK_DEVICE void cluster_arrive() { LIMBECK_SM90("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
LIMBECK_DEVICE void cluster_wait() { LIMBECK_SM90("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
LIMBECK_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The same where no block reads what another wrote, but for barriers after fence_mbarrier_init: without a fence of memory.
LIMBECK_DEVICE void cluster_sync_relaxed() { LIMBECK_SM90("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory"); }
// The address in block `rank` of what lies at `shared` in this one.
LIMBECK_DEVICE uint32_t mapa(const void* shared, uint32_t rank) {
  uint32_t address = 0;
  LIMBECK_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
}
// Without a scope: a release to the whole cluster would first wait until all that this thread ever wrote is seen by the whole GPU, and
// who arrives here has only read.
LIMBECK_DEVICE void mbarrier_arrive_cluster(uint32_t barrier) {
  LIMBECK_SM90("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
LIMBECK_DEVICE void store_cluster(uint32_t address, float x, float y, float z, float w) {
  LIMBECK_SM90("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

// --- Sums in global memory. Their order is not fixed: use only where it cannot matter ------------------------------------------------
LIMBECK_DEVICE void red_add(float* p, float x) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory"); }
LIMBECK_DEVICE void red_add(float* p, float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  red_add(p, x), red_add(p + 1, y);
#else
  asm volatile("red.global.add.v2.f32 [%0], {%1,%2};" ::"l"(p), "f"(x), "f"(y) : "memory");
#endif
}
LIMBECK_DEVICE void red_add(float* p, float x, float y, float z, float w) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  red_add(p, x, y), red_add(p + 2, z, w);
#else
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
#endif
}

// --- Kernels that follow each other (sm_90) ------------------------------------------------------------------------------------------
// Waits until the kernel before has ended; lets the next one start.
LIMBECK_DEVICE void grid_dependency_wait() { LIMBECK_SM90("griddepcontrol.wait;" ::: "memory"); }
LIMBECK_DEVICE void grid_dependency_launch() { LIMBECK_SM90("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace limbeck::cuda::ptx
#endif
