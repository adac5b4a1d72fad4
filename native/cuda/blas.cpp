// cuBLASLt behind blas.h. It is declared here by hand, so that building needs no header of it and running finds any release from 12 on.
//
// The library is column-major: a row-major c[m n] = a[m k] b[k n] is its C^T[n m] = b^T a^T, so the operands change places, and what is
// stored transposed in rows is plain in columns. What a product needs besides its pointers (descriptor, layouts, algorithm) is made
// once for each shape and kept.
#include "cuda/blas.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>

#include "cuda/launch.h"
#include "cuda/libraries.h"

namespace limbeck::cuda {
namespace {

// The names and numbers of cublasLt.h, cublas_api.h and library_types.h.
using Handle = void*;
using Descriptor = void*;
using Layout = void*;
using Preference = void*;
using Status = int;

enum DataType { kFloat32 = 0, kBfloat16 = 14, kFloat8E4M3 = 28 };
enum ComputeType { kCompute32F = 68 };
enum Operation : int32_t { kPlain = 0, kTransposed = 1 };
enum DescriptorAttribute {
  kTransposeA = 3,
  kTransposeB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kScaleA = 17,
  kScaleB = 18,
  kBiasType = 26,
  kScaleModeA = 31,
  kScaleModeB = 32
};
enum PreferenceAttribute { kMaxWorkspace = 1, kReductionSchemes = 3, kAlignA = 5, kAlignB = 6, kAlignC = 7, kAlignD = 8 };
constexpr uint32_t kEpilogueBias = 4;
// Parts of a long sum go to the workspace as float32 and are added by a pass of their own, in order.
constexpr uint32_t kReduceInOrder = 2;
constexpr int32_t kScaleEachRow = 3;          // CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F, since 12.9, on 9.0
constexpr size_t kScaleEachRowSince = 120900;
constexpr size_t kOldest = 120000;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

struct Functions {
  Status (*create)(Handle*);
  Status (*destroy)(Handle);
  const char* (*status_name)(Status);
  size_t (*version)();
  Status (*descriptor_create)(Descriptor*, ComputeType, DataType);
  Status (*descriptor_destroy)(Descriptor);
  Status (*descriptor_set)(Descriptor, DescriptorAttribute, const void*, size_t);
  Status (*layout_create)(Layout*, DataType, uint64_t, uint64_t, int64_t);
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, PreferenceAttribute, const void*, size_t);
  Status (*heuristic)(Handle, Descriptor, Layout, Layout, Layout, Layout, Preference, int, Heuristic*, int*);
  Status (*multiply)(Handle, Descriptor, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta, const void* c,
                     Layout, void* d, Layout, const Algorithm*, void* workspace, size_t, cudaStream_t);
};

template <class F>
void load(const Library& library, const char* name, F*& function) {
  library.symbol(name, function);
  if (function) return;
  throw Error(ErrorKind::device, "ERR_LIBRARY_VERSION",
              "cuBLASLt: " + library.path + " has no function " + name + "; release 12 or newer is needed")
      .on("cuBLASLt").wanted("cuBLASLt 12.0 or newer").got(library.path);
}

// Of whatever release is found; null functions where there is none.
size_t library_version() {
  size_t (*version)() = nullptr;
  library(Vendor::cublaslt).symbol("cublasLtGetVersion", version);
  return version ? version() : 0;
}

Functions load_all() {
  const Library& from = require(Vendor::cublaslt);
  if (const size_t version = library_version(); version < kOldest)
    throw Error(ErrorKind::device, "ERR_LIBRARY_VERSION",
                "cuBLASLt: " + from.path + " is release " + std::to_string(version) + "; 12.0 (" + std::to_string(kOldest) + ") or newer is needed")
        .on("cuBLASLt").wanted(std::to_string(kOldest)).got(std::to_string(version));
  Functions f;
  load(from, "cublasLtCreate", f.create);
  load(from, "cublasLtDestroy", f.destroy);
  load(from, "cublasLtGetStatusName", f.status_name);
  load(from, "cublasLtGetVersion", f.version);
  load(from, "cublasLtMatmulDescCreate", f.descriptor_create);
  load(from, "cublasLtMatmulDescDestroy", f.descriptor_destroy);
  load(from, "cublasLtMatmulDescSetAttribute", f.descriptor_set);
  load(from, "cublasLtMatrixLayoutCreate", f.layout_create);
  load(from, "cublasLtMatrixLayoutDestroy", f.layout_destroy);
  load(from, "cublasLtMatmulPreferenceCreate", f.preference_create);
  load(from, "cublasLtMatmulPreferenceDestroy", f.preference_destroy);
  load(from, "cublasLtMatmulPreferenceSetAttribute", f.preference_set);
  load(from, "cublasLtMatmulAlgoGetHeuristic", f.heuristic);
  load(from, "cublasLtMatmul", f.multiply);
  return f;
}

DataType type_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return kFloat32;
    case DType::bf16: return kBfloat16;
    case DType::u8: return kFloat8E4M3;
    default: break;
  }
  throw Error(ErrorKind::internal, "ERR_INTERNAL", "cuBLASLt: a matrix is neither f32, bf16 nor fp8");
}

