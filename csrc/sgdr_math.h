// The arithmetic of schedule and update, once, for host and device. Read this file first.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define SGDR_HD __host__ __device__ __forceinline__
#else
#define SGDR_HD inline __attribute__((always_inline))
#endif

namespace sgdr {

// Note [Same bits everywhere]
// torch's add(x, alpha=a) is one fused multiply-add. Here every fma is written out and the
// compilers are told not to make any of their own (-ffp-contract=off, -fmad=false), so that the
// result does not depend on vector width, thread count or device, and on the CPU is
// torch.optim.SGD's to the bit.

// ----------------------------------------------------------------------------------------------
// schedule

// Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
// equation 5. All times are integers, counted in applied optimizer steps.
struct Schedule {
  double eta_max;  // of cycle 0
  double eta_min;
  double T_mult;
  double cycle_decay;
  double warmup_start_lr;
  int64_t T_0;           // length of cycle 0
  int64_t anneal_every;  // steps between two changes of the LR
  int64_t warmup_steps;
  int64_t n_cycles;  // afterwards the LR stays at eta_min
};

constexpr int64_t kEndless = INT64_MAX;

// Where a group stands: the LR of its next step is learning_rate(schedule, position).
struct Position {
  int64_t step;   // steps applied so far
  int64_t cycle;  // cycles completed or cut short by a restart
  int64_t T_cur;  // steps since the cycle began; below zero during warm-up
  int64_t T_i;    // length of the cycle
};

// By squaring: a fixed sequence of multiplications, hence the same bits in Python, C++ and CUDA,
// which pow() is not.
SGDR_HD double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

// Exact for an integer T_mult, whose products are integers below 2^53; longer cycles than that
// never end.
SGDR_HD int64_t cycle_length(const Schedule& schedule, int64_t cycle) {
  constexpr double kLongest = 9007199254740992.0;
  const double length = static_cast<double>(schedule.T_0) * power(schedule.T_mult, cycle);
  return static_cast<int64_t>(length < kLongest ? rint(length) : kLongest);
}

SGDR_HD void advance(const Schedule& schedule, Position& position) {
  ++position.step;
  ++position.T_cur;
  if (position.T_cur >= position.T_i && position.cycle < schedule.n_cycles) {
    position.T_cur = 0;
    ++position.cycle;
    position.T_i = cycle_length(schedule, position.cycle);
  }
}

// True at a restart, where reset_momentum drops the momentum; false at the start of the first
// cycle.
SGDR_HD bool at_restart(const Schedule& schedule, const Position& position) {
  return position.T_cur == 0 && position.cycle > 0 && position.cycle < schedule.n_cycles;
}

// Whether the next step ends a cycle, after which "swa" averages the weights.
SGDR_HD bool ends_cycle(const Schedule& schedule, const Position& position) {
  return position.T_cur + 1 >= position.T_i && position.cycle < schedule.n_cycles;
}

SGDR_HD double cos_of_pi_times(double numerator, double denominator) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  return cospi(numerator / denominator);
#else
  // In CosineAnnealingWarmRestarts' own order of operations, for its very bits.
  return std::cos(3.14159265358979323846 * numerator / denominator);
#endif
}

SGDR_HD double learning_rate(const Schedule& schedule, const Position& position) {
  if (position.T_cur < 0) {
    const double done = static_cast<double>(position.T_cur + schedule.warmup_steps);
    const double rise = schedule.eta_max - schedule.warmup_start_lr;
    return schedule.warmup_start_lr + rise * done / static_cast<double>(schedule.warmup_steps);
  }
  if (position.cycle >= schedule.n_cycles) return schedule.eta_min;
  const double T_cur = static_cast<double>(position.T_cur / schedule.anneal_every);
  const double T_i = static_cast<double>(position.T_i) / static_cast<double>(schedule.anneal_every);
  const double amplitude =
      (schedule.eta_max - schedule.eta_min) * power(schedule.cycle_decay, position.cycle);
  return schedule.eta_min + amplitude * (1 + cos_of_pi_times(T_cur, T_i)) / 2;
}

// ------------------------------------------------------------------------------------------------
// update

// Note [Fewer loops]
// Two loops stand for several options, as the bits are the same:
// - no weight decay is decoupled weight decay by 0, as p * 1 is p;
// - a parameter's first step is a later one without dampening that finds -0 in the momentum buffer,
//   as 1 * g + momentum * -0 is g, even where g is -0.
constexpr double kEmptyMomentum = -0.0;

enum class WeightDecay : uint8_t { kL2, kDecoupled };

// What is subtracted from the parameter; with kGrad there is no momentum buffer.
enum class Direction : uint8_t { kGrad, kMomentumBuffer, kNesterov };

// Multiplied by the clip coefficient, and divided by grad_scale before.
enum class GradScale : uint8_t { kNone, kMultiply, kDivideAndMultiply };

// What decides the shape of the element update; known outside the loop, so the loop has no branch.
template <GradScale kScale, WeightDecay kDecay, Direction kDirection>
struct UpdateOptions {
  static constexpr GradScale grad_scale = kScale;
  static constexpr WeightDecay weight_decay = kDecay;
  static constexpr Direction direction = kDirection;
};

// A group's numbers for one step, as the user gave them.
struct GroupScalars {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  double grad_divisor = 1;     // grad_scale
  double grad_multiplier = 1;  // clip coefficient, negative if maximize
};

SGDR_HD GradScale grad_scale_of(const GroupScalars& s) {
  if (s.grad_divisor != 1) return GradScale::kDivideAndMultiply;
  return s.grad_multiplier != 1 ? GradScale::kMultiply : GradScale::kNone;
}

