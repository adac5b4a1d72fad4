// Device memory: one reserved range of addresses, handed out best-fit and merged again when freed. Used by one thread.
#pragma once
#include <cstddef>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "core/backend.h"

namespace limbeck {

class Arena {
 public:
  explicit Arena(std::unique_ptr<Range> range);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* allocate(size_t bytes);  // 64-byte aligned; nullptr when there is no room
  void free(void* p, size_t bytes);
  // What was used and is free, and forgets that it was used. Give it to the range once the stream has passed this point.
  std::vector<std::pair<void*, size_t>> take_free_parts();
  Range& range() { return *range_; }

  size_t live() const { return live_; }
  size_t peak() const { return peak_; }
  size_t reserved() const { return high_water_; }  // the part of the range that was ever used
  size_t limit() const { return limit_; }
  void reset_peak() { peak_ = live_; }

 private:
  static size_t rounded(size_t bytes) { return bytes == 0 ? 64 : (bytes + 63) & ~size_t{63}; }
  void insert(size_t offset, size_t size);
  void erase(std::map<size_t, size_t>::iterator it);

  std::unique_ptr<Range> range_;
  char* base_;
  size_t limit_, live_ = 0, peak_ = 0, high_water_ = 0;
  std::map<size_t, size_t> by_offset_;                 // offset -> size of each free block
  std::set<std::pair<size_t, size_t>> by_size_;        // (size, offset)
};

}  // namespace limbeck
