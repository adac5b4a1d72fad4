// The CUDA backend without a GPU: the same kernels, run by the executor on the stream's thread. For tests: it is exact about what
// a GPU would not forgive, and slow.
#include "core/backend.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "core/pages.h"
#include "cuda/blas.h"
#include "cuda/device.h"
#include "cuda/emulate/schedule.h"
#include "cuda/fault.h"

namespace limbeck::cuda {

namespace {

class Emulated final : public Backend {
 public:
  explicit Emulated(const BackendOptions& options) {
    // The kernels of both generations can be asked for.
    const char* wanted = std::getenv("LIMBECK_EMULATE_ARCHITECTURE");
    device_.architecture = wanted ? std::atoi(wanted) : 90;
    check_architecture(device_.architecture, "the emulated GPU");
    device_.processors = 4;
    device_.workspace_limit = options.workspace_limit;
    device_.memory = size_t{8} << 30;
    device_.shared_per_block = (device_.architecture >= 90 ? 227 : device_.architecture == 80 ? 163 : 99) * 1024;
    device_.fault = &fault_;
    blas_ = open_blas(device_);
    device_.blas = blas_.get();
    detail_ = "emulated on the CPU, compute capability " + std::to_string(device_.architecture / 10) + "." + std::to_string(device_.architecture % 10);
    emulate::allow(&fault_, sizeof fault_, "the fault record");
  }
  ~Emulated() override { emulate::forbid(&fault_); }
  const char* name() const override { return "cuda"; }
  const char* detail() const override { return detail_.c_str(); }
  int threads() const override { return 1; }
  bool computes_bf16() const override { return true; }
  std::vector<const KernelFamily*> families() const override { return cuda::families(); }
  size_t default_limit() const override { return device_.memory; }
  std::unique_ptr<Range> reserve(size_t bytes) override { return reserve_pages(bytes); }
  bool writes_at_once() const override { return false; }
  void prepare(Call& call) override { call.device = &device_; }
  void run(const Kernel& kernel, const Call& call) override { kernel.run(call); }
  double time(const Kernel& kernel, const Call& call) override {
    const auto start = std::chrono::steady_clock::now();
    kernel.run(call);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  void write(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const void* from, size_t bytes, Done done) override {
    if (fault_.key == FaultRecord::no_key) std::memcpy(to, from, bytes);
    sync(std::move(done));
  }
  void sync(Done done) override {
    if (fault_.key == FaultRecord::no_key) return done(nullptr);
    const Error error = error_of(fault_);
    done(&error);
  }
  void drain() override {}
  void clear_fault() override { fault_ = FaultRecord{}; }

 private:
  Device device_;
  FaultRecord fault_;
  std::unique_ptr<Blas> blas_;
  std::string detail_;
};

std::unique_ptr<Backend> open(const BackendOptions& options) { return std::make_unique<Emulated>(options); }

std::string probe() {
  return R"({"driver":"emulated","devices":[{"name":"emulated","architecture":"9.0","memory":8589934592,"processors":4}],"libraries":[],"reason":""})";
}

}  // namespace

}  // namespace limbeck::cuda

extern "C" __attribute__((visibility("default"))) const limbeck::BackendLibrary* limbeck_backend() {
  static const limbeck::BackendLibrary library = {limbeck::kBackendAbi, sizeof(limbeck::Call), sizeof(limbeck::View),
                                                  limbeck::cuda::open, limbeck::cuda::probe, limbeck::cuda::families, limbeck::cuda::imagine};
  return &library;
}
