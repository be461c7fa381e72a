// The arithmetic of schedule and update, once, for host and device. Read this file first.
#pragma once

#include <cmath>
#include <cstdint>

// Inlined everywhere, so that a loop is one function that the compiler can vectorise.
#define SGDR_INLINE inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define SGDR_HD __host__ __device__ __forceinline__
#else
#define SGDR_HD SGDR_INLINE
#endif

namespace sgdr {

// Note [Same bits everywhere]
// torch's add(x, alpha=a) is one fused multiply-add. Here every fma is written out and the
// compilers may not make others (-ffp-contract=off, -fmad=false). So the result does not depend on
// vector width, thread count or device, and equals torch.optim.SGD's on the CPU bit for bit.

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

// Multiplies in a fixed order, so that Python, C++ and CUDA get the same bits; pow() does not.
SGDR_HD double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

// Exact for an integer T_mult: the products are integers below 2^53. A longer cycle never ends.
// Cycles stop growing at some point, so that schedule.py can sum up their lengths in bounded time.
SGDR_HD int64_t cycle_length(const Schedule& schedule, int64_t cycle) {
  constexpr double kLongest = 9007199254740992.0;
  constexpr int64_t kLastGrowing = 10000;
  const double growth = power(schedule.T_mult, cycle < kLastGrowing ? cycle : kLastGrowing);
  const double length = static_cast<double>(schedule.T_0) * growth;
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

// Whether a cycle other than the first begins here, at which reset_momentum drops the momentum.
SGDR_HD bool at_restart(const Schedule& schedule, const Position& position) {
  return position.T_cur == 0 && position.cycle > 0 && position.cycle < schedule.n_cycles;
}

// Whether the next step ends a cycle, after which "swa" averages the weights.
SGDR_HD bool ends_cycle(const Schedule& schedule, const Position& position) {
  return position.T_cur + 1 >= position.T_i && position.cycle < schedule.n_cycles;
}

// Whether the LR can differ from that of the step before: with anneal="epoch" only where an epoch
// begins.
SGDR_HD bool changes_lr(const Schedule& schedule, const Position& position) {
  return position.T_cur <= 0 || position.T_cur % schedule.anneal_every == 0;
}

SGDR_HD double cos_of_pi_times(double numerator, double denominator) {
#if defined(__CUDA_ARCH__)
  return cospi(numerator / denominator);
#else
  // The order of operations is CosineAnnealingWarmRestarts', and so are the bits.
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

// A first step runs as a later step with dampening 0 and a momentum buffer of -0:
// 1 * g + momentum * -0 is g, even for g = -0. So no loop for first steps is compiled.
constexpr double kEmptyMomentum = -0.0;

enum class WeightDecay : uint8_t { kL2, kDecoupled };

// What the parameter moves along; with kGrad there is no momentum buffer.
enum class Direction : uint8_t { kGrad, kMomentumBuffer, kNesterov };

// What is done to the gradient first: it is divided by grad_scale, then multiplied by the clip
// coefficient. kMultiplyTwice divides by a multiplication, with grad_scale's exact reciprocal.
enum class GradScale : uint8_t { kNone, kMultiply, kMultiplyTwice, kDivideAndMultiply };

// The options that change the element update. They are types, decided outside the loop, so that the
// loop has no branch.
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

// The numbers that do not depend on the step, each rounded once to the type of the arithmetic.
template <class T>
struct FixedScalars {
  T momentum, one_minus_dampening, weight_decay;

  SGDR_HD explicit FixedScalars(const GroupScalars& s)
      : momentum(static_cast<T>(s.momentum)),
        one_minus_dampening(static_cast<T>(1 - s.dampening)),
        weight_decay(static_cast<T>(s.weight_decay)) {}
};

// All numbers, likewise.
template <class T>
struct UpdateScalars : FixedScalars<T> {
  T minus_lr, one_minus_lr_weight_decay;
  T grad_divisor;  // with kMultiplyTwice its reciprocal
  T grad_multiplier;

  explicit UpdateScalars(const GroupScalars& s)
      : UpdateScalars(FixedScalars<T>(s), s.lr, s.weight_decay, s.grad_divisor, s.grad_multiplier) {
  }
  SGDR_HD UpdateScalars(const FixedScalars<T>& fixed, double lr, double weight_decay,
                        double divisor, double multiplier)
      : FixedScalars<T>(fixed),
        minus_lr(static_cast<T>(-lr)),
        one_minus_lr_weight_decay(static_cast<T>(1 - lr * weight_decay)),
        grad_divisor(static_cast<T>(divisor)),
        grad_multiplier(static_cast<T>(multiplier)) {}
};

SGDR_HD float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
SGDR_HD double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <GradScale kScale, class T>
SGDR_HD T scale_grad(T grad, const UpdateScalars<T>& s) {
  if constexpr (kScale == GradScale::kDivideAndMultiply) grad = grad / s.grad_divisor;
  if constexpr (kScale == GradScale::kMultiplyTwice) grad = grad * s.grad_divisor;
  if constexpr (kScale != GradScale::kNone) grad = grad * s.grad_multiplier;
  return grad;
}

// One element of torch.optim.SGD's step, in torch's order of operations. T is float or double.
template <class Options, class T>
SGDR_HD void sgd_update(T& param, T grad, T& momentum_buffer, const UpdateScalars<T>& s) {
  grad = scale_grad<Options::grad_scale>(grad, s);
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

// The decay that turns the average of n weights into the average of n + 1.
SGDR_HD double decay_of_equal_average(int64_t n) {
  return static_cast<double>(n) / static_cast<double>(n + 1);
}

// ------------------------------------------------------------------------------------------------
// norm of the gradients

// Note [Sum of squares]
// The order of the sum does not depend on the number of threads or blocks. A chunk of kNormChunk
// elements is added up in kNormLanes doubles: lane l sums elements l, l + kNormLanes, ... in this
// order. Then the upper half of the lanes is added to the lower half until one is left. The sums of
// all chunks, in the order of the tensors, are added up in the same way, as one long chunk. Squares
// of float data are exact in double and do not overflow.
constexpr int64_t kNormChunk = 4096;
constexpr int64_t kNormLanes = 128;

SGDR_HD double square(double x) { return x * x; }

// The norm is divided by grad_scale once, not every gradient.
SGDR_HD double grad_norm(double sum_of_squares, double grad_scale) {
  return sqrt(sum_of_squares) / fabs(grad_scale);
}

SGDR_HD bool is_finite(double x) { return x - x == 0; }

// The coefficient of torch.nn.utils.clip_grad_norm_. A norm of NaN gives NaN, as in torch. An
// infinite limit only measures: it gives 1 for every norm.
SGDR_HD double clip_coefficient(double grad_norm, double max_grad_norm) {
  const double coefficient = max_grad_norm / (grad_norm + 1e-6);
  return coefficient >= 1 || !is_finite(max_grad_norm) ? 1 : coefficient;
}

}  // namespace sgdr
