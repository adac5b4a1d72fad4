#include "cuda/emulate/shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/kernel.h"
#include "cuda/emulate/ranges.h"
#include "cuda/emulate/shared.h"

namespace limbeck::cuda::emulate {

char* shared_window = nullptr;
char* stacks = nullptr;
size_t stacks_bytes = 0;

namespace {

// What a cell remembers of an access: step << 12 | atomic << 11 | id. Steps only grow, over blocks and launches too, so that cells
// need no clearing: an old step is an access that does not matter any more.
using Cell = uint32_t;
constexpr int kIdBits = 11;
constexpr Cell kIdMask = (1u << kIdBits) - 1, kAtomic = 1u << kIdBits;
constexpr int kStepShift = kIdBits + 1;
constexpr int kInFlight = kIdMask;              // the id of a copy that has not landed
constexpr Step kLastStep = (1u << 20) - 2;
constexpr Cell kGuard = 0, kUnwritten = 1;      // of shared memory; both are older than any step

Cell cell(Step step, int id) { return step << kStepShift | static_cast<Cell>(id); }
int id_of(Cell c) { return static_cast<int>(c & kIdMask); }
Step step_of(Cell c) { return c >> kStepShift; }

// The last writer, and two readers since then that did not know of each other.
struct Cells {
  Cell *wrote = nullptr, *read = nullptr, *read_too = nullptr;
  Cells operator+(size_t i) const { return {wrote + i, read + i, read_too + i}; }
};

Cell* reserve_cells(size_t n) {
  void* p = mmap(nullptr, (n + 64) * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<Cell*>(p);
}
void clear_cells(Cell* p, size_t n) { madvise(p, n * sizeof(Cell), MADV_DONTNEED); }

constexpr size_t kGlobalCells = size_t{1} << 32;
Cells shared_cells, global_cells;
size_t global_cells_used = 0, global_cells_touched = 0;

// Blocks run one after the other: the first step of each, and whom the running one has heard of through atomics.
std::vector<Step> runs;
std::vector<uint64_t> heard;
std::unordered_map<uintptr_t, std::vector<uint64_t>> released;
bool has_heard(size_t run) { return run / 64 < heard.size() && (heard[run / 64] >> (run % 64) & 1); }
void merge(std::vector<uint64_t>& to, const std::vector<uint64_t>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] |= from[i];
}

Step clock_now = 0;
Cell launch_cell = 0, blocks_cell = 0;  // the oldest cells of this launch and of the running blocks
std::vector<const char*> units;         // names of the ids after the threads'
const Step no_steps[kIdMask + 1] = {};

// The current thread, for the fast paths.
struct {
  int id = -1;
  Cell word = 0;
  const Step* seen = no_steps;
} me;
size_t watched_shared = 0;  // bytes; 0 while nothing is checked
bool watching = false;

Accessor me_accessor;

std::string who_is(Cell c) {
  const int id = id_of(c);
  if (id == kInFlight) return "an asynchronous copy that nobody has waited for";
  if (c < blocks_cell) return "another block";
  if (id < static_cast<int>(executor.threads.size())) {
    const Thread& t = executor.threads[static_cast<size_t>(id)];
    std::string text = "thread " + std::to_string(t.number);
    if (executor.cluster > 1) text += " of block " + std::to_string(t.block->rank) + " of the cluster";
    return text;
  }
  return units[static_cast<size_t>(id) - executor.threads.size()];
}

bool ordered(Cell c, const Accessor& who) {
  const int id = id_of(c);
  if (id == kInFlight) return c < blocks_cell;
  if (c < blocks_cell) {
    if (c < launch_cell) return true;
    const auto run = std::upper_bound(runs.begin(), runs.end(), step_of(c)) - runs.begin() - 1;
    return has_heard(static_cast<size_t>(run));
  }
  if (id == who.own_id || id == who.id) return true;
  return step_of(c) <= who.seen->of(id);
}

bool is_fenced(Cell c, const Accessor& who) {
  const int id = id_of(c);
  if (c < blocks_cell || id >= static_cast<int>(executor.threads.size())) return true;
  return step_of(c) <= (id == who.own_id ? who.own_fenced : who.fenced->of(id));
}

const char* verb(Access access) { return access == Access::read ? "reads" : access == Access::atomic ? "changes" : "writes"; }

[[noreturn]] void race(const void* p, Cell other, bool other_wrote, Access access, const char* what) {
  const std::string place = describe(p), by = who_is(other);
  if (id_of(other) == kInFlight)
    stop("ERR_EMULATED_RACE", "%s %s %s, where %s has yet to land", what, verb(access), place.c_str(), by.c_str());
  stop("ERR_EMULATED_RACE", "%s %s %s, which %s %s with no barrier between", what, verb(access), place.c_str(), by.c_str(),
       other_wrote ? (other & kAtomic ? "changed" : "wrote") : "read");
}

// One cell; `oldest` is where accesses begin to matter.
inline void touch(Cells c, Cell oldest, const void* p, Access access, const Accessor& who, Cell word, const char* what) {
  const Cell w = *c.wrote;
  if (w >= oldest) {
    if (!(access == Access::atomic && (w & kAtomic)) && !ordered(w, who)) race(p, w, true, access, what);
    if (who.fenced && !is_fenced(w, who))
      stop("ERR_EMULATED_PROXY", "%s %s %s, which %s wrote without a fence_proxy_async before the barrier", what, verb(access),
           describe(p).c_str(), who_is(w).c_str());
  }
  const Cell r = *c.read, s = *c.read_too;
  if (access == Access::read) {
    if (r < oldest || ordered(r, who)) *c.read = word;
    else if (r != word) *c.read_too = word;
    return;
  }
  if (r >= oldest && !ordered(r, who)) race(p, r, false, access, what);
  if (s >= oldest && !ordered(s, who)) race(p, s, false, access, what);
  *c.wrote = word;
  *c.read = *c.read_too = 0;
}

Cell word_of(Access access, const Accessor& who) {
  if (access == Access::in_flight) return cell(who.own_step, kInFlight);
  return cell(who.step, who.id) | (access == Access::atomic ? kAtomic : 0);
}

// Sixteen bytes of one history: what a chunk of a box or a row of a matrix mostly is.
bool chunk_fast(size_t at, Access access, const Accessor& who) {
  if (access == Access::atomic) return false;
  Cell* const w = shared_cells.wrote + at;
  Cell* const r = shared_cells.read + at;
  Cell* const s = shared_cells.read_too + at;
  const Cell w0 = w[0], r0 = r[0], s0 = s[0];
  Cell differ = 0;
  for (int i = 1; i < 16; ++i) differ |= (w[i] ^ w0) | (r[i] ^ r0) | (s[i] ^ s0);
  if (differ != 0 || w0 == kGuard) return false;
  const Cell word = word_of(access, who);
  if (w0 >= blocks_cell && (!ordered(w0, who) || (who.fenced && !is_fenced(w0, who)))) return false;
  if (access == Access::read) {
    if (w0 < blocks_cell) return false;
    if (r0 == word) return true;
    Cell* const to = r0 < blocks_cell || ordered(r0, who) ? r : s;
    for (int i = 0; i < 16; ++i) to[i] = word;
    return true;
  }
  if ((r0 >= blocks_cell && !ordered(r0, who)) || (s0 >= blocks_cell && !ordered(s0, who))) return false;
  for (int i = 0; i < 16; ++i) w[i] = word;
  for (int i = 0; i < 16; ++i) r[i] = 0;
  for (int i = 0; i < 16; ++i) s[i] = 0;
  return true;
}

void shared_slow(size_t at, size_t bytes, Access access, const Accessor& who, const char* what) {
  const Cell word = word_of(access, who);
  for (size_t i = at; i < at + bytes; ++i) {
    const Cell w = shared_cells.wrote[i];
    const char* p = shared_window + i;
    if (w == kGuard)
      stop("ERR_EMULATED_BOUNDS", "%s %s %zu bytes at %s", what, verb(access), bytes, describe(shared_window + at).c_str());
    if (w < blocks_cell && (access == Access::read || access == Access::atomic))
      stop("ERR_EMULATED_UNWRITTEN", "%s reads %s, which nobody wrote", what, describe(p).c_str());
    touch(shared_cells + i, blocks_cell, p, access, who, word, what);
  }
}

// The bytes of one access mostly have one history.
template <int N, bool Write>
inline void shared_fast(size_t at) {
  Cell* const w = shared_cells.wrote + at;
  Cell* const r = shared_cells.read + at;
  Cell* const s = shared_cells.read_too + at;
  const Cell w0 = w[0], r0 = r[0], s0 = s[0];
  Cell differ = 0;
  for (int i = 1; i < N; ++i) differ |= (w[i] ^ w0) | (r[i] ^ r0) | (s[i] ^ s0);
  const Cell oldest = blocks_cell;
  const auto seen = [](Cell c) { return id_of(c) == me.id || (id_of(c) != kInFlight && step_of(c) <= me.seen[id_of(c)]); };
  const auto known = [&](Cell c) { return c < oldest || seen(c); };
  if constexpr (Write) {
    if (differ == 0 && w0 != kGuard && known(w0) && known(r0) && known(s0)) {
      for (int i = 0; i < N; ++i) w[i] = me.word;
      for (int i = 0; i < N; ++i) r[i] = 0;
      for (int i = 0; i < N; ++i) s[i] = 0;
      return;
    }
  } else {
    if (differ == 0 && w0 >= oldest && seen(w0)) {
      if (known(r0)) {
        if (r0 != me.word)
          for (int i = 0; i < N; ++i) r[i] = me.word;
      } else {
        for (int i = 0; i < N; ++i) s[i] = me.word;
      }
      return;
    }
  }
  shared_slow(at, N, Write ? Access::write : Access::read, me_accessor, "the kernel");
}

size_t take_cells(size_t n) {
  const size_t at = global_cells_used;
  global_cells_used += (n + 15) & ~size_t{15};
  if (global_cells_used > kGlobalCells) throw std::bad_alloc();
  global_cells_touched = std::max(global_cells_touched, global_cells_used);
  return at;
}

size_t cells_in(const Range& r) { return ((r.end - r.begin) >> r.shift) + 1; }

// Smaller cells, where an access is smaller than they are.
void refine(Range& r, int shift) {
  const size_t from = r.cells, before = cells_in(r);
  const int by = r.shift - shift;
  r.shift = shift;
  r.cells = take_cells(cells_in(r));
  for (size_t i = 0; i < before; ++i)
    for (size_t j = i << by; j < (i + 1) << by && j < cells_in(r); ++j) {
      global_cells.wrote[r.cells + j] = global_cells.wrote[from + i];
      global_cells.read[r.cells + j] = global_cells.read[from + i];
      global_cells.read_too[r.cells + j] = global_cells.read_too[from + i];
    }
}

void global_access(Range& r, uintptr_t a, size_t bytes, Access access, const Accessor& who, const char* what) {
  const uintptr_t at = a - r.begin;
  if (at + bytes > r.end - r.begin)
    stop("ERR_EMULATED_BOUNDS", "%s %s %zu bytes at %s", what, verb(access), bytes, describe(reinterpret_cast<const void*>(a)).c_str());
  const uintptr_t loose = at | bytes;
  if (loose & ((1u << r.shift) - 1)) refine(r, __builtin_ctzll(loose));
  const Cell word = word_of(access, who);
  const size_t first = at >> r.shift, last = (at + bytes - 1) >> r.shift;
  for (size_t i = first; i <= last; ++i)
    touch(global_cells + (r.cells + i), launch_cell, reinterpret_cast<const void*>(r.begin + (i << r.shift)), access, who, word, what);
}

bool on_a_fiber() {
  return static_cast<size_t>(static_cast<char*>(__builtin_frame_address(0)) - stacks) < stacks_bytes;
}

// Not in a tensor of the call. Reading constants of the program is fine.
__attribute__((noinline)) void stray_write(uintptr_t a, size_t bytes) {
  if (on_a_fiber())
    stop("ERR_EMULATED_BOUNDS", "the kernel writes %zu bytes at %s", bytes, describe(reinterpret_cast<const void*>(a)).c_str());
}
__attribute__((noinline)) void stray_read(uintptr_t a, size_t bytes) {
  if (is_near_a_range(a, bytes) && on_a_fiber())
    stop("ERR_EMULATED_BOUNDS", "the kernel reads %zu bytes at %s", bytes, describe(reinterpret_cast<const void*>(a)).c_str());
}

template <int N, bool Write>
inline void access(const void* p) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  const size_t in_shared = a - reinterpret_cast<uintptr_t>(shared_window);
  if (in_shared < watched_shared) return shared_fast<N, Write>(in_shared);
  if (a - reinterpret_cast<uintptr_t>(stacks) < stacks_bytes || !watching) return;
  if (Range* r = find_range(a)) return global_access(*r, a, N, Write ? Access::write : Access::read, me_accessor, "the kernel");
  if (Write) stray_write(a, N);
  else stray_read(a, N);
}

void access_range(const void* p, size_t bytes, Access kind) {
  if (!watching || bytes == 0) return;
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (a - reinterpret_cast<uintptr_t>(stacks) < stacks_bytes) return;
  if (is_shared(p)) return shared_slow(a - reinterpret_cast<uintptr_t>(shared_window), bytes, kind, me_accessor, "the kernel");
  if (Range* r = find_range(a)) return global_access(*r, a, bytes, kind, me_accessor, "the kernel");
  if (kind == Access::write) stray_write(a, bytes);
  else stray_read(a, bytes);
}

}  // namespace

