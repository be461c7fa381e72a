// The loops compiled for each instruction set, and the choice among the sets.
#pragma once

#include <ATen/Version.h>

#include <string>

#include "loops.h"
#include "squares.h"

namespace sgdr::cpu {

// Function templates whose bodies, and all that is inlined into them, are compiled for `target`.
#define SGDR_INSTRUCTION_SET(name, target)                                                         \
  struct name {                                                                                    \
    template <class Options, class T>                                                              \
    target static void update(T* param, const T* grad, T* momentum_buffer, int64_t numel,          \
                              const UpdateScalars<T>& scalars) {                                   \
      update_elements<Options>(param, grad, momentum_buffer, numel, scalars);                      \
    }                                                                                              \
    template <class Options>                                                                       \
    target static void update_rounding(float* param, const float* grad, uint16_t* momentum_buffer, \
                                       int64_t numel, const UpdateScalars<float>& scalars,         \
                                       const RandomKey& key, int64_t begin) {                      \
      update_elements_rounding<Options>(param, grad, momentum_buffer, numel, scalars, key, begin); \
    }                                                                                              \
    template <class T>                                                                             \
    target static void update_ema(T* ema, const T* param, int64_t numel, double decay) {           \
      update_ema_elements(ema, param, numel, EmaScalars<T>(decay));                                \
    }                                                                                              \
    template <class From, class To>                                                                \
    target static void convert(const void* from, void* to, int64_t numel) {                        \
      convert_elements(static_cast<const From*>(from), static_cast<To*>(to), numel);               \
    }                                                                                              \
    template <class T, class To>                                                                   \
    target static void round(const T* from, void* to, int64_t numel, const RandomKey& key,         \
                             Rounded rounded, int64_t begin) {                                     \
      round_elements<T, To>(from, static_cast<uint16_t*>(to), numel, key, rounded, begin);         \
    }                                                                                              \
    template <class Stored>                                                                        \
    target static double sum_of_squares(const void* values, int64_t numel) {                       \
      return sum_of_squares_of_elements(static_cast<const Stored*>(values), numel);                \
    }                                                                                              \
  };

SGDR_INSTRUCTION_SET(Baseline, )
#if defined(__x86_64__)
SGDR_INSTRUCTION_SET(Avx2, __attribute__((target("arch=x86-64-v3"))))
SGDR_INSTRUCTION_SET(Avx512, __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))))
#endif
#undef SGDR_INSTRUCTION_SET

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
