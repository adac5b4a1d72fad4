// Frozen weights in blocks: neighbours in a row that share one scale (bf16). 8 bits: a signed integer times the scale, in blocks of 32,
// as in GGUF's Q8_0. 4 bits: one of the 16 quantiles of a normal distribution ("NF4", Dettmers et al., arXiv 2305.14314) times the
// largest magnitude, in blocks of 64; the element with the lower index has the lower half of a byte. Rows are filled up to whole blocks
// with codes of zero.
#pragma once
#include <cstdint>

#include "core/everywhere.h"

namespace limbeck {

LIMBECK_EVERYWHERE constexpr int64_t block_of(int bits) { return bits == 8 ? 32 : 64; }

constexpr float kLeastBlockScale = 0x1p-100f;  // blocks of zeros, or nearly, have one that can be divided by

constexpr int kNf4Zero = 7;
LIMBECK_EVERYWHERE constexpr float nf4_value(int code) {
  constexpr float values[16] = {-1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
                                -0.18477343022823334f, -0.09105003625154495f, 0.f, 0.07958029955625534f, 0.16093020141124725f,
                                0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f};
  return values[code];
}
// Halfway between two values; the code of x is how many of these lie below it.
LIMBECK_EVERYWHERE constexpr float nf4_middle(int i) { return (nf4_value(i) + nf4_value(i + 1)) / 2; }

}  // namespace limbeck
