// mma.sync, ldmatrix, stmatrix and wgmma from their definitions. Products of two bf16 are exact in float; sums are taken in float, k by k.
#include "cuda/emulate/tensor_core.h"

#include <cstring>

#include "cuda/bf16.cuh"
#include "cuda/emulate/copies.h"
#include "cuda/emulate/executor.h"
#include "cuda/emulate/ptx.h"
#include "cuda/emulate/shadow.h"

namespace limbeck::cuda::emulate {

namespace {

constexpr int kK = 16;

// Row r (0..15) and pair of columns of a lane's register i in the A fragment of m16k16.
void unpack_a(const uint32_t* registers, int lane, float (*a)[kK]) {
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    float* to = &a[g + 8 * (i & 1)][2 * t + 8 * (i / 2)];
    to[0] = low_float(registers[i]), to[1] = high_float(registers[i]);
  }
}

struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};

void finish_mma(Operands lanes, uint32_t) {
  float a[16][kK], b[kK][8], d[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& o = *static_cast<const MmaOperands*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    unpack_a(o.a, l, a);
    b[2 * t][g] = low_float(o.b0), b[2 * t + 1][g] = high_float(o.b0);
    b[2 * t + 8][g] = low_float(o.b1), b[2 * t + 9][g] = high_float(o.b1);
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = o.d[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kK; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < kWarp; ++l) {
    const auto& o = *static_cast<const MmaOperands*>(lanes[l]);
    for (int i = 0; i < 4; ++i) o.d[i] = d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  }
}

struct MatrixOperands {
  Thread* thread;
  uint32_t* registers;
  char* row;
};

// Lane 8i + r gives row r of matrix i. `move` copies the element of a register's half to or from its place in a row.
template <bool store>
void move_matrices(Operands lanes, int matrices, bool transposed) {
  const char* what = store ? "stmatrix" : "ldmatrix";
  for (int i = 0; i < matrices; ++i)
    for (int r = 0; r < 8; ++r) {
      const auto& o = *static_cast<const MatrixOperands*>(lanes[8 * i + r]);
      check_aligned(o.row, 16, what);
      if (!is_shared(o.row)) stop("ERR_EMULATED_BOUNDS", "%s of %s, which is not in shared memory", what, describe(o.row).c_str());
      check_access(o.row, 16, store ? Access::write : Access::read, accessor_of(*o.thread), what);
    }
  for (int l = 0; l < kWarp; ++l) {
    const auto& mine = *static_cast<const MatrixOperands*>(lanes[l]);
    for (int i = 0; i < matrices; ++i)
      for (int half = 0; half < 2; ++half) {
        const int along = 2 * (l % 4) + half, across = l / 4;
        const int row = transposed ? along : across, column = transposed ? across : along;
        char* element = static_cast<const MatrixOperands*>(lanes[8 * i + row])->row + 2 * column;
        char* part = reinterpret_cast<char*>(&mine.registers[i]) + 2 * half;
        std::memcpy(store ? element : part, store ? part : element, 2);
      }
  }
}

}  // namespace

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  MmaOperands operands = {d, a, b0, b1};
  gather("mma_m16n8k16", ~0u, 0, &operands, finish_mma);
}

template <bool store, int matrices>
void gather_matrices(MatrixOperands& operands, bool transposed) {
  const char* name = store ? "stmatrix" : "ldmatrix";
  const uint64_t parameter = matrices * 2 + (transposed ? 1 : 0);
  if (transposed) gather(name, ~0u, parameter, &operands, [](Operands lanes, uint32_t) { move_matrices<store>(lanes, matrices, true); });
  else gather(name, ~0u, parameter, &operands, [](Operands lanes, uint32_t) { move_matrices<store>(lanes, matrices, false); });
}

template <bool store>
void any_matrices(uint32_t* r, int matrices, bool transposed, const void* row) {
  MatrixOperands operands = {executor.current, r, const_cast<char*>(static_cast<const char*>(row))};
  if (matrices == 1) gather_matrices<store, 1>(operands, transposed);
  else if (matrices == 2) gather_matrices<store, 2>(operands, transposed);
  else gather_matrices<store, 4>(operands, transposed);
}

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row) { any_matrices<false>(r, matrices, transposed, row); }
void stmatrix(void* row, const uint32_t* r, int matrices, bool transposed) {
  any_matrices<true>(const_cast<uint32_t*>(r), matrices, transposed, row);
}

// --- wgmma ---------------------------------------------------------------------------------------------------------------------------

// One warp's part, 16 of the 64 rows: all that its registers and its rows of A have to do with. It is computed when it is waited for.
struct Wgmma {
  int n;
  bool a_in_registers, transposed_a, transposed_b, add;
  uint64_t a, b;
  float* d[kWarp];
  uint32_t a_registers[kWarp][4];
  Step step;
  bool committed;
};

namespace {

// A matrix in shared memory as its descriptor tells: rows along M or N, and 16 columns along K.
struct Matrix {
  size_t start;  // in the windows
  size_t window;
  size_t leading, stride;
  int swizzle;  // log2 of the span in chunks: 0 to 3
  bool mn_major;

