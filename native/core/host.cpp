#include "core/host.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace limbeck {

namespace {

// Pages are the system's until they are touched, so the reservation itself costs nothing.
class HostRange final : public Range {
 public:
  explicit HostRange(size_t bytes) {
    const size_t huge = size_t{2} << 20;
    size_ = (std::max(bytes, huge) + huge - 1) / huge * huge;
    void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(p);
#ifdef MADV_HUGEPAGE
    madvise(base_, size_, MADV_HUGEPAGE);  // fewer TLB misses in matrix products; a wish, not a need
#endif
  }
  ~HostRange() override { munmap(base_, size_); }
  char* base() const override { return base_; }
  size_t size() const override { return size_; }
  bool commit(size_t) override { return true; }
  void give_back(const std::vector<std::pair<void*, size_t>>& parts) override {
    for (const auto& [p, bytes] : parts) madvise(p, bytes, MADV_DONTNEED);
  }

 private:
  char* base_;
  size_t size_;
};

class Host final : public Backend {
 public:
  Host(int threads, const IsaKernels& kernels) : kernels_(kernels), pool_(threads) {}
  const char* name() const override { return "cpu"; }
  const char* detail() const override { return kernels_.isa; }
  int threads() const override { return pool_.size(); }
  bool computes_bf16() const override { return false; }
  std::vector<const KernelFamily*> families() const override { return {kernels_.families, kernels_.families + kernels_.count}; }
  size_t default_limit() const override { return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  std::unique_ptr<Range> reserve(size_t bytes) override { return std::make_unique<HostRange>(bytes); }

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
