// Three macros for C++ tests. A test file is compiled once for each instruction set, like the kernels, and prints `N passed, N failed`.
#pragma once
#include <cmath>
#include <cstdio>
#include <exception>
#include <vector>

#ifndef LIMBECK_EMULATE
#include "core/cpuid.h"
#endif

#define LIMBECK_TEXT_OF(x) #x
#define LIMBECK_TEXT(x) LIMBECK_TEXT_OF(x)

namespace check {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};
inline bool failed = false;

}  // namespace check

#define TEST(name)                                          \
  static void name();                                       \
  static const check::Register register_##name{#name, name}; \
  static void name()

// Both go on after a failure. CHECK may be followed by a printf format that tells more.
#define CHECK(condition, ...)                                                \
  do {                                                                       \
    if (!(condition)) {                                                      \
      check::failed = true;                                                  \
      std::printf("  %s:%d: %s is false", __FILE__, __LINE__, #condition);   \
      __VA_OPT__(std::printf(": " __VA_ARGS__);)                             \
      std::printf("\n");                                                    \
    }                                                                        \
  } while (0)

#define CHECK_NEAR(actual, expected, tolerance)                                                                        \
  do {                                                                                                                 \
    const double a_ = (actual), e_ = (expected), t_ = (tolerance);                                                     \
    if (!(std::fabs(a_ - e_) <= t_)) {                                                                                 \
      check::failed = true;                                                                                            \
      std::printf("  %s:%d: %s is %.9g, expected %.9g within %g\n", __FILE__, __LINE__, #actual, a_, e_, t_);          \
    }                                                                                                                  \
  } while (0)

int main() {
#ifndef LIMBECK_EMULATE
  if (!limbeck::cpu_runs(LIMBECK_TEXT(LIMBECK_ISA))) {
    std::printf("skipped: this processor does not run %s\n0 passed, 0 failed\n", LIMBECK_TEXT(LIMBECK_ISA));
    return 0;
  }
#endif
  int passed = 0, failures = 0;
  for (const auto& test : check::tests()) {
    check::failed = false;
    try {
      test.run();
    } catch (const std::exception& error) {
      check::failed = true;
      std::printf("  threw: %s\n", error.what());
    }
    ++(check::failed ? failures : passed);
    std::printf("%s %s\n", check::failed ? "FAILED" : "ok", test.name);
  }
  std::printf("%d passed, %d failed\n", passed, failures);
  return failures ? 1 : 0;
}
