// The second body of ptx.cuh: the same names, which hand their operands to models of the instructions in this folder.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/float8.h"
#include "cuda/emulate/schedule.h"
#include "cuda/tensor_map.h"

namespace limbeck::cuda::emulate {

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row);
void stmatrix(void* row, const uint32_t* r, int matrices, bool transposed);

void cp_async(void* shared, const void* global, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int newest);

uint32_t shared_address(const void* p);
uint32_t map_to_block(uint32_t address, uint32_t rank);
void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_inval(uint64_t* barrier);
void mbarrier_arrive(uint32_t barrier, bool arrive, uint32_t bytes);  // bytes are announced first
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
enum class Fence { mbarrier_init, proxy_async, proxy_async_global };
void fence(Fence kind);

void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, uint32_t blocks, int rank, const int* at);
void tma_store(const TensorMap* map, const void* shared, bool add, int rank, const int* at);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void bulk_store(void* global, const void* shared, uint32_t bytes, bool add);
void bulk_copy_to_cluster(uint32_t to, const void* shared, uint32_t bytes, uint32_t barrier);
void bulk_commit();
void bulk_wait(int newest, bool read);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int newest);
void wgmma(int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool transposed_a, bool transposed_b, bool add);
void setmaxnreg(int registers);

bool elect_one();
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive();
void cluster_wait();
void store_cluster(uint32_t address, const float* values, int count);
void red_add(float* p, const float* values, int count);

}  // namespace limbeck::cuda::emulate

namespace limbeck::cuda::ptx {

inline float ex2(float x) { return std::exp2(x); }
inline float lg2(float x) { return std::log2(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float rcp(float x) { return 1.0f / x; }
inline int max(int a, int b, int c) { return std::max(std::max(a, b), c); }
inline uint32_t pack_float8(float low, float high) { return float8_from(low) | static_cast<uint32_t>(float8_from(high)) << 8; }
inline uint32_t shared_address(const void* p) { return emulate::shared_address(p); }

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { emulate::mma_m16n8k16(d, a, b0, b1); }
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulate::mma_m16n8k16(d, a, b[0], b[1]); }
template <int N>
void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  emulate::ldmatrix(r, N, false, row);
}
template <int N>
void ldmatrix_transposed(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  emulate::ldmatrix(r, N, true, row);
}
template <int N>
void stmatrix(void* row, const uint32_t (&r)[N]) {
  static_assert(N == 1 || N == 2 || N == 4);
  emulate::stmatrix(row, r, N, false);
}
template <int N>
void stmatrix_transposed(void* row, const uint32_t (&r)[N]) {
  static_assert(N == 1 || N == 2 || N == 4);
  emulate::stmatrix(row, r, N, true);
}

inline void cp_async_16(void* shared, const void* global, int bytes = 16) { emulate::cp_async(shared, global, 16, bytes); }
inline void cp_async_8(void* shared, const void* global, int bytes = 8) { emulate::cp_async(shared, global, 8, bytes); }
inline void cp_async_4(void* shared, const void* global, int bytes = 4) { emulate::cp_async(shared, global, 4, bytes); }
inline void cp_async_commit() { emulate::cp_async_commit(); }
template <int N>
void cp_async_wait() {
  emulate::cp_async_wait(N);
}

inline void mbarrier_init(uint64_t* barrier, int arrivals) { emulate::mbarrier_init(barrier, arrivals); }
inline void mbarrier_inval(uint64_t* barrier) { emulate::mbarrier_inval(barrier); }
inline void mbarrier_arrive(uint64_t* barrier) { emulate::mbarrier_arrive(emulate::shared_address(barrier), true, 0); }
inline void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  emulate::mbarrier_arrive(emulate::shared_address(barrier), false, bytes);
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  emulate::mbarrier_arrive(emulate::shared_address(barrier), true, bytes);
}
// Waits for ever instead of timing out: a phase that never ends is then a deadlock, which is reported.
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  emulate::mbarrier_wait(barrier, parity);
  return true;
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulate::mbarrier_wait(barrier, parity); }
inline void fence_mbarrier_init() { emulate::fence(emulate::Fence::mbarrier_init); }
inline void fence_proxy_async() { emulate::fence(emulate::Fence::proxy_async); }
inline void fence_proxy_async_global() { emulate::fence(emulate::Fence::proxy_async_global); }

