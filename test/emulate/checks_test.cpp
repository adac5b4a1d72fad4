// Each check fires on a kernel that a GPU might run for years before it goes wrong, and names where; the right kernel beside it passes.
#include "kernel.h"

using namespace check;

namespace {

constexpr int n = 64;
std::vector<float> in(n), out(n);

template <class... Arguments>
Caught run(const Grid& grid, void (*kernel)(Arguments...), std::type_identity_t<Arguments>... arguments) {
  for (int i = 0; i < n; ++i) in[static_cast<size_t>(i)] = static_cast<float>(i);
  return caught([&] { launch(call_of(in, out), grid, kernel, arguments...); });
}

// --- Bounds and alignment ------------------------------------------------------------------------------------------------------------

__global__ void copy_kernel(const float* from, float* to, int read_at, int write_at) {
  const int i = static_cast<int>(threadIdx.x);
  to[i + write_at] = from[i + read_at];
}
__global__ void shared_kernel(float* to, int read_at, int write_at) {
  Shared s;
  auto* a = s.take<float>(n);
  auto* b = s.take<float>(n);
  const int i = static_cast<int>(threadIdx.x);
  a[i + write_at] = 1;
  b[i] = 2;
  __syncthreads();
  to[i] = a[i + read_at] + b[i];
}
__global__ void vector_kernel(const float* from, float* to, int at) {
  const float4& v = *reinterpret_cast<const float4*>(from + at);
  to[0] = v.x + v.w;
}
__global__ void registers_kernel(float* to, int at) {
  float r[4] = {1, 2, 3, 4};
  r[at] = 5;
  for (int i = 0; i < 4; ++i) to[i] = r[i];
}
__global__ void too_much_shared_kernel(float* to) {
  Shared s;
  auto* a = s.take<float>(n);
  a[threadIdx.x] = 1;
  to[threadIdx.x] = a[threadIdx.x];
}

}  // namespace

TEST(out_of_bounds_in_global_memory) {
  CHECK_FINE(run(Grid{1, n}, copy_kernel, in.data(), out.data(), 0, 0));
  CHECK_CAUGHT(run(Grid{1, n}, copy_kernel, in.data(), out.data(), 1, 0), "ERR_EMULATED_BOUNDS", "0 bytes past the end of input 0 (256 bytes)");
  CHECK_CAUGHT(run(Grid{1, n}, copy_kernel, in.data(), out.data(), -1, 0), "ERR_EMULATED_BOUNDS", "4 bytes before the start of input 0");
  const Caught c = run(Grid{1, n}, copy_kernel, in.data(), out.data(), 0, 2);
  CHECK_CAUGHT(c, "ERR_EMULATED_BOUNDS", "writes 4 bytes at 0 bytes past the end of input 1");
  CHECK_CAUGHT(c, "ERR_EMULATED_BOUNDS", "block (0,0,0), thread (62,0,0) of <<<(1,1,1), (64,1,1)>>>");
}

TEST(out_of_bounds_in_shared_memory) {
  CHECK_FINE(run(Grid{1, n, 512}, shared_kernel, out.data(), 0, 0));
  CHECK_CAUGHT(run(Grid{1, n, 512}, shared_kernel, out.data(), 0, 1), "ERR_EMULATED_BOUNDS", "0 bytes past the end of shared array 0 (256 bytes)");
  CHECK_CAUGHT(run(Grid{1, n, 512}, shared_kernel, out.data(), 1, 0), "ERR_EMULATED_BOUNDS", "reads");
  CHECK_CAUGHT(run(Grid{1, n, 255}, too_much_shared_kernel, out.data()), "ERR_EMULATED_SHARED", "takes 256 bytes of shared memory, and was launched with 255");
}

TEST(unaligned_vectors_and_arrays_of_registers) {
  CHECK_FINE(run(Grid{1, 1}, vector_kernel, in.data(), out.data(), 4));
  CHECK_CAUGHT(run(Grid{1, 1}, vector_kernel, in.data(), out.data(), 2), "ERR_EMULATED_ALIGNMENT", "byte 8 of input 0");
  CHECK_FINE(run(Grid{1, 1}, registers_kernel, out.data(), 3));
  CHECK_CAUGHT(run(Grid{1, 1}, registers_kernel, out.data(), 4), "ERR_EMULATED_BOUNDS", "element 4");
}

// --- Shared memory that nobody wrote, and races --------------------------------------------------------------------------------------

