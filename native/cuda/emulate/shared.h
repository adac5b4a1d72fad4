// Shared memory of the running blocks: arrays with gaps between them that nobody may touch.
#pragma once
#include <cstddef>
#include <string>

#include "cuda/emulate/shadow.h"

namespace limbeck::cuda::emulate {

std::string describe_shared(size_t at);  // byte `at` of the windows
void begin_shared();                     // a new launch: no arrays
void fill_shared();                      // new blocks: the arrays hold nothing
void mark_arrays();                      // their shadow cells were lost

// Shadow cells: an array that nobody has written yet, and what is no array.
void mark_array(size_t at, size_t bytes);
void unmark_arrays(size_t at, size_t bytes);

}  // namespace limbeck::cuda::emulate
