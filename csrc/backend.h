// What both backends implement: the step, and the norm of all gradients.
#pragma once

#include <cstdint>
#include <span>

#include "step_types.h"

namespace sgdr {

// ------------------------------------------------------------------------------------------------
// CPU

// A param group in one step.
struct GroupStep {
  GroupOptions options;
  GroupScalars scalars;
  int64_t steps_applied;  // before this one
};

namespace cpu {

struct Step {
  std::span<const TensorEntry> tensors;
  std::span<const GroupStep> groups;
};

void fused_step(const Step& step);

// See Note [Sum of squares].
double sum_of_squared_grads(std::span<const TensorEntry> tensors);

constexpr int64_t kParallelNumel = 1 << 17;
constexpr int64_t kParallelNumelPerTensor = 1 << 12;
// Whether work is long enough to wake a second thread, and to release the GIL. Both cost a fixed
// time, and for each tensor the time of some thousand elements: see benchmarks/scaling.py.
bool is_worth_threads(std::span<const TensorEntry> tensors);

}  // namespace cpu

// ------------------------------------------------------------------------------------------------
// CUDA

// kSchedule: an option of the schedule has changed since GroupState::lr was computed.
enum class LrSource : uint8_t { kState, kSchedule };

// A param group in the launches of one step. The pointers are to memory of the GPU.
struct LaunchGroup {
  GroupOptions options;
  GroupMemory* memory;
  ParamState* params;
  uint32_t param_count;  // with and without a gradient
  uint32_t first_param;  // index of its first parameter among those of all groups
  LrSource lr_source;
  bool advances;  // whether this step moves the schedule; in a launch: whether this launch does
};

namespace cuda {

// The norm of all gradients, in memory of the GPU.
struct GradNorm {
  double sum_of_squares;
  double norm;  // before clipping, of the gradients divided by grad_scale
  double clip_coefficient;
};

// The step of all groups on one GPU. The pointers are to its memory.
struct Step {
  std::span<const TensorEntry> tensors;  // in the order of their groups
  std::span<const LaunchGroup> groups;
  const float* grad_scale = nullptr;    // or null
  const float* found_inf = nullptr;     // or null; if not 0, the step is skipped
  const GradNorm* grad_norm = nullptr;  // or null; the gradients are clipped
  bool skip_nonfinite = false;          // with grad_norm: if it is not finite, the step is skipped
};

// What a norm is computed from, and into. The pointers are to memory of the GPU.
struct NormStep {
  std::span<const TensorEntry> tensors;
  double* chunk_sums;  // sum_count of them, and count_ranges(tensors, kNormChunk) more
  GradNorm* result;
  uint32_t* ticket;         // 0 before and after
  const float* grad_scale;  // or null
  double max_grad_norm;     // infinite: nothing is clipped
  int64_t sum_count = 0;    // of sums that chunk_sums holds already
};

#if defined(SGDR_WITH_CUDA)
constexpr bool kIsBuilt = true;

// Both run on the current stream of that GPU.
void fused_step(int8_t gpu, const Step& step);
void grad_norm(int8_t gpu, const NormStep& step);

// Whether the current stream of the current GPU is being captured into a graph.
bool is_capturing();
#else
constexpr bool kIsBuilt = false;
inline void fused_step(int8_t, const Step&) {}
inline void grad_norm(int8_t, const NormStep&) {}
inline bool is_capturing() { return false; }
#endif

}  // namespace cuda
}  // namespace sgdr
