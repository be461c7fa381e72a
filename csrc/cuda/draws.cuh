// The random numbers for stochastic rounding: see Note [Random bits] in random_rounding.h.
#pragma once

#include "launch.h"
#include "memory.cuh"

namespace sgdr {
namespace cuda {

// The draws for a chunk, which its block makes in shared memory before it updates the elements.
struct ChunkDraws {
  static constexpr uint32_t kDraws = kChunkNumel / static_cast<uint32_t>(kDrawNumel);
  static constexpr uint32_t kWords = 4;

  uint32_t words[2][kDraws * kWords];  // for each value of Rounded

  // Draws for `numel` elements that begin with draw `first_draw`, and for one or both of the values
  // that are rounded; the caller puts a barrier behind.
  __device__ __forceinline__ void fill(const RandomKey& key, int64_t first_draw, uint32_t numel,
                                       bool rounds_param, bool rounds_momentum) {
    for (uint32_t i = threadIdx.x; i < 2 * kDraws; i += blockDim.x) {
      const uint32_t kind = i / kDraws, place = i % kDraws;
      if (!(kind == 0 ? rounds_param : rounds_momentum) || place * kDrawNumel >= numel) continue;
      uint32_t drawn[kWords];
      draw(key, static_cast<Rounded>(kind), first_draw + place, drawn);
      for (uint32_t j = 0; j < kWords; ++j) words[kind][place * kWords + j] = drawn[j];
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

template <ElementType kType, uint32_t width, class T>
__device__ __forceinline__ void store_rounded(const Memory<kType>& memory, uint32_t index,
                                              const T (&values)[width], const ChunkDraws& draws,
                                              Rounded rounded) {
  const bool is_half = (kType == ElementType::kNone ? memory.type : kType) == ElementType::kHalf;
  const uint32_t first = index * width;
  const auto words = draws.words_of<width>(rounded, first);
  const uint32_t flip = flip_of_element(first);  // the same for the whole pack
  uint32_t upper_halves[width];
  for (uint32_t i = 0; i < width; ++i) {
    const uint32_t word = words.elements[i / 2] ^ (flip << 16 | flip);
    const uint32_t bits = (first + i) % 2 == 0 ? word & 0xFFFF : word >> 16;
    const float value = static_cast<float>(values[i]);
    upper_halves[i] =
        is_half ? uint32_t{round_to_float16(value, bits)} << 16 : round_upper_half(value, bits);
  }
  memory.store_upper_halves(index, upper_halves);
}

}  // namespace cuda
}  // namespace sgdr
