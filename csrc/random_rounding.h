// Stochastic rounding to half types, and the random numbers for it, for host and device.
#pragma once

#include <bit>
#include <cstdint>

#include "sgdr_math.h"

namespace sgdr {

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Ten rounds
// turn a counter into random words.
constexpr int kPhiloxRounds = 10;

struct PhiloxKey {
  uint32_t words[2];

  SGDR_HD explicit PhiloxKey(uint64_t key)
      : words{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)} {}
  SGDR_HD void advance() {
    words[0] += 0x9E3779B9;
    words[1] += 0xBB67AE85;
  }
};

SGDR_HD void philox_round(const PhiloxKey& key, uint32_t& c0, uint32_t& c1, uint32_t& c2,
                          uint32_t& c3) {
  const uint64_t product_0 = uint64_t{0xD2511F53} * c0;
  const uint64_t product_1 = uint64_t{0xCD9E8D57} * c2;
  c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ key.words[0];
  c1 = static_cast<uint32_t>(product_1);
  c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ key.words[1];
  c3 = static_cast<uint32_t>(product_0);
}

// Which of a parameter's values is rounded.
enum class Rounded : uint8_t { kParam, kMomentumBuffer };

// What a step's random numbers for one parameter depend on, besides the element.
struct RandomKey {
  uint64_t seed;
  uint32_t step;
  uint32_t param_index;  // index among the parameters of all groups
};

// Note [Random bits]
// One draw of 128 bits serves kDrawNumel consecutive elements, 16 bits each. Element i takes the
// 16-bit half-word i % 8 and flips its upper three bits by (i / 8) % 8. So every element's bits are
// uniform, and the eight elements that share a half-word are spread evenly over the unit interval.
constexpr int64_t kDrawNumel = 64;

SGDR_HD void set_counter(const RandomKey& key, Rounded rounded, int64_t index, uint32_t& c0,
                         uint32_t& c1, uint32_t& c2, uint32_t& c3) {
  c0 = static_cast<uint32_t>(index);
  c1 = static_cast<uint32_t>(index >> 32) << 1 | static_cast<uint32_t>(rounded);
  c2 = key.param_index;
  c3 = key.step;
}

SGDR_HD void draw(const RandomKey& key, Rounded rounded, int64_t index, uint32_t (&words)[4]) {
  set_counter(key, rounded, index, words[0], words[1], words[2], words[3]);
  PhiloxKey round_key(key.seed);
  for (int round = 0; round < kPhiloxRounds; ++round, round_key.advance())
    philox_round(round_key, words[0], words[1], words[2], words[3]);
}

SGDR_HD uint32_t flip_of_element(uint32_t i) { return (i / 8 % 8) << 13; }

// The 16 bits of element i of a draw; `word` is the draw's word i % 8 / 2.
SGDR_HD uint32_t bits_of_element(uint32_t word, uint32_t i) {
  return (word >> (i % 2 * 16) & 0xFFFF) ^ flip_of_element(i);
}

// Rounds up with a probability equal to the part that is cut off, else down. `bits` holds 16 random
// bits; the upper half of the result is the representation of the rounded number. A NaN stays: one
// that arithmetic has made has its highest bits set.
SGDR_HD uint32_t round_upper_half(float value, uint32_t bits) {
  const uint32_t exact = std::bit_cast<uint32_t>(value);
  return value == value ? exact + bits : exact;
}

SGDR_HD uint16_t round_to_bfloat16(float value, uint32_t bits) {
  return static_cast<uint16_t>(round_upper_half(value, bits) >> 16);
}

SGDR_HD uint16_t round_to_float16(float value, uint32_t bits) {
  const uint32_t exact = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = exact & 0x7FFFFFFF;
  const uint32_t cut_off = bits >> 3;  // float16 cuts off 13 bits
  // Numbers below 2^-14 are subnormal: multiples of 2^-24, here with 13 more bits. Larger numbers
  // become 0 first, because a conversion that overflows is undefined.
  const float small = magnitude < 0x38800000 ? std::bit_cast<float>(magnitude) : 0.0f;
  const uint32_t subnormal =
      (static_cast<uint32_t>(static_cast<int32_t>(small * 137438953472.0f)) + cut_off) >> 13;
  const uint32_t up = magnitude + cut_off;
  const uint32_t normal = up < 0x47800000 ? (up - 0x38000000) >> 13 : 0x7C00;
  const uint32_t infinite = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  const uint32_t result = magnitude < 0x38800000    ? subnormal
                          : magnitude >= 0x7F800000 ? infinite
                                                    : normal;
  return static_cast<uint16_t>(exact >> 16 & 0x8000) | static_cast<uint16_t>(result);
}

}  // namespace sgdr
