// The rotary frequencies that both backends make: base^(-2i/d), scaled for contexts longer than those of training.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/everywhere.h"

namespace limbeck {

// Wavelengths above context / low tokens are stretched by the factor, those below context / high stay, between them frequencies are
// interpolated (Llama 3.1). A context of 0 stretches all of them.
struct RopeScaling {
  double factor, low, high, context;
};

LIMBECK_EVERYWHERE inline double rope_frequency(int64_t i, int64_t d, double base, const RopeScaling& s) {
  const double frequency = ::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(d));
  const double turns = s.context * frequency / 6.283185307179586;  // of this pair over the context
  if (turns < s.low) return frequency / s.factor;
  if (turns > s.high) return frequency;
  const double share = (turns - s.low) / (s.high - s.low);
  return (1 - share) * frequency / s.factor + share * frequency;
}

}  // namespace limbeck
