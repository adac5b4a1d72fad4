#include "cuda/emulate/ranges.h"

#include <algorithm>
#include <cstdio>

#include "core/kernel.h"
#include "cuda/emulate/shared.h"

namespace limbeck::cuda::emulate {

std::vector<Range> ranges;

namespace {

constexpr size_t kCached = 256;
Range* cached[kCached];  // by page of the address

struct Allowed {
  uintptr_t begin, end;
  std::string name;
};
std::vector<Allowed> allowed;

void add(const void* data, size_t bytes, std::string name, int shift) {
  if (!data || bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  ranges.push_back({begin, begin + bytes, std::move(name), shift, 0});
}

void add(const View& view, const char* kind, int i) {
  const size_t bytes = size_of(view.dtype);
  add(view.data, static_cast<size_t>(view.size()) * bytes, std::string(kind) + " " + std::to_string(i), bytes == 1 ? 0 : bytes == 2 ? 1 : 2);
}

}  // namespace

void collect_ranges(const Call& call) {
  ranges.clear();
  for (int i = 0; i < kMaxTensors; ++i) {
    add(call.in[i], "input", i);
    add(call.out[i], "output", i);
  }
  add(call.workspace, call.workspace_bytes, "the workspace", 2);
  for (const Allowed& a : allowed) add(reinterpret_cast<const void*>(a.begin), a.end - a.begin, a.name, 2);
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin != b.begin ? a.begin < b.begin : a.end > b.end; });
  // An output may be an input too.
  std::vector<Range> apart;
  for (Range& r : ranges) {
    if (!apart.empty() && r.begin < apart.back().end) apart.back().end = std::max(apart.back().end, r.end);
    else apart.push_back(std::move(r));
  }
  ranges = std::move(apart);
  std::fill(std::begin(cached), std::end(cached), nullptr);
}

Range* find_range(uintptr_t a) {
  Range*& slot = cached[a >> 12 & (kCached - 1)];
  if (slot && a - slot->begin < slot->end - slot->begin) return slot;
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), a, [](uintptr_t x, const Range& r) { return x < r.begin; });
  if (after == ranges.begin()) return nullptr;
  Range* r = &*(after - 1);
  return a < r->end ? slot = r : nullptr;
}

// What is meant then is that tensor, and not a constant of the program.
bool is_near_a_range(uintptr_t a, size_t bytes) {
  return std::any_of(ranges.begin(), ranges.end(), [&](const Range& r) { return a + bytes + 4096 > r.begin && a < r.end + 4096; });
}

void allow(const void* data, size_t bytes, const char* name) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  allowed.push_back({begin, begin + bytes, name});
}

void forbid(const void* data) {
  std::erase_if(allowed, [&](const Allowed& a) { return a.begin == reinterpret_cast<uintptr_t>(data); });
}

std::string describe(const void* p) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (is_shared(p)) return describe_shared(a - reinterpret_cast<uintptr_t>(shared_window));
  const Range* nearest = nullptr;
  uintptr_t distance = 0;
  for (const Range& r : ranges) {
    const uintptr_t d = a < r.begin ? r.begin - a : a >= r.end ? a - r.end + 1 : 0;
    if (!nearest || d < distance) nearest = &r, distance = d;
  }
  if (!nearest || distance > (size_t{1} << 20)) {
    char text[64];
    std::snprintf(text, sizeof text, "address %p, which is in none of the call's tensors", p);
    return text;
  }
  const std::string size = " of " + nearest->name + " (" + std::to_string(nearest->end - nearest->begin) + " bytes)";
  if (a < nearest->begin) return std::to_string(nearest->begin - a) + " bytes before the start" + size;
  if (a >= nearest->end) return std::to_string(a - nearest->end) + " bytes past the end" + size;
  return "byte " + std::to_string(a - nearest->begin) + size;
}

}  // namespace limbeck::cuda::emulate
