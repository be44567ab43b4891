// activation.h - the activations of gates: sigmoid and silu of vectors.
#pragma once
#include "simd.h"

namespace lc::LC_ISA {

// 1 / (1 + e^-x). The exponential is taken of -|x|, so that it never overflows. The result of -inf
// is 0, that of NaN is NaN.
template <class T>
LC_INLINE Vec<T> sigmoid(Vec<T> x) {
  constexpr T kLog2e = T(lc::kLog2e);
  const Vec<T> e = exp2<T>((x < 0 ? x : -x) * kLog2e);
  return (x < 0 ? e : broadcast<T>(1)) / (e + T(1));
}

// x / (1 + e^-x)
template <class T>
LC_INLINE Vec<T> silu(Vec<T> x) {
  return x * sigmoid<T>(x);
}

}  // namespace lc::LC_ISA
