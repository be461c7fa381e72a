// The element loops of a step that averages, rounds stochastically or keeps master copies. There is
// one for each mixture of types, which tests the options for each pack, not outside the loop.
#pragma once

#include "loops.cuh"

namespace sgdr {
namespace cuda {

// The random numbers of a chunk, which its block draws into shared memory before the loop.
struct ChunkDraws {
  static constexpr uint32_t kDraws = kChunkNumel / static_cast<uint32_t>(kDrawNumel);
  static constexpr uint32_t kWords = 4;

  uint32_t words[2][kDraws * kWords];  // for each value of Rounded

  // Draws for a chunk that begins with draw `first_draw`; the caller puts barriers around it.
  __device__ __forceinline__ void fill(const RandomKey& key, int64_t first_draw) {
    for (uint32_t i = threadIdx.x; i < 2 * kDraws; i += blockDim.x) {
      uint32_t drawn[kWords];
      draw(key, static_cast<Rounded>(i / kDraws), first_draw + i % kDraws, drawn);
      for (uint32_t j = 0; j < kWords; ++j) words[i / kDraws][i % kDraws * kWords + j] = drawn[j];
    }
  }

  // The words for the chunk's elements [first, first + width).
  template <uint32_t width>
  __device__ __forceinline__ auto words_of(Rounded rounded, uint32_t first) const {
    constexpr auto kNumel = static_cast<uint32_t>(kDrawNumel);
    using Words = Pack<uint32_t, (width + 1) / 2>;
    const uint32_t* const word =
        &words[static_cast<uint32_t>(rounded)][first / kNumel * kWords + first % 8 / 2];
    return *reinterpret_cast<const Words*>(word);
  }
};

// Calls f with the low-precision parameter, its type known to the compiler.
template <class F>
__device__ __forceinline__ void with_low_precision(const Memory<ElementType::kNone>& copy, F f) {
  using enum ElementType;
  static_switch<kHalf, kBFloat16>(copy.type,
                                  [&](auto type) { f(Memory<type.value>{copy.address}); });
}

template <ElementTypes types, class T>
struct ChunkWithExtras : Chunk<types> {
  static constexpr ElementType kEmaType =
      std::is_same_v<T, double> ? ElementType::kDouble : ElementType::kFloat;

  Memory<kEmaType> ema = {nullptr};  // null if nothing is averaged in this step
  EmaScalars<T> ema_scalars = EmaScalars<T>(0);
  Memory<ElementType::kNone> low_precision_param = {nullptr};  // or null
  bool master_is_empty = false;
  const ChunkDraws* draws = nullptr;
  bool rounds_param = false;
  bool rounds_momentum = false;

  __device__ __forceinline__ bool is_aligned() const {
    return Chunk<types>::is_aligned() &&
           (ema.bits_of_address() | low_precision_param.bits_of_address()) % kBytesPerAccess == 0;
  }
};

// See Note [Random bits].
template <ElementType kType, uint32_t width, class T>
__device__ __forceinline__ void store_rounded(const Memory<kType>& memory, uint32_t index,
                                              const T (&values)[width], const ChunkDraws& draws,
                                              Rounded rounded) {
  const bool is_half = (kType == ElementType::kNone ? memory.type : kType) == ElementType::kHalf;
  const uint32_t first = index * width;
  const auto words = draws.words_of<width>(rounded, first);
  uint16_t result[width];
  for (uint32_t i = 0; i < width; ++i) {
    const uint32_t bits = bits_of_element(words.elements[i / 2], first + i);
    const float value = static_cast<float>(values[i]);
    result[i] = is_half ? round_to_float16(value, bits) : round_to_bfloat16(value, bits);
  }
  memory.store_bits(index, result);
}

template <ElementType kType>
constexpr bool kIsNarrow = kType == ElementType::kNone || element_size(kType) == 2;

template <ElementTypes types, class T>
__device__ __forceinline__ void update_chunk(const GroupOptions& options,
                                             const ChunkWithExtras<types, T>& chunk,
                                             UpdateScalars<T> scalars) {
  constexpr bool kMayBeMaster =
      types.param == ElementType::kFloat || types.param == ElementType::kNone;
  if (chunk.momentum_is_empty) scalars.one_minus_dampening = 1;
  const bool averages = chunk.ema.address != nullptr;
  const bool is_master = kMayBeMaster && chunk.low_precision_param.address != nullptr;

  constexpr uint32_t kWidth = vector_width(types);
  for_each_pack<kWidth>(chunk.numel, chunk.is_aligned(), [&](auto width, uint32_t index) {
    T param[width], grad[width], momentum_buffer[width] = {}, ema[width] = {};
    if (is_master && chunk.master_is_empty) {
      with_low_precision(chunk.low_precision_param,
                         [&](const auto& memory) { memory.load(index, param); });
    } else {
      chunk.param.load(index, param);
    }
    chunk.grad.load(index, grad);
    if (options.has_momentum()) load_momentum<types>(chunk, index, momentum_buffer);
    if (averages && chunk.ema_scalars.decay != 0) chunk.ema.load(index, ema);
    with_options(options, scalars, [&]<class Options>(Options) {
      for (uint32_t i = 0; i < width; ++i)
        sgd_update<Options>(param[i], grad[i], momentum_buffer[i], scalars);
    });

    if (averages) {
      for (uint32_t i = 0; i < width; ++i) ema[i] = ema_update(ema[i], param[i], chunk.ema_scalars);
      chunk.ema.store(index, ema);
    }
    if (kIsNarrow<types.param> && chunk.rounds_param) {
      store_rounded(chunk.param, index, param, *chunk.draws, Rounded::kParam);
    } else {
      chunk.param.store(index, param);
    }
    if (kIsNarrow<types.momentum_buffer> && chunk.rounds_momentum) {
      store_rounded(chunk.momentum_buffer, index, momentum_buffer, *chunk.draws,
                    Rounded::kMomentumBuffer);
    } else if (options.has_momentum()) {
      chunk.momentum_buffer.store(index, momentum_buffer);
    }
    if (is_master) {
      with_low_precision(chunk.low_precision_param,
                         [&](const auto& memory) { memory.store(index, param); });
    }
  });
}

}  // namespace cuda
}  // namespace sgdr