namespace {

__global__ void unwritten_kernel(float* to, int written) {
  Shared s;
  auto* a = s.take<float>(n);
  const int i = static_cast<int>(threadIdx.x);
  if (i < written) a[i] = 1;
  __syncthreads();
  to[i] = a[n - 1 - i];
}

// Reverses through shared memory, twice; each barrier can be left out.
__global__ void reverse_kernel(const float* from, float* to, bool first, bool second, bool third) {
  Shared s;
  auto* a = s.take<float>(n);
  const int i = static_cast<int>(threadIdx.x);
  a[i] = from[i];
  if (first) __syncthreads();
  const float x = a[n - 1 - i];
  if (second) __syncthreads();
  a[i] = 2 * x;
  if (third) __syncthreads();
  to[i] = a[n - 1 - i];
}

__global__ void warp_kernel(float* to, bool together) {
  Shared s;
  auto* a = s.take<float>(32);
  const int i = static_cast<int>(threadIdx.x);
  a[i] = static_cast<float>(i);
  if (together) __syncwarp();
  to[i] = a[31 - i];
}

// Everyone reads a[0]; then its own thread or another one changes it.
__global__ void broadcast_kernel(float* to, int writer, bool barrier) {
  Shared s;
  auto* a = s.take<float>(1);
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) a[0] = 1;
  __syncthreads();
  to[i] = a[0];
  if (barrier) __syncthreads();
  if (i == writer) a[0] = 2;
}

__global__ void global_race_kernel(float* to, bool barrier) {
  const int i = static_cast<int>(threadIdx.x);
  to[i] = 1;
  if (barrier) __syncthreads();
  to[(i + 1) % n] += 1;
}
__global__ void blocks_kernel(float* to, int step) { to[static_cast<int>(blockIdx.x) * step + static_cast<int>(threadIdx.x)] = 1; }
__global__ void neighbours_kernel(const float* from, float* to, bool same) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  to[i] = same ? to[(i + 1) % n] : from[i];
}
// The last block sums what all have written.
__global__ void last_block_kernel(const float* from, float* parts, int* counter, bool atomically) {
  Shared s;
  auto* last = s.take<int>(1);
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) {
    parts[1 + blockIdx.x] = from[blockIdx.x];
    __threadfence();
    *last = atomically ? atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1 : blockIdx.x == gridDim.x - 1;
  }
  __syncthreads();
  if (*last && i == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[1 + b];
    parts[0] = sum;
  }
}

}  // namespace

TEST(shared_memory_that_nobody_wrote) {
  CHECK_FINE(run(Grid{1, n, 256}, unwritten_kernel, out.data(), n));
  CHECK_CAUGHT(run(Grid{1, n, 256}, unwritten_kernel, out.data(), n - 1), "ERR_EMULATED_UNWRITTEN", "byte 252 of shared array 0");
}

TEST(races_in_shared_memory) {
  CHECK_FINE(run(Grid{1, n, 256}, reverse_kernel, in.data(), out.data(), true, true, true));
  CHECK_CAUGHT(run(Grid{1, n, 256}, reverse_kernel, in.data(), out.data(), false, true, true), "ERR_EMULATED_UNWRITTEN");
  CHECK_CAUGHT(run(Grid{1, n, 256}, reverse_kernel, in.data(), out.data(), true, false, true), "ERR_EMULATED_RACE", "no barrier between");
  CHECK_CAUGHT(run(Grid{1, n, 256}, reverse_kernel, in.data(), out.data(), true, true, false), "ERR_EMULATED_RACE", "no barrier between");
  CHECK_FINE(run(Grid{1, 32, 128}, warp_kernel, out.data(), true));
  CHECK(!run(Grid{1, 32, 128}, warp_kernel, out.data(), false).code.empty());
  for (const int writer : {0, 1, 40, n - 1}) {
    CHECK_FINE(run(Grid{1, n, 4}, broadcast_kernel, out.data(), writer, true));
    CHECK_CAUGHT(run(Grid{1, n, 4}, broadcast_kernel, out.data(), writer, false), "ERR_EMULATED_RACE");
  }
}

