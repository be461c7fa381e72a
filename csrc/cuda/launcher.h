// The CUDA backend as the rest of the extension sees it. Plain host code, no CUDA types.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "launch.h"

namespace sgdr {

// A group's memory on its GPU. Made by sgdr_fused/device_state.py, which knows the layout too; the
// ParamState of each of the group's parameters follows it.
struct GroupMemory {
  GroupState state;
  uint32_t ticket;  // of the launches whose first group this is
  uint32_t unused;
};
static_assert(sizeof(GroupMemory) == 56);

// The step of all groups of one GPU. All pointers are to memory of that GPU.
struct CudaStep {
  std::span<const LaunchGroup> groups;
  std::span<const TensorEntry> tensors;  // in the order of their groups
  std::span<const uint32_t> param_indices;
  const float* grad_scale;  // or null
  const float* found_inf;   // or null; not 0: the step is skipped
  // Of the gradients as they are; null where no norm is asked for. Then the step writes the norm,
  // clips if max_grad_norm is not infinite, and with skip_nonfinite is skipped where it is no
  // finite number.
  const double* sum_of_squares = nullptr;
  double* grad_norm = nullptr;
  double max_grad_norm = std::numeric_limits<double>::infinity();
  bool skip_nonfinite = false;
};

// The sum of the squares of all grads: see Note [Sum of squares].
struct NormStep {
  std::span<const TensorEntry> tensors;
  double* chunk_sums;  // count_chunks(tensors, kNormChunk) of them
  double* sum_of_squares;
  uint32_t* ticket;  // 0 before and after
};

#if defined(SGDR_WITH_CUDA)
constexpr bool kHasCuda = true;

// On the GPU's current stream.
void fused_step_cuda(int8_t gpu, const CudaStep& step);
void sum_of_squared_grads_cuda(int8_t gpu, const NormStep& step);

// Whether the current stream of the current GPU is being captured into a graph.
bool is_capturing();
#else
constexpr bool kHasCuda = false;
inline void fused_step_cuda(int8_t, const CudaStep&) {}
inline void sum_of_squared_grads_cuda(int8_t, const NormStep&) {}
inline bool is_capturing() { return false; }
#endif

}  // namespace sgdr
