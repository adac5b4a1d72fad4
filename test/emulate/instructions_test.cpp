// Each instruction alone, against its definition: where every lane's elements lie, where every byte goes.
#include "kernel.h"

using namespace check;

namespace {

__global__ void shuffle_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* row = out + lane * 12;
  row[0] = __shfl_sync(~0u, lane, 5);
  row[1] = __shfl_up_sync(~0u, lane, 3);
  row[2] = __shfl_down_sync(~0u, lane, 3);
  row[3] = __shfl_xor_sync(~0u, lane, 9);
  row[4] = __shfl_sync(~0u, lane, 3, 8);
  row[5] = __shfl_down_sync(~0u, lane, 3, 8);
  row[6] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
  row[7] = __reduce_add_sync(~0u, lane);
  row[8] = __reduce_max_sync(~0u, lane % 2 ? -lane : lane - 40);
  row[9] = static_cast<int>(__match_any_sync(~0u, lane / 10));
  const double wide = __shfl_xor_sync(~0u, 1e10 + lane, 1);
  row[10] = wide == 1e10 + (lane ^ 1);
  row[11] = __any_sync(~0u, lane == 7) * 2 + __all_sync(~0u, lane == 7);
}

}  // namespace

TEST(shuffles_votes_and_reductions) {
  std::vector<int> out(32 * 12);
  launch(call_of(out), Grid{1, 32}, shuffle_kernel, out.data());
  uint32_t thirds = 0;
  for (int l = 0; l < 32; l += 3) thirds |= 1u << l;
  for (int l = 0; l < 32; ++l) {
    const int* row = &out[static_cast<size_t>(l) * 12];
    uint32_t same = 0;
    for (int m = 0; m < 32; ++m) same |= (m / 10 == l / 10 ? 1u : 0u) << m;
    CHECK(row[0] == 5 && row[1] == (l < 3 ? l : l - 3) && row[2] == (l > 28 ? l : l + 3) && row[3] == (l ^ 9), "lane %d", l);
    CHECK(row[4] == l / 8 * 8 + 3 && row[5] == (l % 8 + 3 < 8 ? l + 3 : l), "lane %d", l);
    CHECK(static_cast<uint32_t>(row[6]) == thirds && row[7] == 496 && row[8] == -1, "lane %d: %d", l, row[8]);
    CHECK(static_cast<uint32_t>(row[9]) == same && row[10] == 1 && row[11] == 2, "lane %d", l);
  }
}

namespace {

__global__ void difference_kernel(uint32_t* out) {
  const uint32_t lane = threadIdx.x;
  // Signed bytes as 4-bit and 8-bit weights make them; and 1 - 2^-9, which rounds to 1.
  out[lane] = subtract_bf16(0x43004300u | lane | (127u - lane) << 16, 0x43004380u);
  out[32 + lane] = subtract_bf16(0x3f803f80u, 0x3b000000u);
}

}  // namespace

TEST(differences_of_pairs) {
  std::vector<uint32_t> out(64);
  launch(call_of(out), Grid{1, 32}, difference_kernel, out.data());
  for (int l = 0; l < 32; ++l) {
    const uint32_t pair = out[static_cast<size_t>(l)];
    CHECK(low_float(pair) == static_cast<float>(l - 128) && high_float(pair) == static_cast<float>(127 - l), "lane %d", l);
    CHECK(out[static_cast<size_t>(32 + l)] == 0x3f803f80u, "lane %d", l);
  }
}

namespace {

__global__ void block_kernel(int* out) {
  const int i = static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x), n = static_cast<int>(blockDim.x * blockDim.y);
  Shared s;
  int* a = s.take<int>(static_cast<size_t>(n));
  a[i] = i;
  __syncthreads();
  int* row = out + (static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x) * n + i) * 4;
  row[0] = a[n - 1 - i];
  row[1] = __syncthreads_count(i % 5 == 0);
  row[2] = __syncthreads_and(i >= 0) * 2 + __syncthreads_or(i == 3);
  row[3] = static_cast<int>(blockIdx.y * 100 + blockIdx.x * 10 + threadIdx.y);
}

}  // namespace

