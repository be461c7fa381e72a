// The arithmetic of schedule and update, once, for host and device. Read this file first.
#pragma once

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

enum class WeightDecay : uint8_t { kNone, kL2, kDecoupled };

// kFirst: the parameter's first applied step, where the momentum buffer starts as the gradient
// itself.
enum class Momentum : uint8_t { kNone, kFirst, kRunning };

// What decides the shape of the element update; known outside the loop, so the loop has no branch.
template <bool kScaleGrad, WeightDecay kDecay, Momentum kMomentum, bool kNesterov>
struct UpdateOptions {
  static constexpr bool scale_grad = kScaleGrad;
  static constexpr WeightDecay weight_decay = kDecay;
  static constexpr Momentum momentum = kMomentum;
  static constexpr bool nesterov = kNesterov;
};

// A group's numbers for one step, as the user gave them.
struct GroupScalars {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  double grad_divisor;  // grad_scale, negative if maximize: g / -s is -(g / s), exactly
};

// The same, rounded once to the type of the arithmetic.
template <class T>
struct UpdateScalars {
  T minus_lr, momentum, one_minus_dampening, weight_decay, one_minus_lr_weight_decay, grad_divisor;

  SGDR_HD explicit UpdateScalars(const GroupScalars& s)
      : minus_lr(static_cast<T>(-s.lr)),
        momentum(static_cast<T>(s.momentum)),
        one_minus_dampening(static_cast<T>(1 - s.dampening)),
        weight_decay(static_cast<T>(s.weight_decay)),
        one_minus_lr_weight_decay(static_cast<T>(1 - s.lr * s.weight_decay)),
        grad_divisor(static_cast<T>(s.grad_divisor)) {}
};

SGDR_HD float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
SGDR_HD double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// One element of torch.optim.SGD's step, in torch's order of operations. T is float or double.
template <class Options, class T>
SGDR_HD void sgd_update(T& param, T grad, T& momentum_buffer, const UpdateScalars<T>& s) {
  if constexpr (Options::scale_grad) grad = grad / s.grad_divisor;
  if constexpr (Options::weight_decay == WeightDecay::kL2)
    grad = fused_multiply_add(s.weight_decay, param, grad);
  if constexpr (Options::weight_decay == WeightDecay::kDecoupled)
    param *= s.one_minus_lr_weight_decay;

  T direction = grad;
  if constexpr (Options::momentum != Momentum::kNone) {
    if constexpr (Options::momentum == Momentum::kFirst)
      momentum_buffer = grad;
    else
      momentum_buffer =
          fused_multiply_add(s.one_minus_dampening, grad, s.momentum * momentum_buffer);
    direction =
        Options::nesterov ? fused_multiply_add(s.momentum, momentum_buffer, grad) : momentum_buffer;
  }
  param = fused_multiply_add(s.minus_lr, direction, param);
}

}  // namespace sgdr
