// What a kernel finds wrong in the data it was given (a token outside the vocabulary). It goes on with the rest; the engine learns of
// it at the next read, as the same typed error that the CPU throws.
#pragma once
#include <cstdint>

#include "core/checks.h"
#include "cuda/runtime.h"

namespace limbeck::cuda {

// Lies on the device; each read brings a copy of it, made where the read has its place in the stream. The op that faults first owns it,
// and of its positions the first one wins.
struct FaultRecord {
  static constexpr unsigned long long no_key = ~0ull;
  unsigned long long key = no_key;  // position << 32 | value
  unsigned long long origin = 0;    // the address of the op's name, with the kind in the byte above it
  unsigned long long limit = 0;
};
constexpr int kFaultKindShift = 56;

// Handed to kernels that check their data: `check.refuse(position, value)`.
struct FaultCheck {
  FaultRecord* record;
  Fault kind;
  const char* op;
  int64_t limit;  // the values that are right lie below

#if defined(__CUDACC__) || defined(LIMBECK_EMULATE)
  __device__ void refuse(int64_t position, int32_t value) const {
    const unsigned long long origin = reinterpret_cast<unsigned long long>(op) | static_cast<unsigned long long>(kind) << kFaultKindShift;
    const unsigned long long owner = atomicCAS(&record->origin, 0ull, origin);
    if (owner != 0 && owner != origin) return;
    atomicExch(&record->limit, static_cast<unsigned long long>(limit));
    atomicMin(&record->key, static_cast<unsigned long long>(position) << 32 | static_cast<uint32_t>(value));
  }
#endif
};

// The typed error of a fault that was reported.
Error error_of(const FaultRecord& record);

}  // namespace limbeck::cuda
