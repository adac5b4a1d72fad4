#include "cuda/emulate/clocks.h"

#include <cstdlib>
#include <cstring>

namespace limbeck::cuda::emulate {

int Known::capacity = 0;

namespace {
// Tables that are free, all of the last capacity.
std::vector<void*> free_tables;
int free_capacity = 0;
}  // namespace

Known::Table* Known::make() {
  if (free_capacity != capacity) {
    for (void* t : free_tables) std::free(t);
    free_tables.clear();
    free_capacity = capacity;
  }
  void* memory;
  if (!free_tables.empty()) {
    memory = free_tables.back();
    free_tables.pop_back();
  } else {
    memory = std::malloc(sizeof(Table) + static_cast<size_t>(capacity) * sizeof(Step));
  }
  auto* table = static_cast<Table*>(memory);
  table->users = 1;
  table->capacity = capacity;
  return table;
}

void Known::release() {
  if (table_ && --table_->users == 0) {
    if (table_->capacity == free_capacity) free_tables.push_back(table_);
    else std::free(table_);
  }
  table_ = nullptr;
}

void Known::own() {
  if (table_ && table_->users == 1) return;
  Table* copy = make();
  if (table_) std::memcpy(copy->steps, table_->steps, static_cast<size_t>(capacity) * sizeof(Step));
  else std::memset(copy->steps, 0, static_cast<size_t>(capacity) * sizeof(Step));
  release();
  table_ = copy;
}

void Known::learn(const Known& other) {
  if (!other.table_ || other.table_ == table_) return;
  if (!table_) {
    *this = other;
    return;
  }
  own();
  Step* __restrict__ mine = table_->steps;
  const Step* __restrict__ theirs = other.table_->steps;
  for (int i = 0; i < capacity; ++i) mine[i] = mine[i] > theirs[i] ? mine[i] : theirs[i];
}

void Joined::add(const Moment& m) {
  if (!last_seen_.same(m.seen)) seen.learn(m.seen), last_seen_ = m.seen;
  seen.learn(m.id, m.step);
  if (!last_fenced_.same(m.fenced)) fenced.learn(m.fenced), last_fenced_ = m.fenced;
  fenced.learn(m.id, m.fenced_step);
}

void Joined::add(const Joined& other) {
  seen.learn(other.seen);
  fenced.learn(other.fenced);
}

}  // namespace limbeck::cuda::emulate
