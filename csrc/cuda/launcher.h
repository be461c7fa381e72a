// The CUDA backend as the rest of the extension sees it. Plain host code, no CUDA types.
#pragma once

#include <cstdint>
#include <span>

#include "launch.h"

namespace sgdr {

// A group's memory on its GPU. Made by sgdr_fused/device_state.py, which knows the layout too; the
// flags of the group's parameters, LaunchGroup::first_step, follow it.
struct GroupMemory {
  GroupState state;
  uint32_t ticket;  // of the launches whose first group this is
  uint32_t unused;
};
static_assert(sizeof(GroupMemory) == 48);

// The step of all groups of one GPU.
struct CudaStep {
  std::span<const LaunchGroup> groups;
  std::span<const TensorEntry> tensors;  // in the order of their groups
  std::span<const uint32_t> param_indices;
  const float* grad_scale;  // both on that GPU, or null
  const float* found_inf;
};

#if defined(SGDR_WITH_CUDA)
constexpr bool kHasCuda = true;

// On the GPU's current stream.
void fused_step_cuda(int8_t gpu, const CudaStep& step);

// Whether the current stream of the current GPU is being captured into a graph.
bool is_capturing();
#else
constexpr bool kHasCuda = false;
inline void fused_step_cuda(int8_t, const CudaStep&) {}
inline bool is_capturing() { return false; }
#endif

}  // namespace sgdr
