// The element loops: a block updates a chunk. Counterpart of csrc/cpu/loops.h.
#pragma once

#include "../sgdr_math.h"
#include "draws.cuh"
#include "launch.h"
#include "memory.cuh"

namespace sgdr {
namespace cuda {

struct ElementTypes {
  ElementType param, grad, momentum_buffer;
  bool rounds_param = false, rounds_momentum = false;  // stochastically

  bool operator==(const ElementTypes&) const = default;
};

// Stands for types, and roundings, that are known only at run time.
constexpr ElementTypes kAny = {ElementType::kNone, ElementType::kNone, ElementType::kNone};

// The number of elements in a pack, such that the widest type fills one access.
__host__ __device__ constexpr uint32_t vector_width(ElementTypes types, Extras extras) {
  if (types == kAny) return 1;
  const auto sizes = {element_size(types.param), element_size(types.grad),
                      element_size(types.momentum_buffer),
                      has_averages(extras) ? element_size(arithmetic_type(types.param)) : 0};
  return kBytesPerAccess / static_cast<uint32_t>(std::max(sizes));
}

namespace types {
using enum ElementType;
constexpr ElementTypes kFloats = {kFloat, kFloat, kFloat}, kDoubles = {kDouble, kDouble, kDouble},
                       kHalves = {kHalf, kHalf, kHalf},
                       kBFloat16s = {kBFloat16, kBFloat16, kBFloat16},
                       kFloatMomentum = {kBFloat16, kBFloat16, kFloat},
                       kHalfGrad = {kFloat, kHalf, kFloat},
                       kBFloat16Grad = {kFloat, kBFloat16, kFloat};
// The same with stochastic rounding of the parameter, the momentum buffer, or both.
constexpr ElementTypes kRoundedHalves = {kHalf, kHalf, kHalf, true, true},
                       kRoundedBFloat16s = {kBFloat16, kBFloat16, kBFloat16, true, true},
                       kRoundedParam = {kBFloat16, kBFloat16, kFloat, true, false},
                       kRoundedMomentum = {kFloat, kFloat, kBFloat16, false, true},
                       kRoundedMomentumOfMaster = {kFloat, kBFloat16, kBFloat16, false, true},
                       kRoundedMomentumOfBFloat16 = {kBFloat16, kBFloat16, kBFloat16, false, true};
}  // namespace types

// Calls f with the types if they are usual with these extras, and so have loops of their own; else
// with kAny, which goes element by element.
template <Extras extras, class F>
__device__ __forceinline__ void with_types(ElementTypes of_tensor, F f) {
  using namespace types;
  if constexpr (extras == Extras::kRounding)
    static_switch<kFloats, kRoundedMomentum, kRoundedHalves, kRoundedBFloat16s,
                  kRoundedMomentumOfBFloat16, kRoundedParam, kAny>(of_tensor, f);
  else if constexpr (extras == Extras::kMasters)
    static_switch<kFloats, kBFloat16Grad, kHalfGrad, kAny>(of_tensor, f);
  else if constexpr (extras == Extras::kAll)
    static_switch<kFloats, kBFloat16Grad, kHalfGrad, kRoundedMomentum, kRoundedBFloat16s,
                  kRoundedMomentumOfMaster, kAny>(of_tensor, f);
  else
    static_switch<kFloats, kHalves, kBFloat16s, kBFloat16Grad, kFloatMomentum, kDoubles, kAny>(
        of_tensor, f);
}

template <class T>
constexpr ElementType ema_type =
    std::is_same_v<T, double> ? ElementType::kDouble : ElementType::kFloat;

// At most kChunkNumel elements of a tensor, and what a step does with them. A kernel that is not
// compiled for some of the extras has nothing in their members.
template <ElementTypes types, class T>
struct Chunk {
  Memory<types.param> param;
  Memory<types.grad> grad;
  Memory<types.momentum_buffer> momentum_buffer;
  uint32_t numel;
  bool momentum_is_empty;

  Memory<ema_type<T>> ema = {nullptr};  // null if nothing is averaged in this step
  EmaScalars<T> ema_scalars = EmaScalars<T>(0);
  Memory<ElementType::kNone> low_precision_param = {nullptr};  // or null
  bool master_is_empty = false;
  bool rounds_param = false;
  bool rounds_momentum = false;
  const ChunkDraws* draws = nullptr;