// The same, rounded once to the type of the arithmetic.
template <class T>
struct UpdateScalars {
  T minus_lr, momentum, one_minus_dampening, weight_decay, one_minus_lr_weight_decay, grad_divisor,
      grad_multiplier;

  SGDR_HD explicit UpdateScalars(const GroupScalars& s)
      : minus_lr(static_cast<T>(-s.lr)),
        momentum(static_cast<T>(s.momentum)),
        one_minus_dampening(static_cast<T>(1 - s.dampening)),
        weight_decay(static_cast<T>(s.weight_decay)),
        one_minus_lr_weight_decay(static_cast<T>(1 - s.lr * s.weight_decay)),
        grad_divisor(static_cast<T>(s.grad_divisor)),
        grad_multiplier(static_cast<T>(s.grad_multiplier)) {}
};

SGDR_HD float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
SGDR_HD double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// One element of torch.optim.SGD's step, in torch's order of operations. T is float or double.
template <class Options, class T>
SGDR_HD void sgd_update(T& param, T grad, T& momentum_buffer, const UpdateScalars<T>& s) {
  if constexpr (Options::grad_scale == GradScale::kDivideAndMultiply) grad = grad / s.grad_divisor;
  if constexpr (Options::grad_scale != GradScale::kNone) grad = grad * s.grad_multiplier;
  if constexpr (Options::weight_decay == WeightDecay::kL2)
    grad = fused_multiply_add(s.weight_decay, param, grad);
  else
    param *= s.one_minus_lr_weight_decay;

  T direction = grad;
  if constexpr (Options::direction != Direction::kGrad) {
    momentum_buffer = fused_multiply_add(s.one_minus_dampening, grad, s.momentum * momentum_buffer);
    direction = Options::direction == Direction::kNesterov
                    ? fused_multiply_add(s.momentum, momentum_buffer, grad)
                    : momentum_buffer;
  }
  param = fused_multiply_add(s.minus_lr, direction, param);
}

// ------------------------------------------------------------------------------------------------
// average of the weights

// An average that holds nothing yet has decay 0, and becomes the parameter.
template <class T>
struct EmaScalars {
  T decay, one_minus_decay;

  SGDR_HD explicit EmaScalars(double decay)
      : decay(static_cast<T>(decay)), one_minus_decay(static_cast<T>(1 - decay)) {}
};

template <class T>
SGDR_HD T ema_update(T ema, T param, const EmaScalars<T>& s) {
  return s.decay == 0 ? param : fused_multiply_add(s.one_minus_decay, param, s.decay * ema);
}

// With which the average of n becomes that of n + 1, each with the same weight.
SGDR_HD double decay_of_equal_average(int64_t n) {
  return static_cast<double>(n) / static_cast<double>(n + 1);
}

// ------------------------------------------------------------------------------------------------
// norm of the gradients

// Note [Sum of squares]
// The sum is taken in one order, whatever the number of threads or blocks: a chunk of kNormChunk
// elements has kNormLanes sums, in double, lane l of the elements l, l + kNormLanes, ... in this
// order; then the upper half of the lanes is added to the lower one until one is left. The sums of
// all chunks, in the order of the tensors, are added up in the same way, as one long chunk. Squares
// of float data in double are exact and do not overflow.
constexpr int64_t kNormChunk = 4096;
constexpr int64_t kNormLanes = 128;

SGDR_HD double square(double x) { return x * x; }

// grad_scale is taken out of the norm, not out of every gradient.
SGDR_HD double grad_norm(double sum_of_squares, double grad_scale) {
  return sqrt(sum_of_squares) / fabs(grad_scale);
}

// torch.nn.utils.clip_grad_norm_'s. A norm of NaN gives NaN, as there.
SGDR_HD double clip_coefficient(double grad_norm, double max_grad_norm) {
  const double coefficient = max_grad_norm / (grad_norm + 1e-6);
  return coefficient >= 1 ? 1 : coefficient;
}

SGDR_HD bool is_finite(double x) { return x - x == 0; }

// ------------------------------------------------------------------------------------------------
// stochastic rounding

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
  uint32_t param_index;  // among those of all groups
};

// Note [Random bits]
// One draw serves kDrawNumel consecutive elements, 16 bits each: element i takes the half i % 8 of
// the draw's 128 bits, its upper three bits flipped by those of (i / 8) % 8. So every element's
// bits are uniform, and the eight elements that share a half are spread evenly over the unit
// interval.
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

// Of element i of a draw, to which word i % 8 / 2 belongs.
SGDR_HD uint32_t bits_of_element(uint32_t word, uint32_t i) {
  return (word >> (i % 2 * 16) & 0xFFFF) ^ flip_of_element(i);
}

// Up with the probability of the part that is cut off, else down; `bits` is of 16 random bits. The
// result is the number's representation.
SGDR_HD uint16_t round_to_bfloat16(float value, uint32_t bits) {
  const uint32_t exact = std::bit_cast<uint32_t>(value);
  const bool is_nan = (exact & 0x7FFFFFFF) > 0x7F800000;
  return static_cast<uint16_t>((is_nan ? exact | 0x00400000 : exact + bits) >> 16);
}

SGDR_HD uint16_t round_to_float16(float value, uint32_t bits) {
  const uint32_t exact = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = exact & 0x7FFFFFFF;
  const uint32_t cut_off = bits >> 3;  // 13 bits are
  // Below 2^-14 in units of 2^-24, with 13 bits after the point. The number is small, and so is
  // what the compiler computes for one that is not.
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