TEST(a_grid_of_blocks_that_share_memory) {
  constexpr int n = 6 * 7, blocks = 3 * 2;
  std::vector<int> out(n * blocks * 4);
  launch(call_of(out), Grid{dim3(3, 2), dim3(6, 7), n * 4}, block_kernel, out.data());
  for (int b = 0; b < blocks; ++b)
    for (int i = 0; i < n; ++i) {
      const int* row = &out[static_cast<size_t>(b * n + i) * 4];
      CHECK(row[0] == n - 1 - i && row[1] == 9 && row[2] == 3 && row[3] == b / 3 * 100 + b % 3 * 10 + i / 6, "block %d thread %d: %d %d %d %d", b, i,
            row[0], row[1], row[2], row[3]);
    }
}

namespace {

__global__ void mma_kernel(const bf16* a, const bf16* b, const float* c, float* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto pair = [](const bf16* p, int next) { return static_cast<uint32_t>(p[0].bits) | static_cast<uint32_t>(p[next].bits) << 16; };
  // a [16 16] and b [16 8] row-major
  const uint32_t fa[4] = {pair(a + g * 16 + 2 * t, 1), pair(a + (g + 8) * 16 + 2 * t, 1), pair(a + g * 16 + 2 * t + 8, 1),
                          pair(a + (g + 8) * 16 + 2 * t + 8, 1)};
  const uint32_t fb[2] = {pair(b + 2 * t * 8 + g, 8), pair(b + (2 * t + 8) * 8 + g, 8)};
  float f[4];
  for (int i = 0; i < 4; ++i) f[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  ptx::mma_m16n8k16(f, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = f[i];
}

}  // namespace

TEST(mma_is_a_product) {
  std::vector<bf16> a(256), b(128);
  std::vector<float> c(128), d(128);
  for (uint32_t i = 0; i < 256; ++i) a[i] = to_bf16(number(i));
  for (uint32_t i = 0; i < 128; ++i) b[i] = to_bf16(number(i + 1000)), c[i] = number(i + 2000);
  launch(call_of(a, b, c, d), Grid{1, 32}, mma_kernel, a.data(), b.data(), c.data(), d.data());
  for (size_t m = 0; m < 16; ++m)
    for (size_t n = 0; n < 8; ++n) {
      float sum = c[m * 8 + n];
      for (size_t k = 0; k < 16; ++k) sum += to_float(a[m * 16 + k]) * to_float(b[k * 8 + n]);
      CHECK(d[m * 8 + n] == sum, "at %zu %zu: %g, not %g", m, n, static_cast<double>(d[m * 8 + n]), static_cast<double>(sum));
    }
}

namespace {

// Four 8x8 matrices, one below the other: 32 rows of 8 elements.
__global__ void matrices_kernel(const uint16_t* in, uint32_t* out, uint16_t* stored) {
  const int lane = static_cast<int>(threadIdx.x);
  Shared s;
  auto* m = s.take<uint16_t>(32 * 8);
  auto* to = s.take<uint16_t>(2 * 32 * 8);
  for (int i = lane; i < 256; i += 32) m[i] = in[i];
  __syncwarp();
  uint32_t four[4], two[2], one[1];
  ptx::ldmatrix(four, m + lane * 8);
  for (int i = 0; i < 4; ++i) out[lane * 14 + i] = four[i];
  ptx::stmatrix(to + lane * 8, four);
  ptx::ldmatrix_transposed(four, m + lane * 8);
  for (int i = 0; i < 4; ++i) out[lane * 14 + 4 + i] = four[i];
  ptx::stmatrix_transposed(to + 256 + lane * 8, four);
  ptx::ldmatrix(two, m + (lane % 16) * 8);
  out[lane * 14 + 8] = two[0], out[lane * 14 + 9] = two[1];
  ptx::ldmatrix_transposed(two, m + (lane % 16) * 8);
  out[lane * 14 + 10] = two[0], out[lane * 14 + 11] = two[1];
  ptx::ldmatrix(one, m + (lane % 8) * 8);
  out[lane * 14 + 12] = one[0];
  ptx::ldmatrix_transposed(one, m + (lane % 8) * 8);
  out[lane * 14 + 13] = one[0];
  __syncwarp();
  for (int i = lane; i < 512; i += 32) stored[i] = to[i];
}

}  // namespace

TEST(ldmatrix_and_stmatrix_place_every_element) {
  std::vector<uint16_t> in(256), stored(512);
  std::vector<uint32_t> out(32 * 14);
  for (uint16_t i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i + 1000);
  launch(call_of(in, out, stored), Grid{1, 32, 3 * 512}, matrices_kernel, in.data(), out.data(), stored.data());
  const auto element = [&](size_t matrix, size_t row, size_t column) { return static_cast<uint32_t>(in[matrix * 64 + row * 8 + column]); };
  const auto straight = [&](size_t i, size_t l) { return element(i, l / 4, 2 * (l % 4)) | element(i, l / 4, 2 * (l % 4) + 1) << 16; };
  const auto transposed = [&](size_t i, size_t l) { return element(i, 2 * (l % 4), l / 4) | element(i, 2 * (l % 4) + 1, l / 4) << 16; };
  for (size_t l = 0; l < 32; ++l) {
    const uint32_t* row = &out[l * 14];
    for (size_t i = 0; i < 4; ++i) CHECK(row[i] == straight(i, l) && row[4 + i] == transposed(i, l), "lane %zu matrix %zu", l, i);
    for (size_t i = 0; i < 2; ++i) CHECK(row[8 + i] == straight(i, l) && row[10 + i] == transposed(i, l), "lane %zu matrix %zu", l, i);
    CHECK(row[12] == straight(0, l) && row[13] == transposed(0, l), "lane %zu", l);
  }
  for (size_t i = 0; i < 256; ++i) CHECK(stored[i] == in[i] && stored[256 + i] == in[i], "element %zu", i);
}

namespace {

__global__ void cp_async_kernel(const float* in, float* out) {
  const int i = static_cast<int>(threadIdx.x);
  Shared s;
  auto* a = s.take<float>(32 * 4);
  auto* b = s.take<float>(32 * 4);
  auto* c = s.take<float>(32);
  ptx::cp_async_16(a + 4 * i, in + 4 * i);
  ptx::cp_async_commit();
  ptx::cp_async_16(b + 4 * i, in + 4 * i, i % 5 * 4);
  ptx::cp_async_4(c + i, in + i);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  for (int j = 0; j < 4; ++j) out[4 * i + j] = a[(4 * i + j + 64) % 128];
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int j = 0; j < 4; ++j) out[128 + 4 * i + j] = b[(4 * i + j + 64) % 128];
  out[256 + i] = c[31 - i];
}

}  // namespace

TEST(cp_async_by_groups_and_with_zeros) {
  std::vector<float> in(128), out(288);
  for (size_t i = 0; i < 128; ++i) in[i] = static_cast<float>(i + 1);
  launch(call_of(in, out), Grid{1, 32, 2 * 512 + 128}, cp_async_kernel, in.data(), out.data());
  for (size_t i = 0; i < 128; ++i) {
    const size_t j = (i + 64) % 128;
    CHECK(out[i] == in[j], "element %zu", i);
    CHECK(out[128 + i] == (j % 4 < j / 4 % 5 ? in[j] : 0), "element %zu is %g", i, static_cast<double>(out[128 + i]));
  }
  for (size_t i = 0; i < 32; ++i) CHECK(out[256 + i] == in[31 - i], "element %zu", i);
}

namespace {

// A producer warp and a consumer warp hand over two stages through full and empty barriers.
__global__ void pipeline_kernel(const int* in, int* out, int steps) {
  Shared s;
  auto* stage = s.take<int>(2 * 32);
  auto* full = s.take<uint64_t>(2);
  auto* empty = s.take<uint64_t>(2);
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(full + i, 32), ptx::mbarrier_init(empty + i, 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int k = 0; k < steps; ++k) {
    const int i = k % 2;
    const auto parity = static_cast<uint32_t>(k / 2 % 2);
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(empty + i, parity ^ 1);
      stage[i * 32 + lane] = in[k * 32 + lane];
      ptx::mbarrier_arrive(full + i);
    } else {
      ptx::mbarrier_wait(full + i, parity);
      out[k * 32 + lane] = stage[i * 32 + 31 - lane];
      ptx::mbarrier_arrive(empty + i);
    }
  }
}

}  // namespace

