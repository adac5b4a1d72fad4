// The bytes of packed weights are the same on every instruction set, and their values near what was packed.
#include <bit>
#include <cstring>
#include <string>

#include "core/families.h"

#include "check.h"

using namespace limbeck;

namespace {

constexpr int kValues = 256 * 40;

void run(const std::string& name, void* from, void* to) {
  for (int i = 0; i < cpu_isa_count; ++i) {
    if (std::strcmp(cpu_isas[i].isa, LIMBECK_TEXT(LIMBECK_ISA)) != 0) continue;
    for (int f = 0; f < cpu_isas[i].count; ++f)
      for (int k = 0; k < cpu_isas[i].families[f]->count; ++k) {
        const Kernel& kernel = cpu_isas[i].families[f]->kernels[k];
        if (name != kernel.name) continue;
        Call call;
        call.in[0].data = from;
        call.out[0].data = to;
        call.in[0].rank = call.out[0].rank = 1;
        call.in[0].dims[0] = call.out[0].dims[0] = kValues;
        kernel.run(call);
        return;
      }
  }
  CHECK(false, "there is no kernel %s", name.c_str());
}

// Numbers of many sizes, zeros, steps and runs of one sign, exact in every arithmetic.
std::vector<float> weights() {
  std::vector<float> x(kValues);
  uint32_t state = 12345;
  for (int i = 0; i < kValues; ++i) {
    state = state * 1664525u + 1013904223u;
    const auto whole = static_cast<int32_t>(state >> 8) - (1 << 23);
    const int kind = i / 256 % 8;
    x[i] = static_cast<float>(whole) * 0x1p-26f;
    if (kind == 1) x[i] *= 0x1p-9f;
    if (kind == 2) x[i] = static_cast<float>(whole >> 20) / 8;
    if (kind == 3 && i % 7 != 0) x[i] = 0;
    if (kind == 4) x[i] = std::fabs(x[i]) + 0.25f;
    if (kind == 5) x[i] = -0.75f;
    if (kind == 6 && i % 50 == 0) x[i] *= 64;
  }
  return x;
}

uint64_t fingerprint(const std::vector<uint8_t>& bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3u;
  return hash;
}

struct Packed {
  const char* type;
  int values, bytes;
  double error;  // root mean square, of weights whose own is 0.5
  uint64_t hash;
};

}  // namespace

TEST(packed_bytes_do_not_depend_on_the_instruction_set) {
  const Packed types[] = {
      {"f16", 1, 2, 1e-4, 0xeffa8d1faec736f5},       {"bf16", 1, 2, 2e-3, 0xf2d3876cfc8a4772},      {"q8_0", 32, 34, 5e-3, 0x1a87f79019b7afaf},
      {"q5_0", 32, 22, 3e-2, 0x4062125b1a5d8f5b},    {"q4_k", 256, 144, 3e-2, 0xbd36e67efe2451e3}, {"q5_k", 256, 176, 2e-2, 0xf65139d304908fe0},
      {"q6_k", 256, 210, 1e-2, 0x1d802279175b3ac4},
  };
  for (const Packed& p : types) {
    std::vector<float> x = weights(), back(kValues);
    std::vector<uint8_t> bytes(static_cast<size_t>(kValues / p.values * p.bytes));
    run(std::string("pack_") + p.type, x.data(), bytes.data());
    run(std::string("unpack_") + p.type, bytes.data(), back.data());
    double squares = 0;
    for (int i = 0; i < kValues; ++i) squares += (back[i] - x[i]) * (back[i] - x[i]);
    CHECK(std::sqrt(squares / kValues) < p.error, "%s: %g", p.type, std::sqrt(squares / kValues));
    CHECK(fingerprint(bytes) == p.hash, "%s: 0x%llx", p.type, static_cast<unsigned long long>(fingerprint(bytes)));
  }
}
