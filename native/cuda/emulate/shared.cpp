#include "cuda/emulate/shared.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#include "cuda/emulate/ptx.h"

namespace limbeck::cuda::emulate {

namespace {

constexpr size_t kGap = 64;

struct Array {
  size_t offset, bytes;  // as the GPU would place it
  size_t place;          // in a window
};
std::vector<Array> arrays;
size_t used = 0;         // bytes of a window
int windows = 0;         // that the arrays are in

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

std::string describe_shared(size_t at) {
  const size_t rank = at / kWindow, place = at % kWindow;
  const std::string where = executor.cluster > 1 ? " in block " + std::to_string(rank) + " of the cluster" : "";
  const Array* before = nullptr;
  size_t number = 0;
  for (size_t i = 0; i < arrays.size(); ++i)
    if (arrays[i].place <= place && (!before || arrays[i].place >= before->place)) before = &arrays[i], number = i;
  if (!before) return "an address before the first shared array" + where;
  const std::string name = " of shared array " + std::to_string(number) + " (" + std::to_string(before->bytes) + " bytes)" + where;
  if (place < before->place + before->bytes) return "byte " + std::to_string(place - before->place) + name;
  return std::to_string(place - before->place - before->bytes) + " bytes past the end" + name;
}

void begin_shared() {
  if (!shared_window) {
    // Aligned to its own size, so that addresses in it are offsets too.
    const size_t bytes = kWindow * kMaxCluster;
    void* p = mmap(nullptr, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    shared_window = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(p), bytes));
  }
  if (windows > 0 && executor.checks)
    for (int rank = 0; rank < windows; ++rank) unmark_arrays(static_cast<size_t>(rank) * kWindow, used);
  arrays.clear();
  used = 0;
  windows = executor.cluster;
}

void mark_arrays() {
  for (int rank = 0; rank < windows; ++rank)
    for (const Array& a : arrays) mark_array(static_cast<size_t>(rank) * kWindow + a.place, a.bytes);
}

// NaN in every float type.
void fill_shared() {
  for (int rank = 0; rank < executor.cluster; ++rank) std::memset(shared_window + static_cast<size_t>(rank) * kWindow, 0xff, used);
}

void* take_shared(SharedCuts& cuts, size_t bytes, size_t align) {
  if (align == 0 || (align & (align - 1)) != 0 || align > 1024) stop("ERR_EMULATED_SHARED", "takes shared memory aligned to %zu", align);
  const size_t offset = round_up(cuts.used, align);
  cuts.used = offset + bytes;
  if (cuts.used > executor.shared_bytes)
    stop("ERR_EMULATED_SHARED", "takes %zu bytes of shared memory, and was launched with %zu", cuts.used, executor.shared_bytes);
  char* const window = shared_window + static_cast<size_t>(executor.current->block->rank) * kWindow;
  for (const Array& a : arrays) {
    if (a.offset == offset && a.bytes == bytes) return window + a.place;
    if (offset < a.offset + a.bytes && a.offset < offset + bytes)
      stop("ERR_EMULATED_SHARED", "takes bytes %zu to %zu of shared memory, which overlap an array at %zu to %zu", offset, offset + bytes,
           a.offset, a.offset + a.bytes);
  }
  const Array array = {offset, bytes, round_up(used + (used > 0 ? kGap : 0), align)};
  if (array.place + bytes + kGap > kWindow)
    stop("ERR_EMULATED_SHARED", "takes %zu arrays in %zu bytes of shared memory: too many for their gaps", arrays.size() + 1, cuts.used);
  arrays.push_back(array);
  used = array.place + bytes + kGap;
  for (int rank = 0; rank < executor.cluster; ++rank) {
    const size_t at = static_cast<size_t>(rank) * kWindow + array.place;
    std::memset(shared_window + at, 0xff, bytes);
    if (executor.checks) mark_array(at, bytes);
  }
  return window + array.place;
}

uint32_t shared_address(const void* p) {
  if (!is_shared(p)) stop("ERR_EMULATED_BOUNDS", "an instruction for shared memory is given %s", describe(p).c_str());
  const auto at = static_cast<size_t>(static_cast<const char*>(p) - shared_window);
  const size_t rank = at / kWindow;
  // Another block's memory is reached through mapa only.
  if (static_cast<int>(rank) != executor.current->block->rank) return static_cast<uint32_t>((rank + 1) << 24 | at % kWindow);
  return static_cast<uint32_t>(at % kWindow);
}

uint32_t map_to_block(uint32_t address, uint32_t rank) {
  if (rank >= static_cast<uint32_t>(executor.cluster)) stop("ERR_EMULATED_BOUNDS", "mapa asks for block %u of a cluster of %d", rank, executor.cluster);
  return (rank + 1) << 24 | (address & 0xffffff);
}

char* at_shared_address(uint32_t address) {
  const uint32_t block = address >> 24, at = address & 0xffffff;
  if (at >= kWindow || block > static_cast<uint32_t>(executor.cluster))
    stop("ERR_EMULATED_BOUNDS", "an instruction is given shared address %u, which is in no array", address);
  const size_t rank = block == 0 ? static_cast<size_t>(executor.current->block->rank) : block - 1;
  return shared_window + rank * kWindow + at;
}

}  // namespace limbeck::cuda::emulate
