#include "cuda/emulate/copies.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cuda/bf16.cuh"

namespace limbeck::cuda::emulate {

namespace {

// A load that completes on a barrier: from global memory, or from another block's shared memory.
struct Load {
  Box box;
  char* to;
};

struct Mbarrier {
  int arrivals = 0;     // of each phase
  int pending = 0;      // that have yet to come
  int64_t bytes = 0;    // announced, and not yet landed
  uint64_t phase = 0;   // that is open
  int maker = 0;        // the thread that initialised it
  bool fenced = false;
  Joined now, before;   // what those knew that arrived in the open phase, and in the one before
  std::vector<Thread*> waiting;
  std::vector<Load> loads;
  int unit = -1;
  Step step = 0;
};
std::unordered_map<const char*, std::unique_ptr<Mbarrier>> barriers;

Mbarrier& find(const char* p, const char* what) {
  const auto at = barriers.find(p);
  if (at == barriers.end()) stop("ERR_EMULATED_MBARRIER", "%s of %s, where no mbarrier was initialised", what, describe(p).c_str());
  check_access(p, 8, Access::read, thread_accessor(), what);
  return *at->second;
}

void next_step() {
  ++executor.current->step;
  enter_thread();
}

void maybe_complete(Mbarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  ++m.phase;
  m.pending = m.arrivals;
  m.before = m.now;
  m.now = {};
  for (Thread* t : m.waiting)
    if (t != executor.current) wake(*t);
  m.waiting.clear();
}

// Every load that was issued to the barrier arrives.
void land_loads(Mbarrier& m) {
  if (m.loads.empty()) return;
  std::vector<Load> loads;
  loads.swap(m.loads);
  if (executor.checks) note_step(++m.step);
  for (const Load& load : loads) {
    pieces(load.box, load.to, [&](const Piece& p) {
      char bytes[16] = {};
      std::memcpy(bytes + p.skip, p.global, static_cast<size_t>(p.inside));
      std::memcpy(p.shared, bytes, static_cast<size_t>(p.bytes));
      if (executor.checks) land(p.shared, static_cast<size_t>(p.bytes), m.unit, m.step);
    });
    m.bytes -= load.box.bytes;
  }
  if (executor.checks) m.now.seen.learn(m.unit, m.step);
  maybe_complete(m);
}

void issue(Box box, char* to, const char* barrier, const char* what) {
  Mbarrier& m = find(barrier, what);
  if (executor.checks && !m.fenced)
    stop("ERR_EMULATED_PROXY", "%s on %s, which was initialised without a fence_mbarrier_init", what, describe(barrier).c_str());
  if (executor.checks) {
    if (m.unit < 0) m.unit = new_unit("a bulk load"), m.step = first_step();
    const Accessor reader = unit_accessor(m.unit, m.step + 1);
    pieces(box, to, [&](const Piece& p) {
      check_access(p.shared, static_cast<size_t>(p.bytes), Access::in_flight, reader, what);
      check_access(p.global, static_cast<size_t>(p.inside), Access::read, reader, what);
    });
  }
  m.loads.push_back({std::move(box), to});
  if (!m.waiting.empty()) land_loads(m);
}

Box box_of(const TensorMap* map, int rank, const int* at, const void* shared, const char* what) {
  if (map->made != 1) stop("ERR_EMULATED_TMA", "%s with a tensor map that tensor_map() did not make", what);
  if (map->rank != rank) stop("ERR_EMULATED_TMA", "%s with %d coordinates of a tensor map of rank %d", what, rank, map->rank);
  const size_t repeat = map->swizzle == 0 ? 128 : size_t{128} << map->swizzle;
  check_aligned(shared, repeat, what);
  Box box;
  box.map = *map;
  box.rank = rank;
  box.bytes = map->element_bytes;
  for (int d = 0; d < rank; ++d) box.at[d] = at[d], box.bytes *= map->box[d];
  return box;
}

Box run_of(void* global, uint32_t bytes, const char* what) {
  check_aligned(global, 16, what);
  if (bytes % 16 != 0) stop("ERR_EMULATED_TMA", "%s of %u bytes, which is no multiple of 16", what, bytes);
  Box box;
  box.plain = static_cast<char*>(global);
  box.bytes = bytes;
  return box;
}

}  // namespace

template <class F>
void pieces(const Box& box, char* shared, F piece) {
  if (box.rank == 0) {
    for (uint32_t i = 0; i < box.bytes; i += 16) piece(Piece{shared + i, box.plain + i, 16, 0, 16});
    return;
  }
  const TensorMap& map = box.map;
  const int64_t element = map.element_bytes;
  const int64_t row = map.box[0] * element;
  int64_t rows = 1;
  for (int d = 1; d < box.rank; ++d) rows *= map.box[d];
  const int64_t from = std::max<int64_t>(0, -static_cast<int64_t>(box.at[0])) * element;  // of a row, what is inside
  const int64_t to = std::clamp<int64_t>(static_cast<int64_t>(map.dims[0]) - box.at[0], 0, map.box[0]) * element;
  for (int64_t r = 0; r < rows; ++r) {
    bool inside = from < to;
    int64_t offset = box.at[0] * element;
    for (int64_t d = 1, rest = r; d < box.rank; ++d) {
      const int64_t i = box.at[d] + rest % map.box[d];
      rest /= map.box[d];
      if (i < 0 || i >= static_cast<int64_t>(map.dims[d])) inside = false;
      offset += i * static_cast<int64_t>(map.strides[d - 1]);
    }
    for (int64_t b = 0; b < row; b += 16) {
      auto place = static_cast<size_t>(shared + r * row + b - shared_window);
      // The chunk's number within its span is changed by the number of the 128 bytes that it lies in.
      if (map.swizzle != 0) place ^= (place >> 7 & ((size_t{1} << map.swizzle) - 1)) << 4;
      const int bytes = static_cast<int>(std::min<int64_t>(16, row - b));
      const int64_t first = std::clamp<int64_t>(from - b, 0, bytes), last = std::clamp<int64_t>(to - b, 0, bytes);
      const bool any = inside && first < last;
      // What lies outside has no address.
      char* global = any ? const_cast<char*>(map.data) + offset + b + first : shared_window + place;
      piece(Piece{shared_window + place, global, bytes, any ? static_cast<int>(first) : 0, any ? static_cast<int>(last - first) : 0});
    }
  }
}

// --- Copies of sm_80 -----------------------------------------------------------------------------------------------------------------

void cp_async(void* shared, const void* global, int size, int bytes) {
  const auto n = static_cast<size_t>(size);
  if (!is_shared(shared)) stop("ERR_EMULATED_BOUNDS", "cp.async writes %s", describe(shared).c_str());
  check_aligned(shared, n, "cp.async");
  check_aligned(global, n, "cp.async");
  if (bytes < 0 || bytes > size) stop("ERR_EMULATED_BOUNDS", "cp.async of %d bytes with %d that are read", size, bytes);
  if (executor.checks) {
    check_access(shared, n, Access::in_flight, thread_accessor(), "cp.async");
    check_access(global, static_cast<size_t>(bytes), Access::read, thread_accessor(), "cp.async");
  }
  executor.current->copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), static_cast<uint32_t>(size),
                                      static_cast<uint32_t>(bytes)});
}

