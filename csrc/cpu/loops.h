// The inner loops, compiled once for each instruction set, and the tables that pick among them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "../fused_step.h"
#include "../static_switch.h"

namespace sgdr::cpu {

template <class Options, class T>
SGDR_HD void update_elements(T* __restrict__ param, const T* __restrict__ grad,
                             T* __restrict__ momentum_buffer, int64_t numel,
                             UpdateScalars<T> scalars) {
  for (int64_t i = 0; i < numel; ++i) {
    if constexpr (Options::direction == Direction::kGrad) {
      T unused = 0;
      sgd_update<Options>(param[i], grad[i], unused, scalars);
    } else {
      sgd_update<Options>(param[i], grad[i], momentum_buffer[i], scalars);
    }
  }
}

template <class T>
SGDR_HD void update_ema_elements(T* __restrict__ ema, const T* __restrict__ param, int64_t numel,
                                 EmaScalars<T> scalars) {
  for (int64_t i = 0; i < numel; ++i) ema[i] = ema_update(ema[i], param[i], scalars);
}

template <class From, class To>
SGDR_HD void convert_elements(const From* __restrict__ from, To* __restrict__ to, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) to[i] = static_cast<To>(from[i]);
}

// Stochastically, for a block that begins with a draw; see Note [Random bits].
template <class T, class To>
SGDR_HD void round_elements(const T* __restrict__ from, uint16_t* __restrict__ to, int64_t numel,
                            const RandomKey& key, Rounded rounded, int64_t begin) {
  constexpr int64_t kDraws = 8;
  constexpr int64_t kNumel = kDraws * kDrawNumel;
  for (int64_t done = 0; done < numel; done += kNumel) {
    uint32_t words[kDraws][4];
    for (int64_t i = 0; i < kDraws; ++i)
      draw(key, rounded, (begin + done) / kDrawNumel + i, words[i]);
    uint16_t bits[kNumel];
    for (int64_t i = 0; i < kDraws; ++i) {
      for (uint32_t j = 0; j < kDrawNumel; ++j)
        bits[i * kDrawNumel + j] = static_cast<uint16_t>(bits_of_element(words[i][j % 8 / 2], j));
    }
    const int64_t end = std::min(numel, done + kNumel);
    for (int64_t i = done; i < end; ++i) {
      const float value = static_cast<float>(from[i]);
      to[i] = std::is_same_v<To, c10::Half> ? round_to_float16(value, bits[i - done])
                                            : round_to_bfloat16(value, bits[i - done]);
    }
  }
}

// Adds a stretch to the lanes that begins with the first one.
template <class Stored>
SGDR_HD void add_squares(double* __restrict__ lanes, const Stored* __restrict__ values,
                         int64_t numel) {
  int64_t row = 0;
  for (; row + kNormLanes <= numel; row += kNormLanes) {
    for (int64_t lane = 0; lane < kNormLanes; ++lane)
      lanes[lane] += square(static_cast<double>(values[row + lane]));
  }
  for (int64_t lane = 0; row + lane < numel; ++lane)
    lanes[lane] += square(static_cast<double>(values[row + lane]));
}

// Of lanes of which only the first `used` can be other than 0.
SGDR_HD double fold_lanes(double* lanes, int64_t used) {
  for (int64_t half = kNormLanes / 2; half > 0; half /= 2) {
    if (half >= used) continue;
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <class Stored>
SGDR_HD double sum_of_squares_of_elements(const Stored* values, int64_t numel) {
  double lanes[kNormLanes] = {};
  add_squares(lanes, values, numel);
  return fold_lanes(lanes, numel);
}

// Function templates whose bodies, and all that is inlined into them, are compiled for `target`.
#define SGDR_INSTRUCTION_SET(name, target)                                                 \
  struct name {                                                                            \
    template <class Options, class T>                                                      \
    target static void update(T* param, const T* grad, T* momentum_buffer, int64_t numel,  \
                              const UpdateScalars<T>& scalars) {                           \
      update_elements<Options>(param, grad, momentum_buffer, numel, scalars);              \
    }                                                                                      \
    template <class T>                                                                     \
    target static void update_ema(T* ema, const T* param, int64_t numel, double decay) {   \
      update_ema_elements(ema, param, numel, EmaScalars<T>(decay));                        \
    }                                                                                      \
    template <class From, class To>                                                        \
    target static void convert(const void* from, void* to, int64_t numel) {                \
      convert_elements(static_cast<const From*>(from), static_cast<To*>(to), numel);       \
    }                                                                                      \
    template <class T, class To>                                                           \
    target static void round(const T* from, void* to, int64_t numel, const RandomKey& key, \
                             Rounded rounded, int64_t begin) {                             \
      round_elements<T, To>(from, static_cast<uint16_t*>(to), numel, key, rounded, begin); \
    }                                                                                      \
    template <class Stored>                                                                \
    target static double sum_of_squares(const void* values, int64_t numel) {               \
      return sum_of_squares_of_elements(static_cast<const Stored*>(values), numel);        \
    }                                                                                      \
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
template <class T>
using RoundLoop = void (*)(const T* from, void* to, int64_t numel, const RandomKey& key,
                           Rounded rounded, int64_t begin);
using SumLoop = double (*)(const void* values, int64_t numel);

template <class InstructionSet, class T>
UpdateLoop<T> find_update_loop(const GroupStep& group) {
  return static_switch<GradScale::kNone, GradScale::kMultiply, GradScale::kDivideAndMultiply>(
      grad_scale_of(group.scalars), [&](auto grad_scale) {
        return static_switch<WeightDecay::kL2,
                             WeightDecay::kDecoupled>(group.weight_decay, [&](auto weight_decay) {
          return static_switch<Direction::kGrad, Direction::kMomentumBuffer, Direction::kNesterov>(
              group.direction, [&](auto direction) -> UpdateLoop<T> {
                using Options = UpdateOptions<grad_scale, weight_decay, direction>;
                return InstructionSet::template update<Options, T>;
              });
        });
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

// From the stored type to the type of the arithmetic, or back.
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