TEST(races_in_global_memory) {
  CHECK_FINE(run(Grid{1, n}, global_race_kernel, out.data(), true));
  CHECK_CAUGHT(run(Grid{1, n}, global_race_kernel, out.data(), false), "ERR_EMULATED_RACE", "input 1");
  CHECK_FINE(run(Grid{2, 32}, blocks_kernel, out.data(), 32));
  CHECK_CAUGHT(run(Grid{2, 32}, blocks_kernel, out.data(), 31), "ERR_EMULATED_RACE", "which another block wrote");
  CHECK_FINE(run(Grid{2, 32}, neighbours_kernel, in.data(), out.data(), false));
  CHECK_CAUGHT(run(Grid{2, 32}, neighbours_kernel, in.data(), out.data(), true), "ERR_EMULATED_RACE");
  std::vector<int> counter(1);
  const auto sum = [&](bool atomically) {
    counter[0] = 0;
    return caught([&] { launch(call_of(in, out, counter), Grid{5, 32, 4}, last_block_kernel, in.data(), out.data(), counter.data(), atomically); });
  };
  CHECK_FINE(sum(true));
  CHECK(out[0] == 10);
  CHECK_CAUGHT(sum(false), "ERR_EMULATED_RACE", "another block");
}

// --- Barriers and collectives --------------------------------------------------------------------------------------------------------

namespace {

__global__ void some_threads_kernel(int threads) {
  if (static_cast<int>(threadIdx.x) < threads) __syncthreads();
}
__global__ void crossed_kernel() {
  if (threadIdx.x < 32) ptx::bar_sync(1, 64), ptx::bar_sync(2, 64);
  else ptx::bar_sync(2, 64), ptx::bar_sync(1, 64);
}
__global__ void divergent_kernel(float* to, int which) {
  const int i = static_cast<int>(threadIdx.x);
  float x = 1;
  if (which == 0) x = __shfl_xor_sync(~0u, x, 1);
  if (which == 1 && i % 2) x = __shfl_xor_sync(~0u, x, 1);
  if (which == 2) x = i < 16 ? __shfl_xor_sync(~0u, x, 1) : static_cast<float>(__ballot_sync(~0u, 1));
  if (which == 3) x = __shfl_sync(i < 16 ? 0xffffu : 0xffff0000u, x, 20);
  if (which == 4) x = __shfl_xor_sync(0xfffeu, x, 1);
  if (which == 5 && i < 16) x = __shfl_xor_sync(0xffffu, x, 1);
  to[i] = x;
}
__global__ void parity_kernel(int parity) {
  Shared s;
  auto* barrier = s.take<uint64_t>(1);
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 32), ptx::fence_mbarrier_init();
  __syncthreads();
  ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_wait(barrier, static_cast<uint32_t>(parity));
  ptx::mbarrier_wait(barrier, static_cast<uint32_t>(parity) ^ 1);
}

}  // namespace

TEST(a_barrier_that_some_threads_never_reach) {
  CHECK_FINE(run(Grid{1, n}, some_threads_kernel, n));
  const Caught c = run(Grid{1, n}, some_threads_kernel, 40);
  CHECK_CAUGHT(c, "ERR_EMULATED_DEADLOCK", "threads 0 to 39 wait in __syncthreads (barrier 0, 40 of 64 came)");
  CHECK_CAUGHT(c, "ERR_EMULATED_DEADLOCK", "threads 40 to 63 have ended");
  CHECK_CAUGHT(run(Grid{1, n}, crossed_kernel), "ERR_EMULATED_DEADLOCK", "threads 0 to 31 wait in bar.sync (barrier 1, 32 of 64 came)");
  CHECK_CAUGHT(run(Grid{1, 32, 8}, parity_kernel, 0), "ERR_EMULATED_DEADLOCK", "mbarrier_wait for byte 0 of shared array 0 (8 bytes) (phase 1: 32 of 32 arrivals");
}

TEST(divergent_collectives) {
  CHECK_FINE(run(Grid{1, 32}, divergent_kernel, out.data(), 0));
  CHECK_CAUGHT(run(Grid{1, 32}, divergent_kernel, out.data(), 1), "ERR_EMULATED_");
  CHECK_CAUGHT(run(Grid{1, 32}, divergent_kernel, out.data(), 2), "ERR_EMULATED_DIVERGENCE", "__ballot_sync with mask ffffffff, while lane 0 of its warp waits for it in __shfl_xor_sync");
  CHECK_CAUGHT(run(Grid{1, 32}, divergent_kernel, out.data(), 3), "ERR_EMULATED_DIVERGENCE", "gives lane 0 the value of lane 20");
  CHECK_CAUGHT(run(Grid{1, 32}, divergent_kernel, out.data(), 4), "ERR_EMULATED_DIVERGENCE", "does not have its own lane 0");
  CHECK_FINE(run(Grid{1, 32}, divergent_kernel, out.data(), 5));
}

// --- Asynchronous work ---------------------------------------------------------------------------------------------------------------

