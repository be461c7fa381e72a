// The sum of the squares of at most a chunk of elements: see Note [Sum of squares].
#pragma once

#include <cstring>

#include "loops.h"

namespace sgdr::cpu {

// Adds the squares of values to the lanes; the first value belongs to lane 0.
template <class Stored>
SGDR_INLINE void add_squares(double* __restrict__ lanes, const Stored* __restrict__ values,
                             int64_t numel) {
  int64_t row = 0;
  for (; row + kNormLanes <= numel; row += kNormLanes) {
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

}  // namespace sgdr::cpu
