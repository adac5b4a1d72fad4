// Barriers of a block and of a cluster: numbered ones that a fixed count of threads must reach.
#include <algorithm>

#include "cuda/emulate/executor.h"
#include "cuda/emulate/ptx.h"
#include "cuda/emulate/shadow.h"

namespace limbeck::cuda::emulate {

namespace {

void next_step(Thread& t) { ++t.step; }

// Everything that happened before in those that came has happened for all that waited.
void release(NamedBarrier& barrier) {
  if (executor.checks) {
    Joined joined;
    for (const Moment& m : barrier.moments) joined.add(m);
    for (Thread* t : barrier.waiting) t->seen = joined.seen, t->fenced = joined.fenced;
    if (barrier.waiting.size() != barrier.moments.size() && !barrier.waiting.empty() && executor.current) enter_thread();
    barrier.moments.clear();
  }
  for (Thread* t : barrier.waiting)
    if (t != executor.current) wake(*t);
  barrier.waiting.clear();
  barrier.came = 0;
  barrier.threads = 0;
}

// True when the last one came.
bool come(const char* name, int id, int threads, bool waits) {
  Thread& me = *executor.current;
  if (id < 0 || id >= kNamedBarriers) stop("ERR_EMULATED_BARRIER", "%s of barrier %d; there are 0 to 15", name, id);
  if (threads % kWarp != 0 && threads != executor.block_threads)
    stop("ERR_EMULATED_BARRIER", "%s of barrier %d for %d threads, which is no multiple of 32", name, id, threads);
  if (threads > executor.block_threads)
    stop("ERR_EMULATED_BARRIER", "%s of barrier %d for %d threads in a block of %d", name, id, threads, executor.block_threads);
  NamedBarrier& barrier = me.block->barriers[id];
  if (barrier.came > 0 && barrier.threads != threads)
    stop("ERR_EMULATED_BARRIER", "%s of barrier %d for %d threads, where others came for %d", name, id, threads, barrier.threads);
  barrier.threads = threads;
  barrier.name = name;
  ++barrier.came;
  if (executor.checks) {
    barrier.moments.push_back(me.moment());
    next_step(me);
    enter_thread();
  }
  if (waits) barrier.waiting.push_back(&me);
  if (barrier.came < threads) return false;
  release(barrier);
  if (executor.checks) enter_thread();
  return true;
}

}  // namespace

void barrier_sync(const char* name, int id, int threads) {
  if (!come(name, id, threads > 0 ? threads : executor.block_threads, true)) wait(name, static_cast<uint64_t>(id));
}

void barrier_arrive(int id, int threads) { come("bar.arrive", id, threads, false); }

int barrier_reduce(const char* name, int value, int kind) {
  Block& block = *executor.current->block;
  int& r = block.reduction[kind];
  if (kind == 0) r += value != 0;
  else if (kind == 1) r = r && value != 0;
  else r = r || value != 0;
  if (come(name, 0, executor.block_threads, true)) {
    block.reduced[kind] = r;
    r = kind == 1;
    // The others read it when they run, before any of them can come here again.
  } else {
    wait(name, 0);
  }
  return block.reduced[kind];
}

uint32_t cluster_rank() { return static_cast<uint32_t>(executor.current->block->rank); }
uint32_t cluster_size() { return static_cast<uint32_t>(executor.cluster); }

void cluster_arrive() {
  Thread& me = *executor.current;
  auto& barrier = executor.cluster_barrier;
  uint64_t& mine = executor.cluster_phase[static_cast<size_t>(me.id)];
  if (mine > barrier.phase) stop("ERR_EMULATED_BARRIER", "cluster_arrive twice without a cluster_wait");
  mine = barrier.phase + 1;
  if (executor.checks) {
    barrier.now.add(me.moment());
    next_step(me);
    enter_thread();
  }
  if (++barrier.came < static_cast<int>(executor.threads.size())) return;
  barrier.came = 0;
  ++barrier.phase;
  barrier.before = barrier.now;
  barrier.now = {};
  for (Thread& t : executor.threads)
    if (t.waiting && t.waits_for == ~uint64_t{0}) wake(t);
}

void cluster_wait() {
  Thread& me = *executor.current;
  auto& barrier = executor.cluster_barrier;
  const uint64_t mine = executor.cluster_phase[static_cast<size_t>(me.id)];
  if (mine == 0) stop("ERR_EMULATED_BARRIER", "cluster_wait without a cluster_arrive");
  if (barrier.phase < mine) wait("cluster_wait", ~uint64_t{0});
  if (!executor.checks) return;
  me.learn(barrier.before);
  enter_thread();
}

}  // namespace limbeck::cuda::emulate
