// What a kernel finds wrong in the data it was given (a token outside the vocabulary). It goes on with the rest; the engine learns of
// it at the next read, as the same typed error that the CPU throws.
#pragma once
#include <cstdint>

#include "core/checks.h"
#include "cuda/runtime.h"

namespace limbeck::cuda {

// Lies where both sides see it. The first position wins; all words of one op are the same whoever writes them.
struct FaultRecord {
  static constexpr unsigned long long no_key = ~0ull;
  unsigned long long key = no_key;  // position << 32 | value
  unsigned long long kind = 0, op = 0, limit = 0;
};

// Handed to kernels that check their data: `check.refuse(position, value)`.
struct FaultCheck {
  FaultRecord* record;
  Fault kind;
  const char* op;
  int64_t limit;  // the values that are right lie below

#if defined(__CUDACC__) || defined(LIMBECK_EMULATE)
  __device__ void refuse(int64_t position, int32_t value) const {
    const unsigned long long key = static_cast<unsigned long long>(position) << 32 | static_cast<uint32_t>(value);
    atomicMin(&record->key, key);
    atomicExch(&record->kind, static_cast<unsigned long long>(kind));
    atomicExch(&record->op, reinterpret_cast<unsigned long long>(op));
    atomicExch(&record->limit, static_cast<unsigned long long>(limit));
    __threadfence_system();
  }
#endif
};

// The typed error of a fault that was reported.
Error error_of(const FaultRecord& record);

}  // namespace limbeck::cuda
