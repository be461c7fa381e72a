// Reads and writes global memory in packs of up to 16 bytes.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <type_traits>

#include "../static_switch.h"
#include "../step_types.h"

namespace sgdr {
namespace cuda {

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

// A pack as it is in memory, which takes fewer registers than its values. bfloat16 elements stay in
// words: alone, each would take a register. A single element, whose type the compiler may not know,
// is converted at once.
template <ElementType kType, class T, uint32_t width>
struct LoadedPack {
  Pack<typename Stored<kType>::type, width> pack;

  __device__ __forceinline__ T value(uint32_t i) const { return static_cast<T>(pack.elements[i]); }
};
template <class T, uint32_t width>
  requires(width > 1)
struct LoadedPack<ElementType::kBFloat16, T, width> {
  Pack<uint32_t, width / 2> pack;

  __device__ __forceinline__ T value(uint32_t i) const {
    const uint32_t word = pack.elements[i / 2];
    return std::bit_cast<float>(i % 2 == 0 ? word << 16 : word & 0xFFFF0000);
  }
};
template <ElementType kType, class T>
struct LoadedPack<kType, T, 1> {
  T element;

  __device__ __forceinline__ T value(uint32_t) const { return element; }
};

// Elements of one type, which is known to the compiler unless kType is kNone. `index` counts packs
// of `width` elements.
template <ElementType kType>
struct Memory {
  char* address;
  ElementType type = kType;

  template <class T, uint32_t width>
  __device__ __forceinline__ LoadedPack<kType, T, width> load(uint32_t index) const {
    LoadedPack<kType, T, width> loaded;
    if constexpr (width > 1) {
      loaded = reinterpret_cast<const LoadedPack<kType, T, width>*>(address)[index];
    } else {
      with_type([&]<class stored_t>(std::type_identity<stored_t>) {
        loaded.element = static_cast<T>(reinterpret_cast<const stored_t*>(address)[index]);
      });
    }
    return loaded;
  }

  template <class T, uint32_t width>
  __device__ __forceinline__ void store(uint32_t index, const T (&values)[width]) const {
    with_type([&]<class stored_t>(std::type_identity<stored_t>) {
      Pack<stored_t, width> pack;
      for (uint32_t i = 0; i < width; ++i) pack.elements[i] = static_cast<stored_t>(values[i]);
      reinterpret_cast<Pack<stored_t, width>*>(address)[index] = pack;
    });
  }

  // Stores elements of a two-byte type, whose representations are in the upper halves of words.
  template <uint32_t width>
  __device__ __forceinline__ void store_upper_halves(uint32_t index,
                                                     const uint32_t (&words)[width]) const {
    if constexpr (width == 1) {
      reinterpret_cast<uint16_t*>(address)[index] = static_cast<uint16_t>(words[0] >> 16);
    } else {
      Pack<uint32_t, width / 2> pack;
      for (uint32_t i = 0; i < width / 2; ++i)
        pack.elements[i] = __byte_perm(words[2 * i], words[2 * i + 1], 0x7632);
      reinterpret_cast<Pack<uint32_t, width / 2>*>(address)[index] = pack;
    }
  }

  __device__ __forceinline__ uintptr_t bits_of_address() const {
    return reinterpret_cast<uintptr_t>(address);
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

}  // namespace cuda
}  // namespace sgdr
