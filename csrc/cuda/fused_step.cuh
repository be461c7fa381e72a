// The kernel: one launch updates the tensors of all groups and advances their schedules. Needs only
// the CUDA language; counterpart of csrc/cpu/fused_step.cpp.
#pragma once

#include "blocks.cuh"
#include "launch.h"
#include "loops.cuh"
#include "loops_with_extras.cuh"

namespace sgdr {
namespace cuda {

// ----------------------------------------------------------------------------------------------
// what holds for the whole step

__device__ __forceinline__ double grad_scale(const LaunchArgs& args) {
  return args.grad_scale == nullptr ? 1 : *args.grad_scale;
}

__device__ __forceinline__ bool is_skipped(const LaunchArgs& args) {
  if (args.found_inf != nullptr && *args.found_inf != 0) return true;
  return args.skip_nonfinite && !is_finite(*args.sum_of_squares);
}

__device__ __forceinline__ double norm_of_grads(const LaunchArgs& args) {
  return grad_norm(*args.sum_of_squares, grad_scale(args));
}

__device__ __forceinline__ double coefficient_of_grads(const LaunchArgs& args) {
  if (args.sum_of_squares == nullptr || !is_finite(args.max_grad_norm)) return 1;
  return clip_coefficient(norm_of_grads(args), args.max_grad_norm);
}

__device__ __forceinline__ void write_grad_norm(const LaunchArgs& args) {
  if (args.grad_norm == nullptr || blockIdx.x != 0 || threadIdx.x != 0) return;
  *args.grad_norm = norm_of_grads(args);
}

// ----------------------------------------------------------------------------------------------
// a block's work

// Whether the group's parameters are averaged in this step.
__device__ __forceinline__ bool averages(const LaunchGroup& group) {
  return group.options.averaging == Averaging::kExponential ||
         (group.options.averaging == Averaging::kEqual &&
          ends_cycle(group.options.schedule, group.state->position));
}

__device__ __forceinline__ double ema_decay(const LaunchGroup& group, const ParamState& param) {
  if (param.ema_is_empty) return 0;
  return group.options.averaging == Averaging::kEqual ? decay_of_equal_average(param.n_averaged)
                                                      : group.options.ema_decay;
}

__device__ __forceinline__ GroupScalars group_scalars(const LaunchArgs& args,
                                                      const LaunchGroup& group) {
  const double lr = group.lr_source == LrSource::kState
                        ? group.state->lr
                        : refreshed_lr(group.options.schedule, *group.state);
  return scalars_of(group.options, lr, grad_scale(args), coefficient_of_grads(args));
}

template <ElementTypes types>
__device__ __forceinline__ Chunk<types> chunk_of(const LaunchTensor& tensor,
                                                 const LaunchGroup& group, uint32_t begin) {
  const auto at = [begin](const void* memory, ElementType type) {
    char* const bytes = static_cast<char*>(const_cast<void*>(memory));
    return bytes == nullptr ? nullptr : bytes + static_cast<size_t>(begin) * element_size(type);
  };
  const ElementType param = tensor.param_type, grad = tensor.grad_type,
                    momentum_buffer = tensor.momentum_type;
  return {
      .param = {at(tensor.param, param), param},
      .grad = {at(tensor.grad, grad), grad},
      .momentum_buffer = {at(tensor.momentum_buffer, momentum_buffer), momentum_buffer},
      .numel = min(tensor.numel - begin, kChunkNumel),
      .momentum_is_empty =
          group.options.has_momentum() && group.params[tensor.param_index].momentum_is_empty != 0,
  };
}

template <class T, ElementTypes types>
__device__ __forceinline__ ChunkWithExtras<types, T> with_extras(
    const Chunk<types>& plain, const LaunchTensor& tensor, const LaunchExtras& extras,
    const LaunchGroup& group, uint32_t begin, const ChunkDraws& draws) {
  const ParamState& state = group.params[tensor.param_index];
  ChunkWithExtras<types, T> chunk{plain};
  if (extras.ema != nullptr && averages(group)) {
    chunk.ema.address = reinterpret_cast<char*>(static_cast<T*>(extras.ema) + begin);
    chunk.ema_scalars = EmaScalars<T>(ema_decay(group, state));
  }
  const auto is_narrow = [](ElementType type) { return element_size(type) == 2; };
  if (extras.low_precision_param != nullptr) {
    chunk.low_precision_param = {static_cast<char*>(extras.low_precision_param) + 2 * size_t{begin},
                                 tensor.low_precision_type};
    chunk.master_is_empty = state.master_is_empty != 0;
  }
  chunk.rounds_param = group.options.rounds_param && is_narrow(tensor.param_type);
  chunk.rounds_momentum = group.options.rounds_momentum && group.options.has_momentum() &&
                          is_narrow(tensor.momentum_type);
  chunk.draws = &draws;
  return chunk;
}

template <bool kHasExtras>
__device__ __forceinline__ void update_chunks(const LaunchArgs& args) {
  struct Scalars {
    UpdateScalars<float> in_float;
    UpdateScalars<double> in_double;
  };
  alignas(kBytesPerAccess) __shared__ unsigned char memory[sizeof(Scalars)];
  auto* const scalars = reinterpret_cast<Scalars*>(memory);
  alignas(kBytesPerAccess) __shared__ ChunkDraws draws;
  uint32_t group_of_scalars = args.group_count;

  for (uint32_t index = blockIdx.x; index < args.chunk_count; index += gridDim.x) {
    const uint32_t place = tensor_of_chunk(args, index);
    const LaunchTensor& tensor = args.tensor(place);
    const LaunchGroup& group = args.group(tensor.group);
    if (tensor.group != group_of_scalars) {
      __syncthreads();  // no thread still reads the scalars
      if (threadIdx.x == 0) {
        const GroupScalars of_group = group_scalars(args, group);
        *scalars = {UpdateScalars<float>(of_group), UpdateScalars<double>(of_group)};
      }
      __syncthreads();
      group_of_scalars = tensor.group;
    }

    const uint32_t begin = (index - tensor.first_chunk) * kChunkNumel;
    if (kHasExtras && (group.options.rounds_param || group.options.rounds_momentum)) {
      __syncthreads();  // no thread still reads the draws
      const RandomKey key = {group.options.seed, static_cast<uint32_t>(group.state->position.step),
                             group.first_param + tensor.param_index};
      draws.fill(key, (int64_t{tensor.piece} * kMaxPieceNumel + begin) / kDrawNumel);
      __syncthreads();
    }
    const auto update = [&]<ElementTypes types, class T>(
                            std::integral_constant<ElementTypes, types>,
                            const UpdateScalars<T>& of_group) {
      const Chunk<types> chunk = chunk_of<types>(tensor, group, begin);
      if constexpr (kHasExtras)
        update_chunk(group.options,
                     with_extras<T>(chunk, tensor, args.extras(place), group, begin, draws),
                     of_group);
      else
        update_chunk(group.options, chunk, of_group);
    };
    with_types({tensor.param_type, tensor.grad_type, tensor.momentum_type}, [&](auto types) {
      constexpr ElementTypes kTypes = decltype(types)::value;
      if constexpr (kTypes == kAny) {
        if (tensor.param_type == ElementType::kDouble)
          update(types, scalars->in_double);
        else
          update(types, scalars->in_float);
      } else if constexpr (kTypes.param == ElementType::kDouble) {
        update(types, scalars->in_double);
      } else {
        update(types, scalars->in_float);
      }
    });
  }
}

// ----------------------------------------------------------------------------------------------
// the end of a launch, by its last block

// Notes what a parameter's state holds from now on.
template <bool kHasExtras>
__device__ __forceinline__ void fill_state(const LaunchArgs& args, uint32_t i) {
  const LaunchTensor& tensor = args.tensor(i);
  if (!tensor.completes_param) return;
  const LaunchGroup& group = args.group(tensor.group);
  ParamState& state = group.params[tensor.param_index];
  if (group.options.has_momentum()) state.momentum_is_empty = 0;
  if constexpr (kHasExtras) {
    // Asks for types, not addresses: a tensor without elements has no address.
    if (tensor.low_precision_type != ElementType::kNone) state.master_is_empty = 0;
    if (!averages(group)) return;
    if (group.options.averaging == Averaging::kEqual)
      state.n_averaged = state.ema_is_empty ? 1 : state.n_averaged + 1;
    state.ema_is_empty = 0;
  }
}

__device__ __forceinline__ void advance_group(const LaunchGroup& group) {
  GroupState state = *group.state;
  advance(group.options.schedule, state);
  *group.state = state;
  if (!group.options.reset_momentum || !at_restart(group.options.schedule, state.position)) return;
  for (uint32_t i = 0; i < group.param_count; ++i) group.params[i].momentum_is_empty = 1;
}

template <bool kHasExtras>
__device__ __forceinline__ void finish_step(const LaunchArgs& args) {
  for (uint32_t i = threadIdx.x; i < args.tensor_count; i += blockDim.x)
    fill_state<kHasExtras>(args, i);
  __syncthreads();  // a restart may empty the momentum again
  for (uint32_t i = threadIdx.x; i < args.group_count; i += blockDim.x) {
    if (args.group(i).advances) advance_group(args.group(i));
  }
}

// A skipped step only counts itself, and refreshes the LR if the schedule changed: the next launch
// will not know of the change.
__device__ __forceinline__ void skip_step(const LaunchArgs& args) {
  if (blockIdx.x != 0) return;
  for (uint32_t i = threadIdx.x; i < args.group_count; i += blockDim.x) {
    const LaunchGroup& group = args.group(i);
    if (group.lr_source == LrSource::kSchedule && group.state->lr == group.state->scheduled_lr) {
      group.state->lr = group.state->scheduled_lr =
          learning_rate(group.options.schedule, group.state->position);
    }
    if (group.advances) ++group.state->skipped_steps;
  }
}

}  // namespace cuda

template <bool kHasExtras>
__global__ void __launch_bounds__(kThreadsPerBlock, blocks_per_multiprocessor(kHasExtras))
    fused_step_kernel(const __grid_constant__ LaunchArgs args) {
  cuda::write_grad_norm(args);
  if (cuda::is_skipped(args)) {
    cuda::skip_step(args);
    return;
  }
  cuda::update_chunks<kHasExtras>(args);
  if (cuda::is_last_block(args.ticket)) cuda::finish_step<kHasExtras>(args);
}

}  // namespace sgdr