namespace {

__global__ void cp_async_kernel(const float* from, float* to, int wait, bool barrier) {
  Shared s;
  auto* a = s.take<float>(128);
  const int i = static_cast<int>(threadIdx.x);
  if (i < 16) ptx::cp_async_16(a + 4 * i, from + 4 * i);
  ptx::cp_async_commit();
  if (i < 16) ptx::cp_async_16(a + 64 + 4 * i, from + 4 * i);
  ptx::cp_async_commit();
  if (wait == 1) ptx::cp_async_wait<1>();
  if (wait == 0) ptx::cp_async_wait<0>();
  if (barrier) __syncthreads();
  to[i] = a[(i + 32) % 64];
  ptx::cp_async_wait<0>();
}
__global__ void forgotten_kernel(const float* from) {
  Shared s;
  auto* a = s.take<float>(128);
  ptx::cp_async_16(a + 4 * threadIdx.x, from);
  ptx::cp_async_commit();
}

struct Steps {
  bool fence_init = true, expect = true, wait = true, fence_writes = true, commit = true, wait_store = true, early = false;
};
// Loads a tile, doubles it, stores it.
__global__ void tma_kernel(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, Steps steps) {
  Shared s;
  auto* tile = s.take<float>(n, 128);
  auto* barrier = s.take<uint64_t>(1);
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) {
    ptx::mbarrier_init(barrier, 1);
    if (steps.fence_init) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (steps.early) tile[2 * i] = 0;
  if (i == 0) {
    if (steps.expect) ptx::mbarrier_arrive_expect_tx(barrier, n * 4);
    else ptx::mbarrier_arrive(barrier);
    ptx::tma_load(tile, &from, barrier, 0, 0);
  }
  if (steps.wait) ptx::mbarrier_wait(barrier, 0);
  tile[2 * i] *= 2, tile[2 * i + 1] *= 2;
  if (steps.fence_writes) ptx::fence_proxy_async();
  __syncthreads();
  if (i == 0) {
    ptx::tma_store(&to, tile, 0, 0);
    if (steps.commit) ptx::bulk_commit();
    if (steps.wait_store) ptx::bulk_wait<0>();
  }
}
Caught tma(Steps steps) {
  const int64_t dims[] = {32, 2}, strides[] = {128};
  const int box[] = {32, 2};
  const TensorMap from = tensor_map(in.data(), DType::f32, 2, dims, strides, box, Swizzle::none);
  const TensorMap to = tensor_map(out.data(), DType::f32, 2, dims, strides, box, Swizzle::none);
  return run(Grid{1, 32, 512}, tma_kernel, from, to, steps);
}

// Reuses the tile of a store before it was read.
__global__ void reuse_kernel(float* to, bool wait) {
  Shared s;
  auto* tile = s.take<float>(n);
  const int i = static_cast<int>(threadIdx.x);
  for (int k = 0; k < 2; ++k) {
    tile[i] = static_cast<float>(k);
    ptx::fence_proxy_async();
    __syncthreads();
    if (i == 0) {
      ptx::bulk_store(to + 32 * k, tile, 128);
      ptx::bulk_commit();
      if (wait || k == 1) ptx::bulk_wait_read<0>();
    }
    __syncthreads();
  }
}

struct Product {
  bool fence_writes = true, fence = true, commit = true, wait = true, overwrite = false, two = false;
};
__global__ void wgmma_kernel(float* to, Product steps) {
  Shared s;
  auto* a = s.take<bf16>(64 * 64, 1024);
  auto* b = s.take<bf16>(64 * 64, 1024);
  const int i = static_cast<int>(threadIdx.x);
  for (int j = i; j < 64 * 64; j += 128) a[j] = b[j] = to_bf16(1);
  if (steps.fence_writes) ptx::fence_proxy_async();
  __syncthreads();
  float d[32] = {};
  if (steps.fence) ptx::wgmma_fence();
  const int products = steps.two && i >= 96 ? 2 : 1;
  for (int k = 0; k < products; ++k)
    ptx::wgmma<64>(d, ptx::wgmma_descriptor(a, 16, 1024, Swizzle::b128), ptx::wgmma_descriptor(b, 16, 1024, Swizzle::b128), 0);
  if (steps.commit) ptx::wgmma_commit();
  if (steps.overwrite) {
    if (i == 0) b[0] = to_bf16(2);
  }
  if (steps.wait) ptx::wgmma_wait<0>();
  if (i < n) to[i] = d[0];
}

}  // namespace

