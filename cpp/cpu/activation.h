// activation.h - the activations of gates: sigmoid and silu of vectors.
#pragma once
#include "simd.h"

namespace lc::LC_ISA {

namespace detail {

// e^-x is a normal number for |x| <= kMostOfGates.
template <class T>
constexpr T kMostOfGates = sizeof(T) == 8 ? T(708) : T(87);

// 1 + e^-x for x >= -kMostOfGates.
template <class T>
LC_INLINE Vec<T> one_plus_exp(Vec<T> x) {
  const Vec<T> y = at_least<T>(-x, -kMostOfGates<T>), shifted = y * T(kLog2e) + kRound<T>;
  return exp2_of<T>(shifted, y * T(kLog2e) - (shifted - kRound<T>)) + T(1);
}

}  // namespace detail

// 1 / (1 + e^-x). Below -87 (float64: -708) it is that of -87, which is below 1e-37.
template <class T>
LC_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / detail::one_plus_exp<T>(at_least<T>(x, -detail::kMostOfGates<T>));
}

// x / (1 + e^-x). Below -87 (float64: -708) it is that of -87, which is above -1e-35.
template <class T>
LC_INLINE Vec<T> silu(Vec<T> x) {
  const Vec<T> y = at_least<T>(x, -detail::kMostOfGates<T>);
  return y / detail::one_plus_exp<T>(y);
}

}  // namespace lc::LC_ISA