Accessor thread_accessor() { return me_accessor; }
Accessor accessor_of(const Thread& t) { return {t.id, t.step, &t.seen, t.id, t.step}; }
Accessor unit_accessor(int unit, Step step) {
  const Thread& t = *executor.current;
  return {unit, step, &t.seen, t.id, t.step, &t.fenced, t.fenced_step};
}

void check_access(const void* p, size_t bytes, Access access, const Accessor& who, const char* what) {
  if (bytes == 0) return;
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (is_shared(p)) {
    const size_t at = a - reinterpret_cast<uintptr_t>(shared_window);
    if (watched_shared > 0 && !(bytes == 16 && chunk_fast(at, access, who))) shared_slow(a - reinterpret_cast<uintptr_t>(shared_window), bytes, access, who, what);
    return;
  }
  if (!watching || a - reinterpret_cast<uintptr_t>(stacks) < stacks_bytes) return;
  Range* r = find_range(a);
  if (!r) stop("ERR_EMULATED_BOUNDS", "%s %s %zu bytes at %s", what, verb(access), bytes, describe(p).c_str());
  global_access(*r, a, bytes, access, who, what);
}

void land(const void* p, size_t bytes, int id, Step step) {
  if (!watching || bytes == 0) return;
  const Cell word = cell(step, id);
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (is_shared(p)) {
    const size_t at = a - reinterpret_cast<uintptr_t>(shared_window);
    for (size_t i = at; i < at + bytes; ++i) shared_cells.wrote[i] = word;
  } else if (Range* r = find_range(a)) {
    for (size_t i = (a - r->begin) >> r->shift; i <= (a + bytes - 1 - r->begin) >> r->shift; ++i) global_cells.wrote[r->cells + i] = word;
  }
}

