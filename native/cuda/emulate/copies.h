// Asynchronous copies and the barriers they complete on. A copy lands when somebody waits for it, never before: what is read too
// early is what was there, and an error.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/emulate/executor.h"
#include "cuda/emulate/ptx.h"
#include "cuda/emulate/shadow.h"

namespace limbeck::cuda::emulate {

char* at_shared_address(uint32_t address);

// One side of a bulk copy: a box of a tensor, or (rank 0) a run of bytes.
struct Box {
  TensorMap map = {};
  int rank = 0;
  int at[5] = {};
  char* plain = nullptr;
  uint32_t bytes = 0;  // of shared memory, and what it completes on a barrier
};
// Calls piece(shared, global, n, inside) for up to 16 bytes at a time, in an order that is the same each time. Only the first `inside`
// bytes after `skip` lie in the tensor.
struct Piece {
  char* shared;
  char* global;            // of the first byte that is inside
  int bytes, skip, inside; // of the piece; outside before; inside
};
template <class F>
void pieces(const Box& box, char* shared, F piece);

// A store of this thread: from shared to global memory.
struct Store {
  Box box;
  char* shared;
  bool add;
  bool committed = false;
  Step step = 0;                // its group
  std::vector<char> captured;   // what was read of shared memory
  bool read = false;
};

void begin_copies();       // before the first thread of running blocks
void end_of_thread();      // what the current thread leaves undone is an error
void end_of_blocks();
void end_copies();
std::string describe_mbarrier(const char* barrier);

}  // namespace limbeck::cuda::emulate