void cp_async_commit() {
  Thread& me = *executor.current;
  me.copy_groups.push_back(std::move(me.copies));
  me.copies.clear();
}

void cp_async_wait(int newest) {
  Thread& me = *executor.current;
  const auto keep = static_cast<size_t>(newest);
  if (me.copy_groups.size() <= keep) return;
  const size_t ready = me.copy_groups.size() - keep;
  for (size_t g = 0; g < ready; ++g)
    for (const Copy& c : me.copy_groups[g]) {
      std::memset(c.to, 0, c.size);
      std::memcpy(c.to, c.from, c.bytes);
      if (executor.checks) land(c.to, c.size, me.id, me.step);
    }
  me.copy_groups.erase(me.copy_groups.begin(), me.copy_groups.begin() + static_cast<ptrdiff_t>(ready));
}

// --- mbarrier ------------------------------------------------------------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier, int arrivals) {
  const auto* p = reinterpret_cast<const char*>(barrier);
  shared_address(p);
  check_aligned(p, 8, "mbarrier_init");
  if (arrivals < 1 || arrivals > (1 << 20) - 1) stop("ERR_EMULATED_MBARRIER", "mbarrier_init with %d arrivals", arrivals);
  if (barriers.count(p)) stop("ERR_EMULATED_MBARRIER", "mbarrier_init of %s, which is an mbarrier already", describe(p).c_str());
  check_access(p, 8, Access::write, thread_accessor(), "mbarrier_init");
  auto m = std::make_unique<Mbarrier>();
  m->arrivals = m->pending = arrivals;
  m->maker = executor.current->id;
  barriers.emplace(p, std::move(m));
}

void mbarrier_inval(uint64_t* barrier) {
  const auto* p = reinterpret_cast<const char*>(barrier);
  const Mbarrier& m = find(p, "mbarrier_inval");
  if (!m.waiting.empty() || !m.loads.empty()) stop("ERR_EMULATED_MBARRIER", "mbarrier_inval of %s, which is in use", describe(p).c_str());
  check_access(p, 8, Access::write, thread_accessor(), "mbarrier_inval");
  barriers.erase(p);
}

