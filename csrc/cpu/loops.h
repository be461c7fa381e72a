// The inner loops, compiled once for each instruction set, and the tables that pick among them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "../backend.h"
#include "../random_rounding.h"
#include "../static_switch.h"

namespace sgdr::cpu {

// Long loops go strip by strip, and each strip prefetches memory that is needed a little later: the
// processor's own prefetcher leaves a fifth of the memory's bandwidth unused. The memory behind the
// end most likely belongs to the next range.
constexpr int64_t kStrip = 64;
constexpr int64_t kAheadOfStrip = 512;
constexpr int64_t kLong = 1024;

template <class T>
SGDR_INLINE void prefetch_for_strip(const T* strip) {
  const char* const begin = reinterpret_cast<const char*>(strip + kAheadOfStrip);
  for (int64_t byte = 0; byte < kStrip * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(begin + byte, 1);
}

// Calls body(i) for all i < numel, and in a long loop prefetch(i) for each strip. No body reads
// what another body writes.
template <class Prefetch, class Body>
SGDR_INLINE void for_each_element(int64_t numel, Prefetch prefetch, Body body) {
  int64_t done = 0;
  if (numel >= kLong) {
    for (; done + kStrip <= numel; done += kStrip) {
      prefetch(done);
#pragma GCC ivdep
      for (int64_t i = done; i < done + kStrip; ++i) body(i);
    }
  }
#pragma GCC ivdep
  for (int64_t i = done; i < numel; ++i) body(i);
}

template <class Options, class T>
SGDR_INLINE void update_elements(T* __restrict__ param, const T* __restrict__ grad,
                                 T* __restrict__ momentum_buffer, int64_t numel,
                                 UpdateScalars<T> scalars) {
  constexpr bool kHasMomentum = Options::direction != Direction::kGrad;
  const auto prefetch = [=](int64_t i) __attribute__((always_inline)) {
    prefetch_for_strip(param + i);
    prefetch_for_strip(grad + i);
    if constexpr (kHasMomentum) prefetch_for_strip(momentum_buffer + i);
  };
  for_each_element(numel, prefetch, [&](int64_t i) __attribute__((always_inline)) {
    T unused = 0;
    if constexpr (kHasMomentum)
      sgd_update<Options>(param[i], grad[i], momentum_buffer[i], scalars);
    else
      sgd_update<Options>(param[i], grad[i], unused, scalars);
  });
}

template <class T>
SGDR_INLINE void update_ema_elements(T* __restrict__ ema, const T* __restrict__ param,
                                     int64_t numel, EmaScalars<T> scalars) {
  for_each_element(
      numel, [=](int64_t i) __attribute__((always_inline)) { prefetch_for_strip(ema + i); },
      [&](int64_t i)
          __attribute__((always_inline)) { ema[i] = ema_update(ema[i], param[i], scalars); });
}

template <class From, class To>
SGDR_INLINE void convert_elements(const From* __restrict__ from, To* __restrict__ to,
                                  int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) to[i] = static_cast<To>(from[i]);
}

// Gives each element of a draw its 16 random bits.
SGDR_INLINE void spread_bits(const uint32_t (&words)[4], uint16_t* __restrict__ bits) {
  // The half-words of bits_of_element(), copied by one instruction.
  static_assert(std::endian::native == std::endian::little);
  uint16_t halves[8];
  std::memcpy(halves, words, sizeof(halves));
  for (uint32_t run = 0; run < kDrawNumel; run += 8) {
    for (uint32_t i = 0; i < 8; ++i)
      bits[run + i] = static_cast<uint16_t>(halves[i] ^ flip_of_element(run));
  }
}

constexpr int64_t kDraws = 16;
constexpr int64_t kDrawsNumel = kDraws * kDrawNumel;

// The random bits of kDrawsNumel elements from `begin` on, which begins a draw: see Note [Random
// bits].
SGDR_INLINE void draw_bits(uint16_t* __restrict__ bits, const RandomKey& key, Rounded rounded,
                           int64_t begin) {
  // One round for all draws, then the next: the compiler vectorises this.
  uint32_t words[4][kDraws];
  for (int64_t i = 0; i < kDraws; ++i)
    set_counter(key, rounded, begin / kDrawNumel + i, words[0][i], words[1][i], words[2][i],
                words[3][i]);
  PhiloxKey round_key(key.seed);
  for (int round = 0; round < kPhiloxRounds; ++round, round_key.advance()) {
    for (int64_t i = 0; i < kDraws; ++i)
      philox_round(round_key, words[0][i], words[1][i], words[2][i], words[3][i]);
  }
  uint32_t draws[kDraws][4];
  for (int64_t i = 0; i < kDraws; ++i) {
    for (int64_t j = 0; j < 4; ++j) draws[i][j] = words[j][i];
  }
  for (int64_t i = 0; i < kDraws; ++i) spread_bits(draws[i], bits + i * kDrawNumel);
}

template <class T, class To>
SGDR_INLINE void round_elements(const T* __restrict__ from, uint16_t* __restrict__ to,
                                int64_t numel, const RandomKey& key, Rounded rounded,
                                int64_t begin) {
  uint16_t bits[kDrawsNumel];
  for (int64_t done = 0; done < numel; done += kDrawsNumel) {
    draw_bits(bits, key, rounded, begin + done);
    const int64_t left = std::min(numel - done, kDrawsNumel);
    for (int64_t i = 0; i < left; ++i) {
      const float value = static_cast<float>(from[done + i]);
      to[done + i] = std::is_same_v<To, c10::Half> ? round_to_float16(value, bits[i])
                                                   : round_to_bfloat16(value, bits[i]);
    }
  }
}

// The only mixture of types with a loop of its own: float32 with a momentum buffer in bfloat16. By
// blocks it would take 1.5 times as long. Each draw is made while the strip before is updated, so
// that neither waits for the other.
template <class Options>
SGDR_INLINE void update_elements_rounding(float* __restrict__ param, const float* __restrict__ grad,
                                          uint16_t* __restrict__ momentum_buffer, int64_t numel,
                                          const UpdateScalars<float>& scalars, const RandomKey& key,
                                          int64_t begin) {
  uint32_t words[2][4];
  int64_t index = begin / kDrawNumel;
  draw(key, Rounded::kMomentumBuffer, index, words[index % 2]);
  for (int64_t done = 0; done < numel; done += kDrawNumel, ++index) {
    uint16_t bits[kDrawNumel];
    spread_bits(words[index % 2], bits);
    draw(key, Rounded::kMomentumBuffer, index + 1, words[(index + 1) % 2]);
    float* const p = param + done;
    const float* const g = grad + done;
    uint16_t* const m = momentum_buffer + done;
    const auto update = [&](int64_t i) __attribute__((always_inline)) {
      float momentum = std::bit_cast<float>(uint32_t{m[i]} << 16);
      sgd_update<Options>(p[i], g[i], momentum, scalars);
      m[i] = round_to_bfloat16(momentum, bits[i]);
    };
    const int64_t left = numel - done;
    if (left < kDrawNumel) {
      for (int64_t i = 0; i < left; ++i) update(i);
      return;
    }
    prefetch_for_strip(p);
    prefetch_for_strip(g);
    prefetch_for_strip(m);
#pragma GCC ivdep
    for (int64_t i = 0; i < kDrawNumel; ++i) update(i);
  }
}

// Adds the squares of values to the lanes; the first value belongs to lane 0.
template <class Stored>
SGDR_INLINE void add_squares(double* __restrict__ lanes, const Stored* __restrict__ values,
                             int64_t numel) {
  int64_t row = 0;
  for (; row + kNormLanes <= numel; row += kNormLanes) {
    if (numel >= kLong) {
      for (int64_t strip = 0; strip < kNormLanes; strip += kStrip)
        prefetch_for_strip(values + row + strip);
    }
    for (int64_t lane = 0; lane < kNormLanes; ++lane)
      lanes[lane] += square(static_cast<double>(values[row + lane]));
  }
  for (int64_t lane = 0; row + lane < numel; ++lane)
    lanes[lane] += square(static_cast<double>(values[row + lane]));
}

// The sum of the lanes, of which only the first `used` are not 0.
SGDR_INLINE double fold_lanes(double* lanes, int64_t used) {
  for (int64_t half = kNormLanes / 2; half > 0; half /= 2) {
    if (half >= used) continue;
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

using EightLanes [[gnu::vector_size(64)]] = double;

// The same sum for at most kLanes elements, with the lanes in registers: in a quarter of the time.
template <int64_t kLanes, class Stored>
SGDR_INLINE double sum_of_few_squares(const Stored* values, int64_t numel) {
  EightLanes lanes[kLanes / 8];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes / 8; ++i) {
    const Stored* eight = values + 8 * i;
    Stored padded[8] = {};
    if (numel < 8 * (i + 1)) {
      for (int64_t j = 0; 8 * i + j < numel; ++j) padded[j] = eight[j];
      eight = padded;
    }
    double squares[8];
    for (int64_t j = 0; j < 8; ++j) squares[j] = square(static_cast<double>(eight[j]));
    std::memcpy(&lanes[i], squares, sizeof(squares));
  }
#pragma GCC unroll 16
  for (int64_t half = kLanes / 16; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  const EightLanes& last = lanes[0];
  return ((last[0] + last[4]) + (last[2] + last[6])) + ((last[1] + last[5]) + (last[3] + last[7]));
}

template <class Stored>
SGDR_INLINE double sum_of_squares_of_elements(const Stored* values, int64_t numel) {
  if (numel <= 8) return sum_of_few_squares<8>(values, numel);
  if (numel <= 16) return sum_of_few_squares<16>(values, numel);
  if (numel <= 32) return sum_of_few_squares<32>(values, numel);
  if (numel <= 64) return sum_of_few_squares<64>(values, numel);
  double lanes[kNormLanes] = {};
  add_squares(lanes, values, numel);
  return fold_lanes(lanes, numel);
}

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