TEST(mbarrier_phases_order_a_pipeline) {
  constexpr int steps = 7;
  std::vector<int> in(steps * 32), out(steps * 32);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i);
  launch(call_of(in, out), Grid{1, 64, 256 + 32}, pipeline_kernel, in.data(), out.data(), steps);
  for (size_t i = 0; i < in.size(); ++i) CHECK(out[i] == static_cast<int>(i / 32 * 32 + 31 - i % 32), "element %zu", i);
}

namespace {

__global__ void named_barriers_kernel(int* out) {
  Shared s;
  auto* a = s.take<int>(64);
  const int i = static_cast<int>(threadIdx.x);
  // The first two warps meet at 1; the third hears of them at 2 without keeping them waiting.
  if (i < 64) {
    a[i] = i;
    ptx::bar_sync(1, 64);
    out[i] = a[63 - i];
    ptx::bar_arrive(2, 96);
  } else {
    ptx::bar_sync(2, 96);
    out[i] = a[i - 64] + a[i - 32];
  }
}

}  // namespace

TEST(named_barriers_of_some_threads) {
  std::vector<int> out(96);
  launch(call_of(out), Grid{1, 96, 256}, named_barriers_kernel, out.data());
  for (int i = 0; i < 96; ++i) CHECK(out[static_cast<size_t>(i)] == (i < 64 ? 63 - i : 2 * (i - 64) + 32), "thread %d", i);
}

