#include "cuda/fault.h"

#include <bit>

namespace limbeck::cuda {

Error error_of(const FaultRecord& record) {
  const Fault fault = static_cast<Fault>(record.origin >> kFaultKindShift);
  const char* op = reinterpret_cast<const char*>(record.origin & ((1ull << kFaultKindShift) - 1));
  const uint32_t word = static_cast<uint32_t>(record.key);
  const double value = fault == Fault::teacher_mass ? static_cast<double>(std::bit_cast<float>(word)) : static_cast<int32_t>(word);
  return error_of(fault, op, static_cast<int64_t>(record.key >> 32), value, static_cast<int64_t>(record.limit));
}

}  // namespace limbeck::cuda
