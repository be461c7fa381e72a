// The element loops: update, average, conversion and rounding of a stretch of memory.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "../backend.h"
#include "../random_rounding.h"

namespace sgdr::cpu {

template <class Options, class T>
SGDR_INLINE void update_elements(T* __restrict__ param, const T* __restrict__ grad,
                                 T* __restrict__ momentum_buffer, int64_t numel,
                                 UpdateScalars<T> scalars) {
  constexpr bool kHasMomentum = Options::direction != Direction::kGrad;
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) {
    T unused = 0;
    if constexpr (kHasMomentum)
      sgd_update<Options>(param[i], grad[i], momentum_buffer[i], scalars);
    else
      sgd_update<Options>(param[i], grad[i], unused, scalars);
  }
}

template <class T>
SGDR_INLINE void update_ema_elements(T* __restrict__ ema, const T* __restrict__ param,
                                     int64_t numel, EmaScalars<T> scalars) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) ema[i] = ema_update(ema[i], param[i], scalars);
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

// Prefetches `numel` elements. A loop that does much besides loading and storing needs it; for
// plain loops the processor's own prefetcher does better. Nothing is wrong with addresses behind
// the end.
template <class T>
SGDR_INLINE void prefetch_elements(const T* elements, int64_t numel) {
  const auto* const begin = reinterpret_cast<const char*>(elements);
  for (int64_t byte = 0; byte < numel * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(begin + byte);
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
    constexpr int64_t kAhead = 512;
    prefetch_elements(p + kAhead, kDrawNumel);
    prefetch_elements(g + kAhead, kDrawNumel);
    prefetch_elements(m + kAhead, kDrawNumel);
#pragma GCC ivdep
    for (int64_t i = 0; i < kDrawNumel; ++i) update(i);
  }
}

}  // namespace sgdr::cpu
