// Device memory of the CPU backend: one reserved range of addresses, handed out best-fit and merged again when freed.
// Used by one thread. Pages are the system's until they are touched, so the reservation itself costs nothing.
#pragma once
#include <cstddef>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace limbeck {

class Arena {
 public:
  explicit Arena(size_t limit);  // bytes; a multiple of the page size is reserved
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* allocate(size_t bytes);  // 64-byte aligned; nullptr when there is no room
  void free(void* p, size_t bytes);
  // Whole free pages, and forgets that they were used. Give them to give_back() once the stream has passed this point.
  std::vector<std::pair<void*, size_t>> take_free_pages();
  static void give_back(const std::vector<std::pair<void*, size_t>>& pages);

  size_t live() const { return live_; }
  size_t peak() const { return peak_; }
  size_t reserved() const { return high_water_; }  // the part of the range that was ever used
  size_t limit() const { return limit_; }
  void reset_peak() { peak_ = live_; }

 private:
  static size_t rounded(size_t bytes) { return bytes == 0 ? 64 : (bytes + 63) & ~size_t{63}; }
  void insert(size_t offset, size_t size);
  void erase(std::map<size_t, size_t>::iterator it);

  char* base_ = nullptr;
  size_t limit_ = 0, live_ = 0, peak_ = 0, high_water_ = 0;
  std::map<size_t, size_t> by_offset_;                 // offset -> size of each free block
  std::set<std::pair<size_t, size_t>> by_size_;        // (size, offset)
};

}  // namespace limbeck