  // The 16 bytes that hold elements (row, k..k+7), or MN-major (row..row+7, k).
  size_t chunk(int row, int k) const {
    const auto r = static_cast<size_t>(row), c = static_cast<size_t>(k);
    size_t at = start;
    if (!mn_major) {
      const size_t span = size_t{16} << swizzle;  // bytes of a row
      at += r / 8 * stride + r % 8 * span;
      at += swizzle == 0 ? c / 8 * leading : c / 8 * 16;
    } else if (swizzle == 0) {
      at += r / 8 * stride + c / 8 * leading + c % 8 * 16;
    } else {
      const size_t span = size_t{8} << swizzle;  // elements
      at += r / span * leading + r % span * 2 + c / 8 * stride + c % 8 * (2 * span);
    }
    at &= kWindow - 1;
    if (swizzle != 0) at ^= (at >> 7 & ((size_t{1} << swizzle) - 1)) << 4;
    return window + at;
  }
};

Matrix matrix_of(uint64_t descriptor, bool mn_major) {
  Matrix m;
  m.window = static_cast<size_t>(executor.current->block->rank) * kWindow;
  m.start = (descriptor & 0x3fff) << 4;
  m.leading = (descriptor >> 16 & 0x3fff) << 4;
  m.stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 49 & 7) stop("ERR_EMULATED_WGMMA", "a matrix descriptor with a base offset: align the matrix to 1024 bytes instead");
  const auto code = static_cast<int>(descriptor >> 62);
  m.swizzle = code == 0 ? 0 : 4 - code;
  m.mn_major = mn_major;
  return m;
}

// Reads rows x 16 elements, row-major by k: to[k * rows + row].
void read_matrix(const Matrix& m, int first, int rows, float* to) {
  for (int row = 0; row < rows; row += m.mn_major ? 8 : 1)
    for (int k = 0; k < kK; k += m.mn_major ? 1 : 8) {
      uint16_t elements[8];
      std::memcpy(elements, shared_window + m.chunk(first + row, k), 16);
      for (int e = 0; e < 8; ++e) {
        const float x = bits_to_float(static_cast<uint32_t>(elements[e]) << 16);
        if (m.mn_major) to[k * rows + row + e] = x;
        else to[(k + e) * rows + row] = x;
      }
    }
}

void check_matrix(const Matrix& m, int first, int rows, const Accessor& reader) {
  for (int row = 0; row < rows; row += m.mn_major ? 8 : 1)
    for (int k = 0; k < kK; k += m.mn_major ? 1 : 8) check_access(shared_window + m.chunk(first + row, k), 16, Access::read, reader, "wgmma");
}

void compute(const Wgmma& w, int warp) {
  static float a[kK * 16], b[kK * 256], d[16 * 256];
  const int n = w.n, first = warp % 4 * 16;
  if (w.a_in_registers) {
    float rows[16][kK];
    for (int l = 0; l < kWarp; ++l) unpack_a(w.a_registers[l], l, rows);
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < kK; ++k) a[k * 16 + m] = rows[m][k];
  } else {
    read_matrix(matrix_of(w.a, w.transposed_a), first, 16, a);
  }
  read_matrix(matrix_of(w.b, w.transposed_b), 0, n, b);
  const auto place = [&](int l, int i) { return (l / 4 + 8 * (i / 2 % 2)) * n + 8 * (i / 4) + 2 * (l % 4) + i % 2; };
  for (int l = 0; l < kWarp; ++l)
    for (int i = 0; i < n / 2; ++i) d[place(l, i)] = w.add ? w.d[l][i] : 0;
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kK; ++k) {
      const float x = a[k * 16 + m];
      float* __restrict__ to = d + m * n;
      const float* __restrict__ from = b + k * n;
      for (int j = 0; j < n; ++j) to[j] += x * from[j];
    }
  for (int l = 0; l < kWarp; ++l)
    for (int i = 0; i < n / 2; ++i) w.d[l][i] = d[place(l, i)];
}

Warp& warp_of(const Thread& t) { return t.block->warps[static_cast<size_t>(t.number / kWarp)]; }

struct WgmmaOperands {
  int n;
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool transposed_a, transposed_b, add;
};

