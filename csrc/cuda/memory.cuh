// Reads and writes global memory in packs of up to 16 bytes.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
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

// Elements of one type, which is known to the compiler unless kType is kNone. `index` counts packs
// of `width` elements.
template <ElementType kType>
struct Memory {
  char* address;
  ElementType type = kType;

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

  // Stores the representations of elements of a two-byte type.
  template <uint32_t width>
  __device__ __forceinline__ void store_bits(uint32_t index, const uint16_t (&bits)[width]) const {
    Pack<uint16_t, width> pack;
    for (uint32_t i = 0; i < width; ++i) pack.elements[i] = bits[i];
    reinterpret_cast<Pack<uint16_t, width>*>(address)[index] = pack;
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