// Algorithms are chosen for what the pointers are multiples of, up to what the library asks for at most.
uint32_t alignment_of(const void* p) {
  const uintptr_t low = reinterpret_cast<uintptr_t>(p) & 255;
  return low == 0 ? 256 : static_cast<uint32_t>(low & -low);
}

// How one product is made, whatever its pointers.
struct Plan {
  Descriptor descriptor = nullptr;
  Layout a = nullptr, b = nullptr, c = nullptr;
  Algorithm algorithm = {};
};

class CublasLt final : public Blas {
 public:
  ~CublasLt() override {
    for (const auto& [key, plan] : plans_) destroy(plan);
    if (handle_) lib_.destroy(handle_);
    if (workspace_) cudaFree(workspace_);
  }

  void run(const Device& device, const Product& product) override {
    Product p = product;
    if (p.m == 0 || p.n == 0) return;
    if (p.bias && p.accumulate) refuse("a product with a bias does not accumulate", p);
    // The library's kernels for rows that are no whole vectors add the bias to a sum that is rounded already.
    if (p.bias && (p.k == 0 || !vectors(p))) {
      bias_rows(device, p);
      p.bias = nullptr;
      p.accumulate = true;
    }
    if (p.k == 0) return empty_sum(device, p);
    if (!handle_) open();
    const Plan& plan = plan_of(p);
    if (p.bias) set(plan, kBiasPointer, p.bias);
    if (p.a.scales) {
      set(plan, kScaleA, p.b.scales);
      set(plan, kScaleB, p.a.scales);
    }
    const float beta = p.accumulate ? 1.f : 0.f;
    check(lib_.multiply(handle_, plan.descriptor, &p.scale, p.b.data, plan.a, p.a.data, plan.b, &beta, p.c, plan.c, p.c, plan.c,
                        &plan.algorithm, workspace_, kWorkspace, device.stream),
          "cublasLtMatmul", p);
  }

  size_t workspace_bytes() const override { return kWorkspace; }

  std::string version() const override {
    const size_t v = library_version();
    if (v == 0) return "";
    return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
  }

 private:
  static constexpr size_t kWorkspace = size_t{32} << 20;  // what NVIDIA recommends for 9.0
  using Key = std::array<int64_t, 16>;

  void open() {
    lib_ = load_all();
    if (!workspace_) cuda::check(cudaMalloc(&workspace_, kWorkspace), "cuBLASLt's workspace");
    check(lib_.create(&handle_), "cublasLtCreate");
  }

  const Plan& plan_of(const Product& p) {
    const Key key = {p.m, p.n, p.k, p.a.ld, p.b.ld, p.ldc,
                     static_cast<int64_t>(p.a.dtype), static_cast<int64_t>(p.b.dtype), static_cast<int64_t>(p.c_dtype),
                     p.a.transposed, p.b.transposed, p.a.scales != nullptr,
                     alignment_of(p.a.data), alignment_of(p.b.data), alignment_of(p.c), p.bias ? alignment_of(p.bias) : 0};
    const auto found = plans_.find(key);
    return found != plans_.end() ? found->second : plans_.emplace(key, make_plan(p)).first->second;
  }

  Plan make_plan(const Product& p) {
    Plan plan;
    Preference preference = nullptr;
    try {
      check(lib_.descriptor_create(&plan.descriptor, kCompute32F, kFloat32), "cublasLtMatmulDescCreate", p);
      set(plan, kTransposeA, p.b.transposed ? kTransposed : kPlain);
      set(plan, kTransposeB, p.a.transposed ? kTransposed : kPlain);
      if (p.bias) {
        set(plan, kEpilogue, kEpilogueBias);
        set(plan, kBiasPointer, p.bias);
        set(plan, kBiasType, static_cast<int32_t>(type_of(p.c_dtype)));
      }
      if (p.a.scales) {
        set(plan, kScaleModeA, kScaleEachRow);
        set(plan, kScaleModeB, kScaleEachRow);
        set(plan, kScaleA, p.b.scales);
        set(plan, kScaleB, p.a.scales);
      }
      layout(plan.a, p.b, p.k, p.n);
      layout(plan.b, p.a, p.m, p.k);
      check(lib_.layout_create(&plan.c, type_of(p.c_dtype), p.n, p.m, p.ldc), "cublasLtMatrixLayoutCreate", p);

      check(lib_.preference_create(&preference), "cublasLtMatmulPreferenceCreate", p);
      prefer(preference, kMaxWorkspace, uint64_t{kWorkspace});
      prefer(preference, kReductionSchemes, kReduceInOrder);
      prefer(preference, kAlignA, alignment_of(p.b.data));
      prefer(preference, kAlignB, alignment_of(p.a.data));
      prefer(preference, kAlignC, alignment_of(p.c));
      prefer(preference, kAlignD, alignment_of(p.c));
      Heuristic best = {};
      int count = 0;
      check(lib_.heuristic(handle_, plan.descriptor, plan.a, plan.b, plan.c, plan.c, preference, 1, &best, &count),
            "cublasLtMatmulAlgoGetHeuristic", p);
      if (count == 0) refuse("cuBLASLt knows no algorithm for " + text_of(p), p);
      check(best.state, "cublasLtMatmulAlgoGetHeuristic", p);
      plan.algorithm = best.algorithm;
      lib_.preference_destroy(preference);
      return plan;
    } catch (...) {
      if (preference) lib_.preference_destroy(preference);
      destroy(plan);
      throw;
    }
  }

