// Global memory as a launch may touch it: the tensors of its call, and what was allowed beside them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace limbeck {
struct Call;
}

namespace limbeck::cuda::emulate {

struct Range {
  uintptr_t begin, end;
  std::string name;
  int shift;     // a shadow cell stands for 1 << shift bytes
  size_t cells;  // the first one
};
extern std::vector<Range> ranges;  // by address, apart from each other

void collect_ranges(const Call& call);
Range* find_range(uintptr_t a);
bool is_near_a_range(uintptr_t a, size_t bytes);

}  // namespace limbeck::cuda::emulate