void check_aligned(const void* p, size_t alignment, const char* what) {
  if ((reinterpret_cast<uintptr_t>(p) & (alignment - 1)) == 0) return;
  stop("ERR_EMULATED_ALIGNMENT", "%s is given %s, which is not aligned to %zu bytes", what, describe(p).c_str(), alignment);
}

void order_blocks(const void* p) {
  if (!watching || is_shared(p)) return;
  std::vector<uint64_t>& by = released[reinterpret_cast<uintptr_t>(p)];
  merge(heard, by);
  by = heard;
  const size_t run = runs.size() - 1;
  if (by.size() <= run / 64) by.resize(run / 64 + 1);
  by[run / 64] |= uint64_t{1} << (run % 64);
}

void begin_launch(const Call& call) {
  if (!shared_cells.wrote) {
    shared_cells = {reserve_cells(kWindow * kMaxCluster), reserve_cells(kWindow * kMaxCluster), reserve_cells(kWindow * kMaxCluster)};
    global_cells = {reserve_cells(kGlobalCells), reserve_cells(kGlobalCells), reserve_cells(kGlobalCells)};
  }
  collect_ranges(call);
  global_cells_used = 0;
  for (Range& r : ranges) r.cells = take_cells(cells_in(r));
  runs.clear(), heard.clear(), released.clear();
  launch_cell = cell(clock_now + 1, 0);
}

