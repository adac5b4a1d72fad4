// Launches small kernels on the executor: tensors are vectors, in the order of the call's inputs and outputs.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../native/check.h"
#include "core/kernel.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace check {

using namespace limbeck;
using namespace limbeck::cuda;

template <class T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::f32 : sizeof(T) == 2 ? DType::bf16 : sizeof(T) == 8 ? DType::f64 : DType::u8;

template <class T>
View view_of(std::vector<T>& v) {
  View view;
  view.data = v.data();
  view.dtype = dtype_of<T>;
  view.rank = 1;
  view.dims[0] = static_cast<int64_t>(v.size());
  return view;
}

template <class... T>
Call call_of(std::vector<T>&... tensors) {
  Call call;
  call.op = "test";
  int i = 0;
  ((call.in[i++] = view_of(tensors)), ...);
  return call;
}

// The code of the error that a launch ends with, or "".
struct Caught {
  std::string code, message;
};
template <class F>
Caught caught(F launch) {
  try {
    launch();
  } catch (const Error& e) {
    return {e.code, e.what()};
  }
  return {};
}

inline bool has(const Caught& c, const char* code, const char* part = "") { return (c.code == code || (std::string(code).back() == 95 && c.code.rfind(code, 0) == 0)) && c.message.find(part) != std::string::npos; }
// The error's code, and a part of its message.
#define CHECK_CAUGHT(launch, ...)                                                                                         \
  do {                                                                                                                    \
    const check::Caught c_ = (launch);                                                                                    \
    CHECK(check::has(c_, __VA_ARGS__), "caught %s: %s", c_.code.c_str(), c_.message.c_str());                             \
  } while (0)
#define CHECK_FINE(launch)                                                                   \
  do {                                                                                       \
    const check::Caught c_ = (launch);                                                       \
    CHECK(c_.code.empty(), "caught %s: %s", c_.code.c_str(), c_.message.c_str());            \
  } while (0)

// Small numbers that bf16 holds exactly, so that products and sums are exact.
inline float number(uint32_t i) { return static_cast<float>(static_cast<int>((i * 2654435761u >> 16) % 17) - 8) / 4; }

}  // namespace check
