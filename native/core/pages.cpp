#include "core/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace limbeck {

namespace {

class Pages final : public Range {
 public:
  explicit Pages(size_t bytes) {
    const size_t huge = size_t{2} << 20;
    size_ = (std::max(bytes, huge) + huge - 1) / huge * huge;
    void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(p);
#ifdef MADV_HUGEPAGE
    madvise(base_, size_, MADV_HUGEPAGE);  // fewer TLB misses in matrix products; a wish, not a need
#endif
  }
  ~Pages() override { munmap(base_, size_); }
  char* base() const override { return base_; }
  size_t size() const override { return size_; }
  bool commit(size_t) override { return true; }
  // The whole pages of each part.
  void give_back(const std::vector<std::pair<void*, size_t>>& parts) override {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    for (const auto& [p, bytes] : parts) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(p), from = (begin + page - 1) / page * page, to = (begin + bytes) / page * page;
      if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
    }
  }

 private:
  char* base_;
  size_t size_;
};

}  // namespace

std::unique_ptr<Range> reserve_pages(size_t bytes) { return std::make_unique<Pages>(bytes); }

}  // namespace limbeck
