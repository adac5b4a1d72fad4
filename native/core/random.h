// Philox4x32-10 (Salmon et al. 2011): a random number is a pure function of (seed, stream, index), so nothing has to be
// saved to resume and any thread can make any part. src/tensor/random.ts gives the same numbers.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/everywhere.h"

namespace limbeck {

template <int N>
struct Words {
  uint32_t word[N];
  LIMBECK_EVERYWHERE uint32_t operator[](size_t i) const { return word[i]; }
  bool operator==(const Words&) const = default;
};

LIMBECK_EVERYWHERE inline Words<4> philox(Words<4> counter, Words<2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)}};
    key.word[0] += 0x9E3779B9;
    key.word[1] += 0xBB67AE85;
  }
  return counter;
}

// Four 32-bit numbers: block `index` of stream `stream` of `seed`.
LIMBECK_EVERYWHERE inline Words<4> random_block(uint64_t seed, uint64_t stream, uint64_t index) {
  return philox({{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)}},
                {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}});
}

// [0, 1) with 24 bits: every value is exact in float32.
LIMBECK_EVERYWHERE inline float uniform(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

}  // namespace limbeck