namespace {

constexpr int kRows = 20, kColumns = 72;  // of the tensor; boxes stand over both ends

// Loads a box of 32 columns, 16 rows, and writes shared memory out as it lies.
__global__ void tma_load_kernel(const __grid_constant__ TensorMap map, uint16_t* out, int column, int row) {
  Shared s;
  auto* box = s.take<uint16_t>(16 * 64, 1024);
  auto* barrier = s.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 16 * 64 * 2);
    ptx::tma_load(box, &map, barrier, column, row);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * 64; i += 32) out[i] = box[i];
}

__global__ void tma_store_kernel(const __grid_constant__ TensorMap map, const float* in, int column, int row, bool add) {
  Shared s;
  auto* box = s.take<float>(8 * 32, 1024);
  for (int i = static_cast<int>(threadIdx.x); i < 8 * 32; i += 32) {
    // Rows of 128 bytes, chunks permuted as the map says.
    const int r = i / 32, c = i % 32;
    box[r * 32 + ((c / 4) ^ r % 8) * 4 + c % 4] = in[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (add) ptx::tma_reduce_add(&map, box, column, row);
    else ptx::tma_store(&map, box, column, row);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

}  // namespace

TEST(tma_loads_boxes_with_swizzles_and_zeros_outside) {
  std::vector<uint16_t> in(kRows * kColumns), out(16 * 64);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i + 1);
  const int64_t dims[] = {kColumns, kRows}, strides[] = {kColumns * 2};
  for (const Swizzle swizzle : {Swizzle::none, Swizzle::b128}) {
    const int box[] = {64, 16};
    const TensorMap map = tensor_map(in.data(), DType::bf16, 2, dims, strides, box, swizzle);
    for (const auto& [column, row] : {std::pair{0, 0}, {8, 4}, {16, 10}, {-8, -3}, {64, 19}, {-70, 0}}) {
      launch(call_of(in, out), Grid{1, 32, 16 * 128 + 1024 + 8}, tma_load_kernel, map, out.data(), column, row);
      for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 64; ++c) {
          const int at = r * 64 + (swizzle == Swizzle::none ? c : ((c / 8) ^ r % 8) * 8 + c % 8), y = row + r, x = column + c;
          const bool inside = y >= 0 && y < kRows && x >= 0 && x < kColumns;
          const int expected = inside ? y * kColumns + x + 1 : 0;
          CHECK(out[static_cast<size_t>(at)] == expected, "box at %d %d, row %d column %d: %d, not %d", column, row, r, c,
                out[static_cast<size_t>(at)], expected);
        }
    }
  }
}

namespace {

// 64- and 32-byte swizzles, and five dimensions.
template <int Span>
__global__ void tma_load_5d_kernel(const __grid_constant__ TensorMap map, uint16_t* out, int elements) {
  Shared s;
  auto* box = s.take<uint16_t>(static_cast<size_t>(elements), 1024);
  auto* barrier = s.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, static_cast<uint32_t>(elements) * 2);
    ptx::tma_load(box, &map, barrier, 0, 1, 0, 1, 0);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < elements; i += 32) out[i] = box[i];
}

