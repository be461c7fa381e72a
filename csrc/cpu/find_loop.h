// Finds the loop for a group's options and a tensor's types, once, outside the loop.
#pragma once

#include "../backend.h"
#include "../static_switch.h"
#include "instruction_set.h"

namespace sgdr::cpu {

template <class T>
using UpdateLoop = void (*)(T* param, const T* grad, T* momentum_buffer, int64_t numel,
                            const UpdateScalars<T>& scalars);
using UpdateRoundingLoop = void (*)(float* param, const float* grad, uint16_t* momentum_buffer,
                                    int64_t numel, const UpdateScalars<float>& scalars,
                                    const RandomKey& key, int64_t begin);
using ConvertLoop = void (*)(const void* from, void* to, int64_t numel);
template <class T>
using RoundLoop = void (*)(const T* from, void* to, int64_t numel, const RandomKey& key,
                           Rounded rounded, int64_t begin);
using SumLoop = double (*)(const void* values, int64_t numel);

SGDR_INLINE GradScale grad_scale_of(const GroupScalars& s) {
  if (s.grad_divisor != 1) return GradScale::kDivideAndMultiply;
  return s.grad_multiplier != 1 ? GradScale::kMultiply : GradScale::kNone;
}

// Calls f with the group's UpdateOptions.
template <class F>
auto with_update_options(const GroupStep& group, F f) {
  using enum GradScale;
  using enum Direction;
  return static_switch<kNone, kMultiply, kDivideAndMultiply>(
      grad_scale_of(group.scalars), [&](auto scale) {
        return static_switch<WeightDecay::kL2, WeightDecay::kDecoupled>(
            group.options.decay, [&](auto decay) {
              return static_switch<kGrad, kMomentumBuffer, kNesterov>(
                  group.options.direction,
                  [&](auto direction) { return f(UpdateOptions<scale, decay, direction>{}); });
            });
      });
}

template <class InstructionSet, class T>
UpdateLoop<T> find_update_loop(const GroupStep& group) {
  return with_update_options(group, [](auto options) -> UpdateLoop<T> {
    return InstructionSet::template update<decltype(options), T>;
  });
}

template <class InstructionSet>
UpdateRoundingLoop find_update_rounding_loop(const GroupStep& group) {
  return with_update_options(group, [](auto options) -> UpdateRoundingLoop {
    if constexpr (decltype(options)::direction == Direction::kGrad)
      return nullptr;
    else
      return InstructionSet::template update_rounding<decltype(options)>;
  });
}

// Calls f with a value of the C++ type that is stored.
template <class F>
auto with_stored_type(ElementType type, F f) {
  switch (type) {
    case ElementType::kFloat:
      return f(float{});
    case ElementType::kDouble:
      return f(double{});
    case ElementType::kHalf:
      return f(c10::Half{});
    default:
      break;
  }
  return f(c10::BFloat16{});
}

// Converts the stored type to the type of the arithmetic, or back.
template <class InstructionSet, class T>
ConvertLoop find_load_loop(ElementType stored) {
  return with_stored_type(stored, [](auto value) -> ConvertLoop {
    return InstructionSet::template convert<decltype(value), T>;
  });
}

template <class InstructionSet, class T>
ConvertLoop find_store_loop(ElementType stored) {
  return with_stored_type(stored, [](auto value) -> ConvertLoop {
    return InstructionSet::template convert<T, decltype(value)>;
  });
}

template <class InstructionSet, class T>
RoundLoop<T> find_round_loop(ElementType stored) {
  return stored == ElementType::kHalf ? InstructionSet::template round<T, c10::Half>
                                      : InstructionSet::template round<T, c10::BFloat16>;
}

template <class InstructionSet>
SumLoop find_sum_loop(ElementType stored) {
  return with_stored_type(stored, [](auto value) -> SumLoop {
    return InstructionSet::template sum_of_squares<decltype(value)>;
  });
}

}  // namespace sgdr::cpu
