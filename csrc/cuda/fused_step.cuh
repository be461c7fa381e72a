// The kernel: one launch updates the tensors of all groups and advances their schedules. Needs only
// the CUDA language; counterpart of csrc/cpu/fused_step.cpp.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../sgdr_math.h"
#include "../static_switch.h"
#include "launch.h"

namespace sgdr {
namespace cuda {

// ----------------------------------------------------------------------------------------------
// memory

constexpr uint32_t kBytesPerAccess = 16;

// Elements that are read and written together.
template <class stored_t, uint32_t width>
struct alignas(std::min<size_t>(width * sizeof(stored_t), kBytesPerAccess)) Pack {
  stored_t elements[width];
};

template <ElementType type>
struct Stored;
template <>
struct Stored<ElementType::kFloat> : std::type_identity<float> {};
template <>
struct Stored<ElementType::kDouble> : std::type_identity<double> {};
template <>
struct Stored<ElementType::kHalf> : std::type_identity<c10::Half> {};
template <>
struct Stored<ElementType::kBFloat16> : std::type_identity<c10::BFloat16> {};

// Elements of one type, which is known to the compiler unless kType is kNone.
template <ElementType kType>
struct Memory {
  char* address;
  ElementType type;

  template <class T, uint32_t width>
  __device__ __forceinline__ void load(uint32_t index, T (&values)[width]) const {
    with_type([&]<class stored_t>(std::type_identity<stored_t>) {
      const auto pack = reinterpret_cast<const Pack<stored_t, width>*>(address)[index];
      for (uint32_t i = 0; i < width; ++i) values[i] = static_cast<T>(pack.elements[i]);
    });
  }

  template <class T, uint32_t width>
  __device__ __forceinline__ void store(uint32_t index, const T (&values)[width]) const {
    with_type([&]<class stored_t>(std::type_identity<stored_t>) {
      Pack<stored_t, width> pack;
      for (uint32_t i = 0; i < width; ++i) pack.elements[i] = static_cast<stored_t>(values[i]);
      reinterpret_cast<Pack<stored_t, width>*>(address)[index] = pack;
    });
  }

 private:
  template <class F>
  __device__ __forceinline__ void with_type(F f) const {
    using enum ElementType;
    if constexpr (kType != kNone) {
      f(Stored<kType>{});
    } else {
      static_switch<kFloat, kDouble, kHalf, kBFloat16>(
          type, [&](auto known_type) { f(Stored<known_type.value>{}); });
    }
  }
};

struct ElementTypes {
  ElementType param, grad, momentum_buffer;
  bool operator==(const ElementTypes&) const = default;
};

// Any types, known at run time only.
constexpr ElementTypes kAny = {ElementType::kNone, ElementType::kNone, ElementType::kNone};

// The narrowest type fills one access.
__host__ __device__ constexpr uint32_t vector_width(ElementTypes types) {
  if (types == kAny) return 1;
  const auto sizes = {element_size(types.param), element_size(types.grad),
                      element_size(types.momentum_buffer)};
  return kBytesPerAccess / static_cast<uint32_t>(std::min(sizes));
}

// Calls f with the types that have loops of their own, or else with kAny.
template <class F>
__device__ __forceinline__ void with_types(ElementTypes types, F f) {
  using enum ElementType;
  static_switch<ElementTypes{kFloat, kFloat, kFloat},           //
                ElementTypes{kHalf, kHalf, kHalf},              //
                ElementTypes{kBFloat16, kBFloat16, kBFloat16},  //
                ElementTypes{kFloat, kBFloat16, kFloat},        //
                ElementTypes{kFloat, kFloat, kBFloat16},        //
                ElementTypes{kBFloat16, kBFloat16, kFloat},     //
                ElementTypes{kDouble, kDouble, kDouble},        //
                kAny>(types, f);
}

// At most kChunkNumel elements of a tensor.
template <ElementTypes types>
struct Chunk {
  Memory<types.param> param;
  Memory<types.grad> grad;
  Memory<types.momentum_buffer> momentum_buffer;
  uint32_t numel;
  bool first_step;