void mbarrier_arrive(uint32_t barrier, bool arrive, uint32_t bytes) {
  const char* p = at_shared_address(barrier);
  Mbarrier& m = find(p, arrive ? "mbarrier_arrive" : "mbarrier_expect_tx");
  m.bytes += bytes;
  if (m.bytes > (1 << 20) - 1) stop("ERR_EMULATED_MBARRIER", "%s awaits %lld bytes; it can count to 1048575", describe(p).c_str(), static_cast<long long>(m.bytes));
  if (!arrive) return;
  if (m.pending == 0)
    stop("ERR_EMULATED_MBARRIER", "arrives at %s more often than the %d times of a phase", describe(p).c_str(), m.arrivals);
  --m.pending;
  if (executor.checks) {
    m.now.add(executor.current->moment());
    next_step();
  }
  if (m.pending == 0 && !m.waiting.empty()) land_loads(m);
  maybe_complete(m);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  const auto* p = reinterpret_cast<const char*>(barrier);
  shared_address(p);
  Mbarrier& m = find(p, "mbarrier_wait");
  if ((m.phase & 1) == (parity & 1)) land_loads(m);
  if ((m.phase & 1) == (parity & 1)) {
    m.waiting.push_back(executor.current);
    wait("mbarrier_wait", reinterpret_cast<uint64_t>(p));
  }
  if (!executor.checks) return;
  executor.current->learn(m.before);
  enter_thread();
}

std::string describe_mbarrier(const char* p) {
  const Mbarrier& m = *barriers.at(p);
  return " for " + describe(p) + " (phase " + std::to_string(m.phase) + ": " + std::to_string(m.pending) + " of " + std::to_string(m.arrivals) +
         " arrivals and " + std::to_string(m.bytes) + " bytes to come)";
}

void fence(Fence kind) {
  Thread& me = *executor.current;
  if (!executor.checks) return;
  for (auto& [p, m] : barriers)
    if (m->maker == me.id) m->fenced = true;
  if (kind == Fence::mbarrier_init) return;
  me.fenced = me.seen;
  me.fenced_step = me.step;
  next_step();
}

// --- Bulk copies ---------------------------------------------------------------------------------------------------------------------

void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, uint32_t blocks, int rank, const int* at) {
  if (!is_shared(shared)) stop("ERR_EMULATED_BOUNDS", "tma_load writes %s", describe(shared).c_str());
  const Box box = box_of(map, rank, at, shared, "tma_load");
  const auto* p = reinterpret_cast<const char*>(barrier);
  shared_address(p);
  if (blocks == 0) return issue(box, static_cast<char*>(shared), p, "tma_load");
  const auto place = static_cast<size_t>(static_cast<char*>(shared) - shared_window) % kWindow;
  const auto signal = static_cast<size_t>(p - shared_window) % kWindow;
  for (int r = 0; r < 16; ++r) {
    if (!(blocks >> r & 1)) continue;
    if (r >= executor.cluster) stop("ERR_EMULATED_TMA", "tma_load to block %d of a cluster of %d", r, executor.cluster);
    char* window = shared_window + static_cast<size_t>(r) * kWindow;
    issue(box, window + place, window + signal, "tma_load");
  }
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  if (!is_shared(shared)) stop("ERR_EMULATED_BOUNDS", "bulk_load writes %s", describe(shared).c_str());
  check_aligned(shared, 16, "bulk_load");
  issue(run_of(const_cast<void*>(global), bytes, "bulk_load"), static_cast<char*>(shared), reinterpret_cast<const char*>(barrier), "bulk_load");
}

void bulk_copy_to_cluster(uint32_t to, const void* shared, uint32_t bytes, uint32_t barrier) {
  shared_address(shared);
  char* target = at_shared_address(to);
  check_aligned(target, 16, "bulk_copy_to_cluster");
  issue(run_of(const_cast<void*>(shared), bytes, "bulk_copy_to_cluster"), target, at_shared_address(barrier), "bulk_copy_to_cluster");
}