  // A row-major [rows cols], or stored [cols rows] where it is transposed, is a matrix of columns the other way round.
  void layout(Layout& layout, const Matrix& m, int64_t rows, int64_t cols) {
    check(lib_.layout_create(&layout, type_of(m.dtype), m.transposed ? rows : cols, m.transposed ? cols : rows, m.ld),
          "cublasLtMatrixLayoutCreate");
  }

  template <class T>
  void set(const Plan& plan, DescriptorAttribute attribute, const T& value) {
    check(lib_.descriptor_set(plan.descriptor, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
  }
  template <class T>
  void prefer(Preference preference, PreferenceAttribute attribute, const T& value) {
    check(lib_.preference_set(preference, attribute, &value, sizeof value), "cublasLtMatmulPreferenceSetAttribute");
  }

  void destroy(const Plan& plan) {
    for (Layout layout : {plan.a, plan.b, plan.c})
      if (layout) lib_.layout_destroy(layout);
    if (plan.descriptor) lib_.descriptor_destroy(plan.descriptor);
  }

  static bool vectors(const Product& p) {
    return p.a.ld * size_of(p.a.dtype) % 16 == 0 && p.b.ld * size_of(p.b.dtype) % 16 == 0 && p.ldc * size_of(p.c_dtype) % 16 == 0;
  }

  // Every row of c becomes the bias: one is copied, then as many as there are.
  static void bias_rows(const Device& device, const Product& p) {
    const size_t pitch = p.ldc * size_of(p.c_dtype), width = p.n * size_of(p.c_dtype);
    cuda::check(cudaMemcpyAsync(p.c, p.bias, width, cudaMemcpyDeviceToDevice, device.stream), "cudaMemcpyAsync");
    for (int64_t rows = 1; rows < p.m; rows *= 2)
      cuda::check(cudaMemcpy2DAsync(static_cast<char*>(p.c) + rows * pitch, pitch, p.c, pitch, width, std::min(rows, p.m - rows),
                                    cudaMemcpyDeviceToDevice, device.stream),
                  "cudaMemcpy2DAsync");
  }

  // Sums over nothing.
  static void empty_sum(const Device& device, const Product& p) {
    const size_t bytes = size_of(p.c_dtype);
    if (!p.accumulate) cuda::check(cudaMemset2DAsync(p.c, p.ldc * bytes, 0, p.n * bytes, p.m, device.stream), "cudaMemset2DAsync");
  }

  static std::string text_of(const Product& p) {
    const auto shape = [](const Matrix& m, int64_t rows, int64_t cols) {
      const bool t = m.transposed;
      return std::string(name_of(m.dtype)) + "[" + std::to_string(t ? cols : rows) + " " + std::to_string(t ? rows : cols) + "]" + (t ? "^T" : "");
    };
    return shape(p.a, p.m, p.k) + " x " + shape(p.b, p.k, p.n) + " -> " + name_of(p.c_dtype);
  }

  [[noreturn]] static void refuse(const std::string& problem, const Product& p) {
    throw Error(ErrorKind::device, "ERR_CUBLAS", problem).on("cuBLASLt").got(text_of(p));
  }

  void check(Status status, const char* what) {
    if (status != 0)
      throw Error(ErrorKind::device, "ERR_CUBLAS", std::string(what) + ": " + lib_.status_name(status) + " (cuBLASLt " + version() + ")").on("cuBLASLt");
  }
  void check(Status status, const char* what, const Product& p) {
    if (status != 0) refuse(std::string(what) + ", " + text_of(p) + ": " + lib_.status_name(status) + " (cuBLASLt " + version() + ")", p);
  }

  Functions lib_ = {};
  Handle handle_ = nullptr;
  void* workspace_ = nullptr;
  std::map<Key, Plan> plans_;
};

}  // namespace

bool multiplies_fp8(const Device& device, int64_t n, int64_t k) {
  if (device.architecture != 90 || n % 16 != 0 || k % 16 != 0 || n == 0 || k == 0) return false;
  return device.blas == nullptr || library_version() >= kScaleEachRowSince;
}

std::unique_ptr<Blas> open_blas(const Device&) { return std::make_unique<CublasLt>(); }

}  // namespace limbeck::cuda
