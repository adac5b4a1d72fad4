#include "core/cpuid.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "core/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace limbeck {
namespace {

#if defined(__x86_64__)
struct Features {
  bool avx2 = false, avx512 = false;
};

// The processor's word is not enough: the operating system must save the wide registers too (XCR0).
Features detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
  const bool osxsave = c & (1u << 27), avx = c & (1u << 28), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave || !avx || !fma || !f16c) return {};
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  Features has;
  has.avx2 = ymm && (b & (1u << 5));
  const unsigned wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  has.avx512 = has.avx2 && zmm && (b & wide) == wide;
  return has;
}
#endif

std::string compiled() {
  std::string list;
  for (int i = 0; i < cpu_isa_count; ++i) list += (i ? ", " : "") + std::string(cpu_isas[i].isa);
  return list;
}

}  // namespace

bool cpu_runs([[maybe_unused]] const char* isa) {
#if defined(__x86_64__)
  static const Features has = detect();
  if (std::strcmp(isa, "avx2") == 0) return has.avx2;
  if (std::strcmp(isa, "avx512") == 0) return has.avx512;
#endif
  return true;
}

const IsaKernels& choose_isa(const std::string& asked) {
  const char* env = std::getenv("LIMBECK_ISA");
  const bool from_env = asked.empty() && env && *env;
  const std::string want = from_env ? env : asked;
  if (want.empty()) {
    for (int i = cpu_isa_count - 1; i > 0; --i)
      if (cpu_runs(cpu_isas[i].isa)) return cpu_isas[i];
    return cpu_isas[0];
  }
  const std::string where = from_env ? "LIMBECK_ISA" : "isa";
  for (int i = 0; i < cpu_isa_count; ++i) {
    if (want != cpu_isas[i].isa) continue;
    if (cpu_runs(cpu_isas[i].isa)) return cpu_isas[i];
    throw Error(ErrorKind::device, "ERR_ISA",
                "init: " + where + " asks for '" + want + "', which this processor or operating system does not support; leave it out to use the best one")
        .in("init").on(where).wanted("an instruction set of this machine").got(want);
  }
  throw Error(ErrorKind::device, "ERR_ISA",
              "init: " + where + " asks for '" + want + "', which this build does not have; it has " + compiled() + "; leave it out to use the best one")
      .in("init").on(where).wanted(compiled()).got(want);
}

}  // namespace limbeck
