// Floats of 16 bits to float32, on the way from files into tensors.
#include <napi.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "core/float16.h"

namespace limbeck {
namespace {

float float_of_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// widenHalf, widenBf16(from: Uint16Array, into: Float32Array of as many elements)
template <float (*widen)(uint16_t)>
Napi::Value widen_all(const Napi::CallbackInfo& info) {
  const auto from = info[0].As<Napi::Uint16Array>();
  auto into = info[1].As<Napi::Float32Array>();
  const size_t n = std::min(from.ElementLength(), into.ElementLength());
  const uint16_t* x = from.Data();
  float* y = into.Data();
  for (size_t i = 0; i < n; ++i) y[i] = widen(x[i]);
  return info.Env().Undefined();
}

}  // namespace

void register_half(Napi::Env env, Napi::Object exports) {
  exports.Set("widenHalf", Napi::Function::New(env, widen_all<float_of_half>));
  exports.Set("widenBf16", Napi::Function::New(env, widen_all<float_of_bf16>));
}

}  // namespace limbeck