TEST(copies_of_sm_80_that_nobody_waited_for) {
  CHECK_FINE(run(Grid{1, n, 512}, cp_async_kernel, in.data(), out.data(), 1, true));
  CHECK_FINE(run(Grid{1, n, 512}, cp_async_kernel, in.data(), out.data(), 0, true));
  CHECK_CAUGHT(run(Grid{1, n, 512}, cp_async_kernel, in.data(), out.data(), 2, true), "ERR_EMULATED_RACE", "an asynchronous copy that nobody has waited for has yet to land");
  CHECK_CAUGHT(run(Grid{1, n, 512}, cp_async_kernel, in.data(), out.data(), 0, false), "ERR_EMULATED_");
  CHECK_CAUGHT(run(Grid{1, 32, 512}, forgotten_kernel, in.data()), "ERR_EMULATED_WAIT", "cp.async");
}

TEST(tma_with_a_step_left_out) {
  CHECK_FINE(tma({}));
  for (size_t i = 0; i < n; ++i) CHECK(out[i] == 2 * in[i], "element %zu", i);
  CHECK_CAUGHT(tma({.fence_init = false}), "ERR_EMULATED_PROXY", "without a fence_mbarrier_init");
  CHECK_CAUGHT(tma({.expect = false}), "ERR_EMULATED_");
  CHECK_CAUGHT(tma({.wait = false}), "ERR_EMULATED_");  // by the thread that comes first: not yet issued, or not landed
  CHECK_CAUGHT(tma({.fence_writes = false}), "ERR_EMULATED_PROXY", "without a fence_proxy_async");
  CHECK_CAUGHT(tma({.commit = false}), "ERR_EMULATED_WAIT", "not committed");
  CHECK_CAUGHT(tma({.wait_store = false}), "ERR_EMULATED_WAIT", "have read shared memory");
  CHECK_CAUGHT(tma({.early = true}), "ERR_EMULATED_");
  CHECK_FINE(run(Grid{1, 32, 256}, reuse_kernel, out.data(), true));
  CHECK_CAUGHT(run(Grid{1, 32, 256}, reuse_kernel, out.data(), false), "ERR_EMULATED_RACE", "a bulk store read");
}

TEST(wgmma_with_a_step_left_out) {
  const Grid grid{1, 128, 16384};
  CHECK_FINE(run(grid, wgmma_kernel, out.data(), Product{}));
  CHECK(out[0] == 16);
  CHECK_CAUGHT(run(grid, wgmma_kernel, out.data(), Product{.fence_writes = false}), "ERR_EMULATED_PROXY");
  CHECK_CAUGHT(run(grid, wgmma_kernel, out.data(), Product{.fence = false}), "ERR_EMULATED_WGMMA", "without a wgmma_fence");
  CHECK_CAUGHT(run(grid, wgmma_kernel, out.data(), Product{.commit = false}), "ERR_EMULATED_WAIT", "wgmma");
  CHECK_CAUGHT(run(grid, wgmma_kernel, out.data(), Product{.wait = false}), "ERR_EMULATED_WAIT", "wgmma");
  CHECK_CAUGHT(run(grid, wgmma_kernel, out.data(), Product{.overwrite = true}), "ERR_EMULATED_RACE", "a wgmma that nobody has waited for");
  CHECK_CAUGHT(run(grid, wgmma_kernel, out.data(), Product{.two = true}), "ERR_EMULATED_DIVERGENCE", "issued");
}

TEST(tensor_maps_that_hardware_refuses) {
  const int64_t dims[] = {64, 8}, strides[] = {128}, odd[] = {120};
  const int box[] = {64, 8}, wide[] = {64, 300}, narrow[] = {4, 8};
  const auto refused = [&](const void* data, const int64_t* steps, const int* b, Swizzle s) {
    return caught([&] { tensor_map(data, DType::bf16, 2, dims, steps, b, s); });
  };
  alignas(16) static bf16 data[64 * 8 + 1];
  CHECK_FINE(refused(data, strides, box, Swizzle::b128));
  CHECK_CAUGHT(refused(data + 1, strides, box, Swizzle::b128), "ERR_TENSOR_MAP", "aligned");
  CHECK_CAUGHT(refused(data, odd, box, Swizzle::b128), "ERR_TENSOR_MAP", "stride");
  CHECK_CAUGHT(refused(data, strides, wide, Swizzle::b128), "ERR_TENSOR_MAP", "300");
  CHECK_CAUGHT(refused(data, strides, narrow, Swizzle::b128), "ERR_TENSOR_MAP", "multiple of 16");
  CHECK_CAUGHT(refused(data, strides, box, Swizzle::b64), "ERR_TENSOR_MAP", "spans 64");
}
