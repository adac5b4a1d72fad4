// Who has seen what: vector clocks. Every thread counts its own steps, a step being the run between two of its releases (barriers,
// arrivals, fences). A thread's view of the others is shared with all that left the same barrier, and copied when it changes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace limbeck::cuda::emulate {

using Step = uint32_t;

// Steps of every thread (and of every asynchronous unit) that are known to have happened.
class Known {
 public:
  Known() = default;
  Known(const Known& other) : table_(other.table_) {
    if (table_) ++table_->users;
  }
  Known(Known&& other) noexcept : table_(std::exchange(other.table_, nullptr)) {}
  Known& operator=(Known other) noexcept {
    std::swap(table_, other.table_);
    return *this;
  }
  ~Known() { release(); }

  const Step* steps() const { return table_ ? table_->steps : nullptr; }
  Step of(int id) const { return table_ ? table_->steps[id] : 0; }
  bool same(const Known& other) const { return table_ == other.table_; }
  explicit operator bool() const { return table_ != nullptr; }
  void learn(int id, Step step) {
    if (of(id) >= step) return;
    own();
    table_->steps[id] = step;
  }
  void learn(const Known& other);

  static int capacity;  // ids; a multiple of 16; set before a block's first clock

 private:
  struct Table {
    int users, capacity;
    Step steps[];
  };
  void own();
  void release();
  static Table* make();
  Table* table_ = nullptr;
};

// A thread's knowledge at one moment: what it saw, and its own steps.
struct Moment {
  int id;
  Known seen;
  Step step;
  Known fenced;       // what a proxy fence has made visible to asynchronous units
  Step fenced_step;
};

// What all of them together know.
struct Joined {
  Known seen, fenced;
  void add(const Moment& moment);
  void add(const Joined& other);

 private:
  Known last_seen_, last_fenced_;  // already in: threads that left one barrier share them
};

}  // namespace limbeck::cuda::emulate
