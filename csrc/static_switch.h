// Turns a run-time value into a compile-time one, once, outside the loop.
#pragma once

#include <type_traits>

#include "sgdr_math.h"

namespace sgdr {

// Calls f(std::integral_constant<...>) for the one of `candidates` that equals `value`; if none
// does, for the last.
template <auto candidate, auto... candidates, class T, class F>
SGDR_HD constexpr auto static_switch(T value, F f) {
  if constexpr (sizeof...(candidates) == 0) {
    return f(std::integral_constant<T, candidate>{});
  } else {
    return value == candidate ? f(std::integral_constant<T, candidate>{})
                              : static_switch<candidates...>(value, f);
  }
}

}  // namespace sgdr