template <int Span>
void five_dimensions(Swizzle swizzle) {
  constexpr int width = Span / 2;
  const int64_t dims[] = {width, 5, 3, 2, 2};
  const int box[] = {width, 4, 2, 2, 2};
  const int64_t strides[] = {width * 2, width * 2 * 5, width * 2 * 15, width * 2 * 30};
  std::vector<uint16_t> in(width * 60), out(width * 32);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i + 1);
  const TensorMap map = tensor_map(in.data(), DType::bf16, 5, dims, strides, box, swizzle);
  launch(call_of(in, out), Grid{1, 32, 8192}, tma_load_5d_kernel<Span>, map, out.data(), width * 32);
  for (int r = 0; r < 32; ++r)
    for (int c = 0; c < width; ++c) {
      const int i1 = 1 + r % 4, i2 = r / 4 % 2, i3 = 1 + r / 8 % 2, i4 = r / 16;
      const int expected = i3 < 2 ? (((i4 * 2 + i3) * 3 + i2) * 5 + i1) * width + c + 1 : 0;
      // Chunk numbers change with the number of the 128 bytes that a row lies in.
      const int byte = r * Span + c * 2, change = byte / 128 % (Span / 16);
      const int at = (byte ^ change * 16) / 2;
      CHECK(out[static_cast<size_t>(at)] == expected, "row %d column %d: %d, not %d", r, c, out[static_cast<size_t>(at)], expected);
    }
}

}  // namespace

TEST(tma_in_five_dimensions_with_narrow_swizzles) {
  five_dimensions<64>(Swizzle::b64);
  five_dimensions<32>(Swizzle::b32);
}

TEST(tma_stores_and_adds_what_lies_inside) {
  std::vector<float> in(8 * 32), out(10 * 40), before;
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i + 1);
  for (size_t i = 0; i < out.size(); ++i) out[i] = -static_cast<float>(i);
  before = out;
  const int64_t dims[] = {40, 10}, strides[] = {160};
  const int box[] = {32, 8};
  const TensorMap map = tensor_map(out.data(), DType::f32, 2, dims, strides, box, Swizzle::b128);
  for (const bool add : {false, true}) {
    launch(call_of(in, out), Grid{1, 32, 8 * 128}, tma_store_kernel, map, in.data(), 12, 5, add);
    for (int y = 0; y < 10; ++y)
      for (int x = 0; x < 40; ++x) {
        const auto at = static_cast<size_t>(y * 40 + x);
        const bool inside = y >= 5 && x >= 12;
        const float value = inside ? in[static_cast<size_t>((y - 5) * 32 + x - 12)] * (add ? 2 : 1) : before[at];
        CHECK(out[at] == value, "add %d at %d %d: %g, not %g", add, y, x, static_cast<double>(out[at]), static_cast<double>(value));
      }
  }
}

namespace {

__global__ void bulk_kernel(const float* in, float* out, float* sums) {
  Shared s;
  auto* a = s.take<float>(64, 128);
  auto* barrier = s.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 256);
    ptx::bulk_load(a, in, 256, barrier);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 64; i += 32) a[i] *= 2;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_store(out, a, 256);
    ptx::bulk_reduce_add(sums, a, 128);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

}  // namespace

