// What every backend implements: one struct in, nothing out.
#pragma once

#include <span>

#include "sgdr_math.h"
#include "tensor_list.h"

namespace sgdr {

inline Direction direction_of(double momentum, bool nesterov) {
  if (momentum == 0) return Direction::kGrad;
  return nesterov ? Direction::kNesterov : Direction::kMomentumBuffer;
}

// See Note [Fewer loops].
inline WeightDecay kind_of_decay(double weight_decay, bool decoupled) {
  return weight_decay != 0 && !decoupled ? WeightDecay::kL2 : WeightDecay::kDecoupled;
}

struct GroupStep {
  GroupScalars scalars;
  WeightDecay weight_decay = WeightDecay::kDecoupled;
  Direction direction = Direction::kGrad;
  // Stochastically, where the type is narrower than that of the arithmetic.
  bool rounds_param = false;
  bool rounds_momentum = false;
  uint64_t seed = 0;
  int64_t step = 0;  // applied before

  bool has_momentum() const { return direction != Direction::kGrad; }
};

struct FusedStep {
  std::span<const TensorEntry> tensors;
  std::span<const GroupStep> groups;
  int64_t numel;  // of all tensors together
};

// Whether a step is long enough to wake a second thread, and to let go of the GIL: both cost a
// fixed time, and for each tensor the time of some thousand elements. See benchmarks/threads.py.
constexpr int64_t kParallelNumel = 1 << 17;
constexpr int64_t kParallelNumelPerTensor = 1 << 12;

inline bool is_worth_threads(const FusedStep& step) {
  const auto tensors = static_cast<int64_t>(step.tensors.size());
  return step.numel >= kParallelNumel && step.numel >= tensors * kParallelNumelPerTensor;
}

void fused_step_cpu(const FusedStep& step);

// Of all gradients, as they are: see Note [Sum of squares].
double sum_of_squared_grads_cpu(const FusedStep& step);

}  // namespace sgdr
