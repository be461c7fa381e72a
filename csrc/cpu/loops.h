// The inner loops, compiled once for each instruction set, and the table that picks among them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../fused_step.h"
#include "../static_switch.h"

namespace sgdr::cpu {

template <class Options, class T>
SGDR_HD void update_elements(T* __restrict__ param, const T* __restrict__ grad,
                             T* __restrict__ momentum_buffer, int64_t numel,
                             UpdateScalars<T> scalars) {
  for (int64_t i = 0; i < numel; ++i) {
    if constexpr (Options::momentum == Momentum::kNone) {
      T unused = 0;
      sgd_update<Options>(param[i], grad[i], unused, scalars);
    } else {
      sgd_update<Options>(param[i], grad[i], momentum_buffer[i], scalars);
    }
  }
}

template <class From, class To>
SGDR_HD void convert_elements(const From* __restrict__ from, To* __restrict__ to, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) to[i] = static_cast<To>(from[i]);
}

// Function templates whose bodies, and all that is inlined into them, are compiled for `target`.
#define SGDR_INSTRUCTION_SET(name, target)                                                \
  struct name {                                                                           \
    template <class Options, class T>                                                     \
    target static void update(T* param, const T* grad, T* momentum_buffer, int64_t numel, \
                              const UpdateScalars<T>& scalars) {                          \
      update_elements<Options>(param, grad, momentum_buffer, numel, scalars);             \
    }                                                                                     \
    template <class From, class To>                                                       \
    target static void convert(const void* from, void* to, int64_t numel) {               \
      convert_elements(static_cast<const From*>(from), static_cast<To*>(to), numel);      \
    }                                                                                     \
  };

SGDR_INSTRUCTION_SET(Baseline, )
#if defined(__x86_64__)
SGDR_INSTRUCTION_SET(Avx2, __attribute__((target("arch=x86-64-v3"))))
SGDR_INSTRUCTION_SET(Avx512, __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))))
#endif
#undef SGDR_INSTRUCTION_SET

template <class T>
using UpdateLoop = void (*)(T* param, const T* grad, T* momentum_buffer, int64_t numel,
                            const UpdateScalars<T>& scalars);
using ConvertLoop = void (*)(const void* from, void* to, int64_t numel);

template <class InstructionSet, class T>
UpdateLoop<T> find_update_loop(const GroupStep& group, Momentum momentum) {
  return static_switch<false, true>(group.scalars.grad_divisor != 1, [&](auto scale_grad) {
    return static_switch<WeightDecay::kNone, WeightDecay::kL2, WeightDecay::kDecoupled>(
        group.weight_decay, [&](auto weight_decay) {
          return static_switch<Momentum::kNone, Momentum::kFirst, Momentum::kRunning>(
              momentum, [&](auto kind) {
                return static_switch<false, true>(
                    group.nesterov, [&](auto nesterov) -> UpdateLoop<T> {
                      using Options = UpdateOptions<scale_grad, weight_decay, kind, nesterov>;
                      return InstructionSet::template update<Options, T>;
                    });
              });
        });
  });
}

// From the stored type to the type of the arithmetic, or back.
template <class InstructionSet, class T>
ConvertLoop find_load_loop(ElementType stored) {
  switch (stored) {
    case ElementType::kFloat:
      return InstructionSet::template convert<float, T>;
    case ElementType::kDouble:
      return InstructionSet::template convert<double, T>;
    case ElementType::kHalf:
      return InstructionSet::template convert<c10::Half, T>;
    default:
      break;
  }
  return InstructionSet::template convert<c10::BFloat16, T>;
}

template <class InstructionSet, class T>
ConvertLoop find_store_loop(ElementType stored) {
  switch (stored) {
    case ElementType::kFloat:
      return InstructionSet::template convert<T, float>;
    case ElementType::kDouble:
      return InstructionSet::template convert<T, double>;
    case ElementType::kHalf:
      return InstructionSet::template convert<T, c10::Half>;
    default:
      break;
  }
  return InstructionSet::template convert<T, c10::BFloat16>;
}

}  // namespace sgdr::cpu
