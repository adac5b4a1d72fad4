#include "core/arena.h"

#include <algorithm>

namespace limbeck {

Arena::Arena(std::unique_ptr<Range> range) : range_(std::move(range)), base_(range_->base()), limit_(range_->size()) { insert(0, limit_); }

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
  if (offset + size > high_water_ && !range_->commit(offset + size)) return nullptr;
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

std::vector<std::pair<void*, size_t>> Arena::take_free_parts() {
  std::vector<std::pair<void*, size_t>> parts;
  for (const auto& [offset, size] : by_offset_)
    if (offset < high_water_) parts.emplace_back(base_ + offset, std::min(size, high_water_ - offset));
  if (!by_offset_.empty()) {
    const auto& [offset, size] = *by_offset_.rbegin();
    if (offset + size == limit_) high_water_ = std::min(high_water_, offset);
  }
  return parts;
}

}  // namespace limbeck