TEST(bulk_copies_of_plain_runs) {
  std::vector<float> in(64), out(64), sums(32, 1.f);
  for (size_t i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  launch(call_of(in, out, sums), Grid{1, 32, 256 + 8}, bulk_kernel, in.data(), out.data(), sums.data());
  for (size_t i = 0; i < 64; ++i) CHECK(out[i] == 2 * in[i], "element %zu", i);
  for (size_t i = 0; i < 32; ++i) CHECK(sums[i] == 1 + 2 * in[i], "element %zu", i);
}

namespace {

// a [64 K] and b [K N] in any of the layouts that a descriptor can name, filled element by element from the layouts' definitions:
// K-major rows of `span` bytes in groups of 8, or MN-major panels of span / 2 elements with groups of 8 k.
struct Layout {
  bool mn_major;
  Swizzle swizzle;
};
int span_of(Swizzle s) { return 16 << static_cast<int>(s); }
int swizzled(int byte, Swizzle s) { return s == Swizzle::none ? byte : byte ^ (byte / 128 % (span_of(s) / 16)) * 16; }

// Byte of (row, k) in a matrix of `rows` along MN and K = 32; it lies in parts, each of what one descriptor row of panels spans.
int byte_of(Layout l, int rows, int row, int k) {
  const int span = span_of(l.swizzle);
  int byte;
  if (!l.mn_major) {
    const int per_part = span / 2;  // k in a part
    byte = k / per_part * rows * span + row * span + k % per_part * 2;
  } else {
    const int width = span / 2;
    byte = row / width * 32 * span + k * span + row % width * 2;
  }
  return swizzled(byte, l.swizzle);
}
uint64_t descriptor_of(const void* base, Layout l, int rows, int k) {
  const int span = span_of(l.swizzle);
  const auto* p = static_cast<const char*>(base);
  if (l.mn_major) {
    // panels of 32 k; without a swizzle `stride` leads along MN and `leading` along k
    if (l.swizzle == Swizzle::none) return ptx::wgmma_descriptor(p + k * 16, 8 * 16, 32 * 16, l.swizzle);
    return ptx::wgmma_descriptor(p + k * span, 32 * span, 8 * span, l.swizzle);
  }
  const int per_part = span / 2;
  return ptx::wgmma_descriptor(p + k / per_part * rows * span + k % per_part * 2, rows * span, 8 * span, l.swizzle);
}

template <int N, bool TransposedA, bool TransposedB>
__global__ void wgmma_kernel(const bf16* a, const bf16* b, float* d, Swizzle swizzle_a, Swizzle swizzle_b, bool a_in_registers) {
  Shared s;
  auto* sa = s.take<uint8_t>(64 * 128, 1024);
  auto* sb = s.take<uint8_t>((N < 64 ? 64 : N) * 128, 1024);
  const Layout la = {TransposedA, swizzle_a}, lb = {TransposedB, swizzle_b};
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 64 * 32; i += 128) *reinterpret_cast<bf16*>(sa + byte_of(la, 64, i / 32, i % 32)) = a[i];
  for (int i = thread; i < N * 32; i += 128) *reinterpret_cast<bf16*>(sb + byte_of(lb, N, i % N, i / N)) = b[i];
  ptx::fence_proxy_async();
  __syncthreads();
  float f[N / 2];
  const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
  for (int i = 0; i < N / 2; ++i) f[i] = 100;
  const auto pair = [&](int r, int k) { return static_cast<uint32_t>(a[r * 32 + k].bits) | static_cast<uint32_t>(a[r * 32 + k + 1].bits) << 16; };
  ptx::wgmma_fence();
  for (int k = 0; k < 32; k += 16) {
    const uint64_t db = descriptor_of(sb, lb, N, k);
    if (a_in_registers) {
      const uint32_t r[4] = {pair(row, k + 2 * t), pair(row + 8, k + 2 * t), pair(row, k + 2 * t + 8), pair(row + 8, k + 2 * t + 8)};
      ptx::wgmma<N, TransposedB>(f, r, db, k > 0);
    } else {
      ptx::wgmma<N, TransposedA, TransposedB>(f, descriptor_of(sa, la, 64, k), db, k > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int j = 0; j < N / 8; ++j)
    for (int i = 0; i < 4; ++i) d[(row + 8 * (i / 2)) * N + 8 * j + 2 * t + i % 2] = f[4 * j + i];
}

template <int N, bool TransposedA, bool TransposedB>
void wgmma_case(Swizzle swizzle_a, Swizzle swizzle_b, bool a_in_registers) {
  std::vector<bf16> a(64 * 32), b(32 * N);
  std::vector<float> d(64 * N);
  for (uint32_t i = 0; i < a.size(); ++i) a[i] = to_bf16(number(i));
  for (uint32_t i = 0; i < b.size(); ++i) b[i] = to_bf16(number(i + 5000));
  launch(call_of(a, b, d), Grid{1, 128, (64 + (N < 64 ? 64 : N)) * 128}, wgmma_kernel<N, TransposedA, TransposedB>, a.data(), b.data(), d.data(), swizzle_a,
         swizzle_b, a_in_registers);
  int wrong = 0;
  for (size_t m = 0; m < 64; ++m)
    for (size_t n = 0; n < N; ++n) {
      float sum = 0;
      for (size_t k = 0; k < 32; ++k) sum += to_float(a[m * 32 + k]) * to_float(b[k * N + n]);
      if (d[m * N + n] != sum && wrong++ == 0)
        CHECK(d[m * N + n] == sum, "N %d, A %d %d, B %d %d, registers %d, at %zu %zu: %g, not %g", N, TransposedA, static_cast<int>(swizzle_a), TransposedB,
              static_cast<int>(swizzle_b), a_in_registers, m, n, static_cast<double>(d[m * N + n]), static_cast<double>(sum));
    }
  CHECK(wrong == 0);
}

constexpr Swizzle swizzles[] = {Swizzle::none, Swizzle::b32, Swizzle::b64, Swizzle::b128};

}  // namespace

TEST(wgmma_of_k_major_operands) {
  for (const Swizzle a : swizzles) {
    wgmma_case<8, false, false>(a, Swizzle::b128, false);
    wgmma_case<128, false, false>(Swizzle::b128, a, false);
  }
  wgmma_case<80, false, false>(Swizzle::b128, Swizzle::b128, true);
  wgmma_case<256, false, false>(Swizzle::b128, Swizzle::b128, false);
}

TEST(wgmma_of_mn_major_operands) {
  for (const Swizzle s : swizzles) {
    wgmma_case<64, true, false>(s, Swizzle::b128, false);
    wgmma_case<128, false, true>(Swizzle::b128, s, false);
  }
  wgmma_case<256, true, true>(Swizzle::b128, Swizzle::b128, false);
  wgmma_case<192, false, true>(Swizzle::b128, Swizzle::b128, true);
}

namespace {

// Two blocks exchange rows: by a remote store, by a bulk copy that completes on the other's barrier, and by a multicast load.
__global__ void cluster_kernel(const __grid_constant__ TensorMap map, int* out, float* rows) {
  Shared s;
  auto* got = s.take<float>(4);
  auto* row = s.take<float>(32, 128);
  auto* other = s.take<float>(32, 128);
  auto* box = s.take<float>(32 * 2, 128);
  auto* barriers = s.take<uint64_t>(3);
  const uint32_t rank = ptx::cluster_rank(), peer = rank ^ 1;
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) {
    ptx::mbarrier_init(barriers, 1), ptx::mbarrier_init(barriers + 1, 1), ptx::mbarrier_init(barriers + 2, 32);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barriers, 128);
    ptx::mbarrier_arrive_expect_tx(barriers + 1, 256);
  }
  row[i] = static_cast<float>(100 * static_cast<int>(rank) + i);
  ptx::fence_proxy_async();
  ptx::cluster_sync();
  if (i == 0) {
    ptx::store_cluster(ptx::mapa(got, peer), static_cast<float>(rank), 1, 2, 3);
    ptx::bulk_copy_to_cluster(ptx::mapa(other, peer), row, 128, ptx::mapa(barriers, peer));
    // Each block loads one row of the box for both.
    ptx::tma_load_multicast(box + 32 * rank, &map, barriers + 1, 3, 0, static_cast<int>(rank));
  }
  ptx::mbarrier_arrive_cluster(ptx::mapa(barriers + 2, peer));
  ptx::mbarrier_wait(barriers, 0);
  ptx::mbarrier_wait(barriers + 1, 0);
  ptx::mbarrier_wait(barriers + 2, 0);
  ptx::cluster_sync();
  const int at = static_cast<int>(blockIdx.x) * 32 + i;
  out[at] = static_cast<int>(got[0]) * 10 + static_cast<int>(ptx::cluster_size());
  rows[at * 3] = other[i], rows[at * 3 + 1] = box[i], rows[at * 3 + 2] = box[32 + i];
  ptx::cluster_sync();
}

}  // namespace

