#include "cuda/fault.h"

#include <bit>
#include <string>

namespace limbeck::cuda {

Error error_of(const Fault& fault) {
  const std::string position = std::to_string(fault.key >> 32), value = std::to_string(static_cast<int32_t>(fault.key));
  const std::string limit = std::to_string(fault.limit), last = std::to_string(static_cast<int64_t>(fault.limit) - 1);
  const std::string op = reinterpret_cast<const char*>(fault.op);
  switch (static_cast<FaultKind>(fault.kind)) {
    case FaultKind::table_row:
      return Error(ErrorKind::data, "ERR_TOKEN_RANGE",
                   op + ": token id " + value + " at position " + position + " is outside the table of " + limit +
                       " rows; tokenizer and model must agree on the vocabulary")
          .in(op).on("ids").wanted("0 to " + last).got(value);
    case FaultKind::row_index:
      return Error(ErrorKind::data, "ERR_TOKEN_RANGE", op + ": index " + value + " at position " + position + " is outside a row of " + limit)
          .in(op).on("ids").wanted("0 to " + last).got(value);
    case FaultKind::target:
      return Error(ErrorKind::data, "ERR_TOKEN_RANGE",
                   op + ": targets has token " + value + " at position " + position + ", outside the vocabulary of " + limit +
                       "; give tokens that do not count the weight 0")
          .in(op).on("targets").wanted("0 to " + last).got(value);
    case FaultKind::teacher_token:
      return Error(ErrorKind::data, "ERR_TOKEN_RANGE",
                   op + ": tids has token " + value + " at position " + position + ", outside the vocabulary of " + limit +
                       "; teacher and student must share one vocabulary")
          .in(op).on("tids").wanted("below " + limit).got(value);
    case FaultKind::teacher_twice:
      return Error(ErrorKind::data, "ERR_TEACHER_TOKENS",
                   op + ": tids names token " + value + " twice at position " + position +
                       "; the kept tokens of a position must differ (or, for samples, use tail 'truncate')")
          .in(op).on("tids");
    case FaultKind::teacher_mass: {
      const std::string mass = std::to_string(std::bit_cast<float>(static_cast<uint32_t>(fault.key)));
      return Error(ErrorKind::data, "ERR_TEACHER_MASS",
                   op + ": the teacher's probabilities at position " + position + " sum to " + mass +
                       "; tlogp must hold natural logarithms of probabilities")
          .in(op).on("tlogp").wanted("at most 1").got(mass);
    }
    case FaultKind::document_start:
      return Error(ErrorKind::data, "ERR_ATTENTION_STARTS",
                   op + ": starts is " + value + " at row " + position + "; it should be the first position of that token's document")
          .in(op).on("starts").wanted("a position from its predecessor's start to its own").got(value);
    case FaultKind::none: break;
  }
  return Error(ErrorKind::internal, "ERR_INTERNAL", op + ": a kernel reported a fault without a kind");
}

}  // namespace limbeck::cuda
