// A run-time value becomes a compile-time one, without macros:
//
//   dispatch_int<64, 128, 256>(head_dim, [&](auto d) { kernel<d.value>(...); });
#pragma once

#include <type_traits>

#include "problem.h"

namespace fal {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(integral_constant) for the one of kValues that equals value. False when there is none.
template <int... kValues, class F>
bool dispatch_int(int value, F&& f) {
  return ((value == kValues && (f(std::integral_constant<int, kValues>{}), true)) || ...);
}

// Calls f(integral_constant) for the smallest of the ascending kValues that is >= value. False when
// there is none.
template <int... kValues, class F>
bool dispatch_at_least(int value, F&& f) {
  return ((value <= kValues && (f(std::integral_constant<int, kValues>{}), true)) || ...);
}

template <class F>
void dispatch_bool(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace fal