void finish_wgmma(Operands lanes, uint32_t) {
  const auto& first = *static_cast<const WgmmaOperands*>(lanes[0]);
  const Thread& me = *executor.current;
  Warp& warp = warp_of(me);
  const int number = me.number / kWarp;
  auto* w = new Wgmma{first.n, first.a_registers != nullptr, first.transposed_a, first.transposed_b, first.add, first.a, first.b, {}, {},
                      warp.step, false};
  warp.products.push_back(w);
  for (int l = 0; l < kWarp; ++l) {
    const auto& o = *static_cast<const WgmmaOperands*>(lanes[l]);
    if (o.a != w->a || o.b != w->b || o.add != w->add)
      stop("ERR_EMULATED_DIVERGENCE", "wgmma with other descriptors in lane %d than in lane 0", l);
    w->d[l] = o.d;
    if (w->a_in_registers) std::memcpy(w->a_registers[l], o.a_registers, sizeof w->a_registers[l]);
  }
  if (number / 4 * 128 + 128 > executor.block_threads) stop("ERR_EMULATED_DIVERGENCE", "wgmma in a warpgroup of less than 128 threads");
  if (!executor.checks) return;
  if (!warp.fenced) stop("ERR_EMULATED_WGMMA", "wgmma without a wgmma_fence since the last wgmma_wait");

  // The four warps of a group issue the same products in the same order.
  std::vector<Wgmma*>& log = me.block->issued[static_cast<size_t>(number / 4)];
  if (warp.products_issued == log.size()) {
    log.push_back(new Wgmma(*w));
  } else {
    const Wgmma& other = *log[warp.products_issued];
    if (other.n != w->n || other.a_in_registers != w->a_in_registers || other.a != w->a || other.b != w->b || other.add != w->add ||
        other.transposed_a != w->transposed_a || other.transposed_b != w->transposed_b)
      stop("ERR_EMULATED_DIVERGENCE", "wgmma with other operands than in another warp of the warpgroup");
  }
  ++warp.products_issued;

  if (warp.unit < 0) warp.unit = new_unit("a wgmma that nobody has waited for");
  const Accessor reader = unit_accessor(warp.unit, warp.step);
  if (!w->a_in_registers) check_matrix(matrix_of(w->a, w->transposed_a), number % 4 * 16, 16, reader);
  check_matrix(matrix_of(w->b, w->transposed_b), 0, w->n, reader);
}

struct WaitOperands {
  int newest;
};

}  // namespace

void wgmma(int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool transposed_a, bool transposed_b, bool add) {
  WgmmaOperands operands = {n, d, a_registers, a, b, transposed_a, transposed_b, add};
  const uint64_t parameter = static_cast<uint64_t>(n) << 3 | (a_registers ? 4u : 0u) | (transposed_a ? 2u : 0u) | (transposed_b ? 1u : 0u);
  gather("wgmma", ~0u, parameter, &operands, finish_wgmma);
}

void wgmma_fence() {
  WaitOperands operands = {0};
  gather("wgmma_fence", ~0u, 0, &operands, [](Operands, uint32_t) { warp_of(*executor.current).fenced = true; });
}

void wgmma_commit() {
  WaitOperands operands = {0};
  gather("wgmma_commit", ~0u, 0, &operands, [](Operands, uint32_t) {
    Warp& warp = warp_of(*executor.current);
    for (Wgmma* w : warp.products) w->committed = true;
    ++warp.step;
    if (executor.checks) note_step(warp.step);
  });
}

void wgmma_wait(int newest) {
  WaitOperands operands = {newest};
  gather("wgmma_wait", ~0u, static_cast<uint64_t>(newest), &operands, [](Operands lanes, uint32_t) {
    const Thread& me = *executor.current;
    Warp& warp = warp_of(me);
    const auto last = static_cast<int64_t>(warp.step) - 1 - static_cast<const WaitOperands*>(lanes[0])->newest;
    size_t done = 0;
    while (done < warp.products.size() && warp.products[done]->committed && warp.products[done]->step <= last) {
      compute(*warp.products[done], me.number / kWarp);
      delete warp.products[done++];
    }
    warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<ptrdiff_t>(done));
    if (warp.products.empty()) warp.fenced = false;
    if (!executor.checks || warp.unit < 0 || last < static_cast<int64_t>(first_step())) return;
    for (int l = 0; l < kWarp; ++l) {
      Thread& t = executor.threads[static_cast<size_t>(me.id - me.number % kWarp + l)];
      t.seen.learn(warp.unit, static_cast<Step>(last));
    }
    enter_thread();
  });
}

void begin_products() {
  for (Block& block : executor.blocks) {
    block.issued.resize(block.warps.size() / 4 + 1);
    for (auto& log : block.issued) {
      for (Wgmma* w : log) delete w;
      log.clear();
    }
    for (Warp& warp : block.warps) {
      for (Wgmma* w : warp.products) delete w;
      warp.products.clear();
      warp.unit = -1;
      warp.step = executor.checks ? first_step() : 1;
      warp.products_issued = 0;
      warp.fenced = false;
    }
  }
}

void end_of_thread_products() {
  if (executor.checks && !warp_of(*executor.current).products.empty()) stop("ERR_EMULATED_WAIT", "the thread ends before its wgmma was waited for");
}

void end_of_products() {
  for (const Block& block : executor.blocks)
    for (size_t w = 0; w < block.warps.size(); ++w)
      if (executor.checks && block.warps[w].products_issued != block.issued[w / 4].size())
        stop("ERR_EMULATED_DIVERGENCE", "warp %zu issued %llu wgmma, another warp of its warpgroup %zu", w,
             static_cast<unsigned long long>(block.warps[w].products_issued), block.issued[w / 4].size());
}

}  // namespace limbeck::cuda::emulate