TEST(blocks_of_a_cluster_reach_each_other) {
  std::vector<float> in(64), rows(4 * 32 * 3);
  std::vector<int> out(4 * 32);
  for (size_t i = 0; i < 64; ++i) in[i] = static_cast<float>(i + 500);
  const int64_t dims[] = {32, 2}, strides[] = {128};
  const int box[] = {32, 1};
  const TensorMap map = tensor_map(in.data(), DType::f32, 2, dims, strides, box, Swizzle::none);
  Grid grid{4, 32, 1024};
  grid.cluster = 2;
  launch(call_of(in, out, rows), grid, cluster_kernel, map, out.data(), rows.data());
  for (int b = 0; b < 4; ++b)
    for (int i = 0; i < 32; ++i) {
      const auto at = static_cast<size_t>(b * 32 + i);
      const int peer = b % 2 ^ 1;
      CHECK(out[at] == peer * 10 + 2, "block %d: %d", b, out[at]);
      CHECK(rows[at * 3] == static_cast<float>(100 * peer + i) && rows[at * 3 + 1] == in[static_cast<size_t>(i)] &&
                rows[at * 3 + 2] == in[static_cast<size_t>(i + 32)], "block %d thread %d: %g %g %g", b, i, static_cast<double>(rows[at * 3]),
            static_cast<double>(rows[at * 3 + 1]), static_cast<double>(rows[at * 3 + 2]));
    }
}

