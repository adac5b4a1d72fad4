#include "core/host.h"

#include <unistd.h>

#include <chrono>
#include <cstring>

#include "core/pages.h"

namespace limbeck {

namespace {

class Host final : public Backend {
 public:
  Host(int threads, const IsaKernels& kernels) : kernels_(kernels), pool_(threads) {}
  const char* name() const override { return "cpu"; }
  const char* detail() const override { return kernels_.isa; }
  int threads() const override { return pool_.size(); }
  bool computes_bf16() const override { return false; }
  std::vector<const KernelFamily*> families() const override { return {kernels_.families, kernels_.families + kernels_.count}; }
  size_t default_limit() const override { return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  std::unique_ptr<Range> reserve(size_t bytes) override { return reserve_pages(bytes); }

  void prepare(Call& call) override { call.threads = &pool_; }
  void run(const Kernel& kernel, const Call& call) override { kernel.run(call); }
  void write(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const void* from, size_t bytes, Done done) override {
    std::memcpy(to, from, bytes);
    done(nullptr);
  }
  void sync(Done done) override { done(nullptr); }
  void drain() override {}
  void clear_fault() override {}
  bool writes_at_once() const override { return true; }
  double time(const Kernel& kernel, const Call& call) override {
    const auto start = std::chrono::steady_clock::now();
    kernel.run(call);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  const IsaKernels& kernels_;
  ThreadPool pool_;
};

}  // namespace

std::unique_ptr<Backend> open_host(int threads, const IsaKernels& kernels) { return std::make_unique<Host>(threads, kernels); }

}  // namespace limbeck
