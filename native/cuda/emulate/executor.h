// The executor's own state, shared by the files of this folder. One launch runs at a time, on one thread of the host.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/error.h"
#include "cuda/emulate/clocks.h"
#include "cuda/emulate/fiber.h"
#include "cuda/emulate/schedule.h"

namespace limbeck::cuda::emulate {

constexpr int kWarp = 32;
constexpr int kNamedBarriers = 16;

struct Block;

// A copy of sm_80 that a thread has started: `bytes` of `size` are read, the others are zero.
struct Copy {
  char* to;
  const char* from;
  uint32_t size, bytes;
};
struct Store;  // of a box or a run of bytes (copies.h)

// A thread of the running blocks.
struct Thread {
  Fiber fiber;
  uint3 index;
  int number;          // in its block
  int id;              // among the threads of all running blocks: its place in vector clocks
  Block* block;
  bool ended = false;
  const char* waiting = nullptr;  // in what; null when it can run
  uint64_t waits_for = 0;         // barrier id, lane mask or shared address
  void* operands = nullptr;       // of the collective it waits in

  // Knowledge, for the checks.
  Known seen, fenced;
  Step step = 0, fenced_step = 0;
  Moment moment() const { return {id, seen, step, fenced, fenced_step}; }
  void learn(const Joined& joined) {
    seen.learn(joined.seen);
    fenced.learn(joined.fenced);
  }

  // Asynchronous work that it started: copies of sm_80 by group, bulk stores by group.
  std::vector<std::vector<Copy>> copy_groups;
  std::vector<Copy> copies;
  std::vector<Store*> stores;
  int store_unit = -1;  // its place in vector clocks
  Step store_step = 0;  // of the group that is open
};

// Lanes of a warp that wait for the others of their mask.
struct Gathering {
  const char* name = nullptr;
  uint32_t mask = 0, came = 0;
  uint64_t parameter = 0;
};

struct Wgmma;  // tensor_core.cpp

struct Warp {
  std::vector<Gathering> open;
  // Asynchronous products, oldest first.
  std::vector<Wgmma*> products;
  int unit = -1;
  Step step = 0;          // of the group that is open
  uint64_t products_issued = 0;
  bool fenced = false;
};

struct NamedBarrier {
  int threads = 0;  // how many must come; 0 when nobody is there
  int came = 0;
  const char* name = nullptr;
  std::vector<Thread*> waiting;
  std::vector<Moment> moments;
};

struct Block {
  uint3 index;
  int rank = 0;  // in its cluster
  int first = 0; // number of its first thread in Executor::threads
  char* shared = nullptr;
  std::vector<Warp> warps;
  std::vector<std::vector<Wgmma*>> issued;  // by each warpgroup, for comparing its warps
  NamedBarrier barriers[kNamedBarriers];
  int reduction[3] = {};  // __syncthreads_count, _and, _or of those that came
  int reduced[3] = {};
};

struct Executor {
  const char* op = "";
  dim3 grid, block;
  size_t shared_bytes = 0;
  int cluster = 1;
  int block_threads = 1;

  std::vector<Thread> threads;
  std::vector<Block> blocks;  // of the running cluster
  Thread* current = nullptr;
  Fiber host;
  const void* context = nullptr;
  void (*body)(const void*) = nullptr;
  bool failed = false;
  Error error{ErrorKind::device, "ERR_EMULATED", ""};
  bool checks = true;

  // Threads that can run, in the order in which they became able to.
  std::vector<Thread*> ready;
  size_t ready_first = 0, ready_count = 0;

  // All threads of a cluster.
  struct {
    int came = 0;
    uint64_t phase = 0;
    Joined now, before;
  } cluster_barrier;
  std::vector<uint64_t> cluster_phase;  // of each thread: the one it arrived in
};
extern Executor executor;

// Lets others run until `wake` is called for this thread.
void wait(const char* name, uint64_t what);
void wake(Thread& thread);

// Ends the launch: "op: problem; kernel launched as ..., block (..), thread (..)".
[[noreturn]] __attribute__((format(printf, 2, 3))) void stop(const char* code, const char* format, ...);
std::string place_of(const Thread& thread);

// A collective of the current warp: every lane of the mask brings operands; the last one runs `finish` on those of all 32 lanes
// (null for lanes that are not in the mask) before any lane goes on.
using Operands = void* const (&)[kWarp];
void gather(const char* name, uint32_t mask, uint64_t parameter, void* operands, void (*finish)(Operands lanes, uint32_t mask));

}  // namespace limbeck::cuda::emulate
