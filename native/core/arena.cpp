#include "core/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace limbeck {

Arena::Arena(size_t limit) {
  const size_t huge = size_t{2} << 20;
  limit_ = (std::max(limit, huge) + huge - 1) / huge * huge;
  void* p = mmap(nullptr, limit_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(p);
#ifdef MADV_HUGEPAGE
  madvise(base_, limit_, MADV_HUGEPAGE);  // fewer TLB misses in matrix products; a wish, not a need
#endif
  insert(0, limit_);
}

Arena::~Arena() { munmap(base_, limit_); }

void Arena::insert(size_t offset, size_t size) {
  by_offset_.emplace(offset, size);
  by_size_.emplace(size, offset);
}

void Arena::erase(std::map<size_t, size_t>::iterator it) {
  by_size_.erase({it->second, it->first});
  by_offset_.erase(it);
}

void* Arena::allocate(size_t bytes) {
  const size_t size = rounded(bytes);
  const auto fit = by_size_.lower_bound({size, 0});
  if (fit == by_size_.end()) return nullptr;
  const size_t offset = fit->second, have = fit->first;
  erase(by_offset_.find(offset));
  if (have > size) insert(offset + size, have - size);
  live_ += size;
  peak_ = std::max(peak_, live_);
  high_water_ = std::max(high_water_, offset + size);
  return base_ + offset;
}

void Arena::free(void* p, size_t bytes) {
  size_t offset = static_cast<size_t>(static_cast<char*>(p) - base_), size = rounded(bytes);
  live_ -= size;
  auto next = by_offset_.lower_bound(offset);
  if (next != by_offset_.end() && next->first == offset + size) {
    size += next->second;
    erase(next++);
  }
  if (next != by_offset_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      offset = before->first;
      size += before->second;
      erase(before);
    }
  }
  insert(offset, size);
}

std::vector<std::pair<void*, size_t>> Arena::take_free_pages() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<std::pair<void*, size_t>> pages;
  for (const auto& [offset, size] : by_offset_) {
    const size_t from = (offset + page - 1) / page * page, to = std::min(offset + size, high_water_) / page * page;
    if (to > from) pages.emplace_back(base_ + from, to - from);
  }
  if (!by_offset_.empty()) {
    const auto& [offset, size] = *by_offset_.rbegin();
    if (offset + size == limit_) high_water_ = std::min(high_water_, offset);
  }
  return pages;
}

void Arena::give_back(const std::vector<std::pair<void*, size_t>>& pages) {
  for (const auto& [p, bytes] : pages) madvise(p, bytes, MADV_DONTNEED);
}

}  // namespace limbeck