void mark_array(size_t at, size_t bytes) { std::fill_n(shared_cells.wrote + at, bytes, kUnwritten); }
void unmark_arrays(size_t at, size_t bytes) { std::fill_n(shared_cells.wrote + at, bytes, kGuard); }

void begin_blocks() {
  if (clock_now > kLastStep - (1u << 17)) {
    // Steps begin again; what earlier blocks of this launch did is forgotten.
    for (Cell* cells : {global_cells.wrote, global_cells.read, global_cells.read_too}) clear_cells(cells, global_cells_touched);
    for (Cell* cells : {shared_cells.wrote, shared_cells.read, shared_cells.read_too}) clear_cells(cells, kWindow * kMaxCluster);
    mark_arrays();
    runs.clear(), heard.clear(), released.clear();
    clock_now = 0;
    launch_cell = cell(1, 0);
  }
  ++clock_now;
  blocks_cell = cell(clock_now, 0);
  runs.push_back(clock_now);
  heard.clear();
  units.clear();
  Known::capacity = (static_cast<int>(executor.threads.size()) + 128 + 15) / 16 * 16;
  for (Thread& t : executor.threads) {
    t.seen = t.fenced = Known();
    t.step = clock_now;
    t.fenced_step = 0;
  }
  watching = true;
  watched_shared = kWindow * kMaxCluster;
}

