#include "core/cpuid.h"

#include <cstdlib>
#include <cstring>

#include "check.h"

using namespace limbeck;

TEST(the_portable_kernels_come_first_and_run_everywhere) {
  CHECK(cpu_isa_count >= 1);
  CHECK(cpu_runs(cpu_isas[0].isa));
}

TEST(every_instruction_set_has_the_same_families) {
  for (int i = 1; i < cpu_isa_count; ++i) {
    CHECK(cpu_isas[i].count == cpu_isas[0].count);
    for (int f = 0; f < cpu_isas[i].count; ++f) {
      const KernelFamily &a = *cpu_isas[0].families[f], &b = *cpu_isas[i].families[f];
      CHECK(a.count == b.count);
      for (int k = 0; k < a.count; ++k) CHECK(std::strcmp(a.kernels[k].name, b.kernels[k].name) == 0);
    }
  }
}

TEST(an_instruction_set_is_chosen_by_name_by_environment_or_by_itself) {
  unsetenv("LIMBECK_ISA");
  CHECK(cpu_runs(choose_isa().isa));
  for (int i = 0; i < cpu_isa_count; ++i)
    if (cpu_runs(cpu_isas[i].isa)) CHECK(&choose_isa(cpu_isas[i].isa) == &cpu_isas[i]);
  setenv("LIMBECK_ISA", cpu_isas[0].isa, 1);
  CHECK(&choose_isa() == &cpu_isas[0]);
  unsetenv("LIMBECK_ISA");
}

TEST(an_unknown_instruction_set_is_refused_with_the_list) {
  bool refused = false;
  try {
    choose_isa("abacus");
  } catch (const Error& error) {
    refused = error.code == "ERR_ISA" && error.expected.find(cpu_isas[0].isa) != std::string::npos && error.actual == "abacus";
  }
  CHECK(refused);
}
