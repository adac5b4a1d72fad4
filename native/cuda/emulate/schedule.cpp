#include "cuda/emulate/schedule.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>

#include "core/kernel.h"
#include "cuda/emulate/copies.h"
#include "cuda/emulate/executor.h"
#include "cuda/emulate/shared.h"
#include "cuda/emulate/tensor_core.h"

namespace limbeck::cuda::emulate {

Executor executor;

namespace {

constexpr size_t kStack = size_t{256} << 10, kStackGuard = 4096 * 4;
constexpr int kStacks = 2048;
int stacks_made = 0;

char* stack_of(int i) { return stacks + static_cast<size_t>(i) * kStack + kStackGuard; }

void make_stacks(int n) {
  if (!stacks) {
    void* p = mmap(nullptr, kStack * kStacks, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stacks = static_cast<char*>(p);
    stacks_bytes = kStack * kStacks;
  }
  for (; stacks_made < n; ++stacks_made)
    if (mprotect(stack_of(stacks_made), kStack - kStackGuard, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

std::string triple(uint3 v) { return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")"; }

std::string launched_as() {
  const dim3 g = executor.grid, b = executor.block;
  return "<<<" + triple({g.x, g.y, g.z}) + ", " + triple({b.x, b.y, b.z}) + ">>>";
}

// Leaves the kernel for good: its stacks are simply forgotten.
[[noreturn]] void leave(Error error) {
  executor.failed = true;
  executor.error = std::move(error);
  Fiber nowhere;
  switch_fiber(executor.current ? executor.current->fiber : nowhere, executor.host);
  std::abort();
}

// Who waits where, when nobody can go on.
std::string who_waits() {
  std::string text;
  const auto& threads = executor.threads;
  for (size_t i = 0; i < threads.size();) {
    size_t end = i + 1;
    const auto like = [&](const Thread& t) {
      return t.ended == threads[i].ended && t.block == threads[i].block && t.waiting == threads[i].waiting && t.waits_for == threads[i].waits_for;
    };
    while (end < threads.size() && like(threads[end])) ++end;
    const Thread& t = threads[i];
    if (!text.empty()) text += "; ";
    if (executor.cluster > 1) text += "block " + std::to_string(t.block->rank) + " of the cluster: ";
    const int last = threads[end - 1].number;
    text += last > t.number ? "threads " + std::to_string(t.number) + " to " + std::to_string(last) : "thread " + std::to_string(t.number);
    if (t.ended) {
      text += last > t.number ? " have ended" : " has ended";
    } else {
      text += last > t.number ? " wait in " : " waits in ";
      text += t.waiting;
      const std::string name = t.waiting;
      if (name.rfind("__syncthreads", 0) == 0 || name == "bar.sync") {
        const NamedBarrier& b = t.block->barriers[t.waits_for];
        text += " (barrier " + std::to_string(t.waits_for) + ", " + std::to_string(b.came) + " of " + std::to_string(b.threads) + " came)";
      } else if (name == "mbarrier_wait") {
        text += describe_mbarrier(reinterpret_cast<const char*>(t.waits_for));
      }
    }
    i = end;
    if (text.size() > 600 && i < threads.size()) {
      text += "; ...";
      break;
    }
  }
  return text;
}

Thread& next_ready() {
  Thread* t = executor.ready[executor.ready_first];
  if (++executor.ready_first == executor.ready.size()) executor.ready_first = 0;
  --executor.ready_count;
  return *t;
}

// The current thread stops here until somebody switches back.
void switch_away() {
  Thread& from = *executor.current;
  if (executor.ready_count == 0) {
    bool all = true;
    for (const Thread& t : executor.threads) all = all && t.ended;
    if (!all) {
      Error error(ErrorKind::device, "ERR_EMULATED_DEADLOCK",
                  std::string(executor.op) + ": no thread of block " + triple(from.block->index) + " can go on: " + who_waits() + "; launched as " +
                      launched_as());
      leave(error.in(executor.op));
    }
    switch_fiber(from.fiber, executor.host);
  } else {
    Thread& to = next_ready();
    if (&to == &from) return;
    executor.current = &to;
    if (executor.checks) enter_thread();
    switch_fiber(from.fiber, to.fiber);
  }
}

void thread_main() {
  executor.body(executor.context);
  end_of_thread();
  end_of_thread_products();
  executor.current->ended = true;
  executor.current->waiting = nullptr;
  switch_away();
  std::abort();
}

void run_cluster(unsigned first_block) {
  for (int b = 0; b < executor.cluster; ++b) {
    Block& block = executor.blocks[static_cast<size_t>(b)];
    const unsigned i = first_block + static_cast<unsigned>(b);
    block.index = {i % executor.grid.x, i / executor.grid.x % executor.grid.y, i / executor.grid.x / executor.grid.y};
    for (Warp& warp : block.warps) warp.open.clear();
    for (NamedBarrier& barrier : block.barriers) {
      barrier.threads = barrier.came = 0;
      barrier.waiting.clear();
      barrier.moments.clear();
    }
    for (int k = 0; k < 3; ++k) block.reduction[k] = k == 1;
  }
  executor.cluster_barrier = {};
  executor.ready_first = executor.ready_count = 0;
  for (Thread& t : executor.threads) {
    t.ended = false;
    t.waiting = nullptr;
    t.fiber = {};
    make_fiber(t.fiber, stack_of(t.id), kStack - kStackGuard, thread_main);
    wake(t);
  }
  std::fill(executor.cluster_phase.begin(), executor.cluster_phase.end(), 0);
  fill_shared();
  if (executor.checks) begin_blocks();
  begin_copies();
  begin_products();
  executor.current = &next_ready();
  if (executor.checks) enter_thread();
  switch_fiber(executor.host, executor.current->fiber);
  executor.current = nullptr;
  if (executor.checks) end_blocks();
  if (executor.failed) throw executor.error;
  end_of_blocks();
  end_of_products();
}

bool checks_wanted() {
  const char* text = std::getenv("LIMBECK_EMULATE_CHECKS");
  return !text || std::string(text) != "0";
}

std::mutex launching;

}  // namespace

uint3 thread_index() { return executor.current->index; }
uint3 block_index() { return executor.current->block->index; }
uint3 block_size() { return {executor.block.x, executor.block.y, executor.block.z}; }
uint3 grid_size() { return {executor.grid.x, executor.grid.y, executor.grid.z}; }
int block_threads() { return executor.block_threads; }

std::string place_of(const Thread& thread) {
  return "block " + triple(thread.block->index) + ", thread " + triple(thread.index);
}

void stop(const char* code, const char* format, ...) {
  char problem[600];
  va_list args;
  va_start(args, format);
  std::vsnprintf(problem, sizeof problem, format, args);
  va_end(args);
  const std::string op = executor.op;
  const std::string where = executor.current ? place_of(*executor.current) + " of " + launched_as() : launched_as();
  Error error(ErrorKind::device, code, op + ": " + where + ": " + problem);
  error.in(op);
  if (!executor.current) throw error;
  leave(std::move(error));
}

void trap(const char* what) { stop("ERR_EMULATED_TRAP", "%s", what); }

void wait(const char* name, uint64_t what) {
  executor.current->waiting = name;
  executor.current->waits_for = what;
  switch_away();
}

void wake(Thread& thread) {
  thread.waiting = nullptr;
  size_t at = executor.ready_first + executor.ready_count++;
  if (at >= executor.ready.size()) at -= executor.ready.size();
  executor.ready[at] = &thread;
}

void run(const Call& call, dim3 blocks, dim3 threads, size_t shared, int cluster, void (*body)(const void*), const void* context) {
  const std::lock_guard lock(launching);
  executor.op = call.op;
  executor.grid = blocks;
  executor.block = threads;
  executor.shared_bytes = shared;
  executor.cluster = cluster;
  executor.body = body;
  executor.context = context;
  executor.failed = false;
  executor.current = nullptr;
  executor.checks = checks_wanted();
  const int64_t n = int64_t{threads.x} * threads.y * threads.z;
  if (n < 1 || n > 1024 || threads.z > 64) stop("ERR_EMULATED_LAUNCH", "a block of %lld threads; it can have 1 to 1024", static_cast<long long>(n));
  if (cluster < 1 || cluster > kMaxCluster || blocks.x % static_cast<unsigned>(cluster) != 0)
    stop("ERR_EMULATED_LAUNCH", "a cluster of %d blocks does not divide the grid", cluster);
  if (n * cluster > kStacks - 160) stop("ERR_EMULATED_LAUNCH", "a cluster of %d blocks has too many threads", cluster);
  if (blocks.y > 65535 || blocks.z > 65535 || blocks.x > 0x7fffffffu) stop("ERR_EMULATED_LAUNCH", "the grid is too large");
  if (shared > 232448) stop("ERR_EMULATED_LAUNCH", "%zu bytes of shared memory; a block can have 232448", shared);
  executor.block_threads = static_cast<int>(n);
  make_stacks(static_cast<int>(n) * cluster);

  executor.blocks.resize(static_cast<size_t>(cluster));
  executor.threads.resize(static_cast<size_t>(n) * static_cast<size_t>(cluster));
  executor.ready.resize(executor.threads.size() + 1);
  executor.cluster_phase.resize(executor.threads.size());
  for (int b = 0; b < cluster; ++b) {
    Block& block = executor.blocks[static_cast<size_t>(b)];
    block.rank = b;
    block.first = b * static_cast<int>(n);
    block.warps.resize(static_cast<size_t>((n + kWarp - 1) / kWarp));
    for (int i = 0; i < n; ++i) {
      Thread& t = executor.threads[static_cast<size_t>(block.first + i)];
      const auto u = static_cast<unsigned>(i);
      t.index = {u % threads.x, u / threads.x % threads.y, u / threads.x / threads.y};
      t.number = i;
      t.id = block.first + i;
      t.block = &block;
    }
  }
  begin_shared();
  if (executor.checks) begin_launch(call);
  struct End {
    ~End() {
      end_copies();
      begin_products();
      if (executor.checks) end_launch();
      for (Block& block : executor.blocks)
        for (NamedBarrier& barrier : block.barriers) barrier.moments.clear();
      executor.cluster_barrier = {};
    }
  } end;
  const uint64_t count = uint64_t{blocks.x} * blocks.y * blocks.z;
  for (uint64_t i = 0; i < count; i += static_cast<uint64_t>(cluster)) run_cluster(static_cast<unsigned>(i));
}

}  // namespace limbeck::cuda::emulate
