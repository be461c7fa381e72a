// Chooses among the instruction sets that loops.h is compiled for.
#pragma once

#include <ATen/Version.h>

#include <string>

#include "loops.h"

namespace sgdr::cpu {

// Calls f with the instruction set that torch uses, so that ATEN_CPU_CAPABILITY rules both.
template <class F>
auto with_instruction_set(F f) {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  const bool avx2 = __builtin_cpu_supports("x86-64-v3");
  if (capability == "AVX512" && __builtin_cpu_supports("x86-64-v4")) return f(Avx512{});
  if ((capability == "AVX512" || capability == "AVX2") && avx2) return f(Avx2{});
#endif
  return f(Baseline{});
}

}  // namespace sgdr::cpu
