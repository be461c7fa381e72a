// What every backend implements: one struct in, nothing out.
#pragma once

#include <span>

#include "sgdr_math.h"
#include "tensor_list.h"

namespace sgdr {

struct GroupStep {
  GroupScalars scalars;
  WeightDecay weight_decay;
  bool momentum;
  bool nesterov;
};

struct FusedStep {
  std::span<const TensorEntry> tensors;
  std::span<const GroupStep> groups;
  int64_t numel;  // of all tensors together
};

// Below so many elements a second thread costs more than it gives: see benchmarks/threads.py.
constexpr int64_t kParallelNumel = 1 << 17;

void fused_step_cpu(const FusedStep& step);

}  // namespace sgdr
