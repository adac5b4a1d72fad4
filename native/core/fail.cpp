#include "core/fail.h"

#include <cstdarg>
#include <cstdio>

namespace limbeck {

Text text(const char* format, ...) {
  Text t;
  va_list args;
  va_start(args, format);
  std::vsnprintf(t.chars, sizeof t.chars, format, args);
  va_end(args);
  return t;
}

void fail(ErrorKind kind, const char* code, const char* op, const char* argument, const Text& problem, const Text& expected,
          const Text& actual) {
  throw Error(kind, code, std::string(op) + ": " + problem.chars).in(op).on(argument).wanted(expected.chars).got(actual.chars);
}

}  // namespace limbeck
