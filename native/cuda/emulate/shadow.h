// What is known of every byte of shared memory and every element of global memory: who wrote it last and who read it since. From it
// follow the checks: bounds, unwritten shared memory, races, asynchronous copies that nobody waited for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/emulate/clocks.h"
#include "cuda/emulate/executor.h"

namespace limbeck {
struct Call;
}

namespace limbeck::cuda::emulate {

// Shared memory of the running blocks: a window of this size each, one after the other.
constexpr size_t kWindow = size_t{256} << 10;  // what 14 bits of a matrix descriptor reach
constexpr int kMaxCluster = 16;
extern char* shared_window;  // kMaxCluster windows

inline bool is_shared(const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - shared_window) < kWindow * kMaxCluster;
}

// Who does an access.
struct Accessor {
  int id;             // place in vector clocks
  Step step;
  const Known* seen;
  int own_id;         // the thread itself, whose steps are not in `seen`
  Step own_step;
  const Known* fenced = nullptr;  // set for asynchronous units: generic writes must be in it
  Step own_fenced = 0;
};
Accessor thread_accessor();                      // the current thread
Accessor accessor_of(const Thread& thread);
Accessor unit_accessor(int unit, Step step);     // something asynchronous that the current thread starts

enum class Access { read, write, atomic, in_flight };
// `bytes` from p on, anywhere: stops the launch when something is wrong, else remembers the access.
void check_access(const void* p, size_t bytes, Access access, const Accessor& who, const char* what);
inline void check_read(const void* p, size_t bytes, const char* what) { check_access(p, bytes, Access::read, thread_accessor(), what); }
inline void check_write(const void* p, size_t bytes, const char* what) { check_access(p, bytes, Access::write, thread_accessor(), what); }
void check_aligned(const void* p, size_t alignment, const char* what);
// A copy that was in flight has arrived: from now on its bytes are those of unit `id`.
void land(const void* p, size_t bytes, int id, Step step);
// For atomics of global memory: what other blocks did before theirs on the same address is seen from now on.
void order_blocks(const void* p);

void begin_launch(const Call& call);
void begin_blocks();   // first clocks of the running blocks
void end_blocks();
void end_launch();
void enter_thread();   // the current thread changed, or its step
void note_step(Step step);  // of a unit, so that the next blocks begin after it
Step first_step();          // of the running blocks
int new_unit(const char* name);  // a place in vector clocks for something asynchronous
std::string describe(const void* p);

// The bounds of fiber stacks, whose accesses are nobody's business.
extern char* stacks;
extern size_t stacks_bytes;

}  // namespace limbeck::cuda::emulate
