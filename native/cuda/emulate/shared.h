// Shared memory of the running blocks: arrays with gaps between them that nobody may touch.
#pragma once
#include <cstddef>
#include <string>

#include "cuda/emulate/shadow.h"

namespace limbeck::cuda::emulate {

std::string describe_shared(size_t at);  // byte `at` of the windows
void begin_shared();                     // a new launch: no arrays
void fill_shared();                      // new blocks: the arrays hold nothing
// Shadow cells of arrays in every block's window.
void mark_array(size_t at, size_t bytes);
void unmark_arrays(size_t at, size_t bytes);
void renew_shared_cells();

}  // namespace limbeck::cuda::emulate
