// The element loops: a block updates a chunk. Counterpart of csrc/cpu/loops.h.
#pragma once

#include "../sgdr_math.h"
#include "launch.h"
#include "memory.cuh"

namespace sgdr {
namespace cuda {

struct ElementTypes {
  ElementType param, grad, momentum_buffer;
  bool operator==(const ElementTypes&) const = default;
};

// Stands for types that are known only at run time.
constexpr ElementTypes kAny = {ElementType::kNone, ElementType::kNone, ElementType::kNone};

// The number of elements in a pack, such that the narrowest type fills one access.
__host__ __device__ constexpr uint32_t vector_width(ElementTypes types) {
  if (types == kAny) return 1;
  const auto sizes = {element_size(types.param), element_size(types.grad),
                      element_size(types.momentum_buffer)};
  return kBytesPerAccess / static_cast<uint32_t>(std::min(sizes));
}

// Calls f with the types if they have a loop of their own, else with kAny.
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
  bool momentum_is_empty;

  __device__ __forceinline__ bool is_aligned() const {
    return (param.bits_of_address() | grad.bits_of_address() | momentum_buffer.bits_of_address()) %
               kBytesPerAccess ==
           0;
  }
};

// Calls f with the UpdateOptions. One loop serves both kinds of scaling, since x / 1 and x * 1 are
// x.
template <class T, class F>
__device__ __forceinline__ void with_options(const GroupOptions& options,
                                             const UpdateScalars<T>& scalars, F f) {
  const GradScale scale = scalars.grad_divisor != 1 || scalars.grad_multiplier != 1
                              ? GradScale::kDivideAndMultiply
                              : GradScale::kNone;
  static_switch<GradScale::kNone, GradScale::kDivideAndMultiply>(scale, [&](auto grad_scale) {
    static_switch<WeightDecay::kL2, WeightDecay::kDecoupled>(options.decay, [&](auto decay) {
      static_switch<Direction::kGrad, Direction::kMomentumBuffer, Direction::kNesterov>(
          options.direction,
          [&](auto direction) { f(UpdateOptions<grad_scale, decay, direction>{}); });
    });
  });
}

// Calls update(width, index) for elements [index * width, (index + 1) * width) until the chunk is
// done: packs first, then the tail one by one.
template <uint32_t kWidth, class Update>
__device__ __forceinline__ void for_each_pack(uint32_t numel, bool is_aligned, Update update) {
  uint32_t done = 0;
  if constexpr (kWidth > 1) {
    const uint32_t packs = is_aligned ? numel / kWidth : 0;
    for (uint32_t i = threadIdx.x; i < packs; i += blockDim.x)
      update(std::integral_constant<uint32_t, kWidth>{}, i);
    done = packs * kWidth;
  }
  for (uint32_t i = done + threadIdx.x; i < numel; i += blockDim.x)
    update(std::integral_constant<uint32_t, 1>{}, i);
}

template <ElementTypes types, uint32_t width, class T>
__device__ __forceinline__ void load_momentum(const Chunk<types>& chunk, uint32_t index,
                                              T (&momentum_buffer)[width]) {
  for (uint32_t i = 0; i < width; ++i) momentum_buffer[i] = T{kEmptyMomentum};
  if (!chunk.momentum_is_empty) chunk.momentum_buffer.load(index, momentum_buffer);
}

// The first step finds -0 in the momentum buffer: see kEmptyMomentum.
template <ElementTypes types, class T>
__device__ __forceinline__ void update_chunk(const GroupOptions& options, const Chunk<types>& chunk,
                                             UpdateScalars<T> scalars) {
  if (chunk.momentum_is_empty) scalars.one_minus_dampening = 1;
  with_options(options, scalars, [&]<class Options>(Options) {
    constexpr bool kHasMomentum = Options::direction != Direction::kGrad;
    constexpr uint32_t kWidth = vector_width(types);
    for_each_pack<kWidth>(chunk.numel, chunk.is_aligned(), [&](auto width, uint32_t index) {
      T param[width], grad[width], momentum_buffer[width] = {};
      chunk.param.load(index, param);
      chunk.grad.load(index, grad);
      if (kHasMomentum) load_momentum(chunk, index, momentum_buffer);
      for (uint32_t i = 0; i < width; ++i)
        sgd_update<Options>(param[i], grad[i], momentum_buffer[i], scalars);
      chunk.param.store(index, param);
      if (kHasMomentum) chunk.momentum_buffer.store(index, momentum_buffer);
    });
  });
}

}  // namespace cuda
}  // namespace sgdr