void end_blocks() {
  watching = false;
  watched_shared = 0;
  for (const Thread& t : executor.threads) clock_now = std::max(clock_now, t.step);
}

void note_step(Step step) { clock_now = std::max(clock_now, step); }

Step first_step() { return step_of(blocks_cell); }

void end_launch() {
  watching = false;
  watched_shared = 0;
  for (Thread& t : executor.threads) t.seen = t.fenced = Known();
  // A large launch's cells are not kept.
  if (global_cells_touched > (size_t{64} << 20)) {
    for (Cell* cells : {global_cells.wrote, global_cells.read, global_cells.read_too}) clear_cells(cells, global_cells_touched);
    global_cells_touched = 0;
  }
}

void enter_thread() {
  const Thread& t = *executor.current;
  if (t.step >= kLastStep) watching = false, watched_shared = 0;
  me.id = t.id;
  me.word = cell(t.step, t.id);
  me.seen = t.seen ? t.seen.steps() : no_steps;
  me_accessor = {t.id, t.step, &t.seen, t.id, t.step};
}

int new_unit(const char* name) {
  const int id = static_cast<int>(executor.threads.size() + units.size());
  if (id >= Known::capacity) stop("ERR_EMULATED", "uses more than 128 barriers, warpgroups and storing threads in a cluster");
  units.push_back(name);
  return id;
}

}  // namespace limbeck::cuda::emulate