  __device__ __forceinline__ bool is_aligned() const {
    return (reinterpret_cast<uintptr_t>(param.address) | reinterpret_cast<uintptr_t>(grad.address) |
            reinterpret_cast<uintptr_t>(momentum_buffer.address)) %
               kBytesPerAccess ==
           0;
  }
};

// ----------------------------------------------------------------------------------------------
// update

// Vector body and tail alike: elements [index * width, (index + 1) * width).
template <uint32_t width, class Options, ElementTypes types, class T>
__device__ __forceinline__ void update_pack(const Chunk<types>& chunk, uint32_t index,
                                            const UpdateScalars<T>& scalars) {
  constexpr bool kHasMomentum = Options::momentum != Momentum::kNone;
  T param[width], grad[width], momentum_buffer[width];
  chunk.param.load(index, param);
  chunk.grad.load(index, grad);
  for (uint32_t i = 0; i < width; ++i) momentum_buffer[i] = T{-0.0};
  if (kHasMomentum && !chunk.first_step) chunk.momentum_buffer.load(index, momentum_buffer);
  for (uint32_t i = 0; i < width; ++i)
    sgd_update<Options>(param[i], grad[i], momentum_buffer[i], scalars);
  chunk.param.store(index, param);
  if (kHasMomentum) chunk.momentum_buffer.store(index, momentum_buffer);
}

template <class Options, ElementTypes types, class T>
__device__ __forceinline__ void update_elements(const Chunk<types>& chunk,
                                                const UpdateScalars<T>& scalars) {
  constexpr uint32_t kWidth = vector_width(types);
  uint32_t done = 0;
  if constexpr (kWidth > 1) {
    const uint32_t packs = chunk.is_aligned() ? chunk.numel / kWidth : 0;
    for (uint32_t i = threadIdx.x; i < packs; i += blockDim.x)
      update_pack<kWidth, Options>(chunk, i, scalars);
    done = packs * kWidth;
  }
  for (uint32_t i = done + threadIdx.x; i < chunk.numel; i += blockDim.x)
    update_pack<1, Options>(chunk, i, scalars);
}

enum class Direction : uint8_t { kGrad, kMomentumBuffer, kNesterov };

// Note [Fewer loops]
// Two loops stand for several options, as the bits are the same:
// - no weight decay is decoupled weight decay by 0, as p * 1 is p;
// - the first step is a later one without dampening that finds -0 in the momentum buffer, as
//   1 * g + momentum * -0 is g, even where g is -0.
template <ElementTypes types, class T>
__device__ __forceinline__ void update_chunk(const LaunchGroup& group, const Chunk<types>& chunk,
                                             UpdateScalars<T> scalars) {
  if (chunk.first_step) scalars.one_minus_dampening = 1;
  const Direction direction = !group.has_momentum ? Direction::kGrad
                              : group.nesterov    ? Direction::kNesterov
                                                  : Direction::kMomentumBuffer;
  static_switch<false, true>(scalars.grad_divisor != 1, [&](auto scale_grad) {
    static_switch<WeightDecay::kL2, WeightDecay::kDecoupled>(group.decay, [&](auto decay) {
      static_switch<Direction::kGrad, Direction::kMomentumBuffer, Direction::kNesterov>(
          direction, [&](auto direction) {
            constexpr Momentum kMomentum =
                direction == Direction::kGrad ? Momentum::kNone : Momentum::kRunning;
            update_elements<
                UpdateOptions<scale_grad, decay, kMomentum, direction == Direction::kNesterov>>(
                chunk, scalars);
          });
    });
  });
}

// ----------------------------------------------------------------------------------------------
// a block's work

__device__ __forceinline__ GroupScalars group_scalars(const LaunchArgs& args,
                                                      const LaunchGroup& group) {
  const double grad_scale = args.grad_scale == nullptr ? 1 : *args.grad_scale;
  return {.lr = group.lr_source == LrSource::kState
                    ? group.state->lr
                    : learning_rate(group.schedule, group.state->position),
          .momentum = group.momentum,
          .dampening = group.dampening,
          .weight_decay = group.weight_decay,
          .grad_divisor = group.maximize ? -grad_scale : grad_scale};
}

// The last tensor that begins at the chunk or before it: those without elements have none.
__device__ __forceinline__ const LaunchTensor& tensor_of_chunk(const LaunchArgs& args,
                                                               uint32_t chunk) {
  uint32_t first = 0, last = args.tensor_count - 1;
  while (first < last) {
    const uint32_t middle = (first + last + 1) / 2;
    if (args.tensor(middle).first_chunk <= chunk)
      first = middle;
    else
      last = middle - 1;
  }
  return args.tensor(first);
}

template <ElementTypes types, class T>
__device__ __forceinline__ void update_chunk_of(const LaunchTensor& tensor,
                                                const LaunchGroup& group, uint32_t begin,
                                                const UpdateScalars<T>& scalars) {
  const auto at = [begin](const void* memory, ElementType type) {
    char* const bytes = static_cast<char*>(const_cast<void*>(memory));
    return bytes == nullptr ? nullptr : bytes + static_cast<size_t>(begin) * element_size(type);
  };
  const ElementType param = tensor.param_type, grad = tensor.grad_type,
                    momentum_buffer = tensor.momentum_type;
  update_chunk(
      group,
      Chunk<types>{
          .param = {at(tensor.param, param), param},
          .grad = {at(tensor.grad, grad), grad},
          .momentum_buffer = {at(tensor.momentum_buffer, momentum_buffer), momentum_buffer},
          .numel = min(tensor.numel - begin, kChunkNumel),
          .first_step = group.has_momentum && group.first_step[tensor.param_index] != 0,
      },
      scalars);
}

__device__ __forceinline__ void update_chunks(const LaunchArgs& args) {
  struct Scalars {
    UpdateScalars<float> in_float;
    UpdateScalars<double> in_double;
  };
  alignas(Scalars) __shared__ unsigned char memory[sizeof(Scalars)];
  auto* const scalars = reinterpret_cast<Scalars*>(memory);
  uint32_t group_of_scalars = args.group_count;

  for (uint32_t index = blockIdx.x; index < args.chunk_count; index += gridDim.x) {
    const LaunchTensor& tensor = tensor_of_chunk(args, index);
    const LaunchGroup& group = args.group(tensor.group);
    if (tensor.group != group_of_scalars) {
      __syncthreads();  // no thread is still at the chunk before
      if (threadIdx.x == 0) {
        const GroupScalars of_group = group_scalars(args, group);
        *scalars = {UpdateScalars<float>(of_group), UpdateScalars<double>(of_group)};
      }
      __syncthreads();
      group_of_scalars = tensor.group;
    }

    const uint32_t begin = (index - tensor.first_chunk) * kChunkNumel;
    with_types({tensor.param_type, tensor.grad_type, tensor.momentum_type}, [&](auto types) {
      constexpr ElementTypes kTypes = decltype(types)::value;
      if constexpr (kTypes == kAny) {
        if (tensor.param_type == ElementType::kDouble)
          update_chunk_of<kAny>(tensor, group, begin, scalars->in_double);
        else
          update_chunk_of<kAny>(tensor, group, begin, scalars->in_float);
      } else if constexpr (kTypes.param == ElementType::kDouble) {
        update_chunk_of<kTypes>(tensor, group, begin, scalars->in_double);
      } else {
        update_chunk_of<kTypes>(tensor, group, begin, scalars->in_float);
      }
    });
  }
}

// Note [Last block]
// The block that draws the last ticket comes after all that the others have read and written: their
// barrier orders it before their fence, the fence before their ticket, and so on back up here. So
// it may write what they have read. Drawing the last ticket sets it to 0 again.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

__device__ __forceinline__ void advance_group(const LaunchGroup& group) {
  Position position = group.state->position;
  advance(group.schedule, position);
  group.state->position = position;
  group.state->lr = learning_rate(group.schedule, position);
  if (!group.reset_momentum || !at_restart(group.schedule, position)) return;
  for (uint32_t i = 0; i < group.param_count; ++i) group.first_step[i] = 1;
}

__device__ __forceinline__ void finish_step(const LaunchArgs& args) {
  for (uint32_t i = threadIdx.x; i < args.tensor_count; i += blockDim.x) {
    const LaunchTensor& tensor = args.tensor(i);
    const LaunchGroup& group = args.group(tensor.group);
    if (group.has_momentum && tensor.completes_param) group.first_step[tensor.param_index] = 0;
  }
  __syncthreads();  // a restart may set them again
  for (uint32_t i = threadIdx.x; i < args.group_count; i += blockDim.x) {
    if (args.group(i).advances) advance_group(args.group(i));
  }
}

// Of a skipped step only the LR of a changed schedule remains: the next launch will not know of the
// change.
__device__ __forceinline__ void skip_step(const LaunchArgs& args) {
  if (blockIdx.x != 0) return;
  for (uint32_t i = threadIdx.x; i < args.group_count; i += blockDim.x) {
    const LaunchGroup& group = args.group(i);
    if (group.lr_source == LrSource::kSchedule)
      group.state->lr = learning_rate(group.schedule, group.state->position);
  }
}

}  // namespace cuda

__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksPerMultiprocessor)
    fused_step_kernel(const __grid_constant__ LaunchArgs args) {
  if (args.found_inf != nullptr && *args.found_inf != 0) {
    cuda::skip_step(args);
    return;
  }
  cuda::update_chunks(args);
  if (cuda::is_last_block(args.ticket)) cuda::finish_step(args);
}

}  // namespace sgdr