  __device__ __forceinline__ bool is_averaged() const { return ema.address != nullptr; }
  __device__ __forceinline__ bool is_aligned() const {
    return (param.bits_of_address() | grad.bits_of_address() | momentum_buffer.bits_of_address() |
            ema.bits_of_address() | low_precision_param.bits_of_address()) %
               kBytesPerAccess ==
           0;
  }
};

// Calls f with the low-precision parameter, its type known to the compiler.
template <class F>
__device__ __forceinline__ void with_low_precision(const Memory<ElementType::kNone>& copy, F f) {
  using enum ElementType;
  static_switch<kHalf, kBFloat16>(copy.type,
                                  [&](auto type) { f(Memory<type.value>{copy.address}); });
}

// Calls f with the UpdateOptions but for the GradScale.
template <class F>
__device__ __forceinline__ void with_options(const KernelGroup& group, F f) {
  static_switch<WeightDecay::kL2, WeightDecay::kDecoupled>(group.options.decay, [&](auto decay) {
    static_switch<Direction::kGrad, Direction::kMomentumBuffer, Direction::kNesterov>(
        group.options.direction,
        [&](auto direction) { f(UpdateOptions<GradScale::kNone, decay, direction>{}); });
  });
}

// How the gradients are scaled; makes the divisor its reciprocal if that gives the same bits. So it
// is for powers of two, and a GradScaler's scale is one unless its user wants another.
template <class T>
__device__ __forceinline__ GradScale scale_of(UpdateScalars<T>& scalars, float grad_scale) {
  const uint32_t bits = std::bit_cast<uint32_t>(grad_scale);
  const uint32_t exponent = bits >> 23 & 0xFF;
  if ((bits & 0x007FFFFF) != 0 || exponent == 0 || exponent > 253)
    return GradScale::kDivideAndMultiply;
  scalars.grad_divisor = std::bit_cast<float>((bits & 0x80000000) | (254 - exponent) << 23);
  return scalars.grad_divisor == 1 && scalars.grad_multiplier == 1 ? GradScale::kNone
                                                                   : GradScale::kMultiplyTwice;
}

// What a pack's update reads. T is the type of the arithmetic.
template <ElementTypes types, class T, uint32_t width>
struct Loaded {
  LoadedPack<types.param, T, width> param;
  LoadedPack<types.grad, T, width> grad;
  LoadedPack<types.momentum_buffer, T, width> momentum_buffer;
  LoadedPack<ema_type<T>, T, width> ema;
};

template <GradScale... candidates, uint32_t width, class T>
__device__ __forceinline__ void scale_grads(T (&grads)[width], const UpdateScalars<T>& scalars,
                                            GradScale scale) {
  static_switch<candidates...>(scale, [&](auto known) {
    for (T& grad : grads) grad = scale_grad<known>(grad, scalars);
  });
}

// Loads what holds nothing yet, too: to ask first would take longer.
template <Extras extras, class Options, uint32_t width, ElementTypes types, class T>
__device__ __forceinline__ auto load(const Chunk<types, T>& chunk, uint32_t index,
                                     const UpdateScalars<T>& scalars, GradScale scale) {
  Loaded<types, T, width> loaded;
  loaded.grad = chunk.grad.template load<T, width>(index);
  if constexpr (width == 1) {  // a division needs registers that the others do not take yet
    using enum GradScale;
    T grad[] = {loaded.grad.element};
    scale_grads<kNone, kMultiplyTwice, kDivideAndMultiply>(grad, scalars, scale);
    loaded.grad.element = grad[0];
  }
  loaded.param = chunk.param.template load<T, width>(index);
  if (Options::direction != Direction::kGrad)
    loaded.momentum_buffer = chunk.momentum_buffer.template load<T, width>(index);
  if (has_averages(extras) && chunk.is_averaged())
    loaded.ema = chunk.ema.template load<T, width>(index);
  return loaded;
}

// The first step finds -0 in the momentum buffer: see kEmptyMomentum.
template <Extras extras, class Options, uint32_t width, ElementTypes types, class T>
__device__ __forceinline__ void update(const Chunk<types, T>& chunk, uint32_t index,
                                       const Loaded<types, T, width>& loaded,
                                       const UpdateScalars<T>& scalars, GradScale scale) {
  constexpr bool kHasMomentum = Options::direction != Direction::kGrad;
  T param[width], grad[width], momentum_buffer[width] = {};
  for (uint32_t i = 0; i < width; ++i) {
    param[i] = loaded.param.value(i);
    grad[i] = loaded.grad.value(i);
    if (kHasMomentum) momentum_buffer[i] = loaded.momentum_buffer.value(i);
  }
  if (has_masters(extras) && chunk.master_is_empty) {
    with_low_precision(chunk.low_precision_param, [&](const auto& memory) {
      const auto pack = memory.template load<T, width>(index);
      for (uint32_t i = 0; i < width; ++i) param[i] = pack.value(i);
    });
  }
  if (kHasMomentum && chunk.momentum_is_empty) {
    for (T& element : momentum_buffer) element = T{kEmptyMomentum};
  }
  if (width > 1) scale_grads<GradScale::kNone, GradScale::kMultiplyTwice>(grad, scalars, scale);
  for (uint32_t i = 0; i < width; ++i)
    sgd_update<Options>(param[i], grad[i], momentum_buffer[i], scalars);

  if (has_averages(extras) && chunk.is_averaged()) {
    T ema[width];
    for (uint32_t i = 0; i < width; ++i)
      ema[i] = ema_update(loaded.ema.value(i), param[i], chunk.ema_scalars);
    chunk.ema.store(index, ema);
  }
  constexpr bool kMayRound = has_rounding(extras) && types == kAny;
  if (types.rounds_param || (kMayRound && chunk.rounds_param))
    store_rounded(chunk.param, index, param, *chunk.draws, Rounded::kParam);
  else
    chunk.param.store(index, param);
  if (kHasMomentum && (types.rounds_momentum || (kMayRound && chunk.rounds_momentum)))
    store_rounded(chunk.momentum_buffer, index, momentum_buffer, *chunk.draws,
                  Rounded::kMomentumBuffer);
  else if (kHasMomentum)
    chunk.momentum_buffer.store(index, momentum_buffer);
  if (has_masters(extras) && chunk.low_precision_param.address != nullptr) {
    with_low_precision(chunk.low_precision_param,
                       [&](const auto& memory) { memory.store(index, param); });
  }
}

// A block updates a chunk: packs first, two in flight, then the rest element by element. A division
// takes more instructions than all the rest, so that no loop of packs has one.
template <Extras extras, ElementTypes types, class T>
__device__ __forceinline__ void update_chunk(const KernelGroup& group, const Chunk<types, T>& chunk,
                                             UpdateScalars<T> scalars, GradScale scale) {
  constexpr uint32_t kWidth = vector_width(types, extras);
  const bool has_packs = kWidth > 1 && chunk.is_aligned() && scale != GradScale::kDivideAndMultiply;
  const uint32_t packs = has_packs ? chunk.numel / kWidth : 0;
  if (chunk.momentum_is_empty) scalars.one_minus_dampening = 1;
  with_options(group, [&]<class Options>(Options) {
    const auto update_loaded = [&](uint32_t i, const auto& loaded) {
      update<extras, Options>(chunk, i, loaded, scalars, scale);
    };
    if constexpr (kWidth > 1) {
      for (uint32_t i = threadIdx.x; i < packs; i += 2 * blockDim.x) {
        const uint32_t next = i + blockDim.x;
        const auto first = load<extras, Options, kWidth>(chunk, i, scalars, scale);
        Loaded<types, T, kWidth> second;
        if (next < packs) second = load<extras, Options, kWidth>(chunk, next, scalars, scale);
        update_loaded(i, first);
        if (next < packs) update_loaded(next, second);
      }
    }
    for (uint32_t i = packs * kWidth + threadIdx.x; i < chunk.numel; i += blockDim.x)
      update_loaded(i, load<extras, Options, 1>(chunk, i, scalars, scale));
  });
}

}  // namespace cuda
}  // namespace sgdr
