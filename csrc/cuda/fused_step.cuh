// The kernel: one launch updates the tensors of all groups and advances their schedules. Needs only
// the CUDA language; counterpart of csrc/cpu/fused_step.cpp.
#pragma once

#include "blocks.cuh"
#include "launch.h"
#include "loops.cuh"

namespace sgdr {
namespace cuda {

__device__ __forceinline__ bool is_skipped(const LaunchHeader& args) {
  if (args.found_inf != nullptr && *args.found_inf != 0) return true;
  return args.skip_nonfinite && !is_finite(args.grad_norm->norm);
}

// ----------------------------------------------------------------------------------------------
// a block's work

// The group's LR, in each thread of the block. Only after an option of the schedule has changed is
// it computed.
__device__ __forceinline__ double lr_of(const KernelGroup& group) {
  if (group.lr_source == LrSource::kState) return group.memory->state.lr;
  __shared__ double lr;
  if (threadIdx.x == 0) lr = refreshed_lr(group.options.schedule, group.memory->state);
  __syncthreads();
  return lr;
}

template <class T>
__device__ __forceinline__ UpdateScalars<T> scalars_of(const LaunchHeader& args,
                                                       const KernelGroup& group, double lr,
                                                       float grad_scale) {
  const double coefficient = args.grad_norm == nullptr ? 1 : args.grad_norm->clip_coefficient;
  return UpdateScalars<T>(group.fixed_scalars<T>(), lr, group.options.weight_decay, grad_scale,
                          group.options.maximize ? -coefficient : coefficient);
}

// Whether the group's parameters are averaged in this step.
__device__ __forceinline__ bool averages(const KernelGroup& group) {
  return group.options.averaging == Averaging::kExponential ||
         (group.options.averaging == Averaging::kEqual &&
          ends_cycle(group.options.schedule, group.memory->state.position));
}

__device__ __forceinline__ double ema_decay(const KernelGroup& group, const ParamState& param) {
  if (param.ema_is_empty) return 0;
  return group.options.averaging == Averaging::kEqual ? decay_of_equal_average(param.n_averaged)
                                                      : group.options.ema_decay;
}

template <ElementTypes types, class T, class Args>
__device__ __forceinline__ Chunk<types, T> chunk_of(const Args& args, uint32_t place,
                                                    const KernelGroup& group, uint32_t begin) {
  const LaunchTensor& tensor = args.tensor(place);
  const ParamState& state = group.params[tensor.param_index];
  const auto at = [begin](const void* memory, ElementType type) {
    char* const bytes = static_cast<char*>(const_cast<void*>(memory));
    return bytes == nullptr ? nullptr : bytes + static_cast<size_t>(begin) * element_size(type);
  };
  const ElementType param = tensor.param_type, grad = tensor.grad_type,
                    momentum_buffer = tensor.momentum_type,
                    low_precision = tensor.low_precision_type;
  Chunk<types, T> chunk = {
      .param = {at(tensor.param, param), param},
      .grad = {at(tensor.grad, grad), grad},
      .momentum_buffer = {at(tensor.momentum_buffer, momentum_buffer), momentum_buffer},
      .numel = min(tensor.numel - begin, kChunkNumel),
      .momentum_is_empty = group.options.has_momentum() && state.momentum_is_empty != 0,
  };
  if constexpr (has_addresses(Args::kExtras)) {
    const LaunchExtras& extras = args.extras_of(place);
    if (extras.ema != nullptr && averages(group)) {
      chunk.ema.address = at(extras.ema, ema_type<T>);
      chunk.ema_scalars = EmaScalars<T>(ema_decay(group, state));
    }
    chunk.low_precision_param = {at(extras.low_precision_param, low_precision), low_precision};
    chunk.master_is_empty = extras.low_precision_param != nullptr && state.master_is_empty != 0;
  }
  return chunk;
}

template <class Args>
__device__ __forceinline__ void update_chunk(const Args& args, uint32_t index) {
  constexpr Extras kExtras = Args::kExtras;
  const uint32_t place = tensor_of_chunk(args, index);
  const LaunchTensor& tensor = args.tensor(place);
  const KernelGroup& group = args.group(tensor.group);
  const double lr = lr_of(group);
  const uint32_t begin = (index - tensor.first_chunk) * kChunkNumel;

  ElementTypes types = {tensor.param_type, tensor.grad_type, tensor.momentum_type};
  if constexpr (has_rounding(kExtras)) {
    types.rounds_param = rounds(group.options.rounds_param, tensor.param_type);
    types.rounds_momentum = rounds(group.options.rounds_momentum, tensor.momentum_type);
  }
  alignas(kBytesPerAccess) __shared__ ChunkDraws draws;
  if (types.rounds_param || types.rounds_momentum) {
    const RandomKey key = {group.options.seed,
                           static_cast<uint32_t>(group.memory->state.position.step),
                           group.first_param + tensor.param_index};
    draws.fill(key, (int64_t{tensor.piece} * kMaxPieceNumel + begin) / kDrawNumel,
               tensor.numel - begin, types.rounds_param,
               types.rounds_momentum && group.options.has_momentum());
    __syncthreads();
  }
  const auto update = [&]<ElementTypes known, class T>(std::integral_constant<ElementTypes, known>,
                                                       std::type_identity<T>) {
    Chunk<known, T> chunk = chunk_of<known, T>(args, place, group, begin);
    if constexpr (has_rounding(kExtras)) {
      chunk.draws = &draws;
      chunk.rounds_param = types.rounds_param;
      chunk.rounds_momentum = types.rounds_momentum;
    }
    const float grad_scale = args.grad_scale == nullptr ? 1 : *args.grad_scale;
    UpdateScalars<T> scalars = scalars_of<T>(args, group, lr, grad_scale);
    const GradScale scale = scale_of(scalars, grad_scale);
    update_chunk<kExtras>(group, chunk, scalars, scale);
  };
  with_types<kExtras>(types, [&](auto known) {
    constexpr ElementTypes kTypes = decltype(known)::value;
    if constexpr (kTypes.param == ElementType::kDouble) {
      update(known, std::type_identity<double>{});
    } else {
      if constexpr (kTypes == kAny) {
        if (types.param == ElementType::kDouble) return update(known, std::type_identity<double>{});
      }
      update(known, std::type_identity<float>{});
    }
  });
}

// ----------------------------------------------------------------------------------------------
// the next state of each group, by a block of its own while the others update: an LR takes a cosine
// in double, for which the end of the launch would have to wait

template <class Args>
__device__ __forceinline__ void prepare_states(const Args& args) {
  for (uint32_t i = threadIdx.x; i < args.group_count; i += blockDim.x) {
    const KernelGroup& group = args.group(i);
    if (!group.advances) continue;
    GroupState next = group.memory->state;
    advance(group.options.schedule, next);
    group.memory->next = next;
  }
}

// ----------------------------------------------------------------------------------------------
// the end of a launch, by its last block

// Notes what a parameter's state holds from now on.
template <class Args>
__device__ __forceinline__ void fill_state(const Args& args, uint32_t i) {
  const LaunchTensor& tensor = args.tensor(i);
  if (!tensor.completes_param) return;
  const KernelGroup& group = args.group(tensor.group);
  ParamState& state = group.params[tensor.param_index];
  if (group.options.has_momentum()) state.momentum_is_empty = 0;
  // Asks for types, not addresses: a tensor without elements has no address.
  if (has_masters(Args::kExtras) && tensor.low_precision_type != ElementType::kNone)
    state.master_is_empty = 0;
  if (!has_averages(Args::kExtras) || !averages(group)) return;
  if (group.options.averaging == Averaging::kEqual)
    state.n_averaged = state.ema_is_empty ? 1 : state.n_averaged + 1;
  state.ema_is_empty = 0;
}

__device__ __forceinline__ void publish_state(const KernelGroup& group) {
  const GroupState next = group.memory->next;
  group.memory->state = next;
  if (!group.options.reset_momentum || !at_restart(group.options.schedule, next.position)) return;
  for (uint32_t i = 0; i < group.param_count; ++i) group.params[i].momentum_is_empty = 1;
}

template <class Args>
__device__ __forceinline__ void finish_step(const Args& args) {
  for (uint32_t i = threadIdx.x; i < args.tensor_count; i += blockDim.x) fill_state(args, i);
  __syncthreads();  // a restart may empty the momentum again
  for (uint32_t i = threadIdx.x; i < args.group_count; i += blockDim.x) {
    if (args.group(i).advances) publish_state(args.group(i));
  }
}

// A skipped step only counts itself, and refreshes the LR if the schedule changed: the next launch
// will not know of the change.
template <class Args>
__device__ __forceinline__ void skip_step(const Args& args) {
  if (blockIdx.x != 0) return;
  for (uint32_t i = threadIdx.x; i < args.group_count; i += blockDim.x) {
    const KernelGroup& group = args.group(i);
    GroupState& state = group.memory->state;
    if (group.lr_source == LrSource::kSchedule && state.lr == state.scheduled_lr)
      state.lr = state.scheduled_lr = learning_rate(group.options.schedule, state.position);
    if (group.advances) ++state.skipped_steps;
  }
}

}  // namespace cuda

template <class Args>
__global__ void __launch_bounds__(kThreadsPerBlock, blocks_per_multiprocessor(Args::kExtras))
    fused_step_kernel(const __grid_constant__ Args args) {
  if (cuda::is_skipped(args)) {
    cuda::skip_step(args);
    return;
  }
  if (blockIdx.x == 0)
    cuda::prepare_states(args);
  else
    cuda::update_chunk(args, blockIdx.x - 1);
  if (cuda::is_last_block(args.ticket)) cuda::finish_step(args);
}

}  // namespace sgdr