inline void prefetch_tensor_map(const TensorMap*) {}
template <class... C>
void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, C... c) {
  const int at[] = {c...};
  emulate::tma_load(shared, map, barrier, 0, sizeof...(C), at);
}
template <class... C>
void tma_load_multicast(void* shared, const TensorMap* map, uint64_t* barrier, uint16_t blocks, C... c) {
  const int at[] = {c...};
  emulate::tma_load(shared, map, barrier, blocks, sizeof...(C), at);
}
template <class... C>
void tma_store(const TensorMap* map, const void* shared, C... c) {
  const int at[] = {c...};
  emulate::tma_store(map, shared, false, sizeof...(C), at);
}
template <class... C>
void tma_reduce_add(const TensorMap* map, const void* shared, C... c) {
  const int at[] = {c...};
  emulate::tma_store(map, shared, true, sizeof...(C), at);
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  emulate::bulk_load(shared, global, bytes, barrier);
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes) { emulate::bulk_store(global, shared, bytes, false); }
inline void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) { emulate::bulk_store(global, shared, bytes, true); }
inline void bulk_copy_to_cluster(uint32_t to, const void* shared, uint32_t bytes, uint32_t barrier) {
  emulate::bulk_copy_to_cluster(to, shared, bytes, barrier);
}
inline void bulk_commit() { emulate::bulk_commit(); }
template <int N>
void bulk_wait() {
  emulate::bulk_wait(N, false);
}
template <int N>
void bulk_wait_read() {
  emulate::bulk_wait(N, true);
}

inline void wgmma_fence() { emulate::wgmma_fence(); }
inline void wgmma_commit() { emulate::wgmma_commit(); }
template <int N>
void wgmma_wait() {
  emulate::wgmma_wait(N);
}
template <int N>
void wgmma_settle(float (&)[N]) {}
inline uint64_t wgmma_descriptor(uint32_t shared_address, int leading, int stride, Swizzle swizzle) {
  const uint64_t code = swizzle == Swizzle::none ? 0 : 4 - static_cast<int>(swizzle);
  return (static_cast<uint64_t>(shared_address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | code << 62;
}
inline uint64_t wgmma_descriptor(const void* shared, int leading, int stride, Swizzle swizzle) {
  return wgmma_descriptor(shared_address(shared), leading, stride, swizzle);
}
template <int N, bool TransposedA = false, bool TransposedB = false>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulate::wgmma(N, d, nullptr, a, b, TransposedA, TransposedB, add != 0);
}
template <int N, bool TransposedB = false>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulate::wgmma(N, d, a, 0, b, false, TransposedB, add != 0);
}
template <int Registers>
void setmaxnreg_inc() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
  emulate::setmaxnreg(Registers);
}
template <int Registers>
void setmaxnreg_dec() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
  emulate::setmaxnreg(Registers);
}

inline void bar_sync(int id, int threads) { emulate::barrier_sync("bar.sync", id, threads); }
inline void bar_arrive(int id, int threads) { emulate::barrier_arrive(id, threads); }
inline bool elect_one() { return emulate::elect_one(); }

inline uint32_t cluster_rank() { return emulate::cluster_rank(); }
inline uint32_t cluster_size() { return emulate::cluster_size(); }
inline void cluster_arrive() { emulate::cluster_arrive(); }
inline void cluster_wait() { emulate::cluster_wait(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
inline void cluster_sync_relaxed() { cluster_sync(); }
inline uint32_t mapa(const void* shared, uint32_t rank) { return emulate::map_to_block(emulate::shared_address(shared), rank); }
inline void mbarrier_arrive_cluster(uint32_t barrier) { emulate::mbarrier_arrive(barrier, true, 0); }
inline void store_cluster(uint32_t address, float x, float y, float z, float w) {
  const float values[] = {x, y, z, w};
  emulate::store_cluster(address, values, 4);
}

inline void red_add(float* p, float x) { emulate::red_add(p, &x, 1); }
inline void red_add(float* p, float x, float y) {
  const float values[] = {x, y};
  emulate::red_add(p, values, 2);
}
inline void red_add(float* p, float x, float y, float z, float w) {
  const float values[] = {x, y, z, w};
  emulate::red_add(p, values, 4);
}

inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

}  // namespace limbeck::cuda::ptx