namespace {

void start_store(Box box, const void* shared, bool add, const char* what) {
  Thread& me = *executor.current;
  auto* store = new Store{std::move(box), const_cast<char*>(static_cast<const char*>(shared)), add, false, 0, {}, false};
  me.stores.push_back(store);
  if (!executor.checks) return;
  if (me.store_unit < 0) me.store_unit = new_unit("a bulk store");
  const Accessor unit = unit_accessor(me.store_unit, me.store_step);
  pieces(store->box, store->shared, [&](const Piece& p) {
    check_access(p.shared, static_cast<size_t>(p.bytes), Access::read, unit, what);
    check_access(p.global, static_cast<size_t>(p.inside), add ? Access::atomic : Access::in_flight, unit, what);
  });
}

void read_shared(Store& store) {
  if (store.read) return;
  store.read = true;
  pieces(store.box, store.shared, [&](const Piece& p) { store.captured.insert(store.captured.end(), p.shared, p.shared + p.bytes); });
}

void write_global(Store& store, int unit) {
  const char* from = store.captured.data();
  const DType dtype = store.box.rank == 0 ? DType::f32 : store.box.map.dtype;
  pieces(store.box, store.shared, [&](const Piece& p) {
    const char* inside = from + p.skip;
    from += p.bytes;
    if (!store.add) {
      std::memcpy(p.global, inside, static_cast<size_t>(p.inside));
      if (executor.checks) land(p.global, static_cast<size_t>(p.inside), unit, store.step);
    } else if (dtype == DType::bf16) {
      for (int i = 0; i < p.inside; i += 2) {
        bf16 a, b;
        std::memcpy(&a, p.global + i, 2), std::memcpy(&b, inside + i, 2);
        a = to_bf16(to_float(a) + to_float(b));
        std::memcpy(p.global + i, &a, 2);
      }
    } else {
      for (int i = 0; i < p.inside; i += 4) {
        float a, b;
        std::memcpy(&a, p.global + i, 4), std::memcpy(&b, inside + i, 4);
        a += b;
        std::memcpy(p.global + i, &a, 4);
      }
    }
  });
}

void drop(std::vector<Store*>& stores) {
  for (Store* store : stores) delete store;
  stores.clear();
}

}  // namespace

void tma_store(const TensorMap* map, const void* shared, bool add, int rank, const int* at) {
  const char* what = add ? "tma_reduce_add" : "tma_store";
  shared_address(shared);
  const Box box = box_of(map, rank, at, shared, what);
  if (add && map->dtype != DType::f32 && map->dtype != DType::bf16) stop("ERR_EMULATED_TMA", "tma_reduce_add of elements that are neither f32 nor bf16");
  start_store(box, shared, add, what);
}

void bulk_store(void* global, const void* shared, uint32_t bytes, bool add) {
  const char* what = add ? "bulk_reduce_add" : "bulk_store";
  shared_address(shared);
  check_aligned(shared, 16, what);
  start_store(run_of(global, bytes, what), shared, add, what);
}

void bulk_commit() {
  Thread& me = *executor.current;
  for (Store* store : me.stores)
    if (!store->committed) store->committed = true, store->step = me.store_step;
  if (executor.checks) note_step(++me.store_step);
  else ++me.store_step;
}

// Groups are steps: those up to `last` are waited for.
void bulk_wait(int newest, bool read) {
  Thread& me = *executor.current;
  const int64_t last = static_cast<int64_t>(me.store_step) - 1 - newest;
  size_t kept = 0;
  for (Store* store : me.stores) {
    if (!store->committed || static_cast<int64_t>(store->step) > last) {
      me.stores[kept++] = store;
      continue;
    }
    read_shared(*store);
    if (read) {
      me.stores[kept++] = store;
      continue;
    }
    write_global(*store, me.store_unit);
    delete store;
  }
  me.stores.resize(kept);
  if (!executor.checks || me.store_unit < 0 || last < static_cast<int64_t>(first_step())) return;
  me.seen.learn(me.store_unit, static_cast<Step>(last));
  enter_thread();
}

void begin_copies() {
  barriers.clear();
  for (Thread& t : executor.threads) {
    t.copies.clear();
    t.copy_groups.clear();
    drop(t.stores);
    t.store_unit = -1;
    t.store_step = executor.checks ? first_step() : 1;
  }
}

void end_of_thread() {
  Thread& me = *executor.current;
  bool copies = !me.copies.empty();
  for (const auto& group : me.copy_groups) copies = copies || !group.empty();
  if (copies && executor.checks) stop("ERR_EMULATED_WAIT", "the thread ends before its cp.async copies were waited for");
  for (Store* store : me.stores) {
    if (executor.checks && !store->committed) stop("ERR_EMULATED_WAIT", "the thread ends with a bulk store that it has not committed");
    if (executor.checks && !store->read) stop("ERR_EMULATED_WAIT", "the thread ends before its bulk stores have read shared memory");
    read_shared(*store);
    write_global(*store, me.store_unit);
  }
  drop(me.stores);
}

void end_of_blocks() {
  if (!executor.checks) return;
  for (const auto& [p, m] : barriers)
    if (!m->loads.empty()) stop("ERR_EMULATED_WAIT", "the block ends before a copy was waited for that completes on %s", describe(p).c_str());
}

void end_copies() {
  barriers.clear();
  for (Thread& t : executor.threads) drop(t.stores);
}

void store_cluster(uint32_t address, const float* values, int count) {
  char* to = at_shared_address(address);
  const size_t bytes = sizeof(float) * static_cast<size_t>(count);
  check_aligned(to, bytes, "store_cluster");
  check_access(to, bytes, Access::write, thread_accessor(), "store_cluster");
  std::memcpy(to, values, bytes);
}

}  // namespace limbeck::cuda::emulate