// What the compiler calls before each access of an instrumented file (-fsanitize=thread, without its runtime).
using limbeck::cuda::emulate::Access;
extern "C" {
#define LIMBECK_TSAN(n)                                                                         \
  __attribute__((visibility("hidden"))) void __tsan_read##n(void* p) { limbeck::cuda::emulate::access<n, false>(p); }          \
  __attribute__((visibility("hidden"))) void __tsan_write##n(void* p) { limbeck::cuda::emulate::access<n, true>(p); }          \
  __attribute__((visibility("hidden"))) void __tsan_unaligned_read##n(void* p) { limbeck::cuda::emulate::access<n, false>(p); } \
  __attribute__((visibility("hidden"))) void __tsan_unaligned_write##n(void* p) { limbeck::cuda::emulate::access<n, true>(p); } \
  __attribute__((visibility("hidden"))) void __tsan_read_write##n(void* p) { limbeck::cuda::emulate::access<n, true>(p); }
LIMBECK_TSAN(1)
LIMBECK_TSAN(2)
LIMBECK_TSAN(4)
LIMBECK_TSAN(8)
LIMBECK_TSAN(16)
#undef LIMBECK_TSAN
#define LIMBECK_HOOK __attribute__((visibility("hidden"))) void
LIMBECK_HOOK __tsan_read_range(void* p, size_t n) { limbeck::cuda::emulate::access_range(p, n, Access::read); }
LIMBECK_HOOK __tsan_write_range(void* p, size_t n) { limbeck::cuda::emulate::access_range(p, n, Access::write); }
LIMBECK_HOOK __tsan_init() {}
LIMBECK_HOOK __tsan_func_entry(void*) {}
LIMBECK_HOOK __tsan_func_exit() {}
LIMBECK_HOOK __tsan_vptr_update(void**, void*) {}
LIMBECK_HOOK __tsan_vptr_read(void**) {}
__attribute__((visibility("hidden"))) void* __tsan_memcpy(void* to, const void* from, size_t n) {
  limbeck::cuda::emulate::access_range(from, n, Access::read), limbeck::cuda::emulate::access_range(to, n, Access::write);
  return std::memcpy(to, from, n);
}
__attribute__((visibility("hidden"))) void* __tsan_memmove(void* to, const void* from, size_t n) {
  limbeck::cuda::emulate::access_range(from, n, Access::read), limbeck::cuda::emulate::access_range(to, n, Access::write);
  return std::memmove(to, from, n);
}
__attribute__((visibility("hidden"))) void* __tsan_memset(void* to, int value, size_t n) {
  limbeck::cuda::emulate::access_range(to, n, Access::write);
  return std::memset(to, value, n);
}
// -fsanitize=alignment,bounds: types that are looser aligned than they say, and arrays of registers beyond their end.
LIMBECK_HOOK __ubsan_handle_type_mismatch_v1(void*, uintptr_t p);
LIMBECK_HOOK __ubsan_handle_out_of_bounds(void*, uintptr_t index);
LIMBECK_HOOK __ubsan_handle_type_mismatch_v1_abort(void* d, uintptr_t p) { __ubsan_handle_type_mismatch_v1(d, p); }
LIMBECK_HOOK __ubsan_handle_out_of_bounds_abort(void* d, uintptr_t index) { __ubsan_handle_out_of_bounds(d, index); }
LIMBECK_HOOK __ubsan_handle_type_mismatch_v1(void* data, uintptr_t p) {
  using namespace limbeck::cuda::emulate;
  if (!watching || !on_a_fiber()) return;
  struct Data {
    struct { const char* file; unsigned line, column; } where;
    const void* type;
    unsigned char log_alignment, kind;
  };
  const auto* d = static_cast<const Data*>(data);
  stop("ERR_EMULATED_ALIGNMENT", "%s:%u accesses %s as a type that is aligned to %zu bytes", d->where.file, d->where.line,
       describe(reinterpret_cast<const void*>(p)).c_str(), size_t{1} << d->log_alignment);
}
LIMBECK_HOOK __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  using namespace limbeck::cuda::emulate;
  if (!watching || !on_a_fiber()) return;
  struct Data {
    struct { const char* file; unsigned line, column; } where;
  };
  const auto* d = static_cast<const Data*>(data);
  stop("ERR_EMULATED_BOUNDS", "%s:%u reads or writes element %td of an array that is shorter", d->where.file, d->where.line,
       static_cast<ptrdiff_t>(index));
}
}
