// Floats of 16 bits to float32, on the way from files into tensors.
#include <napi.h>

#include <algorithm>
#include <bit>
#include <cstdint>

namespace limbeck {
namespace {

float float_of_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
  // The exponent's bias grows by 112, by a product that makes subnormal numbers normal.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(sign | ((half & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite));
}

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
