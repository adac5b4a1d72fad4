// The generator agrees with its authors' known answers, as its TypeScript twin does in test/tensor/random.test.ts.
#include "core/random.h"

#include "check.h"

using limbeck::philox;

TEST(philox_known_answers) {
  using Block = limbeck::Words<4>;
  CHECK((philox({0, 0, 0, 0}, {0, 0}) == Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr uint32_t ones = 0xffffffff;
  CHECK((philox({ones, ones, ones, ones}, {ones, ones}) == Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
         Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(uniform_is_below_one) {
  CHECK(limbeck::uniform(0) == 0.0f);
  CHECK(limbeck::uniform(0xffffffff) == 1.0f - 0x1p-24f);
}
