// Errors thrown from kernels. Kernel files are compiled for instruction sets that this machine may not have, so the std::string
// work of an error stays out of them: it is compiled once, here.
#pragma once
#include "core/error.h"

namespace limbeck {

struct Text {
  char chars[320];
};
__attribute__((format(printf, 1, 2))) Text text(const char* format, ...);

// Throws an Error that reads "op: problem".
[[noreturn]] void fail(ErrorKind kind, const char* code, const char* op, const char* argument, const Text& problem, const Text& expected,
                       const Text& actual);

}  // namespace limbeck