namespace {

__global__ void atomics_kernel(int* counters, float* sum, unsigned long long* wide) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(counters, 1);
  atomicMax(counters + 1, i);
  atomicMin(counters + 2, -i);
  atomicCAS(counters + 3, 0, i + 1);
  atomicExch(counters + 4, 9);
  ptx::red_add(sum, 0.5f);
  ptx::red_add(sum + 4, 1, 2, 3, 4);
  atomicAdd(wide, 1ull << 33);
}

__global__ void elect_kernel(int* out) { out[threadIdx.x] = ptx::elect_one(); }

__global__ void math_kernel(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  const float x = in[i];
  out[i * 8] = ptx::ex2(x), out[i * 8 + 1] = ptx::lg2(std::fabs(x) + 1), out[i * 8 + 2] = ptx::tanh(x), out[i * 8 + 3] = ptx::rsqrt(x * x + 1);
  out[i * 8 + 4] = ptx::rcp(x * x + 1), out[i * 8 + 5] = low_float(pack_bf16(x, 2 * x)), out[i * 8 + 6] = high_float(pack_bf16(x, 2 * x));
  out[i * 8 + 7] = to_float(from_float<bf16>(x));
}

}  // namespace

TEST(atomics_and_reductions_in_memory) {
  std::vector<int> counters(5);
  std::vector<float> sum(8);
  std::vector<unsigned long long> wide(1);
  launch(call_of(counters, sum, wide), Grid{3, 40}, atomics_kernel, counters.data(), sum.data(), wide.data());
  CHECK(counters[0] == 120 && counters[1] == 119 && counters[2] == -119 && counters[3] == 1 && counters[4] == 9);
  CHECK(sum[0] == 60 && sum[4] == 120 && sum[5] == 240 && sum[6] == 360 && sum[7] == 480);
  CHECK(wide[0] == 120ull << 33);
}

TEST(one_lane_is_elected) {
  std::vector<int> out(64);
  launch(call_of(out), Grid{1, 64}, elect_kernel, out.data());
  int elected = 0;
  for (const int e : out) elected += e;
  CHECK(elected == 2);
}

TEST(approximate_functions_and_bf16) {
  std::vector<float> in = {0, 1, -1, 0.3f, 3.14159f, -7.25f, 1.00390625f, 1.01171875f}, out(64);
  launch(call_of(in, out), Grid{1, 8}, math_kernel, in.data(), out.data());
  for (size_t i = 0; i < in.size(); ++i) {
    const double x = static_cast<double>(in[i]);
    CHECK_NEAR(out[i * 8], std::exp2(x), std::exp2(x) * 1e-6);
    CHECK_NEAR(out[i * 8 + 1], std::log2(std::fabs(x) + 1), 1e-6);
    CHECK_NEAR(out[i * 8 + 2], std::tanh(x), 6e-4);
    CHECK_NEAR(out[i * 8 + 3], 1 / std::sqrt(x * x + 1), 1e-6);
    CHECK_NEAR(out[i * 8 + 4], 1 / (x * x + 1), 1e-6);
    CHECK_NEAR(out[i * 8 + 5], x, std::fabs(x) / 256);
    CHECK_NEAR(out[i * 8 + 6], 2 * x, std::fabs(2 * x) / 256);
    CHECK(out[i * 8 + 7] == out[i * 8 + 5]);
  }
  CHECK(to_bf16(1.00390625f).bits == 0x3f80 && to_bf16(1.01171875f).bits == 0x3f82);  // ties go to even
  CHECK(std::isnan(to_float(to_bf16(NAN))) && std::isinf(to_float(to_bf16(3.4e38f))));
}
